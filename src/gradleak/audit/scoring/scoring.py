"""How reconstructions of one kind of private data are compared with the truth: metrics, controls, and what counts as recovered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from gradleak.errors import BadInput
from gradleak.observations.model import Model
from gradleak.report.record import Control as ControlLabel
from gradleak.report.record import Metric as MetricLabel

Scores = dict[str, list[float]]  # metric -> one number per true sample
RANKED = (
    "the place of the true sample when all candidates are ordered by how near they are to the reconstruction. 1: the "
    "reconstruction tells the true one from all others."
)


@dataclass(frozen=True)
class Metric:
    """One number per sample. each: (model, matched reconstructions, truth) -> (n,), or None where it cannot be measured here.

    better: whether more or less of it is better. label, unit, decimals and meaning are for the report.
    """

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower"]
    decimals: int
    each: Callable[[Model[Any], Any, Any], Sequence[float] | Tensor | None]
    meaning: str

    @property
    def sign(self) -> int:
        """+1 where more is better, -1 where less is."""
        return 1 if self.better == "higher" else -1


@dataclass(frozen=True)
class Control:
    """What somebody would come up with who has not seen the observation: (model, truth, public data) -> as many guesses.

    blind: it has not seen the truth either; other controls are oracles, and no attack is measured against them.
    """

    name: str
    label: str
    blind: bool
    guess: Callable[[Model[Any], Any, Any], Any]
    meaning: str


WRONG_OBSERVATION = Control(
    *("wrong_observation", "Wrong observation", True, lambda model, truth, public: None),
    "the same attack on a release that was made of somebody else's data: what it returns without having seen yours.",
)


@dataclass(frozen=True)
class Candidates:
    """Samples that may have been trained on, or not.

    inputs     n, as the model takes them
    labels     (n,) or None where the task has none; not to be used unless they are `labelled`
    rows       (n) where each is in its source, counted from 0
    classes    names of the labels, where the source has them
    left_out   how many of the source the model cannot take
    of         how many the source has
    """

    inputs: Any
    labels: Tensor | None
    rows: list[int]
    labelled: bool
    classes: tuple[str, ...] | None
    left_out: int
    of: int

    def __len__(self) -> int:
        return len(self.rows)

    def some(self, kept: Sequence[int]) -> "Candidates":
        """Those at these places."""
        inputs = self.inputs[list(kept)] if isinstance(self.inputs, Tensor) else tuple(self.inputs[i] for i in kept)
        labels = None if self.labels is None else self.labels[list(kept)]
        return replace(self, inputs=inputs, labels=labels, rows=[self.rows[i] for i in kept])


@dataclass(frozen=True)
class Scoring:
    """All of it, for one kind of data. Metrics come first to last in importance: leads are measured by the first.

    media      what `Blueprint.show` gives, as a MIME type
    public     (source, split, model, limit) -> public data that the model can take
    split      (public) -> (decoys, the rest): who is told apart from the truth must not have been seen before
    wider      (public, model, secret inputs or None) -> the rest, and what there is besides where priors are fitted
    sample     (model, public, count, seed) -> (inputs, labels) of somebody else
    check      (secret inputs, model): BadInput where they are not of this kind
    match      (model, reconstructions, truth) -> (one reconstruction per true sample, its index or -1)
    rank       (matched, truth, decoys) -> the truth's rank in a line-up with the decoys, or None where none is made
    recovered  (scores, leads) -> for each sample whether it counts as recovered
    partly     (scores, leads) -> for each sample whether a part of it counts as recovered
    is_public  (secret inputs, public, model) -> for each sample whether the public data hold it
    candidates (source, split, model, limit, seed) -> at most so many at random, BadInput where the model cannot take their labels
    keys       (inputs) -> something for each that is equal where they are the same
    features   (inputs, model) -> a matrix of scikit-learn, for telling two sources apart without the model
    in_bag     (model, what was seen in no order, truth, public) -> for each sample whether it tells a part of it, and a sentence
    """

    media: str
    metrics: Sequence[Metric]
    controls: Sequence[Control]
    public: Callable[..., Any]
    split: Callable[[Any], tuple[Any, Any]]
    wider: Callable[[Any, Model[Any], Any], Any]
    sample: Callable[[Model[Any], Any, int, int], tuple[Any, Tensor | None]]
    check: Callable[[Any, Model[Any]], None]
    match: Callable[[Model[Any], Any, Any], tuple[Any, list[int]]]
    rank: Callable[[Any, Any, Any], Tensor | None]
    recovered: Callable[[Scores, list[float]], list[bool]]
    partly: Callable[[Scores, list[float]], list[bool]]
    candidates: Callable[[str, str, Model[Any], int, int], Candidates]
    keys: Callable[[Any], list[Any]]
    features: Callable[[Any, Model[Any]], Any]
    is_public: Callable[[Any, Any, Model[Any]], list[bool]]
    in_bag: Callable[[Model[Any], Sequence[int], Any, Any], tuple[list[bool], str]] | None = None

    def score(self, model: Model[Any], matched: Any, truth: Any) -> Scores:
        """Every metric that can be measured here, per true sample."""
        values = {metric.name: metric.each(model, matched, truth) for metric in self.metrics}
        return {name: [float(v) for v in row] for name, row in values.items() if row is not None}

    def leads(self, scores: Scores, controls: dict[str, Scores]) -> list[float]:
        """By how much the attack is ahead of the best control that saw nothing of this secret, per sample, by the first metric."""
        metric, blind = (
            self.metrics[0],
            [control.name for control in (*self.controls, WRONG_OBSERVATION) if control.blind],
        )
        others = [controls[name][metric.name] for name in blind if name in controls]
        return [
            metric.sign * value - max(metric.sign * other for other in beside)
            for value, *beside in zip(scores[metric.name], *others, strict=True)
        ]


def legend(scoring: Scoring) -> tuple[dict[str, MetricLabel], dict[str, ControlLabel]]:
    """(metrics, controls) of a record: how what a row holds is to be written, by its name, in order of importance."""
    metrics: dict[str, MetricLabel] = {
        metric.name: {
            "label": metric.label,
            "unit": metric.unit,
            "better": metric.better,
            "decimals": metric.decimals,
            "meaning": metric.meaning,
        }
        for metric in scoring.metrics
    }
    metrics["identification_rank"] = {"label": "Rank", "unit": "", "better": "lower", "decimals": 0, "meaning": RANKED}
    every = (*scoring.controls, WRONG_OBSERVATION)
    return metrics, {
        control.name: {"label": control.label, "blind": control.blind, "meaning": control.meaning} for control in every
    }


def check_labels(labels: Tensor, classes: int, source: str) -> None:
    """BadInput for a label that the model does not have."""
    if len(labels) and int(labels.max()) >= classes:
        raise BadInput(
            f"{source} has the label {int(labels.max())}, and the model {classes} classes: they do not belong together."
        )
