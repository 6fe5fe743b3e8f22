"""What canaries say of a training: a score for each, which were guessed, how exposed each is, and the bound as sentences."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.search.descend import OnStep
from gradleak.audit.one_run import Bound, ranked
from gradleak.audit.sample_losses import alignments, losses
from gradleak.formats.tuned import Tuned
from gradleak.report.record import Verdict


def scores(tuned: Tuned, inputs: Any, labels: Tensor | None, by: str, on_step: OnStep | None = None) -> Tensor:
    """(n,) float64, higher for what was rather trained on. by: "loss", that before training less that after, in nats; or "alignment" of the
    sample's gradient at the base model with what was released."""
    if by == "alignment" or tuned.after is None:
        return alignments(tuned.before, tuned.towards, inputs, labels, on_step)
    return losses(tuned.before, inputs, labels, on_step) - losses(tuned.after, inputs, labels, on_step)


def exposure(score: float, everything: Tensor) -> float:
    """log2 |R| - log2 rank, in bits, among the scores of everything that the canary could have been, itself included (Carlini et al.,
    USENIX Security 2019, arXiv:1802.08232, definition 3); it shares its rank with its equals, at the worst for the exposure."""
    rank = max(int((everything >= score).sum()), 1)
    return math.log2(len(everything)) - math.log2(rank)


def table(
    shown: Sequence[str],
    values: Sequence[float],
    included: Sequence[bool],
    guesses: int,
    exposed: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """One row per canary, by falling score."""
    top, bottom = ranked(values, guesses)
    guess = dict.fromkeys(top, "in") | dict.fromkeys(bottom, "out")
    rows = []
    for i in torch.tensor(values).argsort(descending=True, stable=True).tolist():
        row: dict[str, Any] = {"canary": i, "shows": shown[i], "included": included[i], "score": values[i]}
        row |= {"guess": guess.get(i, "none"), "right": None if i not in guess else (guess[i] == "in") == included[i]}
        rows.append(row if exposed is None else row | {"exposure_bits": exposed[i]})
    return rows


def verdict(bound: Bound) -> Verdict:
    """What the bound says, and what it does not."""
    told = f"{bound.right} of {bound.guesses} guesses were right ({bound.right_of_all} of all {bound.m})"
    at = f"at delta {bound.delta:g} with 95 % confidence"
    more = [
        f"at least {epsilon:.2f} {assumed}"
        for epsilon, assumed in (
            (bound.gaussian, "if its trade-off is that of a Gaussian mechanism"),
            (bound.independent, "if moreover no canary changes another's score"),
        )
        if epsilon > 0
    ]
    if bound.unconditional > 0 or more:
        first = (
            f"Epsilon is at least {bound.unconditional:.2f} {at}, whatever the training was"
            if bound.unconditional > 0
            else f"Without assumptions on the training no epsilon is refuted {at}"
        )
        said = "; ".join([first, *more])
        return {
            "level": "partial",
            "sentence": f"{said}. {told}. The true epsilon may be far larger: this bounds it from below only.",
        }
    return {
        "level": "nothing",
        "sentence": f"No epsilon is refuted {at}: {told}. That shows no privacy: other canaries, more of them, or another score may find more.",
    }
