"""Named tensors, {name: tensor}: what models are made of, what is released, and what is saved."""

import hashlib

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def flatten(tensors: Tensors) -> Tensor:
    """All entries in the order of the names: (total,)."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def fingerprint(tensors: Tensors) -> str:
    """SHA-256 over names, types, shapes and bytes: equal exactly when two states are equal bit by bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rounding(rows: Tensor, precision: torch.dtype) -> Tensor:
    """The deviation that rounding to a number format leaves in each row's numbers (rows,): an error even over the distance
    of two neighbouring numbers, whose variance is its square / 12."""
    format_ = torch.finfo(precision)
    apart = format_.eps * torch.exp2(rows.double().abs().clamp_min(format_.tiny).log2().floor())
    return (apart.square().mean(1) / 12).sqrt()


def moved(tensor: Tensor, where: torch.device | torch.dtype) -> Tensor:
    """On another device; or, where it holds floating-point numbers, in another precision."""
    return tensor.to(where) if isinstance(where, torch.device) or tensor.is_floating_point() else tensor
