"""What denoisers share: diffusers where it is installed, and files of tensors that are never unpickled."""

import importlib
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from gradleak.errors import BadInput, shortened


def diffusers() -> Any:
    """The library. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise BadInput('This needs diffusers: pip install "gradleak[diffusion]".') from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file. Raises BadInput for a file that is none or not there."""
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path} is not a safetensors file ({shortened(str(error))}).") from error
