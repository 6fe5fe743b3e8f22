"""What the attacker sees of text: language models of the transformers library, and the gradients, updates and adapters that
they release. Closed types, as in observations.py: a field that was not revealed is None.

Sentences are sequences of token ids, special tokens included. The library's own forward pass is called as a pure function
and watched through hooks; none of its code is repeated here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.errors import BadInput
from gradleak.modalities.language_families import Family, family_of
from gradleak.observations.observation import Item, check_finite
from gradleak.observations.tensors import Tensors, fingerprint, rounding
from gradleak.observations.training import OPTIMISERS, Recipe, product

Task = Literal["classification", "causal-lm", "masked-lm"]
Tokens = tuple[tuple[int, ...], ...]  # a batch of sentences
UNEVEN = 2.0  # the rounding of a gradient follows its columns: such noise ends later than white noise
NO_TARGET = -100  # the label of a position that is not trained on, as torch and transformers have it


class _Reached(Exception):
    """The forward pass has come as far as it was wanted."""


@dataclass(frozen=True)
class LanguageModel:
    """A transformer as the attacker knows it, with the tokenizer that it belongs to; evaluated without dropout.

    name        folder or hub name, for reports only
    config      the transformers configuration
    task        "classification": cross entropy of one label per text; "causal-lm": of every next token; "masked-lm": of
                the tokens that were masked
    parameters  {name: tensor} at the moment the observation was taken
    tokenizer   a fast tokenizer of transformers
    module      the structure only; its own parameters are never read
    frozen      names of parameters that were not trained
    """

    name: str
    config: Any = field(repr=False, compare=False)
    task: Task
    parameters: Tensors = field(repr=False)
    tokenizer: Any = field(repr=False, compare=False)
    module: nn.Module = field(repr=False, compare=False)
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tokenizer) > self.config.vocab_size:
            raise BadInput(
                f"The tokenizer knows {len(self.tokenizer):,} tokens and the model {self.config.vocab_size:,}: "
                "they do not belong together."
            )

    @property
    def family(self) -> Family:
        """Where this kind of transformer keeps its parts; BadInput for a kind that is not supported."""
        return family_of(self.config)

    @property
    def positions(self) -> int:
        """The longest sentence that the model takes."""
        return int(self.config.max_position_embeddings)

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Texts as the victim feeds them; causal language models close each with the end-of-text token, if there is one.

        Raises BadInput for an empty text, and for one that is longer than the model's positions.
        """
        sentences = []
        for text in texts:
            if not text.strip():
                raise BadInput("A text is empty: there is nothing to train on.")
            ids = list(self.tokenizer(text)["input_ids"])
            end = self.tokenizer.eos_token_id
            if self.task == "causal-lm" and end is not None and ids[-1:] != [end]:
                ids.append(end)
            if len(ids) > self.positions:
                raise BadInput(
                    f"A text has {len(ids)} tokens and the model {self.positions} positions: shorten it. It begins {text[:40]!r}."
                )
            sentences.append(tuple(ids))
        return tuple(sentences)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a sentence, without special tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def padded(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both (batch, longest), padded on the right."""
        if not tokens or not all(tokens):
            raise BadInput("A batch needs sentences, and a sentence needs tokens.")
        longest, pad = max(map(len, tokens)), self.config.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in tokens])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
        return ids, mask

    def loss(self, parameters: Tensors, tokens: Sequence[Sequence[int]], labels: Tensor | None) -> Tensor:
        """Mean cross entropy: over texts for classification (labels (batch,) int64), over next tokens for causal-lm, over
        masked tokens for masked-lm (labels (batch, longest) int64, -100 where a token was not masked)."""
        ids, mask = self.padded(tokens)
        own = {**self.parameters, **parameters}
        logits = functional_call(self.module, own, (), {"input_ids": ids, "attention_mask": mask}).logits
        if self.task == "causal-lm":
            wanted = ids.masked_fill(mask == 0, NO_TARGET)[:, 1:]
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten())
        if labels is None:
            raise BadInput("A classifier needs labels, and a masked language model the tokens that were masked.")
        if self.task == "classification":
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits.flatten(0, 1), labels[:, : ids.shape[1]].flatten())

    def inputs(self, modules: Sequence[str], ids: Tensor, *, at: int = 0, parameters: Tensors | None = None) -> Tensors:
        """What goes into some modules: {name: (batch, length, width)}. The forward pass stops at the last of them.

        ids: (batch, length), sentences without padding. at: the position of the first token.
        """
        seen: Tensors = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[name] = args[0]
                if len(seen) == len(modules):
                    raise _Reached

            return hook

        handles = [self.module.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]
        more = {"position_ids": torch.arange(at, at + ids.shape[1])[None].expand_as(ids)} if at else {}
        try:
            with torch.no_grad():
                own = self.parameters if parameters is None else parameters
                functional_call(
                    self.module, own, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
                )
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def state_hash(self) -> str:
        """Fingerprint of the parameters."""
        return fingerprint(self.parameters)


@dataclass(frozen=True)
class View:
    """What a release tells of the inputs x_t of one linear layer: the rows of `measured` lie in the span of F x_t.

    module    the layer
    measured  (rows, r)
    factor    F (r, width), or None for the identity
    noise     deviation of each number of a row (rows,), where it is known beforehand; None where it is that of the number format
    """

    module: str
    measured: Tensor
    factor: Tensor | None = None
    noise: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TextGradient:
    """The gradient of the loss over one private batch of texts.

    released    {parameter name: gradient}; parameters may be missing (frozen, or not shared)
    batch_size  number of texts, or None
    labels      (batch,) int64, or None; None too where the task has none, or where they would be the text itself
    precision   the number format in which it was released
    """

    model: LanguageModel
    released: Tensors = field(repr=False)
    batch_size: int | None = None
    labels: Tensor | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        if not self.released:
            raise BadInput("Nothing was released: there is nothing to attack.")
        for name, tensor in self.released.items():
            known = self.model.parameters.get(name)
            if known is None or known.shape != tensor.shape:
                what = "is no parameter of the model" if known is None else f"has shape {tuple(tensor.shape)}"
                raise BadInput(f"Released tensor {name} {what}: it was taken from another architecture.")
        check_finite(self.released)

    def simulate(self, tokens: Sequence[Sequence[int]], labels: Tensor | None = None) -> Tensors:
        """dL/dtheta of this batch, for the parameters that were released."""
        return gradient_of(self.model, {name: self.model.parameters[name] for name in self.released}, tokens, labels)

    def views(self) -> list[View]:
        """One view per linear layer whose weight's gradient was released; the noise is the rounding to a shorter format."""
        short = None if self.precision in ("float32", "float64") else getattr(torch, self.precision)
        found = []
        for name, tensor in self.released.items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and tensor.ndim == 2 and module in self.model.family.linear(self.model.config):
                rows = tensor.T if self.model.family.transposed else tensor
                found.append(View(module, rows, None, None if short is None else UNEVEN * rounding(rows, short)))
        return found

    @property
    def replayable(self) -> bool:
        """Whether `simulate` can tell what a text would have released: not where what is masked is unknown."""
        return self.model.task != "masked-lm"

    def after(self) -> Tensors | None:
        """The parameters of the model that training changed, as it left them; None where nothing was trained."""
        return None

    def threat_model(self) -> list[Item]:
        """One row per thing the attacker may know, made from the fields."""
        model = self.model
        shared = f"{type(self).__name__}: {len(self.released)} of {len(model.parameters)} tensors in {self.precision}"
        numbers = sum(p.numel() for p in model.parameters.values())
        hidden = {"classification": "withheld", "causal-lm": "none: next tokens", "masked-lm": "the masked tokens"}
        labels = "given" if self.labels is not None else hidden[model.task]
        rows = [
            ("released", True, shared),
            ("architecture", True, f"{model.config.model_type}, {model.config.num_hidden_layers} layers"),
            ("parameters", True, f"{numbers:,} numbers"),
            ("tokenizer", True, f"{len(model.tokenizer):,} tokens"),
            ("mode", True, "eval (no dropout)"),
            ("loss", True, f"cross entropy of {model.task}, mean"),
            ("batch size", self.batch_size is not None, str(self.batch_size or "to be found")),
            ("labels", self.labels is not None, labels),
            ("texts", False, "the secret"),
        ]
        return [{"item": item, "revealed": revealed, "detail": detail} for item, revealed, detail in rows]


@dataclass(frozen=True, kw_only=True)
class TextUpdate(TextGradient):
    """What a client of federated averaging sends: parameters after local SGD minus before. released is that difference.

    Texts are taken in their order, in chunks of `local_batch_size`, starting over at the end.
    """

    learning_rate: float
    local_steps: int
    local_batch_size: int

    def simulate(self, tokens: Sequence[Sequence[int]], labels: Tensor | None = None) -> Tensors:
        """theta_k - theta_0 after the local steps."""
        before = {name: self.model.parameters[name] for name in self.released}
        recipe = Recipe(learning_rate=self.learning_rate, steps=self.local_steps, batch_size=self.local_batch_size)
        after = fine_tuned(self.model, before, tokens, labels, recipe)
        return {name: after[name] - before[name] for name in before}

    def views(self) -> list[View]:
        """As of a gradient; a difference of parameters carries the rounding of the parameters, that of every step."""
        found = []
        for view in super().views():
            weight = self.model.parameters[f"{view.module}.weight"]
            own = rounding(weight.T if self.model.family.transposed else weight, torch.float32) * self.local_steps**0.5
            found.append(replace(view, noise=own if view.noise is None else torch.hypot(own, view.noise)))
        return found

    def threat_model(self) -> list[Item]:
        """The rows of a gradient, and the recipe of the local training."""
        steps, rate, size = self.local_steps, self.learning_rate, self.local_batch_size
        recipe = f"{steps} SGD steps, learning rate {rate:g}, local batch {size}"
        *rows, secret = super().threat_model()
        return [*rows, {"item": "local training", "revealed": True, "detail": recipe}, secret]

    def after(self) -> Tensors | None:
        """theta_0 + released."""
        return {name: self.model.parameters[name] + change for name, change in self.released.items()}


@dataclass(frozen=True, kw_only=True)
class TextAdapter(TextGradient):
    """A LoRA adapter's gradient or change: {module.lora_A or module.lora_B: tensor}, beside the base model.

    start     {module.lora_A and module.lora_B}: where training began; the usual start has B = 0
    scaling   {module: s}
    recipe    how it was trained, or None
    gradient  whether what was released is the gradient of the factors, and not their change in training
    """

    start: Tensors = field(repr=False)
    scaling: dict[str, float] = field(repr=False)
    recipe: Recipe | None = None
    gradient: bool = False

    def __post_init__(self) -> None:
        for module in self.scaling:
            A, B = (self.start.get(f"{module}.lora_{side}") for side in "AB")
            weight = self.model.parameters.get(f"{module}.weight")
            if A is None or B is None or weight is None:
                raise BadInput(f"The adapter of {module} lacks a factor, or the base model lacks the module.")
            shape = weight.T.shape if self.model.family.transposed else weight.shape
            if (len(B), A.shape[1]) != tuple(shape):
                raise BadInput(f"The adapter of {module} does not fit the base model: they do not belong together.")
        check_finite(self.released)

    def merged(self, factors: Tensors) -> Tensors:
        """{module.weight: W + s B A}."""
        own, made = {**self.start, **factors}, {}
        for module, s in self.scaling.items():
            change = s * product(own[f"{module}.lora_A"], own[f"{module}.lora_B"])
            weight = self.model.parameters[f"{module}.weight"]
            made[f"{module}.weight"] = weight + (change.T if self.model.family.transposed else change)
        return made

    def after(self) -> Tensors | None:
        """W + s B A of the adapted layers, where training changed the factors."""
        if self.gradient:
            return None
        return self.merged({name: self.start[name] + change for name, change in self.released.items()})

    def simulate(self, tokens: Sequence[Sequence[int]], labels: Tensor | None = None) -> Tensors:
        """The gradient with respect to the factors, or their change in training where its recipe is known."""
        before = {name: self.start[name] for name in self.start}
        if self.recipe is None:
            return gradient_of(self.model, {n: before[n] for n in self.released}, tokens, labels, self.merged)
        after = fine_tuned(self.model, before, tokens, labels, self.recipe, self.merged)
        return {name: after[name] - before[name] for name in self.released}

    def views(self) -> list[View]:
        """One view per released B: its rows lie in the span of A x_t, exactly so for one step."""
        found = []
        for module in self.scaling:
            B = self.released.get(f"{module}.lora_B")
            if B is not None and bool(B.any()):
                found.append(View(module, B, self.start[f"{module}.lora_A"]))
        return found


def unmasked(tokens: Tokens, labels: Tensor | None) -> Tokens:
    """Sentences as they were before masking: labels (batch, longest), -100 where a token was not masked."""
    if labels is None or labels.ndim == 1:
        return tokens
    return tuple(
        tuple(old if new == NO_TARGET else new for old, new in zip(row, targets, strict=False))
        for row, targets in zip(tokens, labels.tolist(), strict=True)
    )


def gradient_of(
    model: LanguageModel,
    parameters: Tensors,
    tokens: Sequence[Sequence[int]],
    labels: Tensor | None,
    merged: Any = None,
) -> Tensors:
    """dL/dparameters, detached; merged turns them into parameters of the model, where they are not."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    loss = model.loss(leaves if merged is None else merged(leaves), tokens, labels)
    parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(parameters.items(), parts, strict=True)
    }


def fine_tuned(
    model: LanguageModel,
    parameters: Tensors,
    tokens: Sequence[Sequence[int]],
    labels: Tensor | None,
    recipe: Recipe,
    merged: Any = None,
) -> Tensors:
    """The parameters after training by a recipe, in chunks of its batch size, detached."""
    size = recipe.batch_size or len(tokens)
    chunks = range(0, len(tokens), size)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    optimiser = OPTIMISERS[recipe.optimizer](list(leaves.values()), recipe.learning_rate)
    for step in range(recipe.steps):
        start = chunks[step % len(chunks)]
        part = slice(start, start + size)
        optimiser.zero_grad()
        whole = leaves if merged is None else merged(leaves)
        model.loss(whole, tokens[part], None if labels is None else labels[part]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {name: p.detach() for name, p in leaves.items()}


def adam_steps(model: LanguageModel, batches: Iterable[tuple[Tokens, Tensor]], rate: float) -> Tensors:
    """The parameters after one Adam step on each of these batches."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.parameters.items()}
    optimiser = torch.optim.Adam(list(leaves.values()), lr=rate)
    for tokens, labels in batches:
        optimiser.zero_grad()
        model.loss(leaves, tokens, labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {name: p.detach() for name, p in leaves.items()}
