"""What can be known at all: how much of the pictures a release holds, before any attack has to succeed.

Near the pictures x, a change d moves the release by J d, with J = d release / d x of shape (equations, unknowns). Under
noise N(0, noise_std^2) on each released number and a Gaussian prior N(mean, C) of the pictures, what remains unknown is

    posterior covariance = (C^-1 + J^T J / noise_std^2)^-1      (Bishop 2006, Pattern Recognition, equation 2.117)

and no estimate from that release has a lower expected squared error. Three limits. It is linear: it tells what is
determined near x, not whether a picture far away gives the same release. Labels are taken as known. And precision: J is
derived in the precision of the model, summed to J^T J in float64. With a float32 model single singular values are good
to about 1e-5, what remains to 1e-6; `observation.to(torch.float64)` takes twice the time. In J^T J singular values below
about 1e-7 of the largest become uncertain and below 1.5e-8 are lost: noise smaller than that cannot be asked about.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradleak.attacks.search.descend import OnStep
from gradleak.audit.jacobian import checked, jacobian_grams
from gradleak.errors import BadInput
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import flatten
from gradleak.priors.gaussian import GaussianPrior

NOISE_LEVELS = (1e-4, 1e-3, 1e-2, 1e-1)
PRIOR_STD = 0.25  # of a pixel in [0, 1], all independent: 12 dB for the mean image
PRESENT, ABSENT = 0.9, 0.1  # share of the prior's variance that the release explains


@dataclass(frozen=True)
class Identifiability:
    """What one release determines about its pictures. The tuples have one entry per noise level.

    release          "gradient", "update" or "adapter"
    unknowns         pixels, batch * channel * height * width
    equations        released numbers
    singular_values  (unknowns,) of J in units of the release per pixel in [0, 1], falling; 0 beyond the equations
    noise_levels     noise as a share of the root mean square of all released numbers, which the largest layer sets
    noise_std        the same in units of the release
    determined       directions that the noise leaves known better than the prior: singular value of J C^(1/2) > noise
    posterior_std    root mean variance of a pixel that remains
    psnr_db          of that variance, the least expected squared error. Peak 1, and no clamp to [0, 1]
    blind_psnr_db    the same with nothing released: of the prior's variance
    """

    release: str
    unknowns: int
    equations: int
    singular_values: Tensor = field(repr=False, compare=False)
    noise_levels: tuple[float, ...]
    noise_std: tuple[float, ...]
    determined: tuple[int, ...]
    posterior_std: tuple[float, ...]
    psnr_db: tuple[float, ...]
    blind_psnr_db: float

    @property
    def explained(self) -> tuple[float, ...]:
        """1 - trace(posterior) / trace(prior) per noise level: 0 nothing, 1 everything."""
        return tuple(1 - 10 ** ((self.blind_psnr_db - psnr) / 10) for psnr in self.psnr_db)

    def information(self, level: float = 1e-3) -> Literal["present", "partial", "absent"]:
        """By the share of the prior's variance explained at that noise level: from 0.9, between, or below 0.1."""
        explained = self.explained[self._index(level)]
        return "present" if explained >= PRESENT else "absent" if explained < ABSENT else "partial"

    def decibels(self, level: float = 1e-3) -> float:
        """The PSNR that it is enough for at that noise level."""
        return self.psnr_db[self._index(level)]

    def sentence(self, level: float = 1e-3) -> str:
        """The finding at one noise level in plain words."""
        i = self._index(level)
        verdict = {"present": "is there", "partial": "is there in part", "absent": "is absent"}[self.information(level)]
        return (
            f"This {self.release} holds {self.equations:,} equations for {self.unknowns:,} unknowns; "
            f"at noise {level:g} of its size {self.determined[i]:,} directions are determined, "
            f"enough for {self.decibels(level):.1f} dB where a blind guess has {self.blind_psnr_db:.1f} dB: "
            f"the information {verdict}. Whoever knows what such pictures look like may come closer."
        )

    def _index(self, level: float) -> int:
        if level not in self.noise_levels:
            raise BadInput(
                f"Noise {level:g} was not looked at: choose one of {', '.join(map(str, self.noise_levels))}."
            )
        return self.noise_levels.index(level)


