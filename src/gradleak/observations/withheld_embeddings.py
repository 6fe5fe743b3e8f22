"""The gradients of embeddings stay at home: they name the words of a text (attacks/embedding_rows.py)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradleak.errors import BadInput
from gradleak.observations.defenses import Defense
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors


@dataclass(frozen=True)
class WithheldEmbeddings(Defense):
    """Share everything but the gradients of the tables that have a row for each word or each position; an output layer that is the same
    table as the words is among them."""

    def bound(self, model: Model[Any], inputs: Any) -> Defense:
        """Of this model; BadInput where it has none."""
        names = [f"{n}.weight" for n, layer in model.module.named_modules() if isinstance(layer, nn.Embedding)]
        if not names:
            raise BadInput("The model has no embeddings whose gradients could be withheld.")
        return Withheld(tuple(names))

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """Which tables these are, the model knows."""
        raise BadInput("Embeddings are withheld where the model is: `gradleak capture` does it.")

    def __str__(self) -> str:
        return "the gradients of embeddings are withheld"


@dataclass(frozen=True)
class Withheld(Defense):
    """These tensors are not shared."""

    names: tuple[str, ...]

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The others."""
        return {name: tensor for name, tensor in released.items() if name not in self.names}
