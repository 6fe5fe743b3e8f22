"""Observations, secrets and reconstructions on disk: safetensors, with everything else as JSON in the file's header.

Nothing is ever unpickled. A file from a stranger can name an architecture of ours, but never code to import: a factory
of your own has to be given beside the file.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from gradleak.errors import BadInput
from gradleak.models import MODELS, Architecture
from gradleak.observations import Gradient, Model, Update
from gradleak.reconstruction import Reconstruction
from gradleak.secret import Secret
from gradleak.tensors import Tensors

OBSERVATION, SECRET = "gradleak/observation/1", "gradleak/secret/1"
RECONSTRUCTION = "gradleak/reconstruction/1"
RECIPE = ("learning_rate", "local_steps", "local_batch_size")  # the fields that make a Gradient an Update


def save_observation(observation: Gradient, path: Path) -> None:
    """Write the observation with its provenance: mode, buffers, loss, precision, batch size and a hash of the state."""
    model = observation.model
    tensors = _prefixed(
        "released", {k: v.to(getattr(torch, observation.precision)) for k, v in observation.released.items()}
    )
    tensors |= _prefixed("parameters", model.parameters) | _prefixed("buffers", model.buffers or {})
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
    _write(tensors, OBSERVATION, provenance, path)


def load_observation(path: Path, *, factory: str | None = None) -> Gradient:
    """Read an observation back; BadInput with a sentence if it is damaged or contradicts its own provenance.

    factory: "package.module:factory" of your own architecture, needed when the file's is none of ours.
    """
    tensors, provenance = _read(path, OBSERVATION)
    try:
        name, shape, classes = (provenance["architecture"][key] for key in ("name", "input_shape", "classes"))
        kind, mode, reduction, frozen = (provenance[key] for key in ("kind", "mode", "reduction", "frozen"))
        revealed, state_hash = provenance["buffers_revealed"], provenance["state_hash"]
        batch_size, precision = provenance["batch_size"], provenance["precision"]
        recipe = {key: provenance["recipe"][key] for key in RECIPE} if kind == "Update" else {}
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path} lacks provenance ({error}): it cannot be trusted to be what it says.") from error
    if kind not in ("Gradient", "Update") or mode not in ("train", "eval") or reduction not in ("mean", "sum"):
        raise BadInput(
            f"{path} holds a {kind!r} in mode {mode!r}, reduction {reduction!r}: this version knows no such thing."
        )
    if factory is None and name not in MODELS:
        raise BadInput(
            f"{path} was taken from the model {name!r}, which is none of ours: name your factory with --model."
        )
    architecture = Architecture(name, tuple(shape), classes)
    module = Architecture(factory or name, tuple(shape), classes).build(seed=0)
    load_state(module, _group(tensors, "parameters") | _group(tensors, "buffers"), partial=not revealed)
    for parameter_name in frozen:
        module.get_parameter(parameter_name).requires_grad_(False)
    model = Model.of(module, architecture, mode=mode, reduction=reduction, reveal_buffers=revealed)
    if model.state_hash() != state_hash:
        raise BadInput(
            f"{path} holds another state ({model.state_hash()[:12]}) than its provenance ({state_hash[:12]}): it was altered."
        )
    released = {
        key: value.float() if value.dtype.itemsize < 4 else value for key, value in _group(tensors, "released").items()
    }
    shared: dict[str, Any] = {"model": model, "released": released, "batch_size": batch_size, "precision": precision}
    shared["labels"] = tensors.get("labels")
    return Update(**shared, **recipe) if kind == "Update" else Gradient(**shared)


def has_provenance(path: Path) -> bool:
    """Whether the file was written by `save_observation`; False for a plain {name: tensor} file."""
    return "schema" in _open(path)[1]


def check_provenance(observation: Gradient, *, weights: Path | None = None, mode: str | None = None) -> None:
    """BadInput if the weights or the mode that the user believes in are not those the observation was taken at."""
    model = observation.model
    if mode is not None and mode != model.mode:
        raise BadInput(
            f"The observation was taken in {model.mode} mode, not in {mode} mode: the gradients of the two differ."
        )
    if weights is not None:
        for name, tensor in load_tensors(weights).items():
            known = model.parameters.get(name, (model.buffers or {}).get(name))
            if known is not None and not (known.shape == tensor.shape and torch.equal(known, tensor)):
                raise BadInput(f"{weights} is not the state that the observation was taken at: {name} differs.")


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
    return _open(path)[0]


def save_secret(secret: Secret, path: Path) -> None:
    """Write what only the audit may open."""
    _write({"images": secret.images, "labels": secret.labels}, SECRET, {"source": secret.source}, path)


def load_secret(path: Path) -> Secret:
    """Read a secret back; BadInput if the file is something else."""
    tensors, about = _read(path, SECRET)
    return Secret(tensors["images"], tensors["labels"], about.get("source", ""))


def save_reconstruction(reconstruction: Reconstruction, path: Path) -> None:
    """Write what an attack returned."""
    about = {key: getattr(reconstruction, key) for key in ("residual", "status", "iterations", "trace")}
    _write({"images": reconstruction.images, "labels": reconstruction.labels}, RECONSTRUCTION, about, path)


def load_reconstruction(path: Path) -> Reconstruction:
    """Read a reconstruction back; BadInput if the file is something else."""
    tensors, about = _read(path, RECONSTRUCTION)
    about["trace"] = [(int(step), float(value)) for step, value in about["trace"]]
    return Reconstruction(images=tensors["images"], labels=tensors["labels"], **about)


def _write(tensors: Tensors, schema: str, about: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    header = {"schema": schema, "gradleak": json.dumps(about)}
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, unfinished, metadata=header)
    os.replace(unfinished, path)


def _read(path: Path, schema: str) -> tuple[Tensors, dict[str, Any]]:
    tensors, header = _open(path)
    if header.get("schema") != schema:
        found = header.get("schema", "no gradleak header")
        raise BadInput(f"{path} is not a {schema.split('/')[1]} file of this version ({found}, not {schema}).")
    return tensors, json.loads(header["gradleak"])


def _open(path: Path) -> tuple[Tensors, dict[str, str]]:
    if not path.is_file():
        raise BadInput(f"There is no file {path}.")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise BadInput(
            f"{path} is a pickle (torch.save): it could run code, so it is not opened. Convert it with safetensors.torch.save_file."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise BadInput(f"{path} is not a readable safetensors file ({error}): truncated, or something else.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadInput(
                f"{path}: tensor {name} has entries that are NaN or infinite: nothing can be learnt from it."
            )
    return tensors, header


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _group(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}
