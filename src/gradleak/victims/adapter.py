"""Somebody who fine-tunes a model on private data with the PEFT library, and shares the adapter that it saves.

`share_adapter` computes the same without PEFT, from a start as PEFT's: for experiments, and for gradients of the factors.
"""

import difflib
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.formats.defended_adapter import Told, defend_folder
from gradleak.formats.model_folder import write_base
from gradleak.formats.peft import SUBTRACTED, read_adapter
from gradleak.formats.secret_file import Secret
from gradleak.modalities.modality import Blueprint
from gradleak.modalities.networks import ImageTransformer
from gradleak.modalities.transformers_networks import quiet_transformers
from gradleak.observations.adapter import Adapter
from gradleak.observations.defense_names import Chosen
from gradleak.observations.defenses import Defense
from gradleak.observations.layers import is_adaptable, is_transposed, oriented
from gradleak.observations.mixed import mixed_loss, parts
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.orders import batches, taken
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import OPTIMISERS, Recipe
from gradleak.victims.gradient import behind, keep_secret, revealable, trained_with

Init = bool | Literal["gaussian", "pissa", "olora", "lora_ga"]  # of PEFT's init_lora_weights; True is its default
A = TypeVar("A", bound=Blueprint)


def fine_tune(
    model: Model[A],
    private: Any,
    *,
    rank: int,
    out: Path,
    recipe: Recipe,
    alpha: float | None = None,
    target_modules: tuple[str, ...] | str = "all-linear",
    seed: int = 0,
    init: Init = True,
    rslora: bool = False,
    precision: torch.dtype = torch.float32,
    defenses: Sequence[str] = (),
    reveal_labels: bool = False,
    reveal_batch_size: bool = True,
) -> tuple[Observation[A], Secret]:
    """Train an adapter with PEFT and torch.optim on `private` (Pictures or Texts); what is returned is what is found on disk.

    Writes out/adapter, out/base and, where training does not begin at B = 0, out/initial. BatchNorm uses its running
    statistics; nothing is dropped out but what `lora-dropout` says.

    alpha           scaling is alpha / rank; default: the rank, so that it is 1, as with PEFT's defaults
    target_modules  "all-linear" (of transformers: as PEFT means it), "all" for convolutions too, or ends of names
    rslora          scaling is alpha / sqrt(rank)
    precision       number format of the saved adapter
    defenses        as flags name them, "unknown" included: those that are a part of the training, then those of the factors

    Raises BadInput when the model cannot take these data, has no such modules, or the training diverges.
    """
    secret = keep_secret(model, private, seed=seed)
    labels = revealable(secret) if reveal_labels else None
    module = model.solid().eval()
    network = module.network if isinstance(module, ImageTransformer) else module
    # What "all-linear" means for a network of transformers is left to PEFT, but its LoRA-GA wants names.
    as_peft = target_modules == "all-linear" and hasattr(network, "config") and init != "lora_ga"
    targets = "all-linear" if as_peft else module_names(network, target_modules)
    check_rank(network, targets, rank, init)
    chosen = Chosen.of(defenses)
    course, left = course_of(chosen.defenses, recipe, len(secret))
    each = parts(len(secret), course.clients)
    order = list(itertools.islice(batches(len(each[0]), recipe.batch_size, recipe.shuffle), recipe.steps))

    def batch(rows: Sequence[int]) -> tuple[Any, Tensor | None]:
        return taken(secret.inputs, rows), None if secret.labels is None else taken(secret.labels, rows)

    def loss(inputs: Any, labels: Tensor | None) -> Tensor:
        positional, named = model.architecture.arguments(inputs, next(iter(model.parameters.values())))
        logits = model.architecture.logits(module(*positional, **named))
        return model.criterion(*model.architecture.compared(logits, inputs, labels))

    def trained(factors: list[nn.Parameter], own: range) -> list[Tensor]:
        """The factors after training on a client's samples."""
        optimiser = OPTIMISERS[recipe.optimizer](factors, recipe.learning_rate)
        for step, rows in enumerate(order):
            optimiser.param_groups[0]["lr"] = recipe.rate(step)
            optimiser.zero_grad()
            mixed_loss(course.mixup, loss, *batch([own[row] for row in rows])).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return [factor.detach().clone() for factor in factors]

    with warnings.catch_warnings(), quiet_transformers(), torch.random.fork_rng(devices=[]):
        # transformers deprecates a property that PEFT reads
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        settings = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "use_rslora": rslora}
        settings |= {"fan_in_fan_out": any(map(is_transposed, network.modules())), "lora_dropout": course.dropout}
        adapted = _adapted(
            network, {**settings, "init_lora_weights": init, "target_modules": targets}, module, loss, batch(order[0])
        )
        module = adapted if module is network else module
        module.eval()
        for name, layer in adapted.named_modules():
            layer.train("lora_dropout" in name)
        factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        initial = [factor.detach().clone() for factor in factors]
        if course.frozen_a:
            for name, parameter in adapted.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        moving = [factor for factor in factors if factor.requires_grad]
        ends = []
        for own in each:
            for factor, value in zip(factors, initial, strict=True):
                factor.data = value.clone()
            ends.append(trained(moving, own))
        for factor, values in zip(moving, zip(*ends, strict=True), strict=True):
            factor.data = torch.stack(values).mean(0) if len(values) > 1 else values[0]
        check_converged(factors, recipe)
        write_base(model, out / "base")
        save_adapter(adapted, factors, [factor.data for factor in factors], precision, out / "adapter")
        if left:
            defend_folder(out / "adapter", left, torch.Generator().manual_seed(seed), out / "adapter")
        if defenses:
            Told(with_=tuple(defenses), seed=seed).write(out / "adapter")
        if init in SUBTRACTED:
            save_adapter(adapted, factors, initial, precision, out / "initial")
    adapter = read_adapter(
        out / "adapter",
        model,
        recipe=recipe,
        batch_size=len(secret) if reveal_batch_size else None,
        labels=labels,
        initial=out / "initial" if init in SUBTRACTED else None,
    )
    return behind(adapter, chosen.known), secret


