"""An observation on disk: safetensors, with everything else as JSON in the file's header.

Nothing is ever unpickled. A file from a stranger can name an architecture of ours, but never code to import: a factory
of your own has to be given beside the file. Releases, losses and defenses are written field by field, whatever kind they are.
"""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
import torch
from msgspec import Meta

from gradleak.errors import BadInput, checked, shortened
from gradleak.formats.blueprints import BLUEPRINTS, check_state
from gradleak.formats.old_observations import OLD, modern
from gradleak.modalities.losses import LOSSES
from gradleak.observations import tensor_file
from gradleak.observations.defense_names import DEFENSES
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import Observation
from gradleak.observations.release import Release
from gradleak.observations.releases import RELEASES
from gradleak.observations.tensors import Tensors

SCHEMA = "gradleak/observation/2"
LEFT_OUT = -100  # the label of a token that no loss is taken of
Precision = Literal["float64", "float32", "float16", "bfloat16"]


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """How an observation was taken: the JSON in its file's header.

    known  names of released tensors that are parameters of the model, and are not stored twice
    """

    release: str
    settings: dict[str, Any]
    modality: str
    blueprint: dict[str, Any]
    mode: Mode
    criterion: dict[str, Any]
    frozen: list[str]
    buffers_revealed: bool
    state_hash: str
    batch_size: Annotated[int, Meta(ge=1, le=1_000_000)] | None
    precision: Precision
    released: list[str] | None = None
    known: list[str] = []
    defenses: list[dict[str, Any]] | None = []
    factor: float = 1.0
    beside: list[str] = []


def save_observation(observation: Observation[Any], path: Path) -> None:
    """Write the observation with its provenance: mode, buffers, loss, precision, batch size and a hash of the state.

    Raises BadInput for a loss or a defense of your own, which files do not know.
    """
    model, precision = observation.model, getattr(torch, observation.precision)
    known = [name for name, tensor in observation.released.items() if tensor is model.parameters.get(name)]
    stored = {name: shortest(t, precision) for name, t in observation.released.items() if name not in known}
    tensors = tensor_file.prefixed("released", stored)
    tensors |= tensor_file.prefixed("parameters", model.parameters)
    tensors |= tensor_file.prefixed("buffers", model.buffers or {})
    if observation.labels is not None:
        tensors["labels"] = observation.labels
    settings = {}
    for field in fields(observation.release):
        value = getattr(observation.release, field.name)
        if is_tensors(observation.release, field.name):
            tensors |= tensor_file.prefixed(field.name, value or {})
        else:
            settings[field.name] = msgspec.to_builtins(value)
    defenses = None if observation.defenses is None else [named(d, DEFENSES, "defense") for d in observation.defenses]
    about = Provenance(
        release=observation.release.name,
        settings=settings,
        modality=model.architecture.modality,
        blueprint=BLUEPRINTS[model.architecture.modality][0](model.architecture),
        mode=model.mode,
        criterion=named(model.criterion, LOSSES, "loss"),
        frozen=list(model.frozen),
        buffers_revealed=model.buffers is not None,
        state_hash=model.state_hash(),
        batch_size=observation.batch_size,
        precision=observation.precision,  # type: ignore[arg-type]
        released=list(observation.released),
        known=known,
        defenses=defenses,
        factor=observation.factor,
        beside=list(observation.beside),
    )
    tensor_file.write(tensors, SCHEMA, msgspec.to_builtins(about) | {"torch": str(torch.__version__)}, path)


def load_observation(path: Path, *, factory: str | None = None) -> Observation[Any]:
    """Read an observation back, of this version or an older one; BadInput with a sentence if it is damaged or contradicts its
    own provenance.

    factory: "package.module:factory" of your own architecture, or the folder of a transformers model, needed when the
    file's is none of ours.
    """
    tensors, header = tensor_file.open_tensors(path)
    schema = header.get("schema", "")
    if schema in OLD:
        about = modern(tensor_file.described(header, schema, path), tensors, schema, path)
    else:
        about = tensor_file.described(header, SCHEMA, path)
    seen = checked(about, Provenance, f"{path} has no usable provenance")
    for name, table in ((seen.release, RELEASES), (seen.modality, BLUEPRINTS)):
        if name not in table:
            raise BadInput(f"{path} has no usable provenance ({shortened(name)[:60]!r} is none of {', '.join(table)}).")
    parameters, buffers = tensor_file.group(tensors, "parameters"), tensor_file.group(tensors, "buffers")
    module, architecture = BLUEPRINTS[seen.modality][1](seen.blueprint, parameters, factory, str(path))
    formats = {tensor.dtype for tensor in parameters.values() if tensor.is_floating_point()}
    module = module.to(formats.pop()) if len(formats) == 1 else module
    load_state(module, parameters | buffers, partial=not seen.buffers_revealed)
    own = dict(module.named_parameters())
    if unknown := [name for name in seen.frozen if name not in own]:
        raise BadInput(f"{path} has impossible provenance: {unknown[0]} is said to be frozen, but the model has none.")
    for name, parameter in own.items():
        parameter.requires_grad_(name not in seen.frozen)
    model = Model.of(
        module,
        architecture,
        mode=seen.mode,
        criterion=built(seen.criterion, LOSSES, f"{path} has no usable loss"),
        reveal_buffers=seen.buffers_revealed,
    )
    if model.state_hash() != seen.state_hash:
        hashes = f"{model.state_hash()[:12]}, its provenance says {seen.state_hash[:12]}"
        raise BadInput(f"{path} holds another state ({hashes}): it was altered after it was written.")
    model = model.to(torch.promote_types(next(iter(model.parameters.values())).dtype, torch.float32))
    model.check_works()
    released = tensor_file.floating(tensor_file.group(tensors, "released"), path)
    released |= {name: model.parameters[name] for name in seen.known if name in model.parameters}
    if missing := [name for name in seen.released or [] if name not in released]:
        raise BadInput(f"{path} lacks what was released of {missing[0]}: it is damaged.")
    defenses = None
    if seen.defenses is not None:
        defenses = tuple(built(d, DEFENSES, f"{path} has no usable defense") for d in seen.defenses)
    return Observation(
        model=model,
        release=release_of(RELEASES[seen.release], seen.settings, tensors, path),
        released=released,
        batch_size=seen.batch_size,
        labels=usable_labels(tensors.get("labels"), model, seen.batch_size, path),
        precision=seen.precision,
        defenses=defenses,
        factor=seen.factor,
        beside=tuple(seen.beside),
    )


