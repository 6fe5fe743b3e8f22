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
from gradleak.modalities.pictures import LONGEST_SIDE, MOST_CLASSES
from gradleak.modalities.transformers_networks import LARGEST, check_sizes, one_line, quiet_transformers, refusing
from gradleak.observations.tensors import Tensors

SPECIAL = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
Side = Annotated[int, Meta(ge=1, le=LONGEST_SIDE)]
PROBE = "Any text, to see whether the tokenizer works."


class PictureBlueprint(msgspec.Struct, frozen=True):
    """An `Architecture` as JSON."""

    name: Annotated[str, Meta(max_length=1_000)]
    input_shape: tuple[Side, Side, Side]
    classes: Annotated[int, Meta(ge=1, le=MOST_CLASSES)]


Id = Annotated[int, Meta(ge=0, le=LARGEST)]


class AddedToken(msgspec.Struct, frozen=True):
    """What matters of a token beside the vocabulary."""

    id: Id


class Vocabulary(msgspec.Struct, frozen=True):
    """{token: id}, or of some kinds of models a list."""

    vocab: dict[str, Id] | list[Any]


class TokenizerFile(msgspec.Struct, frozen=True):
    """What matters in tokenizer.json."""

    model: Vocabulary
    added_tokens: list[AddedToken] | None = None


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
    if factory is None:
        check_state(outline(architecture), parameters, partial=True)
    return replace(architecture, name=known.name if factory is None else factory).build(seed=0), architecture


def outline(architecture: Architecture) -> nn.Module:
    """The network of a name of ours without any numbers: whatever its size, it costs nothing."""
    with torch.device("meta"):
        return architecture.build(seed=0)


def check_state(module: nn.Module, tensors: Tensors, *, partial: bool = False) -> None:
    """BadInput naming the first tensor that is no parameter or buffer of the module, or does not fit it.

    partial: buffers may be missing.
    """
    parameters = dict(module.named_parameters())
    state = {**parameters, **{name: b for name, b in module.named_buffers() if name in module.state_dict()}}
    for name, tensor in tensors.items():
        if name not in state:
            raise BadInput(
                f"The weights hold {name[:120]}, which the model does not have: they belong to another architecture."
            )
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(tensor.shape)} in the weights and {tuple(state[name].shape)} in the model"
            raise BadInput(f"Tensor {name} is {shapes}: the weights belong to another architecture.")
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise BadInput(f"Tensor {name} holds {tensor.dtype} numbers: the weights belong to another architecture.")
    for name in parameters if partial else state:
        if name not in tensors:
            raise BadInput(f"The weights lack {name}, which the model needs: they belong to another architecture.")


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
    with refusing(f"{where} holds no model that transformers can build"):
        config = AutoConfig.for_model(**settings)
        classes = int(config.num_labels or 2)
    tokenizer = working_tokenizer(
        parsed(known.tokenizer, f"{where} holds no tokenizer"),
        lambda: kind(tokenizer_object=Tokenizer.from_str(known.tokenizer), **known.special),
        config,
        where,
    )
    with torch.device("meta"):
        shapes = build(config, known.task, classes=classes, tokenizer=tokenizer, seed=0)[0]
    check_state(shapes, parameters, partial=True)
    module, config = build(config, known.task, classes=classes, tokenizer=tokenizer, seed=0)
    return module, LanguageArchitecture(known.name, config, known.task, tokenizer)


def working_tokenizer(settings: Any, make: Callable[[], Any], config: Any, where: str) -> Any:
    """What `make` returns; BadInput where it is no fast tokenizer, cannot read a text, or has tokens that the model has not.

    settings: its tokenizer.json, of which nothing is made before its numbers are known to be small; None where there is none, and
    a list of words is read.
    """
    if settings is not None:
        checked(settings, TokenizerFile, f"{where} holds no tokenizer that can be read")
    try:
        with quiet_transformers():
            tokenizer = make()
            check_templates(json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"])
            tokenizer.decode(tokenizer(PROBE)["input_ids"])
            largest = max(tokenizer.get_vocab().values())
            size = int(config.vocab_size)
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BadInput(f"{where} holds no tokenizer that can be read: {one_line(error)}.") from error
    if largest >= size:
        raise BadInput(
            f"{where} has a token of number {largest:,} and a model of {size:,}: they do not belong together."
        )
    return tokenizer


def check_templates(processor: Any) -> None:
    """KeyError where a template has special tokens that it does not define: the library would print a panic."""
    for inner in (processor or {}).get("processors", []):
        check_templates(inner)
    pieces = [piece for name in ("single", "pair") for piece in (processor or {}).get(name, [])]
    for token in [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]:
        processor["special_tokens"][token]


BLUEPRINTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., tuple[nn.Module, Any]]]] = {
    Architecture.modality: (write_pictures, build_pictures),
    LanguageArchitecture.modality: (write_texts, build_texts),
}