def course_of(defenses: Sequence[Defense], recipe: Recipe, samples: int) -> tuple[Adapter, tuple[Defense, ...]]:
    """A release without factors that says how they are trained behind these defenses, and the defenses that are left."""
    release, left = trained_with(Adapter(start={}, scaling={}, recipe=recipe), defenses, samples)
    assert isinstance(release, Adapter)  # of the same kind
    release.check_mixed()
    return release, left


def lora_start(
    model: Model[Any],
    modules: Sequence[str],
    rank: int,
    generator: torch.Generator,
    *,
    copies: int | None = None,
) -> Tensors:
    """Where PEFT starts LoRA by default: {MODULE.lora_A: uniform within 1 / sqrt(inputs), MODULE.lora_B: zero}.

    copies: that many starts side by side, each tensor (copies, ...).
    """
    start, several = dict[str, Tensor](), () if copies is None else (copies,)
    for module in modules:
        weight = oriented(model, module, model.parameters[f"{module}.weight"])
        uniform = 2 * torch.rand((*several, rank, *weight.shape[1:]), generator=generator) - 1
        start[f"{module}.lora_A"] = (uniform / weight[0].numel() ** 0.5).to(weight)
        start[f"{module}.lora_B"] = weight.new_zeros((*several, len(weight), rank, *[1] * (weight.ndim - 2)))
    return start


