"""The factor of a release: a sum in place of a mean, the loss scale of mixed precision, clipping, or a difference of weights of
either sign. It is told by the last layer, before any search; we know of no publication that did this.

Sees      Gradient or Update of a classifier that ends in a biased linear layer and a softmax cross entropy
Recovers  F, so that what was released is F times what the release says
Solves    one sample: dL/dW = F (p - e_y) h^T and dL/db = F (p - e_y). Hence h = dW^T db / ||db||^2 whatever F is, and with it
          p = softmax(W h + b): F is the one that makes db, for some class y.
          Several: the F at which whole numbers of samples per class explain both gradients (labels.py, `label_fit`)
Misses    trained networks in larger batches, whose samples of one class are not alike: no F explains their gradients
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.labels import label_fit, last_layer
from gradleak.errors import NotObserved
from gradleak.modalities.losses import CrossEntropy
from gradleak.modalities.networks import Architecture
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Gradient, Update

FIT = 0.05  # of the last bias gradient, that one sample may leave unexplained: bfloat16 leaves a hundredth
TOLD = 0.02, 0.1  # squared errors of a factor that explains the last layer, and of one that does not
MOST_CLASSES = 128  # for which many factors are tried: each costs the inverse of a matrix of that size


def with_factor_found(observation: Observation[Any]) -> Observation[Any]:
    """The observation with its factor, where that is clearly another one than 1; else the same."""
    factor = factor_of(observation)
    return observation if factor is None else replace(observation, factor=factor)


def factor_of(observation: Observation[Any]) -> float | None:
    """The factor, where it is clearly another one than 1; None where nothing tells it, or something else stands between."""
    model, release = observation.model, observation.release
    plain = isinstance(model.criterion, CrossEntropy) and model.criterion.plain
    if (
        not isinstance(release, Gradient | Update)
        or not isinstance(model.architecture, Architecture)
        or not plain
        or observation.defenses != ()
        or (isinstance(release, Gradient) and release.private is not None)  # the cut is simulated
        or observation.factor != 1
        or not observation.batch_size
        or model.architecture.classes < 2
    ):
        return None
    try:
        like = next(iter(observation.released.values()))
        grey = torch.full((1, *model.architecture.input_shape), 0.5).to(like)
        last, gradient = last_layer(observation, grey), observation.as_gradient()
    except NotObserved:
        return None
    batch = observation.batch_size
    share = 1 if model.criterion.reduction == "mean" else batch
    dW, db = (gradient[f"{last.name}.{part}"].double() / share for part in ("weight", "bias"))
    W, b = (model.parameters[f"{last.name}.{part}"].double() for part in ("weight", "bias"))
    if not bool(db.any()):
        return None
    found = of_one(dW, db, W, b) if batch == 1 else of_several(dW, db, W, b, batch)
    # Several steps, or Adam: their mean is no gradient, and its length may be some other one.
    apart = math.log(3.0) if release.inexact() else FIT
    return found if found is not None and (found < 0 or abs(math.log(found)) > apart) else None


def of_one(dW: Tensor, db: Tensor, W: Tensor, b: Tensor) -> float | None:
    """The factor of one sample's gradients: of the classes that fit, that with the factor nearest 1. Two classes fit with either
    sign, and tell none but 1."""
    p = (W @ (db @ dW / db.square().sum()) + b).softmax(0)
    targets = p - torch.eye(len(p)).to(p)  # row y: dL/db for the label y
    factors = targets @ db / targets.square().sum(1)  # (classes,)
    left = (db - factors[:, None] * targets).norm(dim=1) / db.norm()
    fitting = [float(f) for f in factors[left <= FIT] if float(f)]
    best = min(fitting, key=lambda f: (f < 0, abs(math.log(abs(f)))), default=None)
    told = best is not None and (abs(best - 1) <= FIT or all(f * best > 0 for f in fitting))
    return best if told else None


def of_several(dW: Tensor, db: Tensor, W: Tensor, b: Tensor, batch: int) -> float | None:
    """The factor of a batch: usual ones first, then any between those that the entries of db allow, which are below 1."""

    def error(factor: float) -> float:
        try:
            return label_fit(dW / factor, db / factor, W, b, batch)[1]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return math.inf

    clear, wrong = TOLD
    if float(db.abs().sum()) <= 2 and error(1.0) < wrong:
        return None
    least = float(db.abs().sum()) / 2  # the entries of p - e_y add up to 2 at most
    usual = [sign * size * 2.0**k for k in range(-24, 25) for size in {1, batch} for sign in (1, -1)]
    tried = [f for f in usual if 1 <= abs(f) / least <= 64] if len(db) <= MOST_CLASSES else [batch, -1.0]
    best = min(tried, key=error)
    if error(best) > clear and len(db) <= MOST_CLASSES:
        best = min((sign * least * 2 ** (k / 4) for k in range(25) for sign in (1, -1)), key=error)
    if error(best) > clear:
        return None
    near = sharpened(error, best)
    return best if abs(near / best - 1) < 0.01 else near  # a usual factor is meant exactly


def sharpened(error: Callable[[float], float], factor: float) -> float:
    """The factor nearby at which the error is least, by a search that closes in on it."""
    for width in (0.16, 0.05, 0.016, 0.005, 0.0016):
        factor = min((factor * (1 + width * k) for k in range(-3, 4)), key=error)
    return factor


def named(factor: float, batch: int | None) -> str:
    """What such a factor usually is, in words."""
    size, power = abs(factor), math.log2(abs(factor))
    if factor < 0:
        return "it points the other way, as a difference of weights (after - before) does that is taken for a gradient"
    if batch and batch > 1 and abs(size / batch - 1) < FIT:
        return f"a sum over {batch} samples in place of their mean"
    if power >= 3 and abs(power - round(power)) < 0.02:
        return f"a loss scale of {2 ** round(power):,}, as mixed precision uses, or a sum"
    return (
        "a sum over samples, a loss scale, or another learning rate"
        if size > 1
        else "clipping, a mean over more samples or clients, or another learning rate"
    )
