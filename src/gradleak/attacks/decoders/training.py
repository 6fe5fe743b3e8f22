"""What the two trained decoders share: networks that correct the pseudo-inverse, fitted to public pairs by Adam.

Sketches and gradients enter in units of the sketch's root mean square, so that a decoder is homogeneous, as the true map
is: twice the sketch, twice the gradient.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradleak.attacks.decoders.pairs import batches, check_pictures, key
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Sketch, weight_shaped
from gradleak.observations.tensors import Tensors

# weights, the sketch, S (n, rows, rank) of unit root mean square, S's pseudo-inverse (n, rows, columns) -> M^
Network = Callable[[Tensors, Sketch, Tensor, Tensor], Tensor]


def fit(
    network: Network,
    weights: Tensors,
    adapter: PictureObservation,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
    on_step: OnStep | None,
) -> Tensors:
    """The weights after `steps` of Adam (cosine decay) on the mean over layers and pictures of |M^ - M|^2 / |M|^2.

    The pairs of each step are made on the spot: `batch` public pictures, without replacement until all have served.
    """
    check_pictures(adapter, images, labels)
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    adam = torch.optim.Adam(list(weights.values()), lr=learning_rate)
    inverses = {key(s): torch.linalg.pinv(s.through).T for s in adapter.sketches()}
    batch, order = min(batch, len(images)), torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        adam.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:batch].to(images.device), order[batch:]
        adam.zero_grad()
        losses = []
        for _, found in batches(adapter, images[rows], labels[rows], size=batch):
            for sketch, S, (X, delta) in found:
                unit = _rms(S)
                M, scaled = delta.mT @ X / unit, S / unit
                error = network(weights, sketch, scaled, scaled @ inverses[key(sketch)]) - M
                losses.append((error.square().sum((1, 2)) / M.square().sum((1, 2)).clamp_min(1e-12)).mean())
        loss = torch.stack(losses).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if on_step is not None:
            on_step(step + 1, steps, float(loss.detach()))
    return {name: w.detach() for name, w in weights.items()}


def decode(network: Network, weights: Tensors, adapter: PictureObservation) -> Tensors:
    """{module.weight: gradient}; where both factors of a module are released, the mean of their two answers."""
    answers: dict[str, list[Tensor]] = {}
    for sketch in adapter.sketches():
        S = sketch.measured[None]
        unit = _rms(S)
        M = network(weights, sketch, S / unit, S / unit @ torch.linalg.pinv(sketch.through).T)[0] * unit[0]
        answers.setdefault(f"{sketch.module}.weight", []).append(weight_shaped(adapter.model, sketch, M))
    return {name: torch.stack(each).mean(0) for name, each in answers.items()}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Random weights (..., inputs) for an activation that halves the variance (He et al. 2015)."""
    return torch.randn(*shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))


def _rms(S: Tensor) -> Tensor:
    size: Tensor = S.square().mean((1, 2), keepdim=True).sqrt().clamp_min(torch.finfo(S.dtype).tiny ** 0.5)
    return size
