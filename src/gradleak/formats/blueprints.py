"""The public part of a model on disk: one entry per kind of data, {modality: how to write it, how to build it again}."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import nn

from gradleak.errors import BadInput, checked, parsed, shortened
from gradleak.modalities.language_models import LanguageArchitecture, Task, build
from gradleak.modalities.networks import MODELS, Architecture
from gradleak.modalities.transformers_networks import BROKEN, one_line
from gradleak.observations.tensors import Tensors

SPECIAL = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
MOST_LAYERS = 1_000
LARGEST = 2**24  # a number in a configuration above which nothing of it can be meant
Side = Annotated[int, Meta(ge=1, le=4_096)]


class PictureBlueprint(msgspec.Struct, frozen=True):
    """An `Architecture` as JSON."""

    name: Annotated[str, Meta(max_length=1_000)]
    input_shape: tuple[Side, Side, Side]
    classes: Annotated[int, Meta(ge=1, le=1_000_000)]


class TextBlueprint(msgspec.Struct, frozen=True):
    """A `LanguageArchitecture` as JSON."""

    name: str
    config: str
    tokenizer: str
    special: Mapping[str, str]
    task: Task


def write_pictures(architecture: Architecture) -> dict[str, Any]:
    """As JSON."""
    return {"name": architecture.name, "input_shape": architecture.input_shape, "classes": architecture.classes}


def build_pictures(about: Any, parameters: Tensors, factory: str | None, where: str) -> tuple[nn.Module, Architecture]:
    """(module, architecture), freshly initialised. A file names an architecture of ours, never code to import."""
    known = checked(about, PictureBlueprint, f"{where} has no usable provenance")
    if factory is None and known.name not in MODELS:
        raise BadInput(
            f"{where} was taken from the model {shortened(known.name)!r}, which is none of ours: name your factory, or its "
            "folder, with --model."
        )
    architecture = Architecture(known.name, known.input_shape, known.classes)
    if sum(p.numel() for p in parameters.values()) < known.classes:
        raise BadInput(f"{where} has impossible provenance: fewer numbers than classes.")
    return replace(architecture, name=factory or known.name).build(seed=0), architecture


def write_texts(architecture: LanguageArchitecture) -> dict[str, Any]:
    """As JSON, the tokenizer included."""
    tokenizer = architecture.tokenizer
    return {
        "name": architecture.name,
        "config": architecture.config.to_json_string(use_diff=False),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(getattr(tokenizer, name)) for name in SPECIAL if getattr(tokenizer, name) is not None},
        "task": architecture.task,
    }


def build_texts(
    about: Any, parameters: Tensors, factory: str | None, where: str
) -> tuple[nn.Module, LanguageArchitecture]:
    """(module, architecture), freshly initialised, once its sizes are known to be those of the stored parameters."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, PreTrainedTokenizerFast

    known = checked(about, TextBlueprint, f"{where} has no usable provenance")
    settings = parsed(known.config, f"{where} holds no configuration")
    if not isinstance(settings, dict) or set(known.special) - set(SPECIAL):
        raise BadInput(f"{where} holds no configuration of a language model.")
    check_sizes(settings, where)
    kind: Any = PreTrainedTokenizerFast
    try:
        config = AutoConfig.for_model(**settings)
        tokenizer = kind(tokenizer_object=Tokenizer.from_str(known.tokenizer), **known.special)
        classes = int(config.num_labels or 2)
        with torch.device("meta"):
            sizes = {
                n: p.shape
                for n, p in build(config, known.task, classes=classes, tokenizer=tokenizer, seed=0)[
                    0
                ].named_parameters()
            }
    except (*BROKEN, MemoryError, RecursionError) as error:
        raise BadInput(f"{where} holds no model that transformers can build: {one_line(error)}.") from error
    except Exception as error:
        raise BadInput(f"{where} holds no tokenizer that can be read: {one_line(error)}.") from error
    for name, shape in sizes.items():
        if name not in parameters or parameters[name].shape != shape:
            raise BadInput(
                f"{where} is damaged: parameter {name} is missing or has another shape than its config says."
            )
    module, config = build(config, known.task, classes=classes, tokenizer=tokenizer, seed=0)
    return module, LanguageArchitecture(known.name, config, known.task, tokenizer)


def check_sizes(settings: Any, where: str) -> None:
    """BadInput for a configuration whose sizes nobody means, before anything of that size is made."""
    for key, value in settings.items():
        few = "layer" in key or "depth" in key
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, int) and abs(n) > (MOST_LAYERS if few else LARGEST) for n in numbers):
            raise BadInput(
                f"{where} holds an impossible configuration: {shortened(key)} is {shortened(json.dumps(value))}."
            )
        if isinstance(value, dict):
            check_sizes(value, where)


BLUEPRINTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., tuple[nn.Module, Any]]]] = {
    Architecture.modality: (write_pictures, build_pictures),
    LanguageArchitecture.modality: (write_texts, build_texts),
}
