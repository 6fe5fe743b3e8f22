"""A network as the sequence of layers that it is, also where its forward was written by hand: recorded by torch.fx, function by function."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

Layers = list[tuple[str, nn.Module]]  # (dotted name, layer), from the input on


def dropped(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    """Dropout while it does nothing; TypeError else."""
    if training:
        raise TypeError("dropout in training")
    return nn.Identity()


FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((torch.relu, F.relu, torch.relu_, "relu", "relu_"), lambda inplace=False: nn.ReLU()),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), nn.Tanh),
    **dict.fromkeys((torch.flatten, "flatten"), nn.Flatten),
    F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.softplus: nn.Softplus,
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.dropout: dropped,
}
RESHAPES = ("view", "reshape")


def layers_of(module: nn.Module) -> Layers:
    """The layers one after another, nested sequences unrolled; a part that is no plain sequence counts as one layer."""
    return list(unrolled("", module))


def unrolled(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a part of the network by its dotted name."""
    if isinstance(module, nn.Sequential):
        for part, child in module.named_children():
            yield from unrolled(joined(name, part), child)
    elif plain(module) or (written := recorded(module)) is None:
        yield name, module
    else:
        for part, child in written:
            yield from unrolled(joined(name, part), child)


def joined(name: str, part: str) -> str:
    """The dotted name of a part."""
    return f"{name}.{part}" if name else part


def plain(module: nn.Module) -> bool:
    """Whether it is a layer of torch or of ours, which is known by its type."""
    return type(module).__module__.startswith(("torch.nn.", "gradleak.")) or not list(module.children())


class Recorder(fx.Tracer):
    """Records the calls of layers, and does not look into them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Sequences too: they are unrolled afterwards."""
        return True


def recorded(module: nn.Module) -> Layers | None:
    """What a forward does, if it is one layer after another on one input, each with parameters once; else None."""
    try:
        nodes = list(Recorder().trace(module).nodes)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return None
    layers: Layers = []
    before: fx.Node | None = None
    for node in nodes:
        if node.op == "placeholder" and before is None:
            before = node
        elif node.op == "output" and node.args[0] is before:
            return layers if len({name for name, _ in layers}) == len(layers) else None
        elif node.args and node.args[0] is before and asks_size(node):
            continue
        elif node.op == "call_function" and node.name.startswith("getitem"):
            continue  # of a shape: whatever else takes it ends the sequence
        elif node.args and node.args[0] is before and (layer := layer_of(node, module)) is not None:
            has_parameters = node.op == "call_module" and bool(list(layer.parameters()))
            layers.append((str(node.target) if has_parameters else node.name, layer))
            before = node
        else:
            return None
    return None


def asks_size(node: fx.Node) -> bool:
    """Whether a node is x.shape or x.size(...)."""
    return (node.op == "call_method" and node.target == "size") or (
        node.op == "call_function" and node.target is getattr
    )


def layer_of(node: fx.Node, module: nn.Module) -> nn.Module | None:
    """The layer that a recorded call amounts to, or None."""
    if node.op == "call_module":
        return module.get_submodule(str(node.target)) if len(node.args) == 1 and not node.kwargs else None
    rest = list(node.args[1:])
    if node.op == "call_method" and node.target in RESHAPES:
        return (
            nn.Flatten()
            if len(rest) == 2 and (rest[1] == -1 or rest[0] == -1 or isinstance(rest[0], fx.Node))
            else None
        )
    kind = FUNCTIONS.get(node.target)
    if kind is None or any(isinstance(value, fx.Node) for value in [*rest, *node.kwargs.values()]):
        return None
    if kind is nn.Flatten and (rest or list(node.kwargs.values())) != [1]:
        return None
    try:
        return kind(*rest, **{name: value for name, value in node.kwargs.items() if name != "inplace"})
    except TypeError:
        return None
