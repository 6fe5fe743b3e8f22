"""Somebody who shares what training on private texts made: a gradient, a federated update, a LoRA adapter."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.formats.secret_file import TextSecret
from gradleak.observations.tensors import Tensors
from gradleak.observations.text import NO_TARGET, LanguageModel, TextAdapter, TextGradient, TextUpdate, Tokens
from gradleak.observations.training import Recipe

MASKED = 0.15  # of the tokens of a text (Devlin et al. 2018, section 3.1), at least one


def capture_text_gradient(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Tensor | None = None,
    *,
    precision: torch.dtype = torch.float32,
    reveal_labels: bool = False,
    reveal_batch_size: bool = True,
    source: str = "",
    seed: int = 0,
) -> tuple[TextGradient, TextSecret]:
    """The gradient of the mean loss over `texts`, and the secret behind it; the seed chooses what is masked.

    Raises BadInput as `LanguageModel.encode`, and for labels that do not fit.
    """
    secret = keep_secret(model, texts, labels, source=source, seed=seed)
    if reveal_labels and model.task == "masked-lm":
        raise BadInput("The labels of a masked language model are its text: they cannot be revealed.")
    blank = {name: torch.zeros_like(p) for name, p in model.parameters.items() if name not in model.frozen}
    full = TextGradient(
        model=model,
        released=blank,
        batch_size=len(texts) if reveal_batch_size else None,
        labels=secret.labels if reveal_labels else None,
        precision=str(precision).removeprefix("torch."),
    )
    return replace(full, released=rounded(full.simulate(secret.tokens, secret.labels), precision)), secret


def keep_secret(
    model: LanguageModel, texts: Sequence[str], labels: Tensor | None, *, source: str = "", seed: int = 0
) -> TextSecret:
    """Texts as the model is fed with them; BadInput for texts or labels that it cannot take."""
    tokens = model.encode(texts)
    if model.task == "masked-lm":
        tokens, labels = mask(model, tokens, seed)
    elif model.task == "causal-lm":
        labels = None
    elif labels is None or len(labels) != len(texts):
        raise BadInput("A classifier needs one label per text.")
    elif int(labels.max()) >= model.config.num_labels or int(labels.min()) < 0:
        raise BadInput(f"Label {int(labels.max())} is beyond the model's {model.config.num_labels} classes.")
    return TextSecret(tuple(texts), tokens, labels, source)


def mask(model: LanguageModel, tokens: Tokens, seed: int) -> tuple[Tokens, Tensor]:
    """(tokens, labels (batch, longest)) as BERT is trained: of the tokens chosen, 8 in 10 are masked, 1 is replaced by a
    random one and 1 stays (Devlin et al. 2018, section 3.1). Special tokens are not chosen."""
    if model.tokenizer.mask_token_id is None:
        raise BadInput("The tokenizer has no mask token: masked language modelling is for encoders like BERT.")
    generator, special = torch.Generator().manual_seed(seed), set(model.tokenizer.all_special_ids)
    labels = torch.full((len(tokens), max(map(len, tokens))), NO_TARGET)
    fed = [list(row) for row in tokens]
    for number, row in enumerate(fed):
        plain = [i for i, token in enumerate(row) if token not in special]
        count = max(1, round(MASKED * len(plain)))
        for i in torch.randperm(len(plain), generator=generator)[:count].tolist():
            place, how = plain[i], int(torch.randint(10, (), generator=generator))
            labels[number, place] = row[place]
            if how < 8:
                row[place] = model.tokenizer.mask_token_id
            elif how == 8:
                row[place] = int(torch.randint(model.config.vocab_size, (), generator=generator))
    if not bool((labels != NO_TARGET).any()):
        raise BadInput("No text has a token that could be masked: all are special tokens.")
    return tuple(map(tuple, fed)), labels


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
        gradient=recipe is None,
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
