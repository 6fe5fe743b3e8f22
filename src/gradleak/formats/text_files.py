"""Observations of text, and their secrets, on disk: safetensors, with everything else as JSON in the header, the tokenizer
included. Nothing is unpickled, and no code is imported that a file names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import torch

from gradleak.errors import BadInput
from gradleak.formats.json_types import misfit
from gradleak.formats.language_folder import build
from gradleak.formats.observation_file import RECIPE, LocalTraining, Training
from gradleak.formats.secret_file import TextSecret
from gradleak.modalities.transformers_networks import BROKEN, one_line
from gradleak.observations import tensor_file
from gradleak.observations.text import LanguageModel, Task, TextAdapter, TextGradient, TextUpdate
from gradleak.observations.training import Recipe

TEXT, TEXT_SECRET = "gradleak/text-observation/1", "gradleak/text-secret/1"
SPECIAL = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")


class LowRank(TypedDict):
    """What makes a gradient an adapter, apart from its tensors."""

    scaling: Mapping[str, float]
    recipe: Training | None
    gradient: bool


class Provenance(TypedDict):
    """How an observation of text was taken: the JSON in its file's header."""

    kind: Literal["TextGradient", "TextUpdate", "TextAdapter"]
    name: str
    config: str
    tokenizer: str
    special: Mapping[str, str]
    task: Task
    frozen: Sequence[str]
    state_hash: str
    batch_size: int | None
    precision: Literal["float64", "float32", "float16", "bfloat16"]
    recipe: NotRequired[LocalTraining]
    adapter: NotRequired[LowRank]


def save_text_observation(observation: TextGradient, path: Path) -> None:
    """Write the observation with its model, tokenizer and provenance."""
    model = observation.model
    precision = torch.float32 if isinstance(observation, TextAdapter) else getattr(torch, observation.precision)
    tensors = tensor_file.prefixed("released", {k: v.to(precision) for k, v in observation.released.items()})
    tensors |= tensor_file.prefixed("parameters", model.parameters)
    if observation.labels is not None:
        tensors["labels"] = observation.labels
    tokenizer = model.tokenizer
    about: dict[str, Any] = {
        "kind": type(observation).__name__,
        "name": model.name,
        "config": model.config.to_json_string(use_diff=False),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(getattr(tokenizer, name)) for name in SPECIAL if getattr(tokenizer, name) is not None},
        "task": model.task,
        "frozen": model.frozen,
        "state_hash": model.state_hash(),
        "batch_size": observation.batch_size,
        "precision": observation.precision,
        "torch": torch.__version__,
    }
    if isinstance(observation, TextUpdate):
        about["recipe"] = {name: getattr(observation, name) for name in RECIPE}
    if isinstance(observation, TextAdapter):
        about["adapter"] = {
            "scaling": observation.scaling,
            "recipe": observation.recipe and asdict(observation.recipe),
            "gradient": observation.gradient,
        }
        tensors |= tensor_file.prefixed("start", observation.start)
    tensor_file.write(tensors, TEXT, about, path)


def load_text_observation(path: Path) -> TextGradient:
    """Read an observation of text back; BadInput if it is damaged or contradicts its own provenance."""
    tensors, provenance = tensor_file.read(path, TEXT)
    if wrong := misfit(provenance, Provenance, ""):
        raise BadInput(f"{path} has no usable provenance ({wrong}): it cannot be trusted to be what it says.")
    about = cast(Provenance, provenance)
    model = _model(about, tensor_file.group(tensors, "parameters"), path)
    if model.state_hash() != about["state_hash"]:
        raise BadInput(f"{path} holds another state than its provenance says: it was altered after it was written.")
    released = {
        k: t.to(torch.promote_types(t.dtype, torch.float32)) for k, t in tensor_file.group(tensors, "released").items()
    }
    shared: dict[str, Any] = {
        "model": model,
        "released": released,
        "batch_size": about["batch_size"],
        "labels": tensors.get("labels"),
        "precision": about["precision"],
    }
    match about["kind"]:
        case "TextUpdate" if "recipe" in about:
            return TextUpdate(**shared, **{name: provenance["recipe"][name] for name in RECIPE})
        case "TextAdapter" if "adapter" in about:
            recipe = about["adapter"]["recipe"]
            return TextAdapter(
                **shared,
                start=tensor_file.group(tensors, "start"),
                scaling=dict(about["adapter"]["scaling"]),
                recipe=Recipe(**recipe) if recipe else None,
                gradient=about["adapter"]["gradient"],
            )
        case "TextGradient":
            return TextGradient(**shared)
        case _:
            raise BadInput(f"{path} has impossible provenance: what makes it a {about['kind']} is missing.")


def _model(about: Provenance, parameters: dict[str, torch.Tensor], path: Path) -> LanguageModel:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast
    try:
        settings = json.loads(about["config"])
        config = AutoConfig.for_model(**settings)
        backend = Tokenizer.from_str(about["tokenizer"])
        tokenizer = kind(tokenizer_object=backend, **about["special"])
    except BROKEN as error:
        raise BadInput(f"{path} holds no model that transformers can build: {one_line(error)}.") from error
    module, config = build(config, about["task"], classes=config.num_labels or 2, tokenizer=tokenizer, seed=0)
    own = dict(module.named_parameters())
    for name, parameter in own.items():
        if name not in parameters or parameters[name].shape != parameter.shape:
            raise BadInput(f"{path} is damaged: parameter {name} is missing or has another shape than its config says.")
    return LanguageModel(
        about["name"], config, about["task"], {n: parameters[n] for n in own}, tokenizer, module, tuple(about["frozen"])
    )


def save_text_secret(secret: TextSecret, path: Path) -> None:
    """Write what only the audit may open."""
    tensors = {"labels": torch.zeros(0, dtype=torch.long) if secret.labels is None else secret.labels}
    about = {
        "texts": secret.texts,
        "tokens": secret.tokens,
        "source": secret.source,
        "labelled": secret.labels is not None,
    }
    tensor_file.write(tensors, TEXT_SECRET, about, path)


def load_text_secret(path: Path) -> TextSecret:
    """Read a secret of texts back; BadInput if the file is something else."""
    tensors, about = tensor_file.read(path, TEXT_SECRET, "labels")
    tokens = tuple(tuple(int(i) for i in row) for row in about["tokens"])
    return TextSecret(tuple(about["texts"]), tokens, tensors["labels"] if about["labelled"] else None, about["source"])


def is_text(path: Path) -> bool:
    """Whether a file holds an observation of text."""
    return path.is_file() and tensor_file.open_tensors(path)[1].get("schema") == TEXT
