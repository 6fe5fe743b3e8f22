"""Distances between two sets of released tensors, {name: tensor} with equal names and shapes. Pure; each returns a scalar."""

import torch
from torch import Tensor

from gradleak.observations.precision import wide
from gradleak.observations.tensors import Tensors, flatten


def squared_l2(a: Tensors, b: Tensors) -> Tensor:
    """||a - b||^2 over all entries (Deep Leakage from Gradients, equation 2)."""
    return (flatten(a) - flatten(b)).square().sum()


def cosine(a: Tensors, b: Tensors) -> Tensor:
    """1 - <a, b> / (||a|| ||b||) over all entries, in [0, 2] (Inverting Gradients, equation 4); 1 if either is zero."""
    u, v = flatten(a), flatten(b)
    tiny = torch.finfo(u.dtype).tiny
    similarity: Tensor = (u @ v) / (u.square().sum() * v.square().sum()).clamp_min(tiny).sqrt()
    return 1 - similarity


def relative_residual(a: Tensors, b: Tensors) -> Tensor:
    """||a - b|| / ||b||: 0 when a explains b completely. Computed in the widest format, tensor by tensor: nothing of the model's size
    is made."""
    apart = torch.stack([(wide(a[name]) - wide(b[name])).square().sum() for name in b]).sum()
    size = torch.stack([wide(tensor).square().sum() for tensor in b.values()]).sum()
    residual: Tensor = (apart / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()
    return residual
