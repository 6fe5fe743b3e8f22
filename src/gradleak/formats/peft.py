"""Adapters as the PEFT library saves them: adapter_config.json and adapter_model.safetensors in a folder.

What is in the folder is where training ended. What it gives away is the change since it began, so the start has to be
known: PEFT's default, "gaussian" and "eva" begin with B = 0, "mica" with A = 0; "pissa", "olora", "corda" and "lora_ga"
begin with neither, and subtract the product of their start from the base model's weights, which give that of the first two.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from gradleak.errors import BadInput, checked, read_json, shortened
from gradleak.formats.observation_file import load_tensors
from gradleak.observations import tensor_file
from gradleak.observations.layers import is_adaptable, is_transposed, oriented
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Adapter, Origin, decay, product
from gradleak.observations.starts import FROM_WEIGHTS, computed, converted, why_unknown
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe

Start = Literal["B=0", "A=0"]
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

STARTS: dict[str, Start] = {"True": "B=0", "gaussian": "B=0", "eva": "B=0", "mica": "A=0"}  # by init_lora_weights
SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")  # W + s B A is the base model's weight at the start

# The ways in which a factor is called. PEFT: X.lora_A.weight, with an adapter's name after it in some versions.
# diffusers: the same, or X.lora.down.weight, or processor.X_lora.down.weight; others: X.lora_down.weight.
FACTOR = (
    re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.\w+)?\.weight"),
    re.compile(r"(?P<module>.+)[._]lora[._](?P<factor>down|up)\.weight"),
)
SIDE = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B"}
PREFIXES = ("base_model.model.", "unet.", "transformer.", "text_encoder.")
# transformers 5 has shorter names for the parts of its vision transformers than those that trained adapters carry.
RENAMED = (
    (r"encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"attention\.attention\.(q|k|v)(uery|ey|alue)$", r"attention.\1_proj"),
    (r"attention\.output\.dense$", "attention.o_proj"),
    (r"intermediate\.dense$", "mlp.fc1"),
    (r"output\.dense$", "mlp.fc2"),
)
UNUSUAL = ("use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens", "loftq_config")


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

    @property
    def init(self) -> str:
        """init_lora_weights as a word: PEFT takes "OLoRA" and "Gaussian" too."""
        return (
            self.init_lora_weights.lower() if isinstance(self.init_lora_weights, str) else str(self.init_lora_weights)
        )


def read_adapter(
    folder: Path,
    model: Model[Any],
    *,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    labels: Tensor | None = None,
    start: Start | None = None,
    initial: Path | None = None,
) -> Observation[Any]:
    """The adapter in a PEFT folder, as an observation of the base model that it was trained on.

    start    which factor began at zero; None: what the config says. The other factor is taken to have begun where it
             ended (less AdamW's decay), which is exact for one step
    initial  folder of the adapter before training: the changes of both factors are then known exactly

    Weights that were trained as a whole beside the adapter (modules_to_save, biases) play no part in one step; with
    more steps, `simulate` would hold them fixed, so they are refused. Dropout is not simulated, and told. Raises BadInput for
    what is no LoRA folder, is damaged, contradicts its config, does not fit the model or has learnt nothing.
    """
    factors, scaling, config, precision = read_factors(folder, model, recipe)
    origin: Origin = "unknown"
    init = config.init
    if initial is not None:
        before, unscaled, _, _ = read_factors(initial, model, None)
        if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in factors.items()} or unscaled != scaling:
            raise BadInput(f"The initial adapter {initial} has other modules, ranks or scalings than {folder}.")
        origin, subtracted = "given", init.startswith(SUBTRACTED)
    elif init in FROM_WEIGHTS and start is None:
        try:
            before = computed(init, model, factors, scaling)
        except BadInput as error:
            raise BadInput(
                f"The config in {folder} contradicts {error}; give the adapter before training, or the base it began with."
            ) from error
        origin, subtracted = "recovered", True
    elif init == "True" and start is None and (both := converted(model, factors, scaling)):
        factors, before = both
        origin, subtracted = "given", True
    if origin != "unknown":
        changed = {name: factors[name] - before[name] for name in factors}
        model = _subtracted(model, before, scaling) if subtracted else model
    else:
        zero = "lora_B" if zero_at_start(config, folder, start) == "B=0" else "lora_A"
        left = decay(recipe)
        before = {k: torch.zeros_like(v) if k.endswith(zero) else v / left for k, v in factors.items()}
        changed = {k: v for k, v in factors.items() if k.endswith(zero)}
    if not any(bool(change.any()) for change in changed.values()):
        raise BadInput(f"The adapter in {folder} has learnt nothing: no factor has left its start.")
    release = Adapter(
        start=before, scaling=scaling, recipe=recipe, dropout=config.lora_dropout, origin=origin, init=shortened(init)
    )
    return Observation(
        model=model, release=release, released=changed, batch_size=batch_size, labels=labels, precision=precision
    )


def is_adapter(path: Path) -> bool:
    """Whether this is a folder with an adapter_config.json."""
    return (path / CONFIG).is_file()


def read_factors(
    folder: Path, model: Model[Any], recipe: Recipe | None
) -> tuple[Tensors, dict[str, float], Config, str]:
    """{module.lora_A and module.lora_B}, {module: s}, the config and the number format of an adapter."""
    config = _config(folder)
    if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
        raise BadInput(
            f"{folder / PICKLE} is a pickle: it could run code, so it is not opened. Save the adapter again with "
            "PEFT's save_pretrained(..., safe_serialization=True)."
        )
    tensors = load_tensors(folder / WEIGHTS)
    tensor_file.floating(tensors, folder / WEIGHTS)
    targets = [name for name, layer in model.module.named_modules() if is_adaptable(layer)]
    if config.fan_in_fan_out and not any(is_transposed(layer) for layer in model.module.modules()):
        raise BadInput(
            f"The adapter in {folder} is of transposed layers (fan_in_fan_out is set), and the model has none."
        )
    factors: Tensors = {}
    names: dict[str, str] = {}  # the base model's module -> what the adapter calls it
    for key, tensor in tensors.items():
        match_of_key = next((match for pattern in FACTOR if (match := pattern.fullmatch(key))), None)
        if match_of_key is None:
            _check_other(key, tensor, model, recipe, folder)
            continue
        module = _module(match_of_key["module"], targets, folder)
        factor = f"{module}.{SIDE[match_of_key['factor']]}"
        if factor in factors:
            raise BadInput(f"The adapter in {folder} holds {factor} twice, once as {key}.")
        factors[factor], names[module] = tensor.float(), match_of_key["module"]
    if not factors:
        raise BadInput(f"{folder / WEIGHTS} holds no LoRA factor of a linear or convolutional layer.")
    scaling = {module: _checked_scaling(module, name, factors, config, model, folder) for module, name in names.items()}
    narrowest = min((tensor.dtype for tensor in tensors.values()), key=lambda dtype: dtype.itemsize)
    return factors, scaling, config, str(narrowest).removeprefix("torch.")


def _config(folder: Path) -> Config:
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder}: give one that PEFT's save_pretrained has written.")
    if not is_adapter(folder):
        raise BadInput(f"{folder} is no PEFT folder: it has no {CONFIG}.")
    config = read_json(folder / CONFIG)
    if isinstance(config, dict) and config.get("peft_type") not in (None, "LORA"):
        kind = shortened(str(config["peft_type"]))[:60]
        raise BadInput(f"The adapter in {folder} is of the type {kind!r}: only LORA is read.")
    known = checked(config, Config, f"{folder / CONFIG} is not the config of an adapter")
    if unusual := [key for key in UNUSUAL if config.get(key)]:
        raise BadInput(f"The adapter in {folder} is a variant of LoRA that is not read: {unusual[0]} is set.")
    return known


def zero_at_start(config: Config, folder: Path, asked: Start | None = None) -> Start:
    """Which factor was zero before training; BadInput where neither was, or the config does not say."""
    init = config.init
    if start := asked or STARTS.get(init):
        return start
    if init == "False":
        raise BadInput(
            f"The config in {folder} does not say where training began (init_lora_weights is false): "
            'say which factor was zero, start="B=0" or start="A=0", or give the adapter before training.'
        )
    reason = f" ({reason})" if (reason := why_unknown(init, 0)) else ""
    raise BadInput(
        f"The adapter in {folder} began at {shortened(init)[:60]!r}, where neither factor is zero{reason}: what it learnt is "
        "known only beside its start, so give the folder of the adapter as it was saved before training."
    )


def _module(name: str, targets: list[str], folder: Path) -> str:
    """The base model's module that the adapter calls `name`: of that name, or the only one whose name ends with it."""
    plain = name.removeprefix(PREFIXES[0])
    options = [plain, *(plain.removeprefix(p) for p in PREFIXES[1:] if plain.startswith(p))]
    options = [option.replace(".processor.", ".") for option in options]
    renamed = options[-1]
    for old, new in RENAMED:
        renamed = re.sub(old, new, renamed)
    options += [renamed, f"{options[-1]}.0"]  # .0: older attention processors call the module to_out.0 to_out
    for option in options:
        ending = [target for target in targets if target == option or target.endswith(f".{option}")]
        if option in targets or len(ending) == 1:
            return option if option in targets else ending[0]
        if ending:
            raise BadInput(
                f"The adapter's module {plain[:120]!r} could be {ending[0]} or {ending[1]} of the base model."
            )
    raise BadInput(
        f"The adapter in {folder} changes {plain[:120]!r}, but the base model has no linear or convolutional layer of "
        "that name: they do not belong together."
    )


def _checked_scaling(
    module: str, name: str, factors: Tensors, config: Config, model: Model[Any], folder: Path
) -> float:
    """s of a module: alpha / r, or alpha / sqrt(r) for rslora; BadInput when its factors contradict config or model."""
    weight = oriented(model, module, model.parameters[f"{module}.weight"])
    rank = _by_pattern(name, config.rank_pattern, folder) or config.r
    alpha = _by_pattern(name, config.alpha_pattern, folder)
    alpha = config.lora_alpha if alpha is None else alpha
    wanted = {
        "lora_A": (int(rank), *weight.shape[1:]),
        "lora_B": (weight.shape[0], int(rank), *(1 for _ in weight.shape[2:])),
    }
    for factor, shape in wanted.items():
        tensor = factors.get(f"{module}.{factor}")
        if tensor is None:
            raise BadInput(f"The adapter in {folder} lacks {factor} of {module}.")
        if tensor.shape != shape:
            sizes = f"{tuple(tensor.shape)}, not {tuple(shape)} as the base model and rank {rank:g} in its config need"
            raise BadInput(f"The adapter in {folder} does not fit: {factor} of {module} is {sizes}.")
    if rank < 1 or alpha == 0:
        raise BadInput(
            f"The config in {folder} gives {module} the rank {rank:g} and alpha {alpha:g}: neither may be 0."
        )
    return float(alpha / sqrt(rank) if config.use_rslora else alpha / rank)


def _by_pattern(name: str, patterns: Mapping[str, float] | None, folder: Path) -> float | None:
    """The entry of rank_pattern or alpha_pattern for a module: keys are the end of its name, or with ^ all of it."""
    name = name.removeprefix(PREFIXES[0])
    for key, value in (patterns or {}).items():
        plain = key.removeprefix("^").removesuffix("$").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise BadInput(f"The config in {folder} has the pattern {key[:60]!r}: write out the names of the modules.")
        if name == plain or (name.endswith(f".{plain}") and not key.startswith("^")):
            return value
    return None


def _check_other(key: str, tensor: Tensor, model: Model[Any], recipe: Recipe | None, folder: Path) -> None:
    """BadInput for a tensor that is neither a factor nor, in a single step, of no consequence."""
    plain = key.removeprefix(PREFIXES[0])
    whole = [name for name in model.parameters if name == plain or name.endswith(f".{plain}")]
    bias = re.fullmatch(r".+\.lora_B(\.\w+)?\.bias", plain)
    if not bias and not any(model.parameters[name].shape == tensor.shape for name in whole):
        raise BadInput(
            f"The adapter in {folder} holds {plain[:120]!r}, which is neither a LoRA factor nor of the base model."
        )
    if recipe is not None and recipe.steps > 1:
        raise BadInput(
            f"The adapter in {folder} was trained together with {plain[:120]!r} for {recipe.steps} steps: only a single "
            "step can be told apart."
        )


def _subtracted(model: Model[Any], start: Tensors, scaling: dict[str, float]) -> Model[Any]:
    """The base model as those initialisations leave it: W - s B A of the start."""
    weights = {
        f"{module}.weight": model.parameters[f"{module}.weight"]
        - oriented(model, module, s * product(start[f"{module}.lora_A"], start[f"{module}.lora_B"]))
        for module, s in scaling.items()
    }
    return replace(model, parameters={**model.parameters, **weights})
