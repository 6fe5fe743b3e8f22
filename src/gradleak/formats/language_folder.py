"""Language models in folders of the transformers library: config.json, safetensors (also in shards), and a tokenizer, be it
tokenizer.json, or a list of words (vocab.txt; vocab.json with merges.txt; tokenizer.model), which transformers converts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from gradleak.errors import BadInput, checked, read_json, shortened
from gradleak.formats.adapter_names import parameter_of
from gradleak.formats.blueprints import Id, working_tokenizer
from gradleak.formats.observation_file import load_tensors
from gradleak.modalities.language_models import LanguageArchitecture, Task, build
from gradleak.modalities.transformers_networks import read_config
from gradleak.observations.model import LanguageModel, Model
from gradleak.observations.tensors import Tensors

MOST_FRESH = 2**28  # numbers of a head that is not in the weights
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# The files of a model on the hub that are read, weights apart.
PATTERNS = (
    "*config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Index(msgspec.Struct, frozen=True):
    """The shards of the weights, by tensor."""

    weight_map: Mapping[str, str]


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a folder."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def is_language_model(folder: Path) -> bool:
    """Whether this is the folder of a transformers model with a tokenizer."""
    return (folder / "config.json").is_file() and has_tokenizer(folder)


def is_text_folder(folder: Path, beside: Path) -> bool:
    """Whether this is the folder of a transformers model whose tokenizer lies with its adapter."""
    known = (folder / "config.json").is_file() and not (folder / "preprocessor_config.json").is_file()
    return known and has_tokenizer(beside)


def check_readable(folder: Path) -> None:
    """BadInput for a quantised model, whose numbers are not those that gradients are taken at."""
    path = folder / "config.json"
    if not path.is_file():
        return
    about = read_json(path)
    given = about.get("quantization_config") if isinstance(about, dict) else None
    if isinstance(given, dict):
        method = shortened(str(given.get("quant_method", "of an unnamed kind")))[:40]
        raise BadInput(
            f"The base model in {folder} is quantised ({method}): what it stores are not the numbers that gradients are taken at. Give the "
            "model that it was made from, or save it dequantised."
        )


def read_weights(folder: Path) -> Tensors:
    """The weights of a folder, from one file or from the shards that its index names; BadInput where they are in no safetensors file."""
    if (folder / INDEX).is_file():
        index = checked(read_json(folder / INDEX), Index, f"{folder / INDEX} is no index of shards")
        names = sorted(set(index.weight_map.values()))
        if odd := next((name for name in names if Path(name).name != name), None):
            raise BadInput(f"{folder / INDEX} names {shortened(odd)}, which is no file beside it.")
        return {name: tensor for shard in names for name, tensor in load_tensors(folder / shard).items()}
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BadInput(
            f"{folder} has no model.safetensors: other formats can run code, so they are not opened. "
            "Save the model again with save_pretrained."
        )
    return {name: tensor for file in files for name, tensor in load_tensors(file).items()}


def read_tokenizer(folder: Path, config: Any) -> Any:
    """The tokenizer of a folder; BadInput where it cannot be read, or has tokens that the model has not."""
    from transformers import AutoTokenizer

    settings = None
    if (folder / "tokenizer.json").is_file():
        settings = read_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file():
        checked(read_json(folder / "vocab.json"), dict[str, Id], f"{folder} holds no tokenizer that can be read")
    return working_tokenizer(
        settings,
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True),
        config,
        str(folder),
    )


def read_language_model(folder: Path, task: Task, *, classes: int = 2, seed: int = 0) -> LanguageModel:
    """The model of a folder with a head for the task; a head that the folder lacks is initialised from the seed.

    Raises BadInput where there is no such folder, transformers cannot build it, weights are pickles or do not fit, or the
    tokenizer belongs to another model.
    """
    return read_language_with(folder, task, {}, classes=classes, seed=seed)[0]


def read_language_with(
    folder: Path, task: Task, brought: Tensors, *, beside: Path | None = None, classes: int = 2, seed: int = 0
) -> tuple[LanguageModel, tuple[str, ...]]:
    """`read_language_model`, with what the folder lacks from `brought` ({an adapter's name: tensor}), and the names of that.

    beside: the adapter's folder, whose tokenizer is used where the model's folder has none, or the adapter has added tokens.
    """
    tokenizers = folder if has_tokenizer(folder) else beside
    if tokenizers is None or not (folder / "config.json").is_file():
        raise BadInput(
            f"{folder} holds no language model: it needs config.json, model.safetensors and a tokenizer (tokenizer.json)."
        )
    check_readable(folder)
    config = read_config(folder, f"{folder} holds no language model that transformers can read")
    tokenizer = read_tokenizer(tokenizers, config)
    if task == "classification" and str(config.architectures).rstrip("']").endswith("ForSequenceClassification"):
        classes = config.num_labels
    with torch.device("meta"):
        shapes = build(config, task, classes=classes, tokenizer=tokenizer, seed=seed)[0]
    embedding = next(name for name, p in shapes.named_parameters() if p is shapes.get_input_embeddings().weight)
    parts, wanted = fitting(brought, shapes.state_dict(), classes)
    rows = len(parts[embedding]) if embedding in parts else config.vocab_size
    added = rows != config.vocab_size
    if added or wanted != classes:
        classes, config.vocab_size = wanted, rows
        if added and beside is not None and has_tokenizer(beside):
            tokenizer = read_tokenizer(beside, config)
        with torch.device("meta"):
            shapes = build(config, task, classes=classes, tokenizer=tokenizer, seed=seed)[0]
    state, names = _own(read_weights(folder), shapes, folder, parts)
    module, config = build(config, task, classes=classes, tokenizer=tokenizer, seed=seed)
    module.load_state_dict(state, strict=False)
    model = Model.of(module, LanguageArchitecture(str(folder), config, task, tokenizer))
    model.check_works()
    return model, tuple(name for name in names if name in model.parameters)


def fitting(brought: Tensors, known: Tensors, classes: int) -> tuple[Tensors, int]:
    """({the model's name: tensor of an adapter}, its number of classes): that of a tensor which has as many rows as the model classes, but
    for their number."""
    parts = {found: tensor for name, tensor in brought.items() if (found := parameter_of(name, known)) is not None}
    for name, tensor in parts.items():
        shape = known[name].shape
        if tensor.ndim and tensor.shape != shape and shape[:1] == (classes,) and tensor.shape[1:] == shape[1:]:
            return parts, len(tensor)
    return parts, classes


def _own(stored: Tensors, module: Any, folder: Path, parts: Tensors) -> tuple[Tensors, list[str]]:
    """({name in the module: tensor}, names of those that are wholly or in part from `parts`): of the stored ones, those that it has, else of
    an adapter's parts; BadInput where one does not fit, or the body lacks one."""
    expected, base = module.state_dict(), f"{module.base_model_prefix}."
    state: Tensors = {}
    names: list[str] = []
    for name, tensor in stored.items():
        plain = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        key = plain if plain in expected else base + plain
        if key not in expected:
            continue
        part = parts.get(key)
        if tensor.shape != expected[key].shape and part is not None and part.shape == expected[key].shape:
            vocabulary = len(part) == module.config.vocab_size
            state[key] = grown(tensor, part) if vocabulary else part
            names += [] if vocabulary and len(part) < len(tensor) else [key]
        elif expected[key].shape != tensor.shape or not tensor.is_floating_point():
            shapes = f"{tuple(tensor.shape)} in the weights and {tuple(expected[key].shape)} in the model"
            raise BadInput(f"Tensor {name} of {folder} is {shapes}: they do not belong together.")
        else:
            state[key] = tensor
    fresh = {key: part for key, part in parts.items() if key not in state and part.shape == expected[key].shape}
    state = {key: tensor.to(expected[key].dtype) for key, tensor in {**fresh, **state}.items()}
    missing = [name for name, _ in module.named_parameters() if name.startswith(base) and name not in state]
    # A pooler is a head in all but name: encoders that were not trained with one come without it.
    missing = [name for name in missing if ".pooler." not in name]
    if missing:
        raise BadInput(f"The weights of {folder} lack {missing[0]}: they belong to another architecture.")
    if sum(tensor.numel() for name, tensor in expected.items() if name not in state) > MOST_FRESH:
        raise BadInput(f"The weights of {folder} are far fewer than config.json says: they do not belong together.")
    return state, [*names, *fresh]


def grown(stored: Tensor, part: Tensor) -> Tensor:
    """An embedding whose vocabulary was resized: the base model's rows as far as there are any, and the adapter's."""
    common = min(len(stored), len(part))
    return torch.cat([stored[:common].to(part), part[common:]])
