"""The widest floating-point numbers of a device: searches compute in them, and what stands on float64 is solved on the CPU."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # kinds of devices; Apple's GPUs


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has nothing longer."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the widest format of its device."""
    return tensor.to(widest(tensor.device))
