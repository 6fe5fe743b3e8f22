"""A plain safetensors file of somebody's own, {name: tensor}, as an observation of a model that is known besides."""

from pathlib import Path
from typing import Any

import torch

from gradleak.errors import BadInput
from gradleak.formats.observation_file import load_tensors
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Weights


def read_gradient(path: Path, model: Model[Any], batch_size: int) -> Observation[Any]:
    """{name: gradient}, in whatever number format it is; BadInput for whole numbers."""
    released = load_tensors(path)
    precision = min((t.dtype for t in released.values()), key=lambda dtype: dtype.itemsize, default=torch.float32)
    if not precision.is_floating_point:
        raise BadInput(f"{path} holds {precision} numbers, which are no gradient.")
    return Observation(
        model=model,
        released={name: tensor.float() for name, tensor in released.items()},
        batch_size=batch_size,
        precision=str(precision).removeprefix("torch."),
    )


def published(model: Model[Any], batch_size: int) -> Observation[Any]:
    """The parameters of a trained model, which are all that was released."""
    return Observation(model=model, release=Weights(), released=model.parameters, batch_size=batch_size)
