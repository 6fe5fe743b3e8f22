"""How often each class occurs in a batch, read off the last layers whose gradient is shared, be the classifier among them or
not (GDBR, arXiv:2412.12640, sees the layer before it; iLRG, Ma et al. 2023, the classifier), with the help of public samples.

Sees      Gradient, or an Update of one step, of a classifier; the number of samples; public samples of the same classes
Recovers  the number of samples of each class, and how many of the labels are expected to be right
Solves    A batch's gradient is the sum of what its samples add. Behind the last normalisation, z = w * x + b, with the mean over
          positions and the classifier W after it, a sample adds m * W^T (p - e_y) to dL/db, m the share of positions at which
          its ReLUs are on. The paper takes class means a_c of what public samples add: min over n >= 0 of
          ||sum_c n_c a_c - B g||, sum_c n_c = B (`counts_by_means`)
Differs   All of what a layer's own parameters are told (`added`), of any layer that takes samples one by one, not the bias alone.
          A small network reads the counts, a Gaussian for each class, from sums over public samples drawn at random (`Counter`):
          the sums are as many as one likes, and any mixture of classes is among them
Misses    gradients that the network hardly makes: of samples that it is sure of
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.label_counts.counter import STEPS, Counter
from gradleak.attacks.label_counts.evidence import Evidence, evidence
from gradleak.attacks.labels import apportion
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.layers import calls
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.rounds import Rounds


@dataclass(frozen=True)
class LabelCounts:
    """counts: (classes,) int64, of the batch's size in sum. expected: share of the labels that is right, as the reading itself
    believes; of several rounds the mean of what each tells, and the most that one is believed. layers: the names of those that were read."""

    counts: Tensor
    expected: float
    layers: tuple[str, ...]

    @property
    def labels(self) -> Tensor:
        """The labels in ascending order, (batch,) int64."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def sentence(self) -> str:
        """What was read, in words."""
        told = ", ".join(f"{int(n)} of class {c}" for c, n in enumerate(self.counts) if n)
        where = " and ".join(self.layers)
        return (
            f"Labels are told by the gradient of {where}: {told}; {self.expected:.0%} of them are expected to be right."
        )


def label_counts(
    observation: PictureObservation, public: Pictures, *, generator: torch.Generator, steps: int = STEPS
) -> LabelCounts:
    """Read the counts; steps: of the training of the reader, about a hundredth of a second each.

    Raises NotObserved where the number of samples is withheld, a defense or several steps stand between, no layer can be read, or
    public samples are of fewer than two classes, or of classes that the model does not have.
    """
    if isinstance(observation, Rounds):
        each = [label_counts(one, public, generator=generator, steps=steps) for one in observation.alone().values()]
        mean = torch.stack([one.counts for one in each]).double().mean(0)
        counts = apportion(mean, torch.zeros(len(mean), dtype=torch.bool), int(each[0].counts.sum())).long()
        return LabelCounts(counts, max(one.expected for one in each), each[0].layers)
    if int(public.labels.max()) >= observation.model.architecture.classes:
        raise NotObserved("The public samples are of more classes than the model has: give data of the same kind.")
    seen = evidence(observation, public)
    counter = Counter.trained(seen, generator=generator, steps=steps)
    return LabelCounts(*counter(seen.total(observation)), seen.layers)


def last_layer_withheld(observation: Observation[Any]) -> bool:
    """Whether labels of pictures are neither given nor told by the layer that runs last, since nothing of it was shared."""
    model, release = observation.model, observation.release
    if observation.labels is not None or not isinstance(model.architecture, Architecture):
        return False
    if not isinstance(release, Gradient | Update):
        return False
    if isinstance(observation, Rounds):
        observation = next(iter(observation.alone().values()))
    last = calls(model, model.architecture.blank(2).to(next(iter(observation.released.values()))))[-1].name
    return not any(name.startswith(f"{last}.") for name in observation.released)


def frequent_counts(public: Pictures, classes: int, batch: int) -> Tensor:
    """The control: what somebody says who has seen nothing but how often classes occur in public data, (classes,)."""
    frequent = public.labels.cpu().bincount(minlength=classes).double()
    return apportion(batch * frequent / frequent.sum(), torch.zeros(classes, dtype=torch.bool), batch).long()


def counts_by_means(seen: Evidence, total: Tensor) -> Tensor:
    """The paper's counts (classes,): non-negative least squares against class means, rounded by largest remainders."""
    from scipy.optimize import nnls

    there = (seen.labels.bincount() > 0).nonzero()[:, 0]
    means = torch.stack([seen.each[seen.labels == c].mean(0) for c in there])  # (there, numbers)
    heavy = 1e3 * means.norm()  # so that the counts sum to the batch
    left, right = torch.cat([means.T, heavy.expand(1, len(means))]), torch.cat([total, (heavy * seen.batch)[None]])
    raw = torch.zeros(seen.classes, dtype=torch.float64)
    raw[there] = torch.from_numpy(nnls(left.numpy(), right.numpy())[0])
    return apportion(raw, torch.zeros(seen.classes, dtype=torch.bool), seen.batch).long()
