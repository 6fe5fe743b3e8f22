"""Maximum a posteriori inversion under a Gaussian prior of pictures: of sketches (adapters) as of whole gradients.
The objective is the Bayesian one of Balunovic et al. (ICLR 2022, arXiv:2111.04706); start, metric and schedule are ours.

Sees      Adapter, Gradient or Update; labels optional: of one picture, every class is tried. A prior made of public
          pictures helps and is not needed
Recovers  images (batch, channel, height, width) in [0, 1], labels
Solves    min over z of  sum_l ||s_l(x) - s*_l||^2 / (tau_l^2 + L w ||s*_l||^2) + ||z||^2,   x = mean + F z,   F F^T = prior
          covariance, l over the L released tensors, tau_l the deviation of the noise on each number: equation 3 of the paper
          for Gaussians. With w = 1e-2, 1e-3, ..., 1e-7 one after the other, coarse structure comes first; from a start that is better
          than the mean, w = 1e-4, ..., 1e-7: a strong prior would only lead away from it
Differs   Whitened by the prior, so that L-BFGS needs hundreds of evaluations where pixels need thousands of steps.
          Starts, for one picture, at a kernel ridge regression of public pictures on what they would have released under
          the same label; the label is part of what the release says, and must not drown the rest (search/starts.py). Where nobody knows what
          was done to the release, tau is told by what each stage leaves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.labels import candidate_labels
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import Objective, OnStep, evaluated, rowwise, stack
from gradleak.attacks.search.lbfgs import lbfgs
from gradleak.attacks.search.likelihood import errors, estimated_variance, relative_variance
from gradleak.attacks.search.start import Start, begin
from gradleak.attacks.search.starts import candidates, race
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors
from gradleak.priors.gaussian import GaussianPrior

PRIOR_WEIGHTS: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
LEADING, RACE = (16, 64, 256), 10  # principal components that a race moves in, and evaluations at each stage
TOLD = 1e-3  # the prior weight after which one of several labels is chosen
NEGLIGIBLE = 0.03  # of the noise: what is told more precisely than that gives the same pictures
MOST_PIXELS = 3 * 64 * 64  # a matrix of so many takes 1.1 GiB, and five are held


@dataclass(frozen=True, kw_only=True)
class MapInversion:
    """The prior and the effort. Weights of the prior far below the noise are left out: they change nothing.

    prior        GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth
    pairs        public pictures that starts are made of; 0, or no public pictures: start at the mean
    starts       1: at the regression on the pairs; more: also at the mean and at the nearest pairs, of which a race chooses (starts.py)
    evaluations  of the objective at each prior weight, 1e-2, 1e-3, ...; from the regression on, which is left by a strong prior, as many in all
                 at weights from 1e-4 on
    least        the last prior weight; each is a tenth of the one before
    start        another attack, whose reconstruction the search begins at, with weights from 1e-4 on; or None
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality
    on_device: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    prior: GaussianPrior | None = field(default=None, repr=False)
    pairs: int = 1_000
    starts: int = 1
    evaluations: int = 75
    least: float = 1e-7
    start: Start | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a prior of public pictures, where none was given and they are enough."""
        return self if self.prior is not None else replace(self, prior=GaussianPrior.of_public(public.images))

    def effort(self, observation: PictureObservation) -> Effort:
        """A gradient an evaluation, of every label at the first two prior weights; the race and the pairs, of every label."""
        check_size(observation.model.architecture.input_shape)
        tries, later = len(candidate_labels(observation)), len(self.weights()) - 2
        raced = len(LEADING) * RACE * self.starts if self.starts > 1 else 0
        searched = Effort.of_search(observation, raced + self.evaluations * (2 + later / tries), tries)
        return Effort(searched.simulations, max(self.starts, 1) * searched.together, tries * self.pairs)

    def ahead(
        self,
        objective: Objective,
        z: Tensor,
        prior: GaussianPrior,
        given: tuple[Tensor, Tensors, Tensor],
        weight: float,
    ) -> Tensor:
        """Of the starts (K, starts, n) the one with the least objective after a race of them all, where it came to: (K, 1, n)."""
        K, count = z.shape[:2]
        y, variance = (t.repeat_interleave(count, dim=0) for t in (given[0], given[2]))
        released = {name: t.repeat_interleave(count, dim=0) for name, t in given[1].items()}
        rows, w = z.flatten(0, 1), torch.full((K * count,), weight).to(z)
        every = (y, released, variance, w)
        search = partial(evaluated, rowwise(objective, len(rows)), given=every)
        x, value = race(search, rows, prior.components.flatten(1).to(z), LEADING, RACE)
        return x.view_as(z)[torch.arange(K), value.view(K, count).argmin(1)][:, None]

    def weights(self) -> tuple[float, ...]:
        """Of the prior, from `PRIOR_WEIGHTS[0]` down to `least`."""
        first, tight = PRIOR_WEIGHTS[0], PRIOR_WEIGHTS[2]
        if not 0 < self.least <= tight:
            raise BadInput(f"The last prior weight is above zero and at most {tight:g}, not {self.least:g}.")
        return tuple(first / 10**k for k in range(round(math.log10(first / self.least)) + 1))

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved when the batch size is withheld, or the labels of a batch are neither given nor readable."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[PictureObservation], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state, side by side."""
        check_sees(self, *observations)
        seen, where = observations[0], next(iter(observations[0].released.values()))
        shape = seen.model.architecture.input_shape
        check_size(shape)
        prior = self.prior or GaussianPrior.smooth(shape)
        if prior.mean.shape != shape:
            raise BadInput(f"The prior is one of {tuple(prior.mean.shape)} pictures, the model takes {tuple(shape)}.")
        labels = torch.stack([candidate_labels(o) for o in observations]).to(where.device)
        tries, batch = labels.shape[1:]  # (observations, tries, batch)
        y, released = labels.flatten(0, 1), stack(observations, tries)  # K rows = observations * tries
        told = torch.stack([relative_variance(o) for o in observations]).repeat_interleave(tries, dim=0)  # (K, L)
        variance, unknown = told, seen.defenses is None
        mean, F = prior.mean.flatten().to(where), prior.factor().to(where)  # (pixels,), (pixels, pixels)

        def pictures(z: Tensor) -> Tensor:  # (batch * pixels,) -> (batch, channel, height, width)
            return (mean + z.view(batch, -1) @ F).view(batch, *shape)

        def objective(z: Tensor, y: Tensor, released: Tensors, variance: Tensor, weight: Tensor) -> Tensor:
            precision = 1 / (variance + weight * len(variance) / batch)  # (L,); all equal where no noise is told
            return (precision @ errors(seen.simulate(pictures(z), y), released) + z.square().sum()) / precision.sum()

        if self.start is None:
            start = candidates(seen, prior, y, released, self.starts, pairs=self.pairs, generator=generator)
            learned = batch == 1 and self.pairs > 0 and prior.pictures is not None
            weights = self.weights()[2:] if learned else self.weights()
            often = self.evaluations * len(self.weights()) // len(weights)
        else:
            images = begin(self.start, observations, [rows[0] for rows in labels], generator).to(where)
            start, weights, often = (
                images.repeat_interleave(tries, dim=0)[:, None],
                self.weights()[2:],
                self.evaluations,
            )
        rows = (start.flatten(3) - mean).flatten(0, 2)  # (K * starts * batch, pixels)
        z = torch.linalg.solve(F, rows.mT).mT.reshape(*start.shape[:2], -1)  # (K, starts, batch * pixels)
        if z.shape[1] > 1:
            z = self.ahead(objective, z, prior, (y, released, variance), weights[0])
        z = z.flatten(0, 1)
        evaluate = rowwise(objective, len(z))
        trace, done = list[tuple[int, list[float]]](), 0
        for stage, weight in enumerate(weights):
            w = torch.full((len(y),), weight).to(where)
            report = None if on_step is None else partial(_report, on_step, stage, len(weights))
            search = partial(evaluated, evaluate, given=(y, released, variance, w))
            minimum = lbfgs(search, z, evaluations=often, history=30, on_step=report)
            z, trace = minimum.x, [*trace, *((done + step, values) for step, values in minimum.trace)]
            done += minimum.iterations
            if tries > 1 and weight <= TOLD:  # wrong labels do not fit: go on with the best
                best = minimum.value.view(-1, tries).argmin(1) + tries * torch.arange(len(observations)).to(z.device)
                z, y, tries = z[best], y[best], 1
                released, told = {name: tensor[best] for name, tensor in released.items()}, told[best]
                trace = [(step, [values[int(i)] for i in best]) for step, values in trace]
                variance = told
                evaluate = rowwise(objective, len(z))
            if unknown:
                left = [
                    estimated_variance(seen.simulate, pictures(z[k]), y[k], _row(released, k), z[k].square().sum())
                    for k in range(len(z))
                ]
                variance = told + torch.stack(left)
            elif weight * told.shape[1] / batch < NEGLIGIBLE * float(told.min()):
                break
        results = []
        for row, o in enumerate(observations):
            images, value = pictures(z[row]).clamp(0, 1).detach(), float(minimum.value[row])
            residual = o.residual(images, y[row])
            status = f"Finished {done} evaluations at objective {value:.3g}, relative residual {residual:.2g}."
            if not math.isfinite(value):
                status = "Not started: the objective is no finite number at the start; check the model's parameters."
            curve = [(step, values[row]) for step, values in trace]
            outcome = outcome_of(residual)
            found_here = Reconstruction(
                images.cpu(), y[row].cpu(), residual, status, outcome, iterations=done, trace=curve
            )
            results.append(found_here)
        return results


def check_size(shape: tuple[int, ...]) -> None:
    """NotObserved where pictures are so large that their covariance is not held."""
    if (pixels := math.prod(shape)) > MOST_PIXELS:
        raise NotObserved(
            f"A covariance of {pixels:,} pixels takes {8 * pixels**2 / 2**30:,.0f} GiB, several times: pictures of up to "
            f"{MOST_PIXELS:,} are inverted so, and inverting-gradients reads larger ones."
        )


def _report(on_step: OnStep, stage: int, stages: int, step: int, steps: int, value: float) -> None:
    on_step(stage * steps + step, stages * steps, value)


def _row(released: Tensors, k: int) -> Tensors:
    return {name: tensor[k] for name, tensor in released.items()}


def misfit(simulated: Tensors, released: Tensors) -> Tensor:
    """The mean over the tensors of ||simulated - released||^2 / ||released||^2; tensors that are zero throughout count
    by what is simulated in their place, relative to all of the release."""
    return errors(simulated, released).mean()