def release_of(kind: type[Release], settings: dict[str, Any], tensors: Tensors, path: Path) -> Release:
    """A release out of its plain fields and its groups of tensors."""
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_tensors(kind, field.name):
            if group := tensor_file.group(tensors, field.name):
                values[field.name] = tensor_file.floating(group, path)
        elif field.name in settings:
            what = f"{path} has impossible provenance: {field.name}"
            values[field.name] = checked(settings[field.name], hints[field.name], what)
    try:
        return kind(**values)
    except TypeError as error:
        raise BadInput(f"{path} has impossible provenance: what makes it a release of that kind is missing.") from error


def is_tensors(release: Any, name: str) -> bool:
    """Whether a field of a release holds named tensors."""
    return get_type_hints(release if isinstance(release, type) else type(release))[name] in (Tensors, Tensors | None)


def usable_labels(labels: Any, model: Model[Any], batch_size: int | None, path: Path) -> Any:
    """The labels of a file; BadInput where they are not those of so many inputs of this model."""
    if labels is None:
        return None
    classes, (probe, probed) = model.architecture.classes, model.architecture.probe()
    if probed is None:
        raise BadInput(f"{path} is damaged: it has labels, and what the model was trained for has none.")
    if labels.dtype != torch.int64 or labels.ndim != (1 if classes > 1 else 2) or not labels.numel():
        raise BadInput(f"{path} is damaged: its labels are no class indices.")
    if batch_size is not None and len(labels) != batch_size:
        raise BadInput(f"{path} is damaged: it has {len(labels)} labels for {batch_size} inputs.")
    if classes == 1:  # tokens, where they are not left out
        classes, labels_there = model.logits({}, probe).shape[-1], labels[labels != LEFT_OUT]
    else:
        labels_there = labels
    if labels_there.numel() and (int(labels_there.min()) < 0 or int(labels_there.max()) >= classes):
        raise BadInput(f"{path} is damaged: a label is beyond the model's {classes} classes.")
    return labels


def named(value: Any, table: dict[str, Any], what: str) -> dict[str, Any]:
    """A value of a table as {"name": ..., field: ...}; BadInput for one that the table does not hold."""
    name = next((name for name, kind in table.items() if type(value) is kind), None)
    if name is None:
        raise BadInput(
            f"Files know the {what} {', '.join(table)}, not {type(value).__name__}: keep this one in Python."
        )
    return {"name": name, **msgspec.to_builtins(value)}


def built(about: dict[str, Any], table: dict[str, Any], what: str) -> Any:
    """The value that `named` has written."""
    name = about.get("name")
    if not isinstance(name, str) or name not in table:
        raise BadInput(f"{what} ({shortened(str(name))[:60]!r} is none of {', '.join(table)}).")
    return checked({k: v for k, v in about.items() if k != "name"}, table[name], what)


def shortest(tensor: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """The tensor in the number format of the release, where that loses nothing: a change may need more digits."""
    short = tensor.to(precision)
    return short if torch.equal(short.to(tensor.dtype), tensor) else tensor


def has_provenance(path: Path) -> bool:
    """Whether the file was written by `save_observation`; False for a plain {name: tensor} file."""
    return "schema" in tensor_file.raw_header(path)


def check_provenance(observation: Observation[Any], *, weights: Path | None = None, mode: str | None = None) -> None:
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


def load_state(module: torch.nn.Module, tensors: Tensors, *, partial: bool = False) -> None:
    """Load parameters and buffers into a module; BadInput names the first tensor that does not fit.

    partial: buffers may be missing.
    """
    check_state(module, tensors, partial=partial)
    module.load_state_dict(tensors, strict=False)


def load_tensors(path: Path) -> Tensors:
    """Any safetensors file as {name: tensor}; BadInput for a pickle, a truncated file, or entries that are not finite."""
    return tensor_file.open_tensors(path)[0]
