"""The samples that a training is fed with, kept while it runs, so that an audit of it is scored: only that audit opens them."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import NO_TARGET, LanguageArchitecture, Task
from gradleak.observations.model import Model

MOST = 4_096  # samples that are kept
SOURCE = "what the training was fed with"


@dataclass
class Fed:
    """What a model of transformers was fed with in training, in that order: {name: tensor} of each batch, on the CPU."""

    batches: list[dict[str, Tensor]] = field(default_factory=list, repr=False)
    samples: int = 0

    def watch(self, model: nn.Module) -> Any:
        """Keep from now on what the model is called with in training mode; the handle ends it."""
        return model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        """One batch."""
        if not module.training or self.samples >= MOST:
            return
        tensors = {name: part.detach().cpu().clone() for name, part in named.items() if isinstance(part, Tensor)}
        if tensors:
            self.batches.append(tensors)
            self.samples += len(next(iter(tensors.values())))

    def secret(self, model: Model[Any], count: int | None) -> Secret:
        """The first so many samples, or all, as our model of them is fed. NotObserved where they were too many, or had no labels."""
        if self.samples >= MOST and (count is None or count > self.samples):
            raise NotObserved(f"The training was fed with more than {MOST:,} samples, of which none are kept.")
        architecture = model.architecture
        texts = isinstance(architecture, LanguageArchitecture)
        read = (
            partial(sentences, task=architecture.task) if texts else partial(pictures, constants=model.module.normalise)
        )
        rows = [row for batch in self.batches for row in read(batch)]
        rows = rows[: count or len(rows)]
        if not rows or (labelled := rows[0][1] is not None) != (architecture.probe()[1] is not None):
            raise NotObserved(
                "The model was not called with its inputs and labels by name: nothing is there to score with."
            )
        inputs = tuple(row for row, _ in rows) if texts else torch.stack([row for row, _ in rows])
        labels = [label for _, label in rows if label is not None]
        if not labelled:
            return Secret(inputs, None, SOURCE)
        tokens = bool(labels[0].ndim)  # under the masks; else a class
        return Secret(inputs, pad_sequence(labels, True, NO_TARGET) if tokens else torch.stack(labels), SOURCE)


def sentences(batch: dict[str, Tensor], task: Task) -> list[tuple[Any, Tensor | None]]:
    """(token ids, label) of each text, without padding."""
    ids = batch.get("input_ids", torch.zeros(0, 0, dtype=torch.int64))
    masks = batch.get("attention_mask", torch.ones_like(ids)).bool()
    labels = None if task == "causal-lm" else batch.get("labels")
    rows = []
    for number, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        label = None if labels is None else labels[number]
        rows.append((tuple(row[mask].tolist()), label[mask] if label is not None and label.ndim else label))
    return rows


def pictures(batch: dict[str, Tensor], constants: Any) -> list[tuple[Any, Tensor | None]]:
    """(pixels in [0, 1], label) of each picture. constants: our first layer, which the processor stands for."""
    if "pixel_values" not in batch or "labels" not in batch:
        return []
    pixels = (batch["pixel_values"].float() * constants.std + constants.mean).clamp(0, 1)
    return list(zip(pixels, batch["labels"], strict=True))


def of_pairs(batches: list[Any]) -> Secret:
    """Batches of (pictures in [0, 1], labels) as one secret; NotObserved for others."""
    pairs = [batch for batch in batches if isinstance(batch, tuple | list) and len(batch) == 2 and len(batch[0])]
    if not pairs or len(pairs) < len(batches):
        raise NotObserved(
            "The loader gave no batches of (inputs, labels) before that step: nothing is there to score with."
        )
    inputs, labels = (torch.cat([pair[i].detach().cpu() for pair in pairs]) for i in (0, 1))
    return Secret(inputs, labels, SOURCE)
