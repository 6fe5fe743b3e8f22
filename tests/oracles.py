"""Slow references that are obviously correct: plain PyTorch and loops, nothing of gradleak's own computations."""

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def gradient_by_autograd(
    module: nn.Module, images: Tensor, labels: Tensor, *, mode: str = "eval", reduction: str = "mean"
) -> Tensors:
    """backward() on a copy of the module, as every training loop does it: {parameter name: gradient}."""
    module = copy.deepcopy(module).train(mode == "train")
    module.zero_grad(set_to_none=True)
    loss = F.cross_entropy(module(images), labels, reduction=reduction)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def update_by_sgd(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    learning_rate: float,
    local_steps: int,
    local_batch_size: int,
    mode: str = "eval",
) -> Tensors:
    """Parameters after torch.optim.SGD minus before. Chunks in order, over and over; the last of a pass may be short."""
    module = copy.deepcopy(module).train(mode == "train")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimiser = torch.optim.SGD(module.parameters(), lr=learning_rate)
    chunks = [
        (images[start : start + local_batch_size], labels[start : start + local_batch_size])
        for start in range(0, len(images), local_batch_size)
    ]
    for x, y in itertools.islice(itertools.cycle(chunks), local_steps):
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {name: p.detach() - before[name] for name, p in module.named_parameters()}


def shared_labels(a: Sequence[int], b: Sequence[int]) -> int:
    """Size of the intersection of two multisets of labels: how many of b were found in a, each label counted once."""
    left, found = list(a), 0
    for label in b:
        if label in left:
            left.remove(label)
            found += 1
    return found


def psnr_db_by_hand(a: Tensor, b: Tensor) -> float:
    """10 log10(1 / mean squared error) of two pictures with pixels in [0, 1]; infinite when they are equal."""
    squares = [(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
    mean = torch.tensor(sum(squares) / len(squares), dtype=torch.float64)
    return float(-10 * mean.log10())


def tensors_inside(thing: object, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor that can be reached from an object through attributes, mappings and sequences."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | type | None):
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing.detach()]
    if isinstance(thing, dict):
        parts = [*thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset):
        parts = [*thing]
    else:
        parts = [*getattr(thing, "__dict__", {}).values()]
    return [tensor for part in parts for tensor in tensors_inside(part, seen)]
