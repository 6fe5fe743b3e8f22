"""What an attack returned, on disk: safetensors where it is pictures, to start another search from."""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.errors import BadInput, checked
from gradleak.observations import tensor_file

SCHEMA, OLD = "gradleak/reconstruction/2", "gradleak/reconstruction/1"


class About(msgspec.Struct, frozen=True):
    """The header of a reconstruction."""

    residual: float | None
    status: str
    iterations: int = 0
    trace: list[tuple[int, float | None]] = []
    outcome: str = Outcome.CLOSE.name
    proven: list[bool] = []
    bag: list[int] = []
    tokens: list[list[int]] | None = None


def save_reconstruction(found: Reconstruction, path: Path) -> None:
    """Write what an attack returned."""
    given = {"labels": found.labels, "spread": found.spread}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    about: dict[str, Any] = {"residual": found.residual, "status": found.status, "iterations": found.iterations}
    about |= {"trace": found.trace, "outcome": found.outcome.name, "proven": found.proven, "bag": found.bag}
    if isinstance(found.value, Tensor):
        tensors["images"] = found.value
    else:
        about["tokens"] = found.value
    tensor_file.write(tensors, SCHEMA, about, path, private=True)


def load_reconstruction(path: Path) -> Reconstruction:
    """Read a reconstruction of pictures back; BadInput if the file is something else."""
    tensors, header = tensor_file.open_tensors(path)
    schema = OLD if header.get("schema") == OLD else SCHEMA
    about = checked(tensor_file.described(header, schema, path), About, f"{path} is damaged")
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or labels is None:
        raise BadInput(f"{path} holds no pictures with their labels: no search begins at it.")
    apart = tensors.get("spread", images)
    fits = labels.shape == images.shape[:1] and apart.shape == images.shape
    if images.ndim != 4 or not fits or not images.numel() or labels.dtype != torch.int64:
        raise BadInput(f"{path} is damaged: it holds no pictures with their labels.")
    return Reconstruction(
        value=tensor_file.floating({"images": images}, path)["images"],
        labels=labels,
        residual=float("nan") if about.residual is None else about.residual,
        status=about.status,
        outcome=Outcome.__members__.get(about.outcome, Outcome.CLOSE),
        iterations=about.iterations,
        trace=[(step, float("nan") if value is None else value) for step, value in about.trace],
        spread=tensors.get("spread"),
    )
