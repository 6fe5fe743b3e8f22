"""Language models of the transformers library: the blueprint of one, and how its network is built.

Sentences are sequences of token ids, special tokens included. The library's own forward pass is called; none of its code is
repeated here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from gradleak.errors import BadInput, checked
from gradleak.modalities.modality import Fact, Tokens, fact
from gradleak.modalities.texts import Texts
from gradleak.modalities.transformers_networks import refusing
from gradleak.modalities.words import Task as Task

NO_TARGET = -100  # the label of a position that is not trained on, as torch and transformers have it
Size = Annotated[int, Meta(ge=1)]
ENDLESS = (
    1_024  # tokens of a text that are taken where positions are relative, and the model sets no end: T5, BLOOM, Mamba
)
MASKED = 0.15  # of the tokens of a text (Devlin et al. 2018, section 3.1), at least one


class Sizes(msgspec.Struct, frozen=True):
    """What every configuration of a language model says."""

    vocab_size: Size
    max_position_embeddings: Size | None
    num_hidden_layers: Size
    pad_token_id: Annotated[int, Meta(ge=0)] | None


@dataclass(frozen=True)
class LanguageArchitecture:
    """The blueprint of a language model, with the tokenizer that it belongs to; evaluated without dropout.

    name       folder or hub name, for reports only
    config     the transformers configuration
    task       "classification": cross entropy of one label per text; "causal-lm": of every next token; "masked-lm": of the
               tokens that were masked. The text of an encoder-decoder is its own target
    tokenizer  a fast tokenizer of transformers
    """

    modality: ClassVar[str] = "texts"
    secret: ClassVar[str] = "texts"

    name: str
    config: Any = field(repr=False, compare=False)
    task: Task
    tokenizer: Any = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        known = {name: getattr(self.config, name, None) for name in Sizes.__struct_fields__}
        sizes = checked(known, Sizes, f"Models of the kind {self.config.model_type!r} are not supported for text")
        if sizes.pad_token_id is not None and sizes.pad_token_id >= sizes.vocab_size:
            raise BadInput(
                f"Texts cannot be padded with token {sizes.pad_token_id}: the model has {sizes.vocab_size:,}."
            )
        if len(self.tokenizer) > self.config.vocab_size:
            raise BadInput(
                f"The tokenizer knows {len(self.tokenizer):,} tokens and the model {self.config.vocab_size:,}: "
                "they do not belong together."
            )

    @property
    def classes(self) -> int:
        """Labels that a text may have; 1 where the task has none."""
        return int(self.config.num_labels) if self.task == "classification" else 1

    @property
    def positions(self) -> int:
        """The longest sentence that the model takes."""
        return int(getattr(self.config, "max_position_embeddings", None) or ENDLESS)

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

    def plain(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """A sentence without the special tokens of its tokenizer, which are known beforehand."""
        special = set(self.tokenizer.all_special_ids)
        return tuple(token for token in tokens if token not in special)

    def padded(self, tokens: Sequence[Sequence[int]] | Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both (batch, longest), padded on the right; of equal lengths they may be a tensor."""
        if isinstance(tokens, Tensor):
            return tokens, torch.ones(tokens.shape, dtype=torch.int64)
        if not tokens or not all(tokens):
            raise BadInput("A batch needs sentences, and a sentence needs tokens.")
        longest, pad = max(map(len, tokens)), self.config.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in tokens])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
        return ids, mask

    def arguments(self, inputs: Tokens, like: Tensor) -> tuple[tuple[()], dict[str, Tensor]]:
        """Padded ids and their mask; the decoder of an encoder-decoder reads the same text."""
        ids, mask = (part.to(like.device) for part in self.padded(inputs))
        twice = self.config.is_encoder_decoder and self.task == "causal-lm"
        return (), {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids} if twice else {})

    def logits(self, output: Any) -> Tensor:
        """(batch, classes), or (batch, longest, vocabulary): what is called logits, else the output itself or its first part."""
        named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        first = output[0] if named is None and isinstance(output, tuple) else output
        logits = first if named is None else named
        if not isinstance(logits, Tensor):
            raise BadInput(f"The model {self.name} returns a {type(output).__name__} without logits.")
        return logits

    def compared(self, logits: Tensor, inputs: Tokens, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """One row per text for classification (labels (batch,) int64); per next token for causal-lm; per masked token for
        masked-lm (labels (batch, longest) int64, -100 where a token was not masked)."""
        if self.task == "causal-lm":
            ids, mask = (part.to(logits.device) for part in self.padded(inputs))
            wanted = ids.masked_fill(mask == 0, NO_TARGET)[:, 1:]
            return logits[:, :-1].flatten(0, 1), wanted.flatten()
        if labels is None:
            raise BadInput("A classifier needs labels, and a masked language model the tokens that were masked.")
        if self.task == "classification":
            return logits, labels
        return logits.flatten(0, 1), labels[:, : logits.shape[1]].flatten()

    def feed(self, data: Texts, *, seed: int = 0) -> tuple[Tokens, Tensor | None]:
        """Token ids, with masks where the task has them, and labels; BadInput for texts or labels that do not fit."""
        tokens, labels = self.encode(data.texts), data.labels
        if self.task == "masked-lm":
            return self.masked(tokens, seed)
        if self.task == "causal-lm":
            return tokens, None
        if int(labels.max()) >= self.classes or int(labels.min()) < 0:
            raise BadInput(f"Label {int(labels.max())} is beyond the model's {self.classes} classes.")
        return tokens, labels

    def masked(self, tokens: Tokens, seed: int) -> tuple[Tokens, Tensor]:
        """(tokens, labels (batch, longest)) as BERT is trained: of the tokens chosen, 8 in 10 are masked, 1 is replaced by a
        random one and 1 stays (Devlin et al. 2018, section 3.1). Special tokens are not chosen."""
        if self.tokenizer.mask_token_id is None:
            raise BadInput("The tokenizer has no mask token: masked language modelling is for encoders like BERT.")
        generator, special = torch.Generator().manual_seed(seed), set(self.tokenizer.all_special_ids)
        labels = torch.full((len(tokens), max(map(len, tokens))), NO_TARGET)
        fed = [list(row) for row in tokens]
        for number, row in enumerate(fed):
            plain = [i for i, token in enumerate(row) if token not in special]
            count = max(1, round(MASKED * len(plain)))
            for i in torch.randperm(len(plain), generator=generator)[:count].tolist():
                place, how = plain[i], int(torch.randint(10, (), generator=generator))
                labels[number, place] = row[place]
                if how < 8:
                    row[place] = self.tokenizer.mask_token_id
                elif how == 8:
                    row[place] = int(torch.randint(self.config.vocab_size, (), generator=generator))
        if not bool((labels != NO_TARGET).any()):
            raise BadInput("No text has a token that could be masked: all are special tokens.")
        return tuple(map(tuple, fed)), labels

    def original(self, inputs: Tokens, labels: Tensor | None) -> Tokens:
        """Sentences as they were before masking: labels (batch, longest), -100 where a token was not masked."""
        if labels is None or labels.ndim == 1:
            return inputs
        return tuple(
            tuple(old if new == NO_TARGET else new for old, new in zip(row, targets, strict=False))
            for row, targets in zip(inputs, labels.tolist(), strict=True)
        )

    def blank(self, count: int) -> Tokens:
        """Empty sentences."""
        return ((),) * count

    def probe(self) -> tuple[Tokens, Tensor | None]:
        """Two sentences of one token, twice; that of an encoder-decoder, which looks for the end, is closed."""
        first, last = torch.zeros(2, dtype=torch.int64), 0
        if self.config.is_encoder_decoder and self.config.eos_token_id is not None:
            last = int(self.config.eos_token_id)
        labels = {"classification": first, "causal-lm": None, "masked-lm": torch.zeros(2, 2, dtype=torch.int64)}
        return ((0, last), (0, last)), labels[self.task]

    def show(self, inputs: Tokens) -> list[str]:
        """The texts as somebody may have written them: without the space before the first word, where the tokenizer adds one."""
        texts = [self.decode(row) for row in inputs]
        return [bare if self.alike(bare := text.removeprefix(" "), text) else text for text in texts]

    def alike(self, one: str, other: str) -> bool:
        """Whether two texts are the same tokens."""
        return one == other or bool(self.tokenizer(one)["input_ids"] == self.tokenizer(other)["input_ids"])

    def facts(self, labels: Tensor | None) -> list[Fact]:
        """The architecture, the tokenizer and the task."""
        return [
            fact("architecture", True, f"{self.config.model_type}, {self.config.num_hidden_layers} layers"),
            fact("tokenizer", True, f"{len(self.tokenizer):,} tokens"),
            fact("task", True, self.task),
        ]

    def labels_detail(self) -> str:
        """By task: labels, next tokens, masked tokens."""
        return {"classification": "withheld", "causal-lm": "none: next tokens", "masked-lm": "the masked tokens"}[
            self.task
        ]


def build(config: Any, task: Task, *, classes: int, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    """(module, config): a freshly initialised network for the task, in eval mode, with attention that can be followed."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
    elif config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id
    kind: Any = {"causal-lm": AutoModelForCausalLM, "masked-lm": AutoModelForMaskedLM}.get(task)
    if task == "causal-lm" and config.is_encoder_decoder:
        kind = AutoModelForSeq2SeqLM
    if task == "classification":
        kind, config.num_labels = AutoModelForSequenceClassification, classes
    with refusing(f"transformers cannot build this model for {task}"):
        torch.manual_seed(seed)
        config._experts_implementation = "eager"  # of mixtures of experts: the grouped kernels take no float64
        module = kind.from_config(config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False)
    return module.eval(), config
