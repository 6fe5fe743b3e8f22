"""An attack that reads the gradient of one state of the model, on several rounds of a client: on each by itself, and what they gave put
together.

A sample that two rounds give alike is none of a round's accidents: those found in more rounds come first. What stands together is judged by all
rounds, at once: it is kept where it explains them better than what any round gave by itself. Of bags of tokens what half of the rounds hold
is left: a token that passes a check by chance seldom passes it at other weights, and noise hides a right one now and then.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.reconstruction import Outcome, Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.observations.observation import Observation
from gradleak.observations.rounds import Rounds

SAME = 0.05  # root mean square of pixels up to which two rounds have found one picture: 26 dB
BLANK = 1e-3  # the same of a picture that is none: one grey


@dataclass(eq=False)
class Sample:
    """One sample as one or several rounds gave it; copies: a picture each, or one text."""

    copies: list[Any]
    label: Tensor | None
    proven: bool
    blank: bool = False

    @property
    def value(self) -> Any:
        """The mean of pictures, which has less noise than each of them; a text as it is."""
        return torch.stack(self.copies).mean(0) if isinstance(self.copies[0], Tensor) else self.copies[0]

    def is_like(self, other: "Sample") -> bool:
        """Whether both are one sample."""
        a, b = self.copies[0], other.copies[0]
        if not isinstance(a, Tensor):
            return bool(a == b)
        return not self.blank and not other.blank and float((a - b).square().mean().sqrt()) <= SAME


def attacked(
    attack: Any, observation: Observation[Any], *, generator: torch.Generator, on_step: OnStep | None = None
) -> Reconstruction:
    """The attack on one observation; on several rounds as one where it is `joint`, and else on each. NotObserved as the attack says."""
    if not isinstance(observation, Rounds):
        found: Reconstruction = attack(observation, generator=generator, on_step=on_step)
        return found
    if getattr(attack, "joint", False):
        found = attack(observation, generator=generator, on_step=on_step)
        return replace(found, status=f"From {len(observation.each)} rounds jointly. {found.status}")
    if hasattr(attack, "prepared"):
        raise NotObserved("It is trained for one state of the model: give it the rounds one by one.")
    each, reasons = dict[int, Reconstruction](), list[NotObserved]()
    for number, one in observation.alone().items():
        try:
            each[number] = attack(one, generator=generator, on_step=on_step)
        except NotObserved as reason:
            reasons.append(reason)
    if not each:
        raise reasons[0]
    return put_together(observation, each)


def put_together(observation: Rounds[Any], each: Mapping[int, Reconstruction]) -> Reconstruction:
    """What explains all rounds best: what one of them gave, or the samples that most of them gave."""
    judged = {number: explained(observation, found) for number, found in each.items()}
    number, best = min(judged.items(), key=lambda one: (not any(one[1].proven), one[1].residual))
    samples = gathered(list(each.values()))
    several = sum(len(sample.copies) > 1 for sample in samples)
    chosen = samples[: observation.batch_size or len(samples)]
    bags = [set(found.bag) for found in each.values() if found.bag]
    votes = Counter(token for tokens in bags for token in tokens)
    bag = tuple(sorted(token for token, count in votes.items() if 2 * count >= len(bags)))
    said = f"From {len(each)} rounds one by one"
    said += f": they agree on {several} {'sample' if several == 1 else 'samples'}. " if several else ". "
    if chosen:
        whole = explained(observation, united(chosen, best))
        if whole.residual < best.residual or sum(whole.proven) > sum(best.proven):
            return replace(
                whole, bag=bag, status=f"{said}Together they explain them best. Round {number}: {best.status}"
            )
    return replace(best, bag=bag, status=f"{said}Round {number} explains them best: {best.status}")


def gathered(each: Sequence[Reconstruction]) -> list[Sample]:
    """The different samples, those of more rounds first, and then those that are proven; in the order of the rounds."""
    samples = list[Sample]()
    for found in each:
        before = list(samples)
        for i, value in enumerate(found.value):
            label = None if found.labels is None or i >= len(found.labels) else found.labels[i]
            proven = bool(found.proven) and i < len(found.proven) and found.proven[i]
            blank = isinstance(value, Tensor) and float(value.std()) < BLANK
            one = Sample([value], label, proven, blank)
            known = next((sample for sample in before if sample.is_like(one)), None)
            if known is None:
                samples.append(one)
            else:
                before.remove(known)  # a round gives each sample once
                known.copies.append(value)
                known.proven |= proven
    return sorted(samples, key=lambda sample: (sample.blank, -len(sample.copies), not sample.proven))


def united(samples: Sequence[Sample], like: Reconstruction) -> Reconstruction:
    """These samples as one reconstruction; the residual is still that of `like`."""
    values = [sample.value for sample in samples]
    known = [sample.label for sample in samples if sample.label is not None]
    labels = torch.stack(known) if len(known) == len(samples) else None
    proven = tuple(sample.proven for sample in samples) if like.proven else ()
    value = torch.stack(values) if isinstance(values[0], Tensor) else tuple(values)
    return replace(like, value=value, labels=labels, proven=proven)


def explained(observation: Rounds[Any], found: Reconstruction) -> Reconstruction:
    """It with what it leaves of all rounds, where that can be asked: of pictures. Texts keep what their checks have left."""
    if not isinstance(found.value, Tensor) or found.labels is None or len(found.labels) != len(found.value):
        return found
    like = next(iter(observation.released.values()))
    residual = observation.residual(found.value.to(like), found.labels.to(like.device))
    outcome = found.outcome if found.outcome is Outcome.GUESSED else outcome_of(residual)
    return replace(found, residual=residual, outcome=outcome)
