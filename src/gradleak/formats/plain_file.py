"""A plain safetensors file of somebody's own, {name: tensor}, as an observation of a model that is known besides."""

from pathlib import Path
from typing import Any

import torch

from gradleak.formats.blueprints import check_state, outline
from gradleak.formats.model_folder import is_language_model, read_language_model
from gradleak.formats.observation_file import load_state, load_tensors
from gradleak.modalities.language_models import Task
from gradleak.modalities.networks import MODELS, Architecture
from gradleak.observations import tensor_file
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Weights


def has_folder(model: str) -> bool:
    """Whether the model is the folder of a language model, which comes with its parameters."""
    return is_language_model(Path(model))


def read_of_language_model(path: Path, folder: Path, task: Task, batch_size: int) -> Observation[Any]:
    """{name: gradient} of the language model in a folder."""
    return read_gradient(path, read_language_model(folder, task), batch_size)


def read_of_network(
    path: Path, name: str, shape: tuple[int, int, int], classes: int, weights: Path | None, mode: Mode, batch_size: int
) -> Observation[Any]:
    """{name: gradient} of a network at these weights; where none are given, the file holds the weights of a trained one, which
    are all that was released."""
    architecture = Architecture(name, shape, classes)
    state = load_tensors(path if weights is None else weights)
    if name in MODELS:
        check_state(outline(architecture), state)
    module = architecture.build(0)
    load_state(module, state)
    model = Model.of(module, architecture, mode=mode)
    model.check_works()
    if weights is None:
        return Observation(model=model, release=Weights(), released=model.parameters, batch_size=batch_size)
    return read_gradient(path, model, batch_size)


def read_gradient(path: Path, model: Model[Any], batch_size: int) -> Observation[Any]:
    """{name: gradient}, in whatever number format it is; BadInput for whole ones."""
    released = load_tensors(path)
    precision = min((t.dtype for t in released.values()), key=lambda dtype: dtype.itemsize, default=torch.float32)
    return Observation(
        model=model,
        released={name: tensor.float() for name, tensor in tensor_file.floating(released, path).items()},
        batch_size=batch_size,
        precision=str(precision).removeprefix("torch."),
    )
