"""The files of an adapter: where they lie, and which tensor in them plays which part, under the names that the adapter itself uses.

Read are folders of the PEFT library (adapter_config.json, adapter_model.safetensors), alone, several in one folder or as
checkpoints of a Trainer; and single files: of kohya's scripts (X.lora_down.weight, X.lora_up.weight, X.alpha, with underscores for
dots) and of diffusers (pytorch_lora_weights.safetensors; X.processor.to_q_lora.down.weight), whose ranks are those of their shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from torch import Tensor

from gradleak.errors import BadInput, checked, parsed, read_json, shortened
from gradleak.modalities.linear_attention import taken_apart
from gradleak.observations import tensor_file
from gradleak.observations.tensors import Tensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Wrappers of torch that are no part of a name: torch.compile, FSDP, activation checkpointing, and PEFT's own.
WITHOUT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
FACTORS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight"),
    re.compile(r"(?P<module>.+?)[._]lora(_linear_layer)?[._](?P<side>down|up)(\.[^.]+)?\.weight"),
)
SIDE = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B"}
EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.[^.]+)?")
TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?")
BIAS = re.compile(r"(?P<module>.+)\.lora_B(\.[^.]+)?\.bias")
ALPHA = re.compile(r"(?P<module>.+)\.(alpha|network_alpha)")
WHOLE = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
UNREAD = {  # variants of LoRA by their tensors
    r"lora_magnitude_vector|dora_scale": "DoRA, which rescales the weights besides",
    r"hada_w\d": "LoHa, a product of products",
    r"lokr_w\d": "LoKr, a Kronecker product",
    r"lora_mid\.": "LoCon with a factor in the middle",
    r"oft_|boft_": "OFT, a rotation",
    r"lora_[ab]$": "of MLX or torchtune, with factors of other shapes and names",
}
OF_LYCORIS = {  # its other methods, behind a name with underscores
    r"diff(_b)?": "a whole difference of weights (full)",
    r"[ab]m?[12](\.weight)?": "GLoRA",
    r"on_input|weight": "IA3, a factor of each row or column",
}
UNUSUAL = (
    *("use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens", "loftq_config"),
    *("use_bdlora", "kasa_config", "monteclora_config", "target_parameters"),
)
Rank = Annotated[int, Meta(le=1_000_000)]
Alpha = Annotated[float, Meta(ge=-1e6, le=1e6)]


class Config(msgspec.Struct, frozen=True):
    """What matters in adapter_config.json."""

    peft_type: str
    r: Rank
    lora_alpha: Alpha
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    fan_in_fan_out: bool | None = None
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    rank_pattern: Mapping[str, Rank] | None = None
    alpha_pattern: Mapping[str, Alpha] | None = None
    base_model_name_or_path: Annotated[str, Meta(max_length=1_000)] | None = None
    task_type: Annotated[str, Meta(max_length=100)] | None = None
    trainable_token_indices: list[int] | Mapping[str, list[int]] | None = None

    @property
    def init(self) -> str:
        """init_lora_weights as a word: PEFT takes "OLoRA" and "Gaussian" too."""
        said = self.init_lora_weights
        return said.lower() if isinstance(said, str) else str(said)


@dataclass(frozen=True)
class AdapterFiles:
    """What lies in a folder or file, by the adapter's own names.

    path        the folder, or the file
    config      its config; None for a single file, whose ranks are those of its shapes
    factors     {module: {"lora_A" and "lora_B": tensor}}, in float32
    alphas      {module: alpha} where the tensors themselves say it
    embeddings  the same as factors, of an embedding: A is (r, vocabulary), B (width, r)
    tokens      {module: rows (tokens, width)}, the trained rows of an embedding
    biases      {module: tensor}, of factors B with a bias of their own
    whole       {parameter: tensor}: heads, embeddings and biases that were saved as a whole
    precision   the shortest number format of the factors
    """

    path: Path
    config: Config | None
    factors: dict[str, Tensors] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, Tensors] = field(default_factory=dict)
    tokens: Tensors = field(default_factory=dict)
    biases: Tensors = field(default_factory=dict)
    whole: Tensors = field(default_factory=dict)
    precision: str = "float32"


def is_adapter(path: Path) -> bool:
    """Whether this is a folder with an adapter_config.json."""
    return (path / CONFIG).is_file()


def is_adapter_file(path: Path) -> bool:
    """Whether this is a safetensors file with LoRA factors in it; BadInput where it is none of safetensors."""
    with tensor_file.opened(path) as file:
        keys = list(file.keys())
    return any(pattern.fullmatch(key) for key in keys for pattern in FACTORS)


def located_adapter(path: Path) -> Path:
    """The folder of PEFT or the single file that is meant: this one, that which a config lies beside, or the only one inside.

    BadInput, naming what is inside, where there are several; or none.
    """
    if path.is_file():
        return path.parent if path.name == WEIGHTS and is_adapter(path.parent) else path
    if not path.is_dir():
        raise BadInput(f"There is no folder {shortened(str(path))}: give one that PEFT's save_pretrained has written.")
    if is_adapter(path):
        return path
    inside = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    inside = inside or [f for f in sorted(path.glob("*.safetensors")) if f.name != WEIGHTS and is_adapter_file(f)]
    if not inside:
        raise BadInput(
            f"{path} is no folder of a LoRA adapter: it has no {CONFIG} and is no PEFT folder, and neither is one inside."
        )
    if len(inside) == 1:
        return inside[0]
    steps = {int(match[1]): one for one in inside if (match := re.fullmatch(r"checkpoint-(\d{1,12})", one.name))}
    if steps:
        newest = steps[max(steps)]
        raise BadInput(
            f"{path} holds {len(steps)} checkpoints of a training: give one of them; the newest is {newest}."
        )
    names = ", ".join(shortened(one.name) for one in inside[:10])
    raise BadInput(f"{path} holds {len(inside)} adapters ({names}): give one of them, as {inside[0]}.")


def read_config(path: Path) -> Config | None:
    """The config of a folder; None for a file, which has none."""
    return None if path.is_file() else _config(path)


def read_files(path: Path) -> AdapterFiles:
    """What an adapter's folder or file holds; BadInput for what is damaged, a pickle, or no LoRA."""
    config, file = read_config(path), path
    if config is not None:
        file = path / WEIGHTS
        if not file.is_file() and (path / PICKLE).is_file():
            raise BadInput(
                f"{path / PICKLE} is a pickle: it could run code, so it is not opened. Save the adapter again with "
                "PEFT's save_pretrained(..., safe_serialization=True)."
            )
    elif path.name == WEIGHTS:
        raise BadInput(
            f"{path} has no {CONFIG} beside it, which says alpha and where training began: give the whole folder."
        )
    tensors, header = tensor_file.open_tensors(file)
    files = _sorted(path, config, tensors, file)
    if not files.factors:
        raise BadInput(f"{file} holds no LoRA factor of a linear or convolutional layer.")
    if config is None:
        files.alphas.update({m: a for m, a in _alphas_of_header(header, files, file).items() if m not in files.alphas})
    return files


