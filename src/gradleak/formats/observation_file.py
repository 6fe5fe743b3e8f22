"""Observations, secrets and reconstructions on disk: safetensors, with everything else as JSON in the file's header.

Nothing is ever unpickled. A file from a stranger can name an architecture of ours, but never code to import: a factory
of your own has to be given beside the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import torch
from torch import nn

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.errors import BadInput
from gradleak.formats.json_types import misfit
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import MODELS, Architecture
from gradleak.observations import tensor_file
from gradleak.observations.observation import Adapter, Gradient, Mode, Model, Reduction, Update
from gradleak.observations.tensors import Tensors
from gradleak.observations.trained_weights import Stationarity, Weights
from gradleak.observations.training import Optimizer, Recipe

OBSERVATION, SECRET = "gradleak/observation/1", "gradleak/secret/1"
RECONSTRUCTION = "gradleak/reconstruction/1"
RECIPE = ("learning_rate", "local_steps", "local_batch_size")  # the fields that make a Gradient an Update


class Blueprint(TypedDict):
    """An `Architecture` as JSON."""

    name: str
    input_shape: tuple[int, int, int]
    classes: int


class LocalTraining(TypedDict):
    """The local training behind an Update."""

    learning_rate: float
    local_steps: int
    local_batch_size: int


class Training(TypedDict):
    """A `gradleak.observations.training.Recipe` as JSON."""

    optimizer: Optimizer
    learning_rate: float
    steps: int
    batch_size: int | None


class LowRank(TypedDict):
    """What makes a Gradient an Adapter, apart from its tensors."""

    scaling: Mapping[str, float]
    recipe: Training | None
    dropout: NotRequired[float]


class Progress(TypedDict):
    """A `Stationarity` as JSON."""

    epochs: int
    loss: float
    gradient_norm: float
    kkt_residual: float


class Trained(TypedDict):
    """What makes a Gradient Weights, apart from its tensors."""

    weight_decay: float | None
    stationarity: Progress | None


class Provenance(TypedDict):
    """How an observation was taken: the JSON in its file's header."""

    kind: Literal["Gradient", "Update", "Adapter", "Weights"]
    architecture: Blueprint
    mode: Mode
    reduction: Reduction
    frozen: Sequence[str]
    buffers_revealed: bool
    state_hash: str
    batch_size: int | None
    precision: Literal["float64", "float32", "float16", "bfloat16"]
    recipe: NotRequired[LocalTraining]
    adapter: NotRequired[LowRank]
    weights: NotRequired[Trained]


def save_observation(observation: Gradient, path: Path) -> None:
    """Write the observation with its provenance: mode, buffers, loss, precision, batch size and a hash of the state."""
    model = observation.model
    # The change of a factor is the difference of two numbers of that precision: it may need more digits.
    precision = torch.float32 if isinstance(observation, Adapter) else getattr(torch, observation.precision)
    tensors = tensor_file.prefixed("released", {k: v.to(precision) for k, v in observation.released.items()})
    tensors |= tensor_file.prefixed("parameters", model.parameters) | tensor_file.prefixed(
        "buffers", model.buffers or {}
    )
    if observation.labels is not None:
        tensors["labels"] = observation.labels
    provenance = {
        "kind": type(observation).__name__,
        "architecture": asdict(model.architecture),
        "mode": model.mode,
        "reduction": model.reduction,
        "frozen": model.frozen,
        "buffers_revealed": model.buffers is not None,
        "state_hash": model.state_hash(),
        "batch_size": observation.batch_size,
        "precision": observation.precision,
        "torch": torch.__version__,
    }
    if isinstance(observation, Update):
        provenance["recipe"] = {name: getattr(observation, name) for name in RECIPE}
    if isinstance(observation, Adapter):
        recipe = observation.recipe and asdict(observation.recipe)
        provenance["adapter"] = {"scaling": observation.scaling, "recipe": recipe, "dropout": observation.dropout}
        tensors |= tensor_file.prefixed("start", observation.start)
    if isinstance(observation, Weights):
        done = observation.stationarity and asdict(observation.stationarity)
        provenance["weights"] = {"weight_decay": observation.weight_decay, "stationarity": done}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("released/")}
        tensors |= tensor_file.prefixed("initial", observation.initial or {})
    tensor_file.write(tensors, OBSERVATION, provenance, path)


