"""A LoRA adapter beside its base model: what training changed of its factors."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.func import grad

from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.modality import Fact, by, fact
from gradleak.observations.layers import oriented
from gradleak.observations.mixed import Mixed
from gradleak.observations.model import Model
from gradleak.observations.release import (
    NOTHING,
    Release,
    Reservation,
    Sketch,
    check_finite,
    inexact,
    inexactly_undone,
    noisier,
    weight_shaped,
)
from gradleak.observations.starts import why_unknown
from gradleak.observations.tensors import Tensors, flatten
from gradleak.observations.training import Recipe, Undone, shuffled_recipes, train

SMALLEST, LARGEST = 1e-6, 1e6  # the scaling of an adapter
STILL = 1e-6  # of a factor's largest number: less than that is the rounding of float32, and no training
MERGED = 1e-6  # of the largest singular value of a B that was read off weights: the others are rounding of float32
UNKNOWN = Recipe(learning_rate=1.0, steps=1)  # what is assumed of an adapter that comes without its recipe


Origin = Literal["given", "recovered", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Adapter(Mixed):
    """A LoRA adapter beside its base model (Hu et al. 2021, arXiv:2106.09685): a layer computes (W + s B A) x.

    What is released is {MODULE.lora_A (r, in) or MODULE.lora_B (out, r): its change during training}, of a convolution
    (r, in, k, k) and (out, r, 1, 1), as PEFT stores them; only factors whose start is known.

    start     {MODULE.lora_A and MODULE.lora_B, for every adapted module: where training started}. PEFT's default starts B at
              zero; where A's start is unknown, it is taken to be the released A, which is exact for one step
    origin    how the start is known: given (the adapter before training), recovered (from the seed that drew it, or from the
              base model's weights), unknown
    seed      the seed that drew it, where that was recovered
    tried     how many seeds were tried in vain
    init      what PEFT's config says of the start (init_lora_weights), or ""
    scaling   {module: s}, alpha / r, or alpha / sqrt(r) (rslora)
    recipe    how it was trained, or None: one SGD step is then assumed, and only directions can be told
    dropout   probability with which inputs of the adapter may have been dropped in training; the masks are not known, and `simulate`
              takes their mean
    frozen_a  whether B alone was trained: A is where it began
    gradient  whether what was released is the gradient of the factors, and not their change in training
    undone    the step of an optimizer that this gradient was read from, or None
    unmerged  {module: deviation of one number of s B A} of an adapter that was read off the weights that it was merged into

    Of what was trained beside the factors: `beside` names parameters that began as the model has them, and are trained along (`changed`: the
    change of each, where it is known, which `whole_weights` makes an update of); `held` what
    is not trained along (`embedded`: {embedding that LoRA adapts: its rank}, of these); `known_at_end` parameters that the model has as training left them. `remarks` are reservations of the reader's.
    """

    name: ClassVar[str] = "adapter"
    sketched: ClassVar[bool] = True

    start: Tensors = field(repr=False)
    scaling: dict[str, float] = field(repr=False)
    recipe: Recipe | None = None
    dropout: float = 0.0
    frozen_a: bool = False
    gradient: bool = False
    undone: Undone | None = None
    origin: Origin = "unknown"
    seed: int | None = None
    tried: int = 0
    init: str = ""
    beside: tuple[str, ...] = ()
    changed: Tensors = field(default_factory=dict, repr=False)
    held: tuple[str, ...] = ()
    embedded: dict[str, int] = field(default_factory=dict)
    known_at_end: tuple[str, ...] = ()
    remarks: tuple[Reservation, ...] = ()
    unmerged: dict[str, float] = field(default_factory=dict)

    def names(self, model: Model[Any]) -> Tensors:
        """Its factors."""
        return self.start

    def check(self, model: Model[Any], released: Tensors) -> None:
        """BadInput naming the first module whose factors do not fit the model, or factor whose change does not fit it."""
        self.check_mixed()
        if not self.scaling:
            raise BadInput("The adapter changes no module.")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"Dropout has a probability below 1, not {self.dropout:g}.")
        for module, s in self.scaling.items():
            if not SMALLEST <= abs(s) <= LARGEST:
                raise BadInput(f"The adapter of {module} is scaled by {s:g}: no adapter is.")
            if missing := [f for f in ("lora_A", "lora_B") if f"{module}.{f}" not in self.start]:
                raise BadInput(f"The adapter of {module} has no {missing[0]}: both factors at the start are needed.")
            A, B, weight = self.start[f"{module}.lora_A"], self.start[f"{module}.lora_B"], f"{module}.weight"
            if weight not in model.parameters:
                raise BadInput(f"The adapter changes {module}, which has no weight in the base model.")
            product_shape, shape = (*B.shape[:1], *A.shape[1:]), oriented(model, module, model.parameters[weight]).shape
            if B.shape[1:2] != A.shape[:1] or product_shape != shape or not A.numel() or B.shape[2:].numel() != 1:
                raise BadInput(
                    f"The adapter of {module} makes a weight of {by(product_shape)}, the base model's is {by(shape)}: "
                    "they do not belong together."
                )
        for name, tensor in released.items():
            if name not in self.start or tensor.shape != self.start[name].shape:
                raise BadInput(f"The change of {name} does not have the shape of its start.")
            if self.frozen_a and name.endswith("lora_A") and bool(tensor.any()):
                raise BadInput(f"{name} is said not to have been trained, and has changed.")
        if missing := [name for name in self.beside if name not in model.parameters]:
            raise BadInput(f"{missing[0]} is said to be trained beside the adapter, and is no parameter of the model.")
        for name, tensor in self.changed.items():
            if name not in self.beside or tensor.shape != model.parameters[name].shape:
                raise BadInput(f"The change of {name} beside the adapter is not that of a parameter that was trained.")
        check_finite({**self.start, **self.changed})

    def simulate(self, model: Model[Any], released: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """The change of the released factors after training on these, unrolled, differentiable; or their gradient.

        Without a recipe the learning rate is unknown: the change is brought to the length of what was released.
        """
        recipe = self.recipe or UNKNOWN
        # In one step no factor meets the other's change: those that are not released need no gradient, but for the norm that is cut.
        alone = recipe.clip is None and (recipe.steps == 1 or self.gradient)
        before = {name: self.start[name] for name in (released if alone else self.start) if self.moves(name)}
        before |= {} if alone else {name: model.parameters[name] for name in self.beside}

        def loss(factors: Tensors, inputs: Any, labels: Tensor | None) -> Tensor:
            return self.loss(model, factors, inputs, labels)

        def of_client(inputs: Any, labels: Tensor | None) -> Tensors:
            if self.gradient:
                gradient: Tensors = grad(self.objective(loss))(before, inputs, labels)
                return gradient
            after = train(self.objective(loss), before, inputs, labels, recipe)
            return {name: after[name] - before[name] for name in before}

        moved = self.over_clients(of_client, inputs, labels)
        moved = moved if self.undone is None else self.undone.of(moved)
        change = {n: moved[n] if n in moved else torch.zeros_like(self.start[n]) for n in released}
        if self.gradient:
            return change
        if self.recipe is not None:
            return change
        size, wanted = (flatten(tensors).square().sum() for tensors in (change, released))
        ratio = wanted / size.clamp_min(torch.finfo(size.dtype).tiny)
        scale = torch.where((size > 0) & (wanted > 0), ratio, 1.0).sqrt()
        return {name: scale * tensor for name, tensor in change.items()}

    def moves(self, factor: str) -> bool:
        """Whether training changes this factor."""
        return not (self.frozen_a and factor.endswith("lora_A"))

    def merged(self, model: Model[Any], tensors: Tensors) -> Tensors:
        """{module.weight: W + s B A}, with these factors in place of those at the start."""
        known, weights = {**self.start, **tensors}, {name: tensors[name] for name in self.beside if name in tensors}
        for module, s in self.scaling.items():
            change = s * product(known[f"{module}.lora_A"], known[f"{module}.lora_B"])
            weights[f"{module}.weight"] = model.parameters[f"{module}.weight"] + oriented(model, module, change)
        return weights

    def sketches(
        self,
        model: Model[Any],
        released: Tensors,
        precision: str,
        modules: Collection[str] | None,
        noise: Tensors = NOTHING,
    ) -> list[Sketch]:
        """One equation per released factor: exact for one SGD step, else a mean over the steps."""
        recipe = self.recipe or UNKNOWN
        sketches = []
        for module, s in self.scaling.items():
            if modules is not None and module not in modules:
                continue
            unit = 1 / s if self.gradient else -1 / (recipe.path * s)
            A, B = (self.start[f"{module}.{factor}"].flatten(1) for factor in ("lora_A", "lora_B"))
            if f"{module}.lora_B" in released and bool(A.any()):
                B_change = unit * released[f"{module}.lora_B"].flatten(1)
                known = noisier(None, noise.get(f"{module}.lora_B"), B_change)
                sketches.append(Sketch(module, "right", B_change, A, None if known is None else abs(unit) * known))
            if f"{module}.lora_A" in released and bool(B.any()):
                A_change = unit * released[f"{module}.lora_A"].flatten(1).T
                known = noisier(None, noise.get(f"{module}.lora_A"), A_change)
                sketches.append(Sketch(module, "left", A_change, B.T, None if known is None else abs(unit) * known))
        return sketches

    def as_gradient(self, model: Model[Any], released: Tensors) -> Tensors:
        """{module.weight: the gradient of least norm that explains its sketch}: M = S (F F^T)^-1 F."""
        sketches = sorted(self.sketches(model, released, "float32", None), key=lambda s: s.side)  # B's change stays
        if not sketches:
            raise NotObserved(
                "The adapter measures no gradient: the other factor of each that is released starts at zero."
            )
        return {
            f"{s.module}.weight": weight_shaped(model, s, s.measured @ torch.linalg.pinv(s.through).T) for s in sketches
        }

    def ended(self, released: Tensors) -> Tensors:
        """{factor: its value after training}, of every factor; by way of float64, so that it is what was saved to the last bit."""
        left = decay(self.recipe)  # of a factor whose start is unknown
        start = {name: tensor.double() for name, tensor in self.start.items()}
        ended = {
            name: t + released[name] if name in released else left * t if self.moves(name) else t
            for name, t in start.items()
        }
        return {name: tensor.to(self.start[name]) for name, tensor in ended.items()}

    def begun(self, released: Tensors, start: Tensors, origin: Origin, seed: int | None = None) -> tuple[Self, Tensors]:
        """The same release with another start of all factors, and the changes of all of them from there. An A that several steps have
        left where it began was not trained."""
        changes = {name: tensor - start[name] for name, tensor in self.ended(released).items()}
        As = [name for name in changes if name.endswith("lora_A")]
        still = all(float(changes[name].abs().max()) <= STILL * float(start[name].abs().max()) for name in As)
        frozen = self.frozen_a or (still and self.recipe is not None and self.recipe.steps > 1)
        changes |= {name: torch.zeros_like(changes[name]) for name in As if frozen}
        return replace(self, start=start, origin=origin, seed=seed, frozen_a=frozen), changes

    def after(self, model: Model[Any], released: Tensors) -> Tensors | None:
        """W + s B A of the adapted layers, where training changed the factors."""
        if self.gradient:
            return None
        return self.merged(model, {name: self.start[name] + change for name, change in released.items()})

    def ends(self, model: Model[Any], released: Tensors) -> tuple[Tensors | None, Tensors | None]:
        """Factors, and what was trained as a whole beside them; of a gradient there is no end."""
        start = {**self.start, **{name: model.parameters[name] for name in self.changed}}
        ended = {name: model.parameters[name] + change for name, change in self.changed.items()}
        return start, None if self.gradient else {**self.ended(released), **ended}

    def descended(self, model: Model[Any], released: Tensors) -> Tensors:
        """Of the factors whose start is known, and of what was trained as a whole."""
        if self.gradient:
            return released
        return {name: -change for name, change in (*released.items(), *self.changed.items())}

    def steps(self) -> int:
        """Those of the recipe."""
        return 1 if self.recipe is None or self.gradient else self.recipe.steps

    def one_step(self) -> Self:
        """The same with a recipe of one step."""
        return self if self.recipe is None else replace(self, recipe=replace(self.recipe, steps=1))

    def inexact(self) -> str:
        """Dropout, an unknown recipe, more than one step, Adam; nothing for one step of SGD from a known start."""
        if self.dropout > 0:
            return f"it may have been trained with dropout {self.dropout:g}, whose masks nobody knows"
        if self.known_at_end:
            return f"{self.known_at_end[0]} is known only as training left it"
        if self.gradient:
            return inexactly_undone(self.undone)
        if self.held and self.recipe is not None and self.recipe.steps > 1:
            return f"{self.held[0]} changed in training too, and is held as it was"
        return "its recipe is unknown, one step of SGD is assumed" if self.recipe is None else inexact(self.recipe)

    def shuffled(self, samples: int) -> list[Release]:
        """Of a training in several batches, with these shuffled."""
        own = samples // self.clients
        recipes = [] if self.recipe is None or self.gradient else shuffled_recipes(self.recipe, own)
        return [replace(self, recipe=recipe) for recipe in recipes]

    def guessed(self) -> bool:
        """Without a recipe: one step of SGD is assumed."""
        return self.recipe is None and not self.gradient

    def reservations(self, model: Model[Any], released: Tensors) -> list[Reservation]:
        """Where it is no exact linear sketch of one gradient; and what a known start gives away."""
        told: list[Reservation] = [*self.remarks]
        if self.unmerged:
            told.append(("merged", "warning", self.merging(released)))
        if self.origin == "recovered":
            known = f"Seed {self.seed} draws" if self.seed is not None else "The weights of the base model give"
            sentence = f"{known} the adapter as it was before training: what training changed of A lies in the span "
            told.append(("seed", "warning", f"{sentence}of what its layers were fed with."))
        if self.origin == "unknown" and not self.gradient and (reason := why_unknown(self.init, self.tried)):
            told.append(("no_seed", "info", f"Where training began is not known: {reason}."))
        if self.undone is not None:
            told.append(("step_undone", "warning", self.undone.sentence()))
        told += self.alike(self.steps(), linear=self.gradient or "adam" not in (self.recipe or UNKNOWN).optimizer)
        if reason := self.inexact():
            told.append(("not_exact", "warning", f"The adapter is no exact linear sketch of one gradient: {reason}."))
        return told

    def facts(self) -> list[Fact]:
        """The ranks and the recipe."""
        ranks = sorted({tensor.shape[0] for name, tensor in self.start.items() if name.endswith("lora_A")})
        rank = f"{len(self.scaling)} modules of rank {', '.join(map(str, ranks))}"
        rank += ", read off the weights that it was merged into" if self.unmerged else ""
        recipe = "one SGD step assumed; only directions are compared" if self.recipe is None else str(self.recipe)
        if self.gradient:
            recipe = f"{self.undone.recipe}; undone" if self.undone else "none: gradients of the factors"
        facts = [fact("adapter", True, rank), fact("recipe", self.recipe is not None or self.gradient, recipe)]
        if not self.gradient:
            facts.append(fact("initial adapter", self.origin != "unknown" or self.frozen_a, self.beginning()))
        return [*facts, *self.mixed_facts()]

    def beginning(self) -> str:
        """How the start is known, in words."""
        if self.frozen_a:
            return "A is as it began: B alone was trained"
        if self.origin == "recovered":
            source = "the base model's weights give it" if self.seed is None else f"seed {self.seed} draws it"
            return f"recovered: {source}"
        return {"given": "given", "unknown": "unknown: taken to be where training ended"}[self.origin]

    def merging(self, released: Tensors) -> str:
        """What the change of the weights gives away of an adapter that was merged into them."""
        ranks = [
            int(torch.linalg.matrix_rank(released[f"{m}.lora_B"].flatten(1).double(), rtol=MERGED))
            for m in self.unmerged
        ]
        kept = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks of {min(ranks)} to {max(ranks)}"
        sentence = f"The weights changed by {kept} in {len(ranks)} layers, as a LoRA adapter leaves them that was merged into them: "
        return sentence + "merging hides neither its factors' product nor the space of their rows."

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The start on another device, or in another precision."""
        start, changed = ({name: tensor.to(where) for name, tensor in t.items()} for t in (self.start, self.changed))
        return replace(self, start=start, changed=changed)


def product(A: Tensor, B: Tensor) -> Tensor:
    """B A in the shape of the layer's weight: (out, in) or (out, in, k, k)."""
    return (B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])


def decay(recipe: Recipe | None) -> float:
    """What AdamW's weight decay has left of a parameter that had no gradient."""
    if recipe is None or recipe.optimizer != "adamw":
        return 1.0
    if recipe.learning_rate * recipe.decay >= 1:  # the largest of its rates
        raise BadInput(f"At a learning rate of {recipe.learning_rate:g}, the weight decay of AdamW leaves nothing.")
    return float(prod(1 - recipe.rate(step) * recipe.decay for step in range(recipe.steps)))
