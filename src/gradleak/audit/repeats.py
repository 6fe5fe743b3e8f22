"""One attack under several seeds: which run an attacker keeps, and how far the others are from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.scoring.scoring import Scores, Scoring
from gradleak.formats.secret_file import Secret
from gradleak.observations.observation import Observation
from gradleak.report.record import Repeat, Result


@dataclass(frozen=True)
class Run:
    """An attack under one seed; ready: with what it made of public data beforehand."""

    seed: int
    ready: Any
    reconstruction: Reconstruction
    seconds: float


def kept(runs: Sequence[Run]) -> Run:
    """The run whose reconstruction explains most of the release, which nobody needs the secret for; the first of equals."""
    return min(
        runs, key=lambda run: run.reconstruction.residual if math.isfinite(run.reconstruction.residual) else math.inf
    )


def same(one: Reconstruction, other: Reconstruction) -> bool:
    """Whether both return the same."""
    if isinstance(one.value, Tensor) and isinstance(other.value, Tensor):
        return one.value.shape == other.value.shape and torch.equal(one.value, other.value)
    return type(one.value) is type(other.value) and bool(one.value == other.value)


def repeated(
    row: Result,
    observation: Observation[Any],
    scoring: Scoring,
    runs: Sequence[Run],
    secret: Secret | None,
    decoys: Any,
) -> list[Repeat]:
    """What came of each seed, measured against the controls that the row has."""
    told = list[Repeat]()
    for run in runs:
        one: Repeat = {"seed": run.seed, "residual": run.reconstruction.residual, "scores": {}}
        if secret is not None and row["controls"]:
            model = observation.model
            truth = model.architecture.original(secret.inputs, secret.labels)
            matched = scoring.match(model, run.reconstruction.value, truth)[0]
            scores: Scores = scoring.score(model, matched, truth)
            controls: Any = row["controls"]
            leads = scoring.leads(scores, controls)
            means = {name: math.fsum(values) / len(values) for name, values in scores.items()}
            if (ranks := scoring.rank(matched, truth, decoys)) is not None:
                scores["identification_rank"] = ranks.tolist()
            whole, parts = scoring.recovered(scores, leads), scoring.partly(scores, leads)
            one |= {"scores": means, "recovered": sum(whole), "partly": sum(parts)}
        told.append(one)
    return told