def load_observation(path: Path, *, factory: str | None = None) -> Gradient:
    """Read an observation back; BadInput with a sentence if it is damaged or contradicts its own provenance.

    factory: "package.module:factory" of your own architecture, or the folder of a transformers model, needed when the
    file's is none of ours.
    """
    tensors, provenance = tensor_file.read(path, OBSERVATION)
    if wrong := misfit(provenance, Provenance, ""):
        raise BadInput(f"{path} has no usable provenance ({wrong}): it cannot be trusted to be what it says.")
    about = cast(Provenance, provenance)
    name, shape, classes = (
        about["architecture"]["name"],
        about["architecture"]["input_shape"],
        about["architecture"]["classes"],
    )
    recipe: dict[str, Any] = {key: provenance["recipe"][key] for key in RECIPE} if "recipe" in about else {}
    batch_size = 1 if about["batch_size"] is None else about["batch_size"]
    extras = {"Update": "recipe" in about, "Adapter": "adapter" in about, "Weights": "weights" in about}
    if min(*shape, classes, batch_size, *recipe.values()) <= 0 or any(
        (about["kind"] == k) != v for k, v in extras.items()
    ):
        raise BadInput(f"{path} has impossible provenance: a size, a count or a rate is not above zero, or missing.")
    if factory is None and name not in MODELS:
        raise BadInput(
            f"{path} was taken from the model {name!r}, which is none of ours: name your factory, or its folder, with --model."
        )
    architecture = Architecture(name, (shape[0], shape[1], shape[2]), classes)
    module = replace(architecture, name=factory or name).build(seed=0)
    if about["kind"] == "Weights":  # which are released in the precision that they were trained in
        module = module.to(getattr(torch, about["precision"]))
    load_state(
        module,
        tensor_file.group(tensors, "parameters") | tensor_file.group(tensors, "buffers"),
        partial=not about["buffers_revealed"],
    )
    own = dict(module.named_parameters())
    if unknown := [key for key in about["frozen"] if key not in own]:
        raise BadInput(f"{path} has impossible provenance: {unknown[0]} is said to be frozen, but the model has none.")
    for key, parameter in own.items():
        parameter.requires_grad_(key not in about["frozen"])
    model = Model.of(
        module,
        architecture,
        mode=about["mode"],
        reduction=about["reduction"],
        reveal_buffers=about["buffers_revealed"],
    )
    if model.state_hash() != about["state_hash"]:
        hashes = f"{model.state_hash()[:12]} than its provenance ({about['state_hash'][:12]})"
        raise BadInput(f"{path} holds another state ({hashes}: it was altered after it was written.")
    released = {
        key: t.float() if t.dtype.itemsize < 4 else t for key, t in tensor_file.group(tensors, "released").items()
    }
    shared: dict[str, Any] = {"model": model, "released": released, "labels": tensors.get("labels")}
    shared |= {"batch_size": about["batch_size"], "precision": about["precision"]}
    match about["kind"]:
        case "Update":
            return Update(**shared, **recipe)
        case "Weights":
            return _weights(shared, tensor_file.group(tensors, "initial"), about["weights"])
        case "Adapter":
            return _adapter(shared, tensor_file.group(tensors, "start"), about["adapter"], path)
        case "Gradient":
            return Gradient(**shared)


