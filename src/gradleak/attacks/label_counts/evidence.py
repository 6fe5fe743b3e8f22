"""What samples add to the gradient of the last layers whose gradient is shared: of public samples, and of a batch in sum."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.layers import calls
from gradleak.observations.model import PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors

LAYERS = 2  # that are read: the last of those that were shared
LARGEST = 2**12  # numbers of a tensor that are read: of larger matrices, how they act on the mean input
CHUNK = 256  # samples side by side, where they do not meet in BatchNorm


@dataclass(frozen=True)
class Evidence:
    """What public samples show of the layers of one model, in float64, each tensor in units of its root mean square.

    each     (samples, numbers): what each public sample adds to a sum over a batch
    labels   (samples,) of the public samples
    through  {name: (in,)}: vectors by which large matrices are told (`added`)
    scales   {name: the unit}
    """

    each: Tensor
    labels: Tensor
    classes: int
    batch: int
    layers: tuple[str, ...]
    through: Tensors
    scales: dict[str, float]

    def total(self, observation: PictureObservation) -> Tensor:
        """(numbers,): the sum over the batch of an observation of this model."""
        gradient = observation.as_gradient()
        share = self.batch if observation.model.criterion.reduction == "mean" else 1
        told = {k: gradient[k] @ self.through[k] if k in self.through else gradient[k] for k in self.scales}
        return torch.cat([share * told[k].flatten().double().cpu() / scale for k, scale in self.scales.items()])


def evidence(observation: PictureObservation, public: Pictures) -> Evidence:
    """What public samples show of the last layers that were shared. Raises NotObserved as `label_counts` does."""
    model, batch = observation.model, observation.batch_size
    if not isinstance(model.architecture, Architecture) or not isinstance(observation.release, Gradient | Update):
        raise NotObserved("Label counts are read off a gradient or an update of a classifier of pictures.")
    if batch is None:
        raise NotObserved("The batch size was withheld, and labels without it: neither can be told from one gradient.")
    if observation.defenses != () or (isinstance(observation.release, Gradient) and observation.release.private):
        raise NotObserved("Labels were not given, and a defense stands between them and what public samples show.")
    if reason := observation.release.inexact():
        raise NotObserved(f"Labels were not given, and are read off one gradient alone: {reason}.")
    if int((public.labels.bincount() > 0).sum()) < 2 or len(public.labels) < batch:
        raise NotObserved(f"Labels were not given, and {len(public.labels)} public samples are too few to learn from.")
    gradient = observation.as_gradient()
    layers = readable(model, gradient)
    size = (
        batch if model.mode == "train" else CHUNK
    )  # in train mode, samples meet in BatchNorm: as many as in the batch
    whole = (
        range(0, len(public.labels) - size + 1, size) if model.mode == "train" else range(0, len(public.labels), size)
    )
    like, through = next(iter(gradient.values())), Tensors()
    parts = []
    for first in whole:
        images, labels = public.images[first : first + size].to(like), public.labels[first : first + size]
        parts.append(added(model, layers, images, labels.to(like.device), through, tuple(gradient)))
    found = {name: torch.cat([part[name] for part in parts]).double().cpu() for name in parts[0]}
    scales = {name: float(each.square().mean().sqrt().clamp_min(1e-30)) for name, each in found.items()}
    each = torch.cat([found[name] / scale for name, scale in scales.items()], dim=1)
    labels = public.labels[: len(each)].cpu()
    return Evidence(each, labels, model.architecture.classes, batch, layers, through, scales)


def readable(model: PictureModel, gradient: Tensors) -> tuple[str, ...]:
    """The last two layers that hold a tensor that is shared and can be read, in order of execution; NotObserved if there is none."""
    grey = model.architecture.blank(2).to(next(iter(gradient.values())))
    names = dict.fromkeys(call.name for call in calls(model, grey))
    found = [
        name
        for name in names
        if any(f"{name}.{own}" in gradient for own in own_parameters(model, name))
        or (large_matrix(model, name) and f"{name}.weight" in gradient)
    ]
    if not found:
        raise NotObserved("Labels were not given, and no layer that was shared tells them.")
    return tuple(found[-LAYERS:])


def own_parameters(model: PictureModel, name: str) -> Tensors:
    """The parameters of one layer that are small enough to be read number by number."""
    parts = [part for part, _ in model.module.get_submodule(name).named_parameters(recurse=False)]
    own = {part: model.parameters[f"{name}.{part}"] for part in parts if f"{name}.{part}" in model.parameters}
    return {part: tensor for part, tensor in own.items() if tensor.numel() <= LARGEST}


def large_matrix(model: PictureModel, name: str) -> bool:
    """Whether the layer is linear, with a matrix that is told by how it acts on the mean input: dL/dW a / ||a||^2 in the paper."""
    layer, weight = model.module.get_submodule(name), model.parameters.get(f"{name}.weight")
    return isinstance(layer, nn.Linear) and weight is not None and weight.numel() > LARGEST


def added(
    model: PictureModel,
    layers: tuple[str, ...],
    images: Tensor,
    labels: Tensor,
    through: Tensors,
    shared: tuple[str, ...] | None = None,
) -> Tensors:
    """What each sample adds to the sum over the batch of the gradient of these layers' parameters: {name: (batch, numbers)}.

    They sum to the gradient of the batch, in train mode too, where BatchNorm lets samples meet. through: {name: (in,)} of matrices
    above LARGEST, of which the product with this vector is told; what is not yet there is put in, the mean input.
    """
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def listen(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nudge = torch.zeros_like(output).requires_grad_()
            seen[name] = (layer, inputs[0].detach(), nudge)
            return output + nudge

        return hook

    handles = [model.module.get_submodule(name).register_forward_hook(listen(name)) for name in layers]
    try:
        loss = model.loss({}, images, labels) * (len(images) if model.criterion.reduction == "mean" else 1)
        slopes = torch.autograd.grad(loss, [seen[name][2] for name in layers])
    finally:
        for handle in handles:
            handle.remove()
    found: Tensors = {}
    for name, slope in zip(layers, slopes, strict=True):
        layer, inputs, _ = seen[name]
        if large_matrix(model, name):
            vector = through.setdefault(f"{name}.weight", inputs.reshape(-1, inputs.shape[-1]).mean(0))
            found[f"{name}.weight"] = (
                (slope * (inputs @ vector)[..., None]).reshape(len(slope), -1, slope.shape[-1]).sum(1)
            )
        each = of_each(model, name, layer, inputs, slope)
        found |= {f"{name}.{part}": told.flatten(1) for part, told in each.items()}
    return {full: told.detach() for full, told in found.items() if shared is None or full in shared}


def of_each(model: PictureModel, name: str, layer: nn.Module, inputs: Tensor, slope: Tensor) -> Tensors:
    """{parameter: (batch, ...)}: the product of a layer's derivative by its own parameters with the slope of its output."""
    own = {part: tensor.to(inputs) for part, tensor in own_parameters(model, name).items()}
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # behind the statistics it scales and shifts channels
        buffers = {k.removeprefix(f"{name}."): t for k, t in (model.buffers or {}).items() if k.startswith(f"{name}.")}
        bare = {"weight": torch.ones_like(own["weight"]), "bias": torch.zeros_like(own["bias"])}
        with torch.no_grad():
            inputs = functional_call(layer, {**buffers, **bare}, (inputs,))
        positions = tuple(range(2, inputs.ndim))
        scale, shift = slope * inputs, slope
        return {
            "weight": scale.sum(positions) if positions else scale,
            "bias": shift.sum(positions) if positions else shift,
        }
    parts = [part for part, _ in layer.named_parameters() if part not in own]
    rest = {part: model.parameters[f"{name}.{part}"] for part in parts if f"{name}.{part}" in model.parameters}

    def one(x: Tensor, s: Tensor) -> Tensors:
        pull = vjp(lambda chosen: functional_call(layer, {**rest, **chosen}, (x[None],)), own)[1]
        told: Tensors = pull(s[None])[0]
        return told

    return vmap(one)(inputs, slope)
