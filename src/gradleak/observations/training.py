"""How something was trained: a recipe, and the training itself as a pure function, of pictures as of texts."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.func import grad

from gradleak.errors import BadInput
from gradleak.modalities.modality import Inputs
from gradleak.modalities.words import Optimizer as Optimizer
from gradleak.observations.orders import SEEDS, SHUFFLERS, Schedule, Shuffler, batches, scheduled, taken
from gradleak.observations.tensors import Tensors, flatten

MOMENTUM, BETAS, EPSILON, WEIGHT_DECAY = 0.9, (0.9, 0.999), 1e-8, 0.01  # torch.optim's defaults; momentum as is usual

SMALLEST_RATE, LARGEST_RATE, MOST = 1e-30, 1e30, 1_000_000
SMALLEST_DECAY = 1e-6  # nobody trains with less


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How something was trained: full steps over the private samples in their order, starting over at the end.

    optimizer      sgd, momentum (SGD at 0.9), adam or adamw (weight decay 0.01), with the defaults of torch.optim
    learning_rate  of every step; where `rates` differ, the largest of them
    rates          the learning rate of each step, where they differ (see `scheduled`); else none
    shuffle        how the samples are shuffled in each epoch, and the seed: ("loader", 42) (see `batches`); None: not at all
    steps          number of optimiser steps
    batch_size     samples per step; None: all of them
    weight_decay   None: 0.01 of adamw, 0 of the others
    proximal       mu of FedProx, which draws the parameters to where they started: mu / 2 ||theta - theta_0||^2 is added to the loss
                   (Li et al. 2020, arXiv:1812.06127, equation 2)
    clip           norm to which the gradient of each step is cut, or None
    """

    optimizer: Optimizer = "sgd"
    learning_rate: float
    steps: int
    batch_size: int | None = None
    weight_decay: float | None = None
    proximal: float = 0.0
    clip: float | None = None
    rates: tuple[float, ...] = ()
    shuffle: tuple[Shuffler, int] | None = None

    def __post_init__(self) -> None:
        if self.rates:
            if len(self.rates) != self.steps or not all(0 <= rate <= LARGEST_RATE for rate in self.rates):
                raise BadInput(f"{self.steps} steps need as many learning rates, none below 0, not {len(self.rates)}.")
            object.__setattr__(self, "learning_rate", max(self.rates))
            object.__setattr__(self, "rates", self.rates if min(self.rates) < max(self.rates) else ())
        if self.shuffle is not None and not 0 <= self.shuffle[1] < 2**63:
            raise BadInput(f"A seed lies between 0 and 2^63, not at {self.shuffle[1]}.")
        if not (self.learning_rate > 0 and self.steps > 0 and (self.batch_size is None or self.batch_size > 0)):
            raise BadInput("Training needs a learning rate, a number of steps and a batch size above zero.")
        most = max(self.steps, self.batch_size or 1)
        if not SMALLEST_RATE <= self.learning_rate <= LARGEST_RATE or most > MOST:
            raise BadInput(
                f"Nobody trains with a learning rate of {self.learning_rate:g}, or with {most:,} steps or samples a step: rates "
                f"lie between {SMALLEST_RATE:g} and {LARGEST_RATE:g}, and {MOST:,} is the most of the others."
            )

        if not (0 <= self.decay <= 1 and 0 <= self.proximal <= LARGEST_RATE and (self.clip is None or self.clip > 0)):
            raise BadInput(
                "Weight decay lies between 0 and 1, FedProx's mu is not below 0, and gradients are cut to a norm above 0."
            )

    @property
    def decay(self) -> float:
        """The weight decay that is meant."""
        if self.weight_decay is not None:
            return self.weight_decay
        return WEIGHT_DECAY if self.optimizer == "adamw" else 0.0

    @property
    def path(self) -> float:
        """All learning rates together: what turns a gradient that stays the same into the change by SGD."""
        return sum(self.rates) if self.rates else self.learning_rate * self.steps

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on."""
        return self.rates[step] if self.rates else self.learning_rate

    def __str__(self) -> str:
        batch = "all samples" if self.batch_size is None else f"{self.batch_size} samples"
        rate = (
            f"rates {self.rates[0]:g} to {self.rates[-1]:g}, {self.learning_rate:g} at most"
            if self.rates
            else f"rate {self.learning_rate:g}"
        )
        text = f"{self.steps} {self.optimizer} steps, learning {rate}, {batch} a step"
        text += "" if self.shuffle is None else f", shuffled ({self.shuffle[0]}, seed {self.shuffle[1]})"
        text += "" if self.weight_decay is None else f", weight decay {self.weight_decay:g}"
        text += f", FedProx at {self.proximal:g}" if self.proximal else ""
        return text + ("" if self.clip is None else f", gradients cut to norm {self.clip:g}")


@dataclass(frozen=True, kw_only=True)
class Undone:
    """A step of an optimizer that was undone: what was released is the gradient behind it.

    recipe  of that one step
    error   of the gradient, as a share of its length
    """

    recipe: Recipe
    error: float

    def of(self, gradient: Tensors) -> Tensors:
        """What the optimizer was given of such a gradient."""
        return cut(gradient, self.recipe.clip)

    def sentence(self) -> str:
        """What that means."""
        return (
            f"What was released is one step of {self.recipe.optimizer} at a learning rate of {self.recipe.learning_rate:g}. It hides "
            f"little: its epsilon gives the gradient back, to {self.error:.1g} of its length."
        )


OPTIMISERS: dict[Optimizer, Callable[[list[Any], float], torch.optim.Optimizer]] = {  # (parameters, learning rate)
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=MOMENTUM),
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, rate),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, rate),
}

Objective = Callable[[Tensors, Any, Any], Tensor]  # (parameters, inputs, labels or None) -> scalar


def train(loss: Objective, parameters: Tensors, inputs: Inputs, labels: Tensor | None, recipe: Recipe) -> Tensors:
    """The parameters after training, unrolled: differentiable with respect to the inputs where these are tensors.

    BadInput where there are no inputs: nothing is trained on nothing.
    """
    if not len(inputs):
        raise BadInput("There is no sample to train on.")
    order = batches(len(inputs), recipe.batch_size, recipe.shuffle)
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = first
    start, (b1, b2), decay = parameters, BETAS, recipe.decay
    for step, rows in enumerate(itertools.islice(order, recipe.steps), start=1):
        rate = recipe.rate(step - 1)
        g = grad(loss)(parameters, taken(inputs, rows), None if labels is None else taken(labels, rows))
        if recipe.proximal:
            g = {k: g[k] + recipe.proximal * (parameters[k] - start[k]) for k in g}
        g = cut(g, recipe.clip)
        if decay and recipe.optimizer != "adamw":
            g = {k: g[k] + decay * parameters[k] for k in g}
        match recipe.optimizer:
            case "sgd":
                change = g
            case "momentum":
                change = first = {k: MOMENTUM * first[k] + g[k] for k in g}
            case "adam" | "adamw":
                first = {k: b1 * first[k] + (1 - b1) * g[k] for k in g}
                second = {k: b2 * second[k] + (1 - b2) * g[k].square() for k in g}
                # 1e-30: where a gradient is zero, the square root would have no derivative.
                size_of = {k: (second[k] / (1 - b2**step) + 1e-30).sqrt() + EPSILON for k in g}
                change = {k: first[k] / (1 - b1**step) / size_of[k] for k in g}
        if recipe.optimizer == "adamw":
            parameters = {k: (1 - rate * decay) * p for k, p in parameters.items()}
        parameters = {k: p - rate * change[k] for k, p in parameters.items()}
    return parameters


def cut(gradient: Tensors, norm: float | None) -> Tensors:
    """A gradient cut to a norm over all its tensors, as clip_grad_norm_ does; None: the gradient itself."""
    if norm is None:
        return gradient
    share = (norm / (flatten(gradient).norm() + 1e-6)).clamp(max=1)
    return {name: share * tensor for name, tensor in gradient.items()}


def other_recipes(recipe: Recipe, before: Tensors, change: Tensors, simulated: Tensors) -> list[Recipe]:
    """What else the training may have been whose change was simulated: with SGD, momentum, Adam or AdamW, with rates that fall to 0, or
    with the weight decay that explains best what the simulation leaves of the change."""
    kinds: list[Optimizer] = ["sgd", "adam", "adamw", *(["momentum"] if recipe.steps > 1 else [])]  # type: ignore[list-item]
    others = [replace(recipe, optimizer=kind, weight_decay=None) for kind in kinds if kind != recipe.optimizer]
    if recipe.steps > 1 and not recipe.rates:
        others += [
            replace(recipe, rates=scheduled(kind, recipe.learning_rate, recipe.steps)) for kind in get_args(Schedule)
        ]
    both = torch.stack([flatten(simulated), flatten(before)], dim=1).double()
    _, pull = torch.linalg.lstsq(both, flatten(change).double()[:, None]).solution.flatten().tolist()
    decay = recipe.decay - pull / recipe.path
    if SMALLEST_DECAY < decay <= 1:
        others.append(replace(recipe, weight_decay=float(f"{decay:.2g}")))
    return others


def shuffled_recipes(recipe: Recipe, samples: int) -> list[Recipe]:
    """The same training with the samples shuffled by the usual seeds, where their order can tell: several batches in several steps."""
    if recipe.steps < 2 or not recipe.batch_size or recipe.batch_size >= samples or recipe.shuffle is not None:
        return []
    return [replace(recipe, shuffle=(kind, seed)) for seed in SEEDS for kind in SHUFFLERS]