def _adapter(shared: dict[str, Any], start: Tensors, about: LowRank, path: Path) -> Adapter:
    factors = {f"{module}.{factor}" for module in about["scaling"] for factor in ("lora_A", "lora_B")}
    if not factors or set(start) != factors or any(tensor.ndim < 2 for tensor in start.values()):
        raise BadInput(f"{path} does not hold the start of both factors of every adapted module: it is damaged.")
    for name, tensor in shared["released"].items():
        if name not in start or tensor.shape != start[name].shape:
            raise BadInput(f"{path} is damaged: the change of {name} does not have the shape of its start.")
    recipe = Recipe(**about["recipe"]) if about["recipe"] else None
    return Adapter(
        **shared, start=start, scaling=dict(about["scaling"]), recipe=recipe, dropout=about.get("dropout", 0.0)
    )


def _weights(shared: dict[str, Any], initial: Tensors, about: Trained) -> Weights:
    done = None if about["stationarity"] is None else Stationarity(**about["stationarity"])
    shared |= {"released": shared["model"].parameters}
    return Weights(**shared, initial=initial or None, weight_decay=about["weight_decay"], stationarity=done)


def has_provenance(path: Path) -> bool:
    """Whether the file was written by `save_observation`; False for a plain {name: tensor} file."""
    return "schema" in tensor_file.open_tensors(path)[1]


def check_provenance(observation: Gradient, *, weights: Path | None = None, mode: str | None = None) -> None:
    """BadInput if the weights or the mode that the user believes in are not those the observation was taken at."""
    model = observation.model
    if mode is not None and mode != model.mode:
        raise BadInput(
            f"The observation was taken in {model.mode} mode, not in {mode} mode: the gradients of the two differ."
        )
    if weights is not None:
        given = load_tensors(weights)
        for name, known in {**model.parameters, **(model.buffers or {})}.items():
            if name not in given or known.shape != given[name].shape or not torch.equal(known, given[name]):
                what = "differs" if name in given else "is missing"
                raise BadInput(f"{weights} is not the state that the observation was taken at: {name} {what}.")


def load_state(module: nn.Module, tensors: Tensors, *, partial: bool = False) -> None:
    """Load parameters and buffers into a module; BadInput names the first tensor that does not fit.

    partial: buffers may be missing.
    """
    own = module.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise BadInput(
                f"The weights hold {name}, which the model does not have: they belong to another architecture."
            )
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)} in the weights and {tuple(own[name].shape)} in the model"
            raise BadInput(f"Tensor {name} is {shapes}: the weights belong to another architecture.")
    needed = dict(module.named_parameters()) if partial else own
    for name in needed:
        if name not in tensors:
            raise BadInput(f"The weights lack {name}, which the model needs: they belong to another architecture.")
    module.load_state_dict(tensors, strict=False)


def load_tensors(path: Path) -> Tensors:
    """Any safetensors file as {name: tensor}; BadInput for a pickle, a truncated file, or entries that are not finite."""
    return tensor_file.open_tensors(path)[0]


def save_secret(secret: Secret, path: Path) -> None:
    """Write what only the audit may open."""
    tensor_file.write({"images": secret.images, "labels": secret.labels}, SECRET, {"source": secret.source}, path)


def load_secret(path: Path) -> Secret:
    """Read a secret back; BadInput if the file is something else."""
    tensors, about = tensor_file.read(path, SECRET, "images", "labels")
    return Secret(tensors["images"], tensors["labels"], about.get("source", ""))


def save_reconstruction(reconstruction: Reconstruction, path: Path) -> None:
    """Write what an attack returned."""
    about = {key: getattr(reconstruction, key) for key in ("residual", "status", "iterations", "trace")}
    tensor_file.write({"images": reconstruction.images, "labels": reconstruction.labels}, RECONSTRUCTION, about, path)


def load_reconstruction(path: Path) -> Reconstruction:
    """Read a reconstruction back; BadInput if the file is something else."""
    tensors, about = tensor_file.read(path, RECONSTRUCTION, "images", "labels")
    about["trace"] = [(int(step), float(value)) for step, value in about["trace"]]
    return Reconstruction(images=tensors["images"], labels=tensors["labels"], **about)