def _sorted(path: Path, config: Config | None, tensors: Tensors, file: Path) -> AdapterFiles:
    """The tensors by the part that they play."""
    plain = {key: _plain(key) for key in tensors if "original_module" not in key.split(".")}
    names = {key: WHOLE.sub("", name) for key, name in plain.items()}
    known = {
        name for key, name in plain.items() if names[key] == name
    }  # PEFT saves what it has wrapped under both names
    names = {key: name for key, name in names.items() if plain[key] == name or name not in known}
    tensors = {key: tensors[key] for key in names}
    for pattern, kind in UNREAD.items():
        if odd := next(
            (k for k, n in names.items() if re.search(rf"(^|\.)({pattern})", n.removesuffix(".weight"))), None
        ):
            raise BadInput(f"The adapter in {path} is {kind} ({shortened(odd)[:120]}): only plain LoRA is read.")
    for pattern, kind in OF_LYCORIS.items():
        if odd := next(
            (key for key, name in names.items() if re.fullmatch(rf"(lycoris|lora)_\w+\.({pattern})", name)), None
        ):
            raise BadInput(f"The adapter in {path} is {kind} ({shortened(odd)[:120]}): only plain LoRA is read.")
    counts = [key for key in tensors if key.endswith(("num_batches_tracked", "token_indices"))]
    alphas = {k: m["module"] for k, n in names.items() if (m := ALPHA.fullmatch(n)) and tensors[k].numel() == 1}
    rest = {key: tensor for key, tensor in tensors.items() if key not in counts and key not in alphas}
    tensor_file.floating(rest, file)
    files = AdapterFiles(path, config, alphas={module: float(tensors[key]) for key, module in alphas.items()})
    kept: list[Tensor] = []
    for key, tensor in rest.items():
        name = names[key]
        if match := next((m for pattern in FACTORS if (m := pattern.fullmatch(name))), None):
            _put(files.factors, match["module"], SIDE[match["side"]], tensor, key, path)
            kept.append(tensor)
        elif match := EMBEDDING.fullmatch(name.removesuffix(".weight")):
            _put(files.embeddings, match["module"], SIDE[match["side"]], tensor, key, path)
        elif match := TOKENS.fullmatch(name):
            files.tokens[match["module"]] = tensor.float()
        elif match := BIAS.fullmatch(name):
            files.biases[match["module"]] = tensor.float()
        else:
            files.whole[name] = tensor
    narrowest = min((tensor.dtype for tensor in kept), key=lambda dtype: dtype.itemsize, default="float32")
    return AdapterFiles(**{**vars(files), "precision": str(narrowest).removeprefix("torch.")})


