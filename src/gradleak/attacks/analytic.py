"""Exact inputs of a biased linear layer (Phong et al. 2017, section III; Geiping et al., NeurIPS 2020, proposition 3.1).

Sees      Gradient or Update of a model whose first layer is a linear layer with bias, fed with the whole picture
Recovers  images (batch, channel, height, width) in [0, 1]: exactly for batch 1; in a larger batch those that at least
          two ReLU units see alone
Solves    dL/dW = sum_n delta_n x_n^T and dL/db = sum_n delta_n. One image: x = dL/dW^T dL/db / ||dL/db||^2, the least
          squares over all units. Several: a unit that only image n activates has the ratio dW_i / db_i = x_n, and two
          units with one and the same ratio tell that it did
Differs   least squares in place of a single unit's ratio, which averages rounding and noise out
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradleak.attacks.attack import check_sees
from gradleak.attacks.labels import labels_of_images, recover_labels, with_best_label
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.observations.layers import calls
from gradleak.observations.model import PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update


@dataclass(frozen=True, kw_only=True)
class Analytic:
    """tolerance: relative distance up to which two units' ratios count as one and the same image."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = Architecture.modality

    tolerance: float = 1e-5

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved when the first layer is no biased linear layer, or the batch size is unknown and above 1."""
        check_sees(self, observation)
        observation = observation.to(torch.float64)
        name, scale, shift = first_layer(observation.model)
        gradient = observation.as_gradient()
        if f"{name}.weight" not in gradient or f"{name}.bias" not in gradient:
            raise NotObserved(
                f"The first layer {name} was not trained: there is no gradient of it to read images from."
            )
        weight, bias = gradient[f"{name}.weight"], gradient[f"{name}.bias"]  # (units, inputs), (units,)
        if observation.batch_size == 1 and bool(bias.any()):
            inputs, support = (bias @ weight / bias.square().sum())[None], [len(bias)]
        else:
            inputs, support = isolated_inputs(weight, bias, self.tolerance)
        shape = observation.model.architecture.input_shape
        images = ((inputs - shift) / scale).reshape(-1, *shape).clamp(0, 1)
        batch = observation.batch_size or max(len(images), 1)
        count = min(len(images), batch)
        images = torch.cat([images[:count], images.new_full((batch - count, *shape), 0.5)])
        labels = observation.labels
        if labels is None:
            observation = replace(observation, batch_size=batch)
            try:
                labels = labels_of_images(observation, images) if count == batch else recover_labels(observation)
            except NotObserved:  # the last layer was not trained
                if batch > 1:
                    raise
                labels, _ = with_best_label(observation, images)
        status = f"{count} of {batch} images solved in closed form from layer {name}"
        status += f" ({', '.join(map(str, support[:count]))} units agree)." if count else ": no unit isolates an image."
        if reason := observation.release.inexact():
            status += f" Not exact: {reason}."
        residual = observation.residual(images, labels)
        return Reconstruction(images.float().cpu(), labels.cpu(), residual, status, outcome_of(residual))


def first_layer(model: PictureModel) -> tuple[str, Tensor, Tensor]:
    """Name of the first layer and the (scale, shift) with input = scale * pixel + shift, each (pixels,), in float64.

    Raises NotObserved if it is not a linear layer with bias, or does not see every pixel by itself.
    """
    where = next(iter(model.parameters.values())).device
    probes = torch.zeros(3, *model.architecture.input_shape, dtype=torch.float64, device=where)
    probes[1], probes[2] = 1, torch.linspace(0, 1, probes[2].numel()).view_as(probes[2])
    first = calls(model.to(torch.float64), probes)[0]
    if not isinstance(first.layer, nn.Linear) or first.layer.bias is None:
        kind = type(first.layer).__name__
        raise NotObserved(
            f"The first layer {first.name} is a {kind}: only a linear layer with bias gives its input away."
        )
    if first.input.shape != (3, probes[0].numel()):
        raise NotObserved(
            f"The first layer {first.name} sees {tuple(first.input.shape[1:])} values, not the whole picture."
        )
    shift, scale = first.input[0], first.input[1] - first.input[0]
    if not torch.allclose(first.input[2], scale * probes[2].flatten() + shift) or not bool(scale.abs().min() > 0):
        raise NotObserved(f"The first layer {first.name} does not see the pixels one by one: its input is no picture.")
    return first.name, scale, shift


def isolated_inputs(weight: Tensor, bias: Tensor, tolerance: float) -> tuple[Tensor, list[int]]:
    """The inputs that at least two units see alone, (found, inputs), most supported first, and how many units agree."""
    strongest = bias.abs().argsort(descending=True)[:2048]
    strongest = strongest[bias[strongest].abs() > 1e-9 * bias.abs().max()]
    ratios = weight[strongest] / bias[strongest, None]  # (units, inputs)
    same = torch.cdist(ratios, ratios) <= tolerance * ratios.norm(dim=1, keepdim=True)  # (units, units)
    inputs, support = [], []
    while bool((same.sum(dim=1) > 1).any()):
        members = same[int(same.sum(dim=1).argmax())]
        inputs.append(ratios[members].mean(dim=0))
        support.append(int(members.sum()))
        same = same & ~members[:, None] & ~members[None, :]
    return torch.stack(inputs) if inputs else ratios[:0], support
