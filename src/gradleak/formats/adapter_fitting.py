"""The factors of an adapter under the names of the base model, with the scaling of each module."""

import re
from dataclasses import dataclass
from math import sqrt
from typing import Any

from gradleak.errors import BadInput, shortened
from gradleak.formats.adapter_files import AdapterFiles, Config, by_pattern
from gradleak.formats.adapter_names import module_of
from gradleak.observations.layers import is_adaptable, is_transposed, oriented
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors

PART = re.compile(r"(lora_[a-z]+\d?|unet|text_encoder(?:_\d)?|transformer)[._]")  # of a pipeline of diffusers


@dataclass(frozen=True)
class Fitted:
    """The factors of an adapter under the names of the base model.

    factors  {MODULE.lora_A and MODULE.lora_B}
    scaling  {MODULE: s}
    config   of the adapter; the usual one for a single file
    unread   adapted modules that are neither linear nor convolutional
    """

    factors: Tensors
    scaling: dict[str, float]
    config: Config
    unread: tuple[str, ...]

    @classmethod
    def of(cls, files: AdapterFiles, model: Model[Any]) -> "Fitted":
        """BadInput where a module is not of this model, or its factors contradict config or model."""
        layers = dict(model.module.named_modules())
        targets = [name for name, layer in layers.items() if is_adaptable(layer)]
        if files.config is not None and files.config.fan_in_fan_out and not any(map(is_transposed, layers.values())):
            raise BadInput(
                f"The adapter in {files.path} is of transposed layers (fan_in_fan_out is set), and the model has none."
            )
        factors: Tensors = {}
        names: dict[str, str] = {}  # the base model's module -> what the adapter calls it
        others = other_parts(files, targets)
        unread = [f"{len(names)} modules of {part}" for part, names in others.items()]
        foreign = {name for names in others.values() for name in names}
        for name, pair in files.factors.items():
            if name in foreign:
                continue
            module = module_of(name, targets) or module_of(f"{name}.in_proj", targets)  # of PEFT's packed attention
            if module is None and (other := module_of(name, layers)) is not None:
                unread.append(f"{other} ({type(layers[other]).__name__})")
                continue
            if module is None:
                plain = shortened(name.removeprefix("base_model.model."))[:120]
                raise BadInput(
                    f"The adapter in {files.path} changes {plain!r}, but the base model has no linear or convolutional layer of "
                    "that name: they do not belong together."
                )
            for factor, tensor in pair.items():
                if f"{module}.{factor}" in factors:
                    raise BadInput(
                        f"The adapter in {files.path} holds {module}.{factor} twice, once as {shortened(name)}."
                    )
                factors[f"{module}.{factor}"], names[module] = tensor, name
        config = files.config or Config(peft_type="LORA", r=1, lora_alpha=1)
        if not names:
            raise BadInput(
                f"The adapter in {files.path} changes {unread[0]}, and no linear or convolutional layer: it is not read."
            )
        scaling = {m: _scaling(m, n, factors, files, config, model) for m, n in names.items()}
        return cls(factors, scaling, config, tuple(unread))


def _scaling(module: str, name: str, factors: Tensors, files: AdapterFiles, config: Config, model: Model[Any]) -> float:
    """s of a module: alpha / r, or alpha / sqrt(r) for rslora; BadInput when its factors contradict config or model."""
    weight, folder = oriented(model, module, model.parameters[f"{module}.weight"]), files.path
    for factor in ("lora_A", "lora_B"):
        if f"{module}.{factor}" not in factors:
            raise BadInput(f"The adapter in {folder} lacks {factor} of {module}.")
    ranks, held = by_pattern(name, config.rank_pattern, folder), len(factors[f"{module}.lora_A"])
    if files.config is None:
        rank, alpha = held, files.alphas.get(name, held)
    else:
        rank = int(held if held in ranks else [*ranks, config.r][0])
        alpha = files.alphas.get(name, [*by_pattern(name, config.alpha_pattern, folder), config.lora_alpha][0])
    wanted = {
        "lora_A": (rank, *weight.shape[1:]),
        "lora_B": (weight.shape[0], rank, *(1 for _ in weight.shape[2:])),
    }
    for factor, shape in wanted.items():
        if (tensor := factors[f"{module}.{factor}"]).shape != shape:
            sizes = f"{tuple(tensor.shape)}, not {tuple(shape)} as the base model and rank {rank} in its config need"
            raise BadInput(f"The adapter in {folder} does not fit: {factor} of {module} is {sizes}.")
    if rank < 1 or alpha == 0:
        raise BadInput(f"The config in {folder} gives {module} the rank {rank} and alpha {alpha:g}: neither may be 0.")
    return float(alpha / sqrt(rank) if config.use_rslora else alpha / rank)


def other_parts(files: AdapterFiles, targets: list[str]) -> dict[str, list[str]]:
    """{part of a pipeline: its modules} of a single file, where the base model is another part of it: text encoder or denoising network."""
    parts: dict[str, list[str]] = {}
    for name in files.factors if files.config is None else ():
        if match := PART.match(name):
            parts.setdefault(match[1], []).append(name)
    of_none = {part: n for part, n in parts.items() if not any(module_of(name, targets) for name in n)}
    return of_none if len(of_none) < len(parts) else {}
