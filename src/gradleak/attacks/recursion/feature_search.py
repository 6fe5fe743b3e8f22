"""Two searches that continue a recursion: from a noisy picture, and from features that are known exactly.

Both are maximum a posteriori under GaussianPrior.smooth, by L-BFGS in a metric in which the objective is nearly round.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from gradleak.attacks.inverting_gradients import smooth_pictures
from gradleak.attacks.map_inversion import misfit
from gradleak.attacks.recursion.linear_systems import Belief
from gradleak.attacks.search.descend import OnStep, rowwise
from gradleak.attacks.search.lbfgs import Evaluate, lbfgs, unwhiten, whitened
from gradleak.attacks.search.starts import regress
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors
from gradleak.priors.gaussian import GaussianPrior

Found = tuple[Tensor, int, list[tuple[int, float]]]  # images (batch, channel, height, width), evaluations, trace

PRIOR_WEIGHTS = (1e-4, 1e-5, 1e-6, 1e-7)  # one after the other: coarse structure comes first
PICTURES = 64  # whose features give the start


@lru_cache(1)
def smooth(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Mean (pixels,) and inverse covariance (pixels, pixels) of GaussianPrior.smooth."""
    prior = GaussianPrior.smooth(shape)
    V = prior.components.flatten(1)  # all of them: (pixels, pixels)
    return prior.mean.flatten(), V.T @ (V / (prior.std.square() + prior.remainder**2)[:, None])


def refine(
    observation: PictureObservation,
    labels: Tensor,
    variance: Tensors,
    start: Tensor,
    factor: Tensor,
    evaluations: int,
    on_step: OnStep | None,
) -> Found:
    """min over x of sum (simulate(x) - released)^2 / variance + (x - mean)^T C^-1 (x - mean), halved.

    start (1, channel, height, width); factor: lower L, L L^T the approximate Hessian there, which serves as the metric.
    """
    mean, precision = smooth(observation.model.architecture.input_shape)
    released, shape = observation.released, start.shape

    def objective(x: Tensor, precision: Tensor) -> Tensor:  # (pixels,)
        simulated = observation.simulate(x.view(shape), labels)
        errors = [((simulated[k] - g).square() / variance[k]).sum() for k, g in released.items()]
        return (torch.stack(errors).sum() + (x - mean) @ (precision @ (x - mean))) / 2

    origin = start.flatten()[None]
    evaluate = _without_graph(rowwise(objective, 1), precision[None])
    done = lbfgs(whitened(evaluate, origin, factor), torch.zeros_like(origin), evaluations=evaluations, on_step=on_step)
    x = (origin + unwhiten(done.x, factor)).view(shape)
    return x, done.iterations, [(step, values[0]) for step, values in done.trace]


@lru_cache(1)
def rooted(shape: tuple[int, int, int]) -> tuple[GaussianPrior, Tensor]:
    """GaussianPrior.smooth, and F (pixels, pixels) in float32 with F F^T its covariance."""
    prior = GaussianPrior.smooth(shape)
    return prior, prior.factor().float()


def invert_features(
    observation: PictureObservation,
    labels: Tensor,
    variance: Tensors,
    below: nn.Module,
    features: Belief,
    evaluations: int,
    on_step: OnStep | None,
) -> Found:
    """min over z of ||below(x) - features||^2 / ||below(mean) - features||^2 + w ||z||^2, x = mean + F z, w falling.

    below: the layers from the picture to the features (K, ...), of K pictures that are searched side by side; F F^T the prior's covariance.
    Where the features are fewer than the pixels, the misfit of the gradient (as in MapInversion) is added, if it is one of one picture.
    variance: of the released entries. The start is a kernel ridge regression of random smooth pictures on their features: from grey, a
    search in a ReLU network may crawl.
    """
    observation, below = observation.to(torch.float32), below.float()
    prior, F = rooted(observation.model.architecture.input_shape)
    shape, mean = prior.mean.shape, prior.mean.flatten().float()
    target, released = features.value.float(), observation.released  # target (K, ...)
    with torch.no_grad():
        whole = (below(mean.view(1, *shape)) - target).square().flatten(1).sum(1).clamp_min(1e-30)  # (K,)
    enough = target[0].numel() >= mean.numel() or observation.batch_size != 1
    noise = (features.variance.flatten(1).sum(1) / whole).max()  # the misfit of the truth
    if not enough:
        shares = [variance[name].sum() / g.square().sum().clamp_min(1e-30) for name, g in released.items()]
        noise = noise + torch.stack(shares).mean()

    def objective(z: Tensor, target: Tensor, whole: Tensor, weight: Tensor) -> Tensor:  # (pixels,), (...), (), ()
        images = (mean + z @ F).view(1, *shape)
        value: Tensor = (below(images)[0] - target).square().sum() / whole + weight * z.square().sum()
        return value if enough else value + misfit(observation.simulate(images, labels), released)

    start = _regressed(below, target, mean.view(shape))  # (K, channel, height, width)
    z = prior.filtered(start - mean.view(shape), torch.rsqrt).flatten(1)
    done, trace = 0, list[tuple[int, float]]()
    weights = sorted({max(weight, float(noise) / mean.numel()) for weight in PRIOR_WEIGHTS}, reverse=True)
    recorded = rowwise(objective, len(z))
    for weight in weights:
        evaluate = _without_graph(recorded, target, whole, torch.full((len(z),), weight))
        report = None if on_step is None else _shifted(on_step, done, evaluations)
        minimum = lbfgs(evaluate, z, evaluations=-(-evaluations // len(weights)), history=30, on_step=report)
        z, trace = minimum.x, [*trace, *((done + step, values[0]) for step, values in minimum.trace)]
        done += minimum.iterations
    return (mean + z @ F).view(-1, *shape), done, trace


def _regressed(below: nn.Module, target: Tensor, mean: Tensor) -> Tensor:
    """The pictures (K, channel, height, width) that random smooth ones suggest for these features (K, ...)."""
    pictures = smooth_pictures((PICTURES, *mean.shape), torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = torch.cat([below(part).flatten(1) for part in torch.split(pictures, 16)])
    unit, wanted = (nn.functional.normalize(t - rows.mean(0), eps=1e-30) for t in (rows, target.flatten(1)))
    return regress(unit, pictures, wanted)


def _without_graph(recorded: Callable[..., tuple[Tensor, Tensor]], *given: Tensor) -> Evaluate:
    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            gradient, value = recorded(x, *given)
        return gradient, value

    return evaluate


def _shifted(on_step: OnStep, done: int, steps: int) -> OnStep:
    return lambda step, _, value: on_step(min(done + step, steps), steps, value)
