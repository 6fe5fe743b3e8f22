"""Somebody who trains a LoRA adapter as the Trainer of transformers does unless told otherwise: AdamW without decay, a rate that falls
linearly to zero, batches of 8 in an order of their own each epoch, gradients cut to norm 1, dropout as the model has it.

The library's Trainer writes folders and asks for a network's files; this is its arithmetic, for experiments.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradleak.formats.peft import read_adapter
from gradleak.modalities.modality import Blueprint
from gradleak.modalities.transformers_networks import quiet_transformers
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.victims.adapter import module_names

A = TypeVar("A", bound=Blueprint)
BATCH, NORM = 8, 1.0


def trained_by_defaults(
    model: Model[A],
    inputs: Any,
    labels: Tensor | None,
    *,
    epochs: int,
    rate: float = 2e-4,
    rank: int = 8,
    seed: int = 42,
) -> Observation[A]:
    """The adapter in the folder that PEFT saves, its recipe not told. A classifier of texts trains its head along, which the adapter brings:
    where that began is not known. Scaling is 2, dropout of the adapter .05."""
    from peft import LoraConfig, get_peft_model

    count, module = len(inputs), model.solid()
    config: Any = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05}
    network = hasattr(module, "config")
    task = {1: "CAUSAL_LM"}.get(model.architecture.classes, "SEQ_CLS") if network else None
    config |= {"task_type": task} if network else {"target_modules": module_names(module, "all-linear")}
    with (
        warnings.catch_warnings(),
        quiet_transformers(),
        torch.random.fork_rng(devices=[]),
        TemporaryDirectory() as out,
    ):
        warnings.simplefilter("ignore")  # of GPT-2, PEFT says that its weights are (in, out), and sets that itself
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(module, LoraConfig(**config))
        adapted.train()
        weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0)
        steps, like = epochs * -(-count // BATCH), next(iter(model.parameters.values()))
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(epochs):
            for rows in torch.randperm(count).split(BATCH):  # type: ignore[no-untyped-call]
                x = inputs[rows] if isinstance(inputs, Tensor) else tuple(inputs[i] for i in rows.tolist())
                y = None if labels is None else labels[rows]
                positional, named = model.architecture.arguments(x, like)
                logits = model.architecture.logits(adapted(*positional, **named))
                loss = model.criterion(*model.architecture.compared(logits, x, y))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(weights, NORM)
                optimizer.step()
                falling.step()
        adapted.eval().save_pretrained(out, safe_serialization=True, save_embedding_layers=False)
        beside = read_adapter(Path(out), model).adapter.changed
        head = {name: model.parameters[name] + change for name, change in beside.items()}
        ended = replace(model, parameters={**model.parameters, **head})
        return read_adapter(Path(out), ended, brought=tuple(head))
