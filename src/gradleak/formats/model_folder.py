"""The model that an adapter belongs to, or that a victim trains, as a folder: one that `capture adapter` wrote, or one of the
transformers library, of pictures or of texts.

A folder of ours holds model.safetensors and gradleak.json, which names the `Architecture`. A folder of transformers holds
config.json and model.safetensors; of pictures preprocessor_config.json, whose mean and standard deviation become our first
layer; of texts tokenizer.json. Only safetensors are read, and no folder can make us import code.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from gradleak.errors import BadInput, checked, read_json, shortened
from gradleak.formats.blueprints import PictureBlueprint, check_state, outline, working_tokenizer
from gradleak.formats.observation_file import load_state, load_tensors
from gradleak.modalities.language_models import LanguageArchitecture, Task, build
from gradleak.modalities.networks import MODELS, Architecture, ImageTransformer
from gradleak.modalities.transformers_networks import (
    BROKEN,
    one_line,
    quiet_transformers,
    read_config,
    refusing,
    structure,
)
from gradleak.observations.model import LanguageModel, Model
from gradleak.observations.tensors import Tensors

SCHEMA = "gradleak/base/1"
MOST_FRESH = 2**28  # numbers of a head that is not in the weights


class Base(msgspec.Struct, frozen=True):
    """gradleak.json."""

    schema: str
    architecture: PictureBlueprint


def is_language_model(folder: Path) -> bool:
    """Whether this is the folder of a transformers model with a tokenizer."""
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def read_model(base: str | Path, *, factory: str | None = None, task: Task | None = None) -> Model[Any]:
    """The model in a folder or, by its name, on the Hugging Face hub, in eval mode.

    task: of a language model, classification if none is given. Raises BadInput for that of another model, and as `read_base` and
    `read_language_model`.
    """
    folder = located(base)
    if is_language_model(folder):
        return read_language_model(folder, task or "classification")
    if task is not None:
        raise BadInput(f"{base} holds no language model, and a task (--task) says nothing about another: leave it out.")
    return Model.of(*read_base(folder, factory=factory))


def located(base: str | Path) -> Path:
    """The folder, or that of a hub name's local copy."""
    folder = Path(os.path.expanduser(base))
    return folder if folder.is_dir() else _download(str(base))


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
    folder = located(base)
    if (folder / "config.json").is_file():
        module, architecture = _read_transformers(folder)
    elif (folder / "gradleak.json").is_file():
        module, architecture = _read_ours(folder, factory)
    else:
        raise BadInput(
            f"{base} is no folder of a base model: it has neither config.json (transformers) nor gradleak.json (ours)."
        )
    for name, tensor in module.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(f"The base model {base} has entries in {name} that are NaN or infinite.")
    module.eval()
    try:
        with torch.no_grad():
            logits = module(torch.zeros(1, *architecture.input_shape))
    except BROKEN as error:
        raise BadInput(f"The base model {base} fails on a picture: {one_line(error)}.") from error
    if not bool(logits.isfinite().all()):
        raise BadInput(f"The base model {base} gives logits that are NaN or infinite.")
    if logits.shape != (1, architecture.classes):
        raise BadInput(f"The base model {base} gives {tuple(logits.shape)}, not (1, {architecture.classes}) logits.")
    return module, architecture


def read_language_model(folder: Path, task: Task, *, classes: int = 2, seed: int = 0) -> LanguageModel:
    """The model of a folder with a head for the task; a head that the folder lacks is initialised from the seed.

    Raises BadInput where there is no such folder, transformers cannot build it, weights are pickles or do not fit, or the
    tokenizer belongs to another model.
    """
    from transformers import AutoTokenizer

    if not is_language_model(folder):
        raise BadInput(f"{folder} holds no language model: it needs config.json, model.safetensors and tokenizer.json.")
    config = read_config(folder, f"{folder} holds no language model that transformers can read")
    tokenizer = working_tokenizer(
        read_json(folder / "tokenizer.json"),
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True),
        config,
        str(folder),
    )
    if task == "classification" and str(config.architectures).rstrip("']").endswith("ForSequenceClassification"):
        classes = config.num_labels
    with torch.device("meta"):
        shapes = build(config, task, classes=classes, tokenizer=tokenizer, seed=seed)[0]
    state = _own(load_tensors(folder / "model.safetensors"), shapes, folder)
    module, config = build(config, task, classes=classes, tokenizer=tokenizer, seed=seed)
    module.load_state_dict(state, strict=False)
    model = Model.of(module, LanguageArchitecture(str(folder), config, task, tokenizer))
    model.check_works()
    return model


def _own(stored: Tensors, module: Any, folder: Path) -> Tensors:
    """{name in the module: stored tensor}, of those that it has; BadInput where one does not fit, or the body lacks one."""
    expected, base, state = module.state_dict(), f"{module.base_model_prefix}.", {}
    for name, tensor in stored.items():
        plain = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        key = plain if plain in expected else base + plain
        if key in expected:
            if expected[key].shape != tensor.shape or not tensor.is_floating_point():
                shapes = f"{tuple(tensor.shape)} in the weights and {tuple(expected[key].shape)} in the model"
                raise BadInput(f"Tensor {name} of {folder} is {shapes}: they do not belong together.")
            state[key] = tensor.to(expected[key].dtype)
    missing = [name for name, _ in module.named_parameters() if name.startswith(base) and name not in state]
    # A pooler is a head in all but name: encoders that were not trained with one come without it.
    missing = [name for name in missing if ".pooler." not in name]
    if missing:
        raise BadInput(f"The weights of {folder} lack {missing[0]}: they belong to another architecture.")
    if sum(tensor.numel() for name, tensor in expected.items() if name not in state) > MOST_FRESH:
        raise BadInput(f"The weights of {folder} are far fewer than config.json says: they do not belong together.")
    return state


def _read_ours(folder: Path, factory: str | None) -> tuple[nn.Module, Architecture]:
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
    if factory is None:
        check_state(outline(architecture), state)
    module = replace(architecture, name=architecture.name if factory is None else factory).build(seed=0)
    load_state(module, state)
    return module, architecture


def _read_transformers(folder: Path) -> tuple[nn.Module, Architecture]:
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
    with refusing(f"The weights in {folder} cannot be loaded"):
        module.network, info = AutoModelForImageClassification.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, and better
        )
    if misfits := sorted(info["mismatched_keys"]):
        name, found, needed = misfits[0]
        raise BadInput(
            f"The weights in {folder} do not fit config.json: {name} is {tuple(found)}, not {tuple(needed)}."
        )
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"The weights in {folder} lack {missing[0]}: it would be random, and no adapter was trained on that."
        )
    return module, architecture


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with quiet_transformers():
            return Path(snapshot_download(name, allow_patterns=["*config.json", "model*.safetensors*"]))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{name!r} is no folder here, and it cannot be had from the Hugging Face hub: {one_line(error)}. "
            "Give the folder of the base model."
        ) from error
