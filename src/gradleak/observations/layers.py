"""Which layers with parameters a model runs, in order, and what goes in and out of them: analytic attacks start here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.observations.observation import Model


@dataclass(frozen=True)
class Call:
    """One call of a layer: its dotted name in the model, the layer, its input and output for the images given."""

    name: str
    layer: nn.Module
    input: Tensor
    output: Tensor


def calls(model: Model, images: Tensor) -> list[Call]:
    """Every call of a layer that has parameters of its own, in order of execution, for (batch, channel, height, width)."""
    seen: list[Call] = []

    def listen(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append(Call(name, layer, inputs[0], output))

        return hook

    own = [(name, layer) for name, layer in model.module.named_modules() if list(layer.parameters(recurse=False))]
    handles = [layer.register_forward_hook(listen(name)) for name, layer in own]
    try:
        with torch.no_grad():
            model.logits({}, images)
    finally:
        for handle in handles:
            handle.remove()
    return seen
