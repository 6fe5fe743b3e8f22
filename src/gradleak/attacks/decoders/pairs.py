"""Pairs (gradient, sketch) from public pictures, for one adapter's base model and factors: what decoders are fitted on.

A layer's gradient for one picture is G = Delta^T X, with X its inputs and Delta = dL/d(its outputs), one row for each
token (position, patch) that it processes. One batched backward pass gives both for many pictures at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.release import Sketch
from gradleak.observations.tensors import Tensors, fingerprint

Factors = tuple[Tensor, Tensor]  # (n, tokens, columns of M) and (n, tokens, rows of M): M = second^T first


def factors(adapter: PictureObservation, images: Tensor, labels: Tensor) -> dict[str, Factors]:
    """{module: (X (n, tokens, in), Delta (n, tokens, out))} for each picture alone: G_i = Delta_i^T X_i.

    A convolution's tokens are its positions, its X the patches under the kernel (in * k * k). Taken at the adapter's
    start. Raises BadInput for layers other than linear ones and ungrouped 2-D convolutions, and for BatchNorm in train
    mode, where pictures have no gradients of their own.
    """
    model = adapter.model
    if model.mode == "train" and any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.module.modules()
    ):
        raise BadInput("BatchNorm in train mode mixes the pictures of a batch: a decoder needs a model in eval mode.")
    inputs: dict[str, list[Tensor]] = {module: [] for module in adapter.adapter.scaling}
    probes: dict[str, list[Tensor]] = {module: [] for module in adapter.adapter.scaling}

    def listen(module: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[module].append(_tokens(layer, module, given[0].detach()))
            probes[module].append(torch.zeros_like(output, requires_grad=True))  # dL/d(probe) = dL/d(output)
            return output + probes[module][-1]

        return hook

    handles = [
        model.module.get_submodule(module).register_forward_hook(listen(module)) for module in adapter.adapter.scaling
    ]
    try:
        logits = model.logits(adapter.adapter.merged(adapter.model, {}), images)
    finally:
        for handle in handles:
            handle.remove()
    if unused := [module for module in probes if not probes[module]]:
        raise BadInput(f"The model never calls {unused[0]}, which the adapter changes: nothing can be learnt about it.")
    every = [probe for calls in probes.values() for probe in calls]
    deltas = iter(torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), every))
    return {
        module: (torch.cat(inputs[module], 1), torch.cat([_positions(next(deltas)) for _ in calls], 1))
        for module, calls in probes.items()
    }


def batches(
    adapter: PictureObservation, images: Tensor, labels: Tensor, *, size: int = 50
) -> Iterator[tuple[slice, list[tuple[Sketch, Tensor, Factors]]]]:
    """Rows of the pictures, and for each of the adapter's sketches: itself, what it would measure of these pictures'
    gradients (n, rows of M, rank), and the factors of M."""
    sketches = adapter.sketches()
    for first in range(0, len(images), size):
        rows = slice(first, first + size)
        changes = factors(adapter, images[rows], labels[rows])
        yield rows, [(s, measure(s, oriented(s, changes)), oriented(s, changes)) for s in sketches]


def oriented(sketch: Sketch, found: dict[str, Factors]) -> Factors:
    """The factors of the sketch's M: of G (right) or of its transpose (left)."""
    X, delta = found[sketch.module]
    return (X, delta) if sketch.side == "right" else (delta, X)


def measure(sketch: Sketch, pair: Factors) -> Tensor:
    """S = M F^T per picture, without forming M: (n, rows of M, rank)."""
    X, delta = pair
    return delta.mT @ (X @ sketch.through.T)


def sketched_moment(S: Tensor, pair: Factors) -> Tensor:
    """F M^T M = S^T M per picture, without forming M or M^T M: (n, rank, columns of M)."""
    X, delta = pair
    return (delta @ S).mT @ X


def key(sketch: Sketch) -> str:
    """A name for the equation: its module and its side."""
    return f"{sketch.module}.{sketch.side}"


def identity(adapter: PictureObservation) -> str:
    """Fingerprint of what a decoder is fitted to: the base model, the adapter's start, and which factors are released."""
    released = {f"released {name}": torch.zeros(0) for name in adapter.released}
    return fingerprint(
        {**adapter.model.parameters, **(adapter.model.buffers or {}), **adapter.adapter.start, **released}
    )


def check_identity(fitted: str, adapter: PictureObservation) -> None:
    """BadInput if a decoder was fitted to another base model or to other factors than this adapter's."""
    if fitted != identity(adapter):
        raise BadInput(
            "This decoder was fitted to another base model or to another adapter's start (its A or B): "
            "fit one to this adapter, on public pictures."
        )


def check_pictures(adapter: PictureObservation, images: Tensor, labels: Tensor) -> None:
    """BadInput unless the adapter has sketches and there are public pictures of its model's size and classes."""
    if not adapter.sketches():
        raise BadInput("The adapter measures no gradient: the other factor of each that is released starts at zero.")
    shape, classes = adapter.model.architecture.input_shape, adapter.model.architecture.classes
    if not len(images) or tuple(images.shape[1:]) != shape or len(labels) != len(images):
        raise BadInput(f"A decoder is fitted on labelled pictures of {shape}, not on {tuple(images.shape)}.")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise BadInput(
            f"The public labels go from {int(labels.min())} to {int(labels.max())}, the model has {classes} classes."
        )


def as_observation(adapter: PictureObservation, decoded: Tensors) -> PictureObservation:
    """{module.weight: gradient} as an observation of the model at the adapter's start, all other parameters frozen."""
    parameters = {**adapter.model.parameters, **adapter.adapter.merged(adapter.model, {})}
    frozen = tuple(name for name in parameters if name not in decoded)
    return Observation(
        model=replace(adapter.model, parameters=parameters, frozen=frozen),
        released=decoded,
        batch_size=adapter.batch_size,
        labels=adapter.labels,
        precision=adapter.precision,
    )


def _tokens(layer: nn.Module, module: str, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        if isinstance(layer.padding, str):
            raise BadInput(f"{module} pads by name ({layer.padding}): give the padding as numbers.")
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    if isinstance(layer, nn.Linear):
        return _positions(x)
    raise BadInput(f"{module} is a {type(layer).__name__}: decoders know linear layers and ungrouped 2-D convolutions.")


def _positions(x: Tensor) -> Tensor:
    """(n, channel, height, width), (n, tokens, width) or (n, width) -> (n, tokens, width)."""
    return x.flatten(2).mT if x.dim() == 4 else x.view(len(x), -1, x.shape[-1])
