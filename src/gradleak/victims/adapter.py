"""Somebody who fine-tunes a model on private pictures with the PEFT library, and shares the adapter that it saves."""

import copy
import difflib
import itertools
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from gradleak.errors import BadInput
from gradleak.formats.base_folder import write_base
from gradleak.formats.peft import SUBTRACTED, adaptable, read_adapter
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture, ImageTransformer
from gradleak.modalities.pictures import Pictures
from gradleak.observations.observation import Adapter, Model
from gradleak.observations.training import OPTIMISERS, Recipe
from gradleak.victims.gradient import check_takes

Init = bool | Literal["gaussian", "pissa", "olora", "lora_ga"]  # of PEFT's init_lora_weights; True is its default


def fine_tune(
    module: nn.Module,
    architecture: Architecture,
    private: Pictures,
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
    reveal_labels: bool = False,
    reveal_batch_size: bool = True,
) -> tuple[Adapter, Secret]:
    """Train an adapter with PEFT and torch.optim; what is returned is what `read_adapter` finds on disk.

    Writes out/adapter, out/base and, where training does not begin at B = 0, out/initial. BatchNorm uses its running
    statistics, nothing is dropped out. The module is left as it was.

    alpha           scaling is alpha / rank; default: the rank, so that it is 1, as with PEFT's defaults
    target_modules  "all-linear" (of transformers: as PEFT means it), "all" for convolutions too, or ends of names
    rslora          scaling is alpha / sqrt(rank)
    precision       number format of the saved adapter

    Raises BadInput when the model cannot take these pictures, has no such modules, or the training diverges.
    """
    model = Model.of(module, architecture)
    check_takes(model, private)
    trained, module = module, copy.deepcopy(module).eval()
    network = module.network if isinstance(module, ImageTransformer) else module
    # What "all-linear" means for a network of transformers is left to PEFT, but its LoRA-GA wants names.
    as_peft = target_modules == "all-linear" and network is not module and init != "lora_ga"
    targets = "all-linear" if as_peft else module_names(network, target_modules)
    check_rank(network, targets, rank, init)
    batches = _batches(private, recipe)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # transformers deprecates a property that PEFT reads
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        settings = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "use_rslora": rslora}
        adapted = _adapted(
            network, {**settings, "init_lora_weights": init, "target_modules": targets}, module, batches[0]
        )
        factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        initial = [factor.detach().clone() for factor in factors] if init in SUBTRACTED else None
        _train(module, factors, batches, recipe)
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise BadInput(f"The fine-tuning diverged at learning rate {recipe.learning_rate:g}: choose a smaller one.")
        write_base(trained, architecture, out / "base")
        save_adapter(adapted, factors, [factor.data for factor in factors], precision, out / "adapter")
        if initial:
            save_adapter(adapted, factors, initial, precision, out / "initial")
    adapter = read_adapter(
        out / "adapter",
        model,
        recipe=recipe,
        batch_size=len(private.labels) if reveal_batch_size else None,
        labels=private.labels if reveal_labels else None,
        initial=out / "initial" if initial else None,
    )
    return adapter, Secret(private.images, private.labels, f"{private.source} {private.split}")


def _batches(private: Pictures, recipe: Recipe) -> list[tuple[torch.Tensor, torch.Tensor]]:
    size = recipe.batch_size or len(private.labels)
    starts = range(0, len(private.labels), size)
    return [(private.images[i : i + size], private.labels[i : i + size]) for i in starts]


def _adapted(network: nn.Module, settings: dict[str, Any], module: nn.Module, batch: tuple[torch.Tensor, ...]) -> Any:
    """The network with PEFT's layers in place; LoRA-GA first takes the gradient of the first private batch."""
    from peft import LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora import preprocess_loraga

    if settings["init_lora_weights"] != "lora_ga":
        return get_peft_model(network, LoraConfig(**settings))
    config = LoraConfig(**settings, lora_ga_config=LoraGAConfig())

    def estimate() -> None:
        module.eval()  # PEFT has just put the network into train mode
        images = batch[0].clone().requires_grad_()  # else the hooks by which PEFT counts warn that no input needs one
        F.cross_entropy(module(images), batch[1]).backward()  # type: ignore[no-untyped-call]

    preprocess_loraga(network, config, estimate)
    return get_peft_model(network, config)


def _train(
    module: nn.Module, factors: list[nn.Parameter], batches: list[tuple[torch.Tensor, torch.Tensor]], recipe: Recipe
) -> None:
    module.eval()
    optimiser = OPTIMISERS[recipe.optimizer](factors, recipe.learning_rate)
    for images, labels in itertools.islice(itertools.cycle(batches), recipe.steps):
        optimiser.zero_grad()
        F.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def save_adapter(
    adapted: Any, factors: list[nn.Parameter], values: list[torch.Tensor], precision: torch.dtype, folder: Path
) -> None:
    """PEFT's save_pretrained of these values of the factors, in another number format."""
    for factor, value in zip(factors, values, strict=True):
        factor.data = value.to(precision)
    adapted.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)


def module_names(network: nn.Module, wanted: tuple[str, ...] | str) -> list[str]:
    """The full names of the modules to adapt, matched as PEFT matches them: by their end."""
    able = [name for name, layer in network.named_modules() if adaptable(layer)]
    if wanted == "all-linear":
        return [name for name in able if not isinstance(network.get_submodule(name), nn.Conv2d)]
    if wanted == "all":
        return able
    chosen = []
    for name in (wanted,) if isinstance(wanted, str) else wanted:
        found = [module for module in able if module == name or module.endswith(f".{name}")]
        if not found:
            known = sorted({ending for module in able for ending in (module, module.rpartition(".")[2])})
            close = difflib.get_close_matches(name, known, n=3) or known[:10]
            raise BadInput(
                f"The model has no linear or convolutional layer called {name!r}: choose among {', '.join(close)}, "
                "or all-linear, or all."
            )
        chosen += found
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
