"""Tensors as people hold them: numpy arrays, names that wrappers have changed, lists in the order of state_dict, None for what was
not trained, BatchNorm's statistics beside. Fitted to the names and shapes that a model has."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradleak.errors import BadInput, shortened
from gradleak.modalities.linear_attention import taken_apart
from gradleak.modalities.modality import by
from gradleak.observations.tensors import Tensors

# Parts of names that wrappers add: DataParallel and DDP, torch.compile, Opacus, FSDP, activation checkpointing; and people.
WRAPPERS = {"module", "_orig_mod", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "grad"}


def fitted(
    given: Any, known: Tensors, module: nn.Module, frozen: Sequence[str] = ()
) -> tuple[Tensors, tuple[str, ...]]:
    """({name: tensor}, names of what is beside), in the names, shapes and number format of `known`.

    given   {name: array or None}, or arrays in the order of the module's state_dict or of its parameters
    known   {name: tensor} that may be given, as the model has them
    frozen  names of parameters that a list may leave out

    Beside are buffers. A name that fits nothing stays as it is. Raises BadInput where arrays cannot be told by their order, or
    hold no numbers.
    """
    if isinstance(given, Mapping) and all(usual(tensor, known.get(name)) for name, tensor in given.items()):
        return dict(given), ()
    given = given if isinstance(given, Mapping) else dict(enumerate(given))
    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in known}
    own = {id(tensor): name for name, tensor in module.named_parameters()}
    twins = {name for name, tensor in state.items() if own.get(id(tensor), name) != name}  # tied to another name
    if numbered := in_order(given):
        given = ordered(numbered, known, module, frozen)
    names = renamed([str(name) for name in given], {**state, **known})
    tensors: Tensors = {}
    for (old, array), name in zip(given.items(), names, strict=True):
        if array is None or name in twins:
            continue
        if name in tensors:
            raise BadInput(f"Two tensors are called {shortened(name)}: {shortened(str(old))} is one of them.")
        tensors[name] = like(as_tensor(array, name), known.get(name, state.get(name)), name)
    beside = tuple(name for name in tensors if name in state)
    return {name: tensor for name, tensor in tensors.items() if name not in state}, beside


def usual(tensor: Any, known: Tensor | None) -> bool:
    """Whether nothing has to be done to a tensor."""
    return (
        isinstance(tensor, Tensor)
        and known is not None
        and tensor.shape == known.shape
        and tensor.dtype in (known.dtype, torch.float64)
        and not tensor.requires_grad
        and tensor.layout == torch.strided
    )


def as_tensor(array: Any, name: str) -> Tensor:
    """Any array as a dense tensor outside autograd; BadInput for one that holds no numbers."""
    if isinstance(array, Tensor):
        return array.detach().to_dense() if array.layout != torch.strided else array.detach()
    try:
        values = np.asarray(array)
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("=")))
    except (TypeError, ValueError) as error:
        what = f"numpy array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise BadInput(f"What is given as {shortened(name)} is a {what}, not an array of numbers.") from error


def like(tensor: Tensor, known: Tensor | None, name: str) -> Tensor:
    """In the shape of the known tensor where this one is flat, and in its number format where that loses nothing that a numpy
    array has by default; BadInput for whole numbers in place of others."""
    if known is None:
        return tensor
    if tensor.shape != known.shape and tensor.ndim <= 1 and tensor.numel() == known.numel():
        tensor = tensor.reshape(known.shape)
    if not known.is_floating_point():
        return tensor.round().to(known.dtype) if tensor.is_floating_point() else tensor
    if not tensor.is_floating_point():
        raise BadInput(f"Tensor {shortened(name)} holds {tensor.dtype} numbers, which are whole: it is damaged.")
    return tensor.to(known.dtype)


def renamed(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """The names without what wrappers add to them, where they then are known ones; or without what all of them have in front, or
    with what all known ones have; else as they are."""
    known = set(known)
    if set(names) <= known:
        return list(names)
    bare = {unwrapped(name): name for name in known}
    found = [name if name in known else bare.get(unwrapped(name), taken_apart(name)) for name in names]
    strange = [name for name in found if name not in known]
    if not strange:
        return found
    for front in prefixes(strange):  # Lightning's "model.", a wrapper of one's own
        if {name.removeprefix(front) for name in strange} <= known:
            return [name if name in known else name.removeprefix(front) for name in found]
    for front in prefixes(known):  # the body of a model with a head
        if {front + name for name in strange} <= known:
            return [name if name in known else front + name for name in found]
    return found


def unwrapped(name: str) -> str:
    """A name without the parts that wrappers add, and with those of layers that were packed; a/b is a.b."""
    return taken_apart(".".join(part for part in name.replace("/", ".").split(".") if part not in WRAPPERS))


def prefixes(names: Iterable[str]) -> list[str]:
    """ "a.", "a.b.", ...: every beginning of some name, the shortest first."""
    parts = [name.split(".")[:-1] for name in names]
    found = {".".join(row[: i + 1]) + "." for row in parts for i in range(len(row))}
    return sorted(found, key=len)


def in_order(given: Mapping[Any, Any]) -> list[Any]:
    """The arrays by their numbers, where names are numbers, or "arr_0", "arr_1", ...; nothing for other names."""
    found = [re.fullmatch(r"([a-z]*_?)(\d+)", str(name)) for name in given]
    if not found or not all(found) or len({match[1] for match in found if match}) > 1:
        return []
    numbers = {int(match[2]): array for match, array in zip(found, given.values(), strict=True) if match}
    return [numbers[i] for i in sorted(numbers)] if len(numbers) == max(numbers) - min(numbers) + 1 else []


def ordered(arrays: list[Any], known: Tensors, module: nn.Module, frozen: Sequence[str]) -> dict[str, Any]:
    """{name: array} by the order of state_dict, of the parameters, or of those of them that are trained; of one flat array, cut
    into the parameters. BadInput for another number of arrays, or where a shape differs."""
    state, parameters = dict(module.state_dict(keep_vars=True)), dict(module.named_parameters())
    if len(arrays) == 1 < len(known) and np.ndim(arrays[0]) == 1:
        flat, counts = as_tensor(arrays[0], "the flat array"), [tensor.numel() for tensor in known.values()]
        if len(flat) == sum(counts):
            return dict(zip(known, torch.split(flat, counts), strict=True))
    orders: tuple[list[str], ...] = (list(state), list(parameters), [name for name in known if name not in frozen])
    names = next((order for order in orders if len(order) == len(arrays)), None)
    if names is None:
        have = f"its state_dict {len(state)} and its parameters {len(parameters)}"
        raise BadInput(f"There are {len(arrays)} arrays without names, and the model's have another number: {have}.")
    shapes = {**state, **known}
    for number, (key, array) in enumerate(zip(list(names), arrays, strict=True)):
        if array is not None and math.prod(np.shape(array)) != shapes[key].numel():
            sizes = f"{by(np.shape(array))}, where the model's {key} is {by(shapes[key].shape)}"
            raise BadInput(f"Array {number} is {sizes}: the arrays are of another architecture, or in another order.")
    return dict(zip(names, arrays, strict=True))
