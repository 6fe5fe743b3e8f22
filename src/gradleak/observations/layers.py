"""The layers of a model: which run, in which order, what goes in and out of them, and which way their weights lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors


@dataclass(frozen=True)
class Call:
    """One call of a layer: its dotted name in the model, the layer, its input and output for the images given."""

    name: str
    layer: nn.Module
    input: Tensor
    output: Tensor


def calls(model: Model[Any], inputs: Any) -> list[Call]:
    """Every call of a layer that has parameters of its own and makes one tensor of another, in order of execution."""
    seen: list[Call] = []

    def listen(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if (
                inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            ):  # not attention, nor parametrizations
                seen.append(Call(name, layer, inputs[0], output))

        return hook

    layers = [(name, layer) for name, layer in model.module.named_modules() if list(layer.parameters(recurse=False))]
    handles = [layer.register_forward_hook(listen(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            model.logits({}, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Reached(Exception):
    """The forward pass has come as far as it was wanted."""


def layer_inputs(
    model: Model[LanguageArchitecture],
    modules: Sequence[str],
    ids: Tensor,
    *,
    parameters: Tensors | None = None,
) -> Tensors:
    """What goes into some modules of a language model: {name: (batch, length, width)}. The pass stops at the last of them.

    ids: (batch, length), sentences without padding. parameters: in place of the model's.
    """
    seen: Tensors = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].reshape(*ids.shape, -1)
            if len(seen) == len(modules):
                raise _Reached

        return hook

    handles = [model.module.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]
    known = (model.parameters if parameters is None else parameters) | (model.buffers or {})
    try:
        with torch.no_grad():
            functional_call(model.module, known, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def is_transposed(layer: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2, Conv1D of transformers, whose weight is (in, out)."""
    return type(layer).__name__ == "Conv1D"


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer multiplies its input by a matrix."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a low-rank adapter of this layer can be read: it is linear or convolutional."""
    return is_linear(layer) or isinstance(layer, nn.Conv2d)


def oriented(model: Model[Any], module: str, weight: Tensor) -> Tensor:
    """A tensor of the shape of a layer's weight as (out, in, ...), or back: GPT-2 stores (in, out)."""
    return weight.T if is_transposed(model.module.get_submodule(module)) else weight
