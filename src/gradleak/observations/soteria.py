"""Soteria (Sun et al., CVPR 2021, arXiv:2012.06043): a part of the representation that the last layer reads is not shared."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from gradleak.errors import BadInput
from gradleak.observations.defenses import Defense
from gradleak.observations.layers import is_linear
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors


@dataclass(frozen=True)
class Soteria(Defense):
    """Columns of the last linear layer's gradient are set to 0: the share of features r_i that tell most of the pictures for what they
    are worth, those of the largest |r_i| / ||dr_i/dx|| (equation 9; the mean over the batch). Everything else is shared as it is."""

    reads: ClassVar[bool] = True

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadInput(f"The share of features that Soteria hides lies between 0 and 1, not at {self.share:g}.")

    def bound(self, model: Model[Any], inputs: Any) -> Defense:
        """Of these pictures (batch, channel, height, width); BadInput for texts, and for a model without a linear layer."""
        if not isinstance(inputs, Tensor):
            raise BadInput("Soteria is for pictures: it asks how features change with pixels.")
        layer = last_linear(model)

        def features(x: Tensor) -> Tensor:
            kept = list[Tensor]()
            handle = model.module.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
            try:
                model.logits(model.parameters, x[None])
            finally:
                handle.remove()
            return kept[0].flatten()

        r = vmap(features)(inputs)  # (batch, features)
        slope = vmap(jacrev(features))(inputs).flatten(2).norm(dim=2)
        telling = (r.abs() / slope.clamp_min(torch.finfo(r.dtype).tiny)).mean(0)
        hidden = telling.topk(max(round(self.share * len(telling)), 1)).indices
        return Columns(f"{layer}.weight", tuple(hidden.tolist()))

    def seen(self, simulated: Tensors, released: Tensors) -> Tensors:
        """Without the columns that are missing."""
        return {n: t * released[n].any(0) if t.ndim == 2 and hides(released[n]) else t for n, t in simulated.items()}

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """It depends on the private pictures."""
        raise BadInput(
            "Soteria hides features of private pictures: it is applied where these are, by `gradleak capture`."
        )

    def __str__(self) -> str:
        return f"Soteria hides {100 * self.share:g} % of the last layer's features"


@dataclass(frozen=True)
class Columns(Defense):
    """Columns of one weight's gradient are set to 0."""

    name: str
    hidden: tuple[int, ...]

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """Without them."""
        if self.name not in released:
            return released
        shared = released[self.name].clone()
        shared[..., list(self.hidden)] = 0
        return released | {self.name: shared}


def hides(released: Tensor) -> bool:
    """Whether columns of a matrix are missing."""
    return not bool(released.any(0).all())


def last_linear(model: Model[Any]) -> str:
    """The linear layer that the model names last."""
    names = [name for name, module in model.module.named_modules() if is_linear(module)]
    if not names:
        raise BadInput("Soteria hides what the last linear layer reads, and the model has none.")
    return str(names[-1])
