"""Somebody who fine-tunes a language model on private texts with the PEFT library, and shares the adapter that it saves."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.formats.language_folder import read_text_adapter
from gradleak.formats.secret_file import TextSecret
from gradleak.modalities.transformers_networks import quiet_transformers
from gradleak.observations.text import LanguageModel, TextAdapter
from gradleak.observations.training import OPTIMISERS, Recipe
from gradleak.victims.adapter import check_rank, module_names, save_adapter
from gradleak.victims.text import keep_secret


def fine_tune_texts(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Tensor | None,
    *,
    rank: int,
    out: Path,
    recipe: Recipe,
    alpha: float | None = None,
    target_modules: tuple[str, ...] | str = "all-linear",
    rslora: bool = False,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    reveal_batch_size: bool = True,
    source: str = "",
) -> tuple[TextAdapter, TextSecret]:
    """Train an adapter with PEFT and torch.optim, without dropout; what is returned is what is found on disk.

    Writes out/adapter and out/base with the tokenizer. Arguments as of `victims.lora.fine_tune`. Raises BadInput for texts
    that the model cannot take, modules that it lacks, and training that diverges.
    """
    from peft import LoraConfig, get_peft_model

    secret = keep_secret(model, texts, labels, source=source, seed=seed)
    base: Any = copy.deepcopy(model.module)
    base.load_state_dict(model.parameters, strict=False)
    targets = target_modules if target_modules == "all-linear" else module_names(base, target_modules)
    check_rank(base, targets, rank, True)
    size = recipe.batch_size or len(texts)
    chunks = [slice(start, start + size) for start in range(0, len(texts), size)]
    with warnings.catch_warnings(), quiet_transformers(), torch.random.fork_rng(devices=[]):
        # transformers deprecates a property that PEFT reads
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        base.save_pretrained(out / "base")
        model.tokenizer.save_pretrained(out / "base")
        adapted = get_peft_model(
            base,
            LoraConfig(
                r=rank,
                lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
                use_rslora=rslora,
                target_modules=targets if isinstance(targets, str) else list(targets),
                fan_in_fan_out=model.family.transposed,
            ),
        ).eval()
        factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        victim = replace(model, module=adapted, parameters={})
        optimiser = OPTIMISERS[recipe.optimizer](factors, recipe.learning_rate)
        for step in range(recipe.steps):
            part = chunks[step % len(chunks)]
            optimiser.zero_grad()
            some = None if secret.labels is None else secret.labels[part]
            victim.loss({}, secret.tokens[part], some).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise BadInput(f"The fine-tuning diverged at learning rate {recipe.learning_rate:g}: choose a smaller one.")
        save_adapter(adapted, factors, [factor.data for factor in factors], precision, out / "adapter")
    found = read_text_adapter(
        out / "adapter", model, recipe=recipe, batch_size=len(texts) if reveal_batch_size else None
    )
    return found, secret