def identifiability(
    observation: PictureObservation,
    images: Tensor,
    labels: Tensor,
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    prior: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Identifiability:
    """What the observation determines about its pictures near `images` (batch, channel, height, width) with `labels`.

    images: the truth, or a public picture in its stead. prior: covariance of one picture (c*h*w, c*h*w) as `prior_of`
    gives it, or of the batch (n, n); None: independent pixels of std 0.25. Raises BadInput for shapes that do not fit,
    for levels that are not positive, where the release is zero, and where the model has no forward-mode derivative.
    """
    return compare([observation], images, labels, noise_levels=noise_levels, prior=prior, on_step=on_step)[0]


def compare(
    observations: Sequence[PictureObservation],
    images: Tensor,
    labels: Tensor,
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    prior: Tensor | None = None,
    on_step: OnStep | None = None,
) -> list[Identifiability]:
    """The same for several observations of one model, which share the derivatives through the network."""
    if not noise_levels or min(noise_levels) <= 0:
        raise BadInput("Noise levels are shares of the release's size above zero, such as 0.001: give at least one.")
    images, labels = checked(observations, images, labels)
    n = images.numel()
    root = None if prior is None else _root(_for_batch(prior, n).to(images.device))
    releases = [flatten(o.simulate(images, labels)).double() for o in observations]
    sizes = [float(release.square().mean().sqrt()) for release in releases]
    if 0.0 in sizes:
        raise BadInput("At these pictures every released number is zero: there is no size to measure noise by.")
    grams = jacobian_grams(observations, images, labels, on_step=on_step)
    bounds = []
    for observation, gram, equations, rms in zip(observations, grams, map(len, releases), sizes, strict=True):
        values = singular_values(gram, equations)
        noises = [level * rms for level in noise_levels]
        if root is None:
            whitened, blind = PRIOR_STD * values, PRIOR_STD**2
            left = [float((blind / (1 + (whitened / noise).square())).mean()) for noise in noises]
        else:
            whitened, blind = singular_values(root.T @ gram @ root, equations), float(root.square().sum() / n)
            left = [float(_posterior(gram, noise, root).mean()) for noise in noises]
        bounds.append(
            Identifiability(
                release=observation.release.name,
                unknowns=n,
                equations=equations,
                singular_values=values,
                noise_levels=tuple(noise_levels),
                noise_std=tuple(noises),
                determined=tuple(determined(whitened, noise) for noise in noises),
                posterior_std=tuple(math.sqrt(variance) for variance in left),
                psnr_db=tuple(-10 * math.log10(variance) for variance in left),
                blind_psnr_db=-10 * math.log10(blind),
            )
        )
    return bounds


def singular_values(gram: Tensor, equations: int | None = None) -> Tensor:
    """Of J from J^T J (n, n): (n,) float64, falling. Below 1.5e-8 of the largest, and beyond the equations: 0."""
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    squares[equations:] = 0
    return torch.where(squares > torch.finfo(gram.dtype).eps * squares[0], squares, 0).sqrt()


def determined(singular_values: Tensor, noise_std: float, prior_std: float = 1.0) -> int:
    """How many directions the release tells more of than the prior: prior_std * singular value > noise_std."""
    return int((prior_std * singular_values > noise_std).sum())


def posterior_variance(gram: Tensor, noise_std: float, prior_covariance: Tensor) -> Tensor:
    """The variance of each pixel that remains, (n,): the diagonal of (C^-1 + J^T J / noise_std^2)^-1, C (n, n).

    Raises BadInput if C is not positive definite or noise_std is not above zero.
    """
    if not noise_std > 0:
        raise BadInput(f"The noise must be above zero, not {noise_std:g}: without any, what is determined is exact.")
    return _posterior(gram, noise_std, _root(_for_batch(prior_covariance, len(gram))))


def _posterior(gram: Tensor, noise_std: float, L: Tensor) -> Tensor:
    """With C = L L^T the covariance is L (1 + L^T J^T J L / noise_std^2)^-1 L^T, where 1 keeps the inverse well-posed."""
    information = L.T @ gram @ L / noise_std**2
    information.diagonal().add_(1)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(information), L.T, upper=False)
    variance: Tensor = half.square().sum(0)
    return variance