def _plain(key: str) -> str:
    """A tensor's name without the wrappers that are no part of it."""
    return taken_apart(".".join(part for part in key.split(".") if part not in WITHOUT))


def _put(parts: dict[str, Tensors], module: str, side: str, tensor: Tensor, key: str, path: Path) -> None:
    if side in parts.setdefault(module, {}):
        raise BadInput(f"The adapter in {path} holds {module}.{side} twice, once as {shortened(key)}.")
    if not tensor.numel():
        raise BadInput(
            f"The adapter in {path} has nothing in {shortened(key)}: it was saved from the shards of a distributed training "
            "(DeepSpeed ZeRO-3, FSDP). Gather the weights before save_pretrained."
        )
    parts[module][side] = tensor.float()


def _alphas_of_header(header: Mapping[str, str], files: AdapterFiles, file: Path) -> dict[str, float]:
    """{module: alpha} as newer diffusers write it into the header of a file, by the model's part: unet.lora_alpha."""
    if "lora_adapter_metadata" not in header:
        return {}
    about = parsed(header["lora_adapter_metadata"], f"{file} has a damaged header")
    known = about if isinstance(about, dict) else {}
    alphas = {module: known.get(f"{module.partition('.')[0]}.lora_alpha") for module in files.factors}
    return {module: float(alpha) for module, alpha in alphas.items() if isinstance(alpha, int | float)}


def _config(folder: Path) -> Config:
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder}: give one that PEFT's save_pretrained has written.")
    if not is_adapter(folder):
        raise BadInput(f"{folder} is no PEFT folder: it has no {CONFIG}.")
    config = read_json(folder / CONFIG)
    if isinstance(config, dict) and "fine_tune_type" in config:
        raise BadInput(f"The adapter in {folder} is MLX's: convert it to PEFT's format.")
    if isinstance(config, dict) and config.get("peft_type") not in (None, "LORA"):
        kind = shortened(str(config["peft_type"]))[:60]
        raise BadInput(f"The adapter in {folder} is of the type {kind!r}: only LORA is read.")
    known = checked(config, Config, f"{folder / CONFIG} is not the config of an adapter")
    if unusual := [key for key in UNUSUAL if config.get(key)]:
        kind = "DoRA" if unusual == ["use_dora"] else "a variant of LoRA"
        raise BadInput(f"The adapter in {folder} is {kind}, which is not read: {unusual[0]} is set.")
    return known


def by_pattern(name: str, patterns: Mapping[str, float] | None, where: Path) -> list[float]:
    """The entries of rank_pattern or alpha_pattern for a module: of the keys that, as regular expressions, fit the end of its name.

    PEFT takes the first (peft 0.21, utils/other.py, `get_pattern_key`), but saves them in the order of the alphabet: which was the first
    when training began may be told by a shape only. BadInput for an expression that is none, or that could take for ever: with
    repeated groups, or many repetitions.
    """
    name, found = name.partition("base_model.model.")[2] or name, []
    for key, value in (patterns or {}).items():
        repeated = len(re.findall(r"(?<!\\)[*+{]", key))
        if len(key) > 300 or repeated > 4 or re.search(r"(?<!\\)\)[*+{]", key):
            raise BadInput(
                f"The config in {where} has the pattern {shortened(key)[:60]!r}: write out the names of the modules."
            )
        try:
            if re.match(rf"(.*\.)?({key})$", name[:300]):
                found.append(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise BadInput(
                f"The config in {where} has the pattern {shortened(key)[:60]!r}, which is no regular expression ({error})."
            ) from error
    return found
