"""Somebody who shares what training on private texts made: a gradient, a federated update, a LoRA adapter's factors."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.lora import Recipe
from gradleak.secret import TextSecret
from gradleak.tensors import Tensors
from gradleak.text import LanguageModel, TextAdapter, TextGradient, TextUpdate


def capture_text_gradient(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Tensor | None = None,
    *,
    precision: torch.dtype = torch.float32,
    reveal_labels: bool = False,
    reveal_batch_size: bool = True,
    source: str = "",
) -> tuple[TextGradient, TextSecret]:
    """The gradient of the mean loss over `texts`, and the secret behind it. Raises BadInput as `LanguageModel.encode`."""
    tokens, labels = model.encode(texts), _checked(model, texts, labels)
    blank = {name: torch.zeros_like(p) for name, p in model.parameters.items() if name not in model.frozen}
    full = TextGradient(
        model=model,
        released=blank,
        batch_size=len(texts) if reveal_batch_size else None,
        labels=labels if reveal_labels else None,
        precision=str(precision).removeprefix("torch."),
    )
    released = rounded(full.simulate(tokens, labels), precision)
    return replace(full, released=released), TextSecret(tuple(texts), tokens, labels, source)


def share_text_update(
    gradient: TextGradient, secret: TextSecret, *, learning_rate: float, local_steps: int, local_batch_size: int
) -> TextUpdate:
    """What the client of `gradient` would have shared after some steps of local SGD."""
    blank = TextUpdate(
        model=gradient.model,
        released=gradient.released,
        batch_size=gradient.batch_size,
        labels=gradient.labels,
        precision=gradient.precision,
        learning_rate=learning_rate,
        local_steps=local_steps,
        local_batch_size=local_batch_size,
    )
    change = blank.simulate(secret.tokens, secret.labels)
    if not all(bool(tensor.isfinite().all()) for tensor in change.values()):
        raise BadInput(f"Local training diverged at learning rate {learning_rate:g}: choose a smaller one.")
    return replace(blank, released=rounded(change, getattr(torch, gradient.precision)))


def share_adapter(
    model: LanguageModel,
    secret: TextSecret,
    *,
    modules: Sequence[str],
    rank: int,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> TextAdapter:
    """LoRA from PEFT's usual start (A uniform, B zero, s = 1) on these modules: its gradient, or its change by a recipe.

    After more than one step A has moved too; what is released is the change of B, beside A as it ended, as in the folder
    that PEFT saves.
    """
    generator, start = torch.Generator().manual_seed(seed), {}
    for module in modules:
        weight = model.parameters[f"{module}.weight"]
        rows, width = weight.T.shape if model.family.transposed else weight.shape
        start[f"{module}.lora_A"] = (2 * torch.rand(rank, width, generator=generator) - 1) / width**0.5
        start[f"{module}.lora_B"] = torch.zeros(rows, rank)
    released = {name: tensor for name, tensor in start.items() if recipe is not None or name.endswith("lora_B")}
    blank = TextAdapter(
        model=model,
        released=released,
        start=start,
        scaling=dict.fromkeys(modules, 1.0),
        recipe=recipe,
        batch_size=len(secret.tokens),
    )
    change = blank.simulate(secret.tokens, secret.labels)
    if recipe is None:
        return replace(blank, released=change)
    ended = {name: start[name] + step for name, step in change.items() if name.endswith("lora_A")}
    B = {name: step for name, step in change.items() if name.endswith("lora_B")}
    return replace(blank, released=B, start={**start, **ended})


def rounded(tensors: Tensors, precision: torch.dtype) -> Tensors:
    """The tensors as a number format keeps them, in float32 again where it is a shorter one."""
    return {name: t.to(precision).to(torch.promote_types(precision, torch.float32)) for name, t in tensors.items()}


def _checked(model: LanguageModel, texts: Sequence[str], labels: Tensor | None) -> Tensor | None:
    if model.task != "classification":
        return None
    if labels is None or len(labels) != len(texts):
        raise BadInput("A classifier needs one label per text.")
    if int(labels.max()) >= model.config.num_labels or int(labels.min()) < 0:
        raise BadInput(f"Label {int(labels.max())} is beyond the model's {model.config.num_labels} classes.")
    return labels
