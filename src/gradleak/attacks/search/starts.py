"""Where a search for one picture may begin, out of public pictures, and which of these starts it goes on from.

Whether a search ends at the truth is decided by where it begins. Candidates: the mean, kernel ridge regression of public pictures on
what they would have released under the same label, and the public pictures whose own release is nearest. They are searched side by side,
leading principal components first; the search goes on from the one that explains the release best.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.search.lbfgs import Evaluate, lbfgs
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.work import side_by_side
from gradleak.priors.gaussian import GaussianPrior

KERNEL_RIDGE = 0.1  # of the regression; 0.01 to 0.3 make little difference
FEATURES = 100_000  # released numbers that regression and retrieval look at, at most
CHUNK = 25  # simulations side by side


def candidates(
    seen: PictureObservation,
    prior: GaussianPrior,
    y: Tensor,
    released: Tensors,
    count: int,
    *,
    pairs: int,
    generator: torch.Generator,
) -> Tensor:
    """At most so many starts of each of K rows: (K, starts, batch, channel, height, width), the regression first.

    y (K, batch); released {name: (K, ...)}. Of a batch, whose public counterpart is not known, and without public pictures or pairs: draws
    around the mean, and the mean.
    """
    K, batch = y.shape
    mean = prior.mean.to(next(iter(released.values())))
    if batch > 1:  # equal pictures would stay equal
        noise = torch.randn(K, count, batch, len(prior.std), generator=generator).double()
        return mean + 0.1 * (prior.pixels(noise) - prior.mean).to(mean)
    if prior.pictures is None or not pairs:
        return mean.expand(K, 1, 1, *mean.shape)
    chosen = torch.randperm(len(prior.pictures), generator=generator)[:pairs]
    public = prior.pictures[chosen].to(mean)  # (n, channel, height, width)
    near = min(max(count - 2, 0), len(public))
    starts = torch.empty(K, min(count, 2) + near, *mean.shape).to(mean)
    targets = features(released)
    for label in set(y[:, 0].tolist()):
        rows = y[:, 0] == label
        alone = partial(_alone, seen, y[rows][0])
        chunk = side_by_side(partial(alone, public[0]), CHUNK)
        known = torch.cat([features(vmap(alone)(part)) for part in torch.split(public, chunk)])
        nearest = public[(targets[rows] @ known.T).topk(near).indices]
        found = [regress(known, public, targets[rows])[:, None], mean.expand(len(nearest), 1, *mean.shape), nearest]
        starts[rows] = torch.cat(found, dim=1)[:, : starts.shape[1]]
    return starts[:, :, None]


def race(
    evaluate: Evaluate, starts: Tensor, components: Tensor, leading: Sequence[int], evaluations: int
) -> tuple[Tensor, Tensor]:
    """Where searches from `starts` (K, n) come within so many evaluations at each stage, and the values there (K,).

    components (k, n), orthonormal, most important first: each stage moves within so many of them. evaluate: as L-BFGS takes it.
    """
    x, value = starts, starts.new_full(starts.shape[:1], torch.inf)
    for most in leading:
        V = components[:most]

        def within(x: Tensor, V: Tensor = V) -> tuple[Tensor, Tensor]:
            gradient, value = evaluate(x)
            return (gradient.view(-1, V.shape[1]) @ V.T @ V).view_as(gradient), value

        found = lbfgs(within, x, evaluations=evaluations)
        x, value = found.x, found.value
    return x, value


def features(released: Tensors) -> Tensor:
    """Every tensor in unit length, side by side, thinned to at most FEATURES: {name: (K, ...)} -> (K, features)."""
    stride = -(-sum(t[0].numel() for t in released.values()) // FEATURES)
    rows = [t.detach().flatten(1)[:, ::stride] for t in released.values()]
    units = torch.cat([torch.nn.functional.normalize(r, dim=1, eps=1e-30) for r in rows], dim=1)
    return units * (1 / math.sqrt(len(rows)))


def regress(pairs: Tensor, pictures: Tensor, targets: Tensor) -> Tensor:
    """Kernel ridge regression with exp(-(1 - <a, b>) / its median): (n, f), (n, ...), (m, f) -> (m, ...)."""
    mean, apart = pictures.mean(0), 1 - pairs @ pairs.T
    scale = apart.median().clamp_min(1e-6)
    kernel = (-apart / scale).exp()
    kernel.diagonal().add_(KERNEL_RIDGE)
    weights = torch.linalg.solve(kernel, (pictures - mean).flatten(1))
    found: Tensor = (-(1 - targets @ pairs.T) / scale).exp() @ weights
    return mean + found.view(-1, *mean.shape)


def _alone(seen: PictureObservation, y: Tensor, image: Tensor) -> Tensors:
    return {name: tensor.detach() for name, tensor in seen.simulate(image[None], y).items()}
