"""What a defense costs and what it saves, in words: leakage to the best attack that knows it, utility, and what is proven."""

from collections.abc import Sequence
from dataclasses import dataclass

SAME = 0.05  # of what leaks without a defense: less is no change that a handful of samples could show


@dataclass(frozen=True)
class Tried:
    """A defense as it was measured.

    name      as `--defense` takes it; "none" without one
    leaked    share of the samples, or of the words of texts, that the best attack recovers, which knows the defense, in [0, 1]
    attack    which that is
    unaware   the same of the best attack that does not know it, or None
    chance    the share that somebody recovers who saw nothing
    whole     share of texts that come back word for word, in [0, 1], or None
    accuracy  of a model trained behind it, in [0, 1], or None; and its perplexity on texts, 1 or more, or None
    epsilon   what is proven for one sample of that training at delta, added or removed, or None where nothing is
    """

    name: str
    leaked: float
    attack: str
    chance: float
    unaware: float | None = None
    whole: float | None = None
    accuracy: float | None = None
    perplexity: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5


def advice(tried: Sequence[Tried], measure: str = "top-1") -> list[str]:
    """A sentence for each defense, beside what leaks without one; the one named "none" has to be among them."""
    bare = next(each for each in tried if each.name == "none")
    return [sentence(each, bare, measure) for each in tried if each.name != "none"]


def sentence(each: Tried, bare: Tried, measure: str) -> str:
    """What the defense does."""
    proven = f"epsilon {each.epsilon:.3g} at delta {each.delta:g}" if each.epsilon is not None else "nothing is proven"
    if each.leaked > bare.leaked - SAME * max(bare.leaked, SAME):
        moved = f"hides nothing: {measure} stays at {percent(each.leaked)} ({each.attack})"
    elif each.leaked <= each.chance:
        moved = f"{measure} falls from {percent(bare.leaked)} to {percent(each.leaked)}, which is chance, in all attacks tried"
    else:
        moved = f"{measure} falls from {percent(bare.leaked)} to {percent(each.leaked)} ({each.attack})"
        moved += f", where chance has {percent(each.chance)}" if each.chance > SAME else ""
    if each.whole is not None:
        moved += f", and {percent(each.whole)} of the texts come back whole"
    if each.unaware is not None and each.unaware < each.leaked - SAME:
        moved += f"; an attacker who does not know it would reach {percent(each.unaware)}"
    cost = ""
    if each.accuracy is not None and bare.accuracy is not None:
        cost = f"; accuracy goes from {bare.accuracy:.2f} to {each.accuracy:.2f}"
    if each.perplexity is not None and bare.perplexity is not None:
        cost = f"; perplexity goes from {bare.perplexity:.4g} to {each.perplexity:.4g}"
    return f"{each.name}: {proven}; {moved}{cost}."


def percent(share: float) -> str:
    """A share as a whole number of per cent."""
    return f"{100 * share:.0f} %"
