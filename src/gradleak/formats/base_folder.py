"""The model that an adapter belongs to, as a folder: one that `capture adapter` wrote, or one of the transformers library.

A folder of ours holds model.safetensors and gradleak.json, which names the `Architecture`. A folder of transformers
holds config.json, model.safetensors and preprocessor_config.json, whose mean and standard deviation become our first
layer. Only safetensors are read, and no folder can make us import code.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from gradleak.errors import BadInput
from gradleak.formats.json_types import misfit, read_json
from gradleak.formats.observation_file import Blueprint, load_state, load_tensors
from gradleak.modalities.networks import MODELS, Architecture, ImageTransformer
from gradleak.modalities.transformers_networks import BROKEN, one_line, quiet_transformers, structure

SCHEMA = "gradleak/base/1"


class Base(TypedDict):
    """gradleak.json."""

    schema: str
    architecture: Blueprint


def write_base(module: nn.Module, architecture: Architecture, folder: Path) -> None:
    """Save a model so that `read_base` gives it back, and transformers too where the network is one of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(module, ImageTransformer):
        about = {"schema": SCHEMA, "architecture": asdict(architecture)}
        (folder / "gradleak.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / "model.safetensors")
        return
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
    folder = Path(base).expanduser()
    if not folder.is_dir():
        folder = _download(str(base))
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
    if logits.shape != (1, architecture.classes):
        raise BadInput(f"The base model {base} gives {tuple(logits.shape)}, not (1, {architecture.classes}) logits.")
    return module, architecture


def _read_ours(folder: Path, factory: str | None) -> tuple[nn.Module, Architecture]:
    path = folder / "gradleak.json"
    about = read_json(path)
    if wrong := misfit(about, Base, ""):
        raise BadInput(f"{path} does not describe a base model ({wrong}).")
    if about["schema"] != SCHEMA:
        raise BadInput(f"{path} is of the schema {about['schema']!r}, not {SCHEMA!r}: another version wrote it.")
    channels, height, width = about["architecture"]["input_shape"]
    architecture = Architecture(
        about["architecture"]["name"], (channels, height, width), about["architecture"]["classes"]
    )
    if min(channels, height, width, architecture.classes) < 1:
        raise BadInput(f"{path} describes an impossible model: a size or a count is not above zero.")
    if factory is None and architecture.name not in MODELS:
        raise BadInput(f"{path} names the model {architecture.name!r}, which is none of ours: give your factory.")
    module = replace(architecture, name=factory or architecture.name).build(seed=0)
    load_state(module, load_tensors(folder / "model.safetensors"))
    return module, architecture


def _read_transformers(folder: Path) -> tuple[nn.Module, Architecture]:
    from transformers import AutoModelForImageClassification

    module, architecture = structure(folder)
    if not any(folder.glob("model*.safetensors")):
        raise BadInput(
            f"{folder} has no model.safetensors: other formats can run code, so they are not opened. "
            "Save the model again with save_pretrained."
        )
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
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
    except (*BROKEN, SafetensorError) as error:
        raise BadInput(f"The weights in {folder} cannot be loaded: {one_line(error)}.") from error
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