def _for_batch(prior: Tensor, n: int) -> Tensor:
    """(n, n) float64 from the covariance of the batch, or of one picture: pictures are independent."""
    if prior.dim() != 2 or prior.shape[0] != prior.shape[1] or n % len(prior):
        raise BadInput(f"The prior covariance is {tuple(prior.shape)}; it must be square, and fit {n:,} unknowns.")
    batch: Tensor = torch.block_diag(*[prior.double()] * (n // len(prior)))  # type: ignore[no-untyped-call]
    return batch


def _root(covariance: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise BadInput("The prior covariance is not positive definite: shrink it, as prior_of does.")
    return factor


def prior_of(images: Tensor) -> Tensor:
    """The covariance (c*h*w, c*h*w) float64 of public pictures (m, c, h, w), by Ledoit and Wolf (2004).

    The sample covariance S is mixed with its mean variance: (1 - a) S + a tr(S)/n I, with their estimate of the best a
    in [0, 1]. Few pictures make it large; no picture in the private batch may be among them.
    """
    if images.dim() != 4 or len(images) < 2:
        raise BadInput("A prior needs at least two public pictures, as (pictures, channel, height, width).")
    from sklearn.covariance import ledoit_wolf

    X = images.flatten(1).double()
    if bool((X[0] == X).all()):
        raise BadInput("These public pictures are all equal: a prior needs pictures that differ.")
    return torch.from_numpy(ledoit_wolf(X.numpy())[0])


@dataclass(frozen=True)
class LeastError:
    """What no estimate of a picture falls below on average, if pictures are Gaussian.

    mse, blind_mse  mean squared error of a pixel, with the release and without; looks: at how many pictures the information was averaged
    """

    mse: float
    blind_mse: float
    looks: int

    def sentence(self) -> str:
        """In plain words."""
        least, blind = (-10 * math.log10(mse) for mse in (self.mse, self.blind_mse))
        return (
            f"If pictures are Gaussian, no attack on one of them that knows all the others comes closer than {least:.1f} dB on average under "
            f"this noise, where a blind guess has {blind:.1f} dB (van Trees' inequality, information averaged over {self.looks} pictures)."
        )


def van_trees(
    observation: PictureObservation,
    labels: Tensor,
    prior: GaussianPrior,
    noise_std: float,
    *,
    looks: int = 8,
    seed: int = 0,
) -> LeastError:
    """E ||x^ - x||^2 >= tr (E[J^T J] / noise_std^2 + C^-1)^-1, of any estimate x^, biased or not (van Trees 1968; Gill and Levit 1995,
    Bernoulli 1, theorem 1), of one picture of this label (1,).

    The expectation is over the prior, here over `looks` pictures of it. An average of few stands above the bound as a rule (the trace is
    convex): take more where that matters.
    """
    shape = tuple(observation.model.architecture.input_shape)
    root, generator = prior.factor(), torch.Generator().manual_seed(seed)
    n = len(root)
    total = torch.zeros(n, n, dtype=torch.float64)
    for _ in range(looks):
        drawn = prior.mean + (root @ torch.randn(n, generator=generator, dtype=torch.float64)).view(shape)
        total += (
            jacobian_grams([observation], drawn[None].to(next(iter(observation.model.parameters.values()))), labels)[
                0
            ].cpu()
            / looks
        )
    left = _posterior(total, noise_std, root_of(prior))
    return LeastError(float(left.mean()), float(root.square().sum() / n), looks)


def root_of(prior: GaussianPrior) -> Tensor:
    """The lower triangular root of a prior's covariance."""
    return _root(prior.covariance())