def share_adapter(
    model: Model[A],
    secret: Secret,
    *,
    modules: Sequence[str],
    rank: int,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> Observation[A]:
    """LoRA from PEFT's usual start with s = 1 on these modules: the gradient of its factors, or their change by a recipe.

    After more than one step A has moved too; what is released is the change of B, beside A as it ended, as in the folder
    that PEFT saves. Raises BadInput when the training diverges.
    """
    start = lora_start(model, modules, rank, torch.Generator().manual_seed(seed))
    release = Adapter(start=start, scaling=dict.fromkeys(modules, 1.0), recipe=recipe, gradient=recipe is None)
    factors = {name: tensor for name, tensor in start.items() if recipe is not None or name.endswith("lora_B")}
    change = {k: t.detach() for k, t in release.simulate(model, factors, secret.inputs, secret.labels).items()}
    if recipe is not None:
        check_converged(change.values(), recipe)
        ended = {name: start[name] + step for name, step in change.items() if name.endswith("lora_A")}
        release = replace(release, start={**start, **ended})
    released = {name: step for name, step in change.items() if name.endswith("lora_B")}
    return Observation(model=model, release=release, released=released, batch_size=len(secret))


def check_converged(tensors: Iterable[Tensor], recipe: Recipe) -> None:
    """BadInput where training has left something that is no finite number."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise BadInput(f"The fine-tuning diverged at learning rate {recipe.learning_rate:g}: choose a smaller one.")


def _adapted(
    network: nn.Module,
    settings: dict[str, Any],
    module: nn.Module,
    loss: Callable[..., Tensor],
    batch: tuple[Any, Tensor | None],
) -> Any:
    """The network with PEFT's layers in place; LoRA-GA first takes the gradient of the first private batch."""
    from peft import LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora import preprocess_loraga

    if settings["init_lora_weights"] != "lora_ga":
        return get_peft_model(network, LoraConfig(**settings))
    config = LoraConfig(**settings, lora_ga_config=LoraGAConfig())

    def estimate() -> None:
        module.eval()  # PEFT has just put the network into train mode
        inputs = batch[0]
        if isinstance(inputs, Tensor):
            inputs = inputs.clone().requires_grad_()  # else the hooks by which PEFT counts warn that no input needs one
        loss(inputs, batch[1]).backward()  # type: ignore[no-untyped-call]

    preprocess_loraga(network, config, estimate)
    return get_peft_model(network, config)


def save_adapter(
    adapted: Any, factors: list[nn.Parameter], values: list[torch.Tensor], precision: torch.dtype, folder: Path
) -> None:
    """PEFT's save_pretrained of these values of the factors, in another number format."""
    for factor, value in zip(factors, values, strict=True):
        factor.data = value.to(precision)
    adapted.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)


def module_names(network: nn.Module, wanted: tuple[str, ...] | str) -> list[str]:
    """The full names of the modules to adapt, matched as PEFT matches them: by their end."""
    able = [name for name, layer in network.named_modules() if is_adaptable(layer)]
    if wanted == "all-linear":
        return [name for name in able if not isinstance(network.get_submodule(name), nn.Conv2d)]
    if wanted == "all":
        return able
    chosen = []
    for name in (wanted,) if isinstance(wanted, str) else wanted:
        matching = [module for module in able if module == name or module.endswith(f".{name}")]
        if not matching:
            known = sorted({ending for module in able for ending in (module, module.rpartition(".")[2])})
            close = difflib.get_close_matches(name, known, n=3) or known[:10]
            raise BadInput(
                f"The model has no linear or convolutional layer called {name!r}: choose among {', '.join(close)}, "
                "or all-linear, or all."
            )
        chosen += matching
    return list(dict.fromkeys(chosen))


def check_rank(network: nn.Module, targets: list[str] | str, rank: int, init: Init) -> None:
    """BadInput when the rank is none, or when the initialisation cannot be had at it."""
    if rank < 1:
        raise BadInput(f"The rank of an adapter is at least 1, not {rank}.")
    if not targets:
        raise BadInput("The model has no linear or convolutional layer to adapt.")
    if init in (True, "gaussian"):
        return
    needed = 2 * rank if init == "lora_ga" else rank
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and name in targets:
            raise BadInput(f"{init} initialises linear layers only, and {name} is a convolution: leave it out.")
        if (
            isinstance(layer, nn.Linear)
            and (targets == "all-linear" or name in targets)
            and min(layer.weight.shape) < needed
        ):
            sizes = "x".join(map(str, layer.weight.shape))
            raise BadInput(f"{init} at rank {rank} needs weights of at least {needed}x{needed}, and {name} is {sizes}.")
