"""What the attacker sees. Closed types: a field that was not revealed is None, and there is no ground truth in here.

`observation.simulate(images, labels)` answers the one question every attack asks: what would have been released, had
the secret been these images? It is a pure function of tensors, so torch.func can differentiate and vectorise it.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.observations.tensors import Tensors, fingerprint, flatten
from gradleak.observations.training import Recipe, product, train

Mode = Literal["train", "eval"]
Reduction = Literal["mean", "sum"]
Item = dict[str, str | bool]  # one row of the threat-model table


@dataclass(frozen=True)
class Model:
    """The model as the attacker knows it, called as a pure function, so that no attack leaves state behind.

    architecture  name, input shape (channel, height, width) and number of classes
    mode          "train": BatchNorm normalises by the statistics of the batch; "eval": by its buffers
    parameters    {name: tensor} at the moment the observation was taken
    buffers       {name: tensor}, or None when they were withheld: BatchNorm's initial ones then stand in
    reduction     "mean" or "sum" of the cross entropy over the batch
    frozen        names of parameters that were not trained, so that no gradient of them exists
    module        the structure only; its own tensors are never read, apart from buffers that were withheld
    """

    architecture: Architecture
    mode: Mode
    parameters: Tensors = field(repr=False)
    buffers: Tensors | None = field(repr=False)
    module: nn.Module = field(repr=False, compare=False)
    reduction: Reduction = "mean"
    frozen: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        architecture: Architecture,
        *,
        mode: Mode = "eval",
        reduction: Reduction = "mean",
        reveal_buffers: bool = True,
    ) -> Self:
        """A snapshot of any nn.Module that maps pixels (batch, channel, height, width) in [0, 1] to logits. Copies all."""
        persistent = set(module.state_dict())
        parameters = {k: v.detach().clone() for k, v in module.named_parameters()}
        buffers = {k: v.detach().clone() for k, v in module.named_buffers() if k in persistent}
        frozen = tuple(k for k, v in module.named_parameters() if not v.requires_grad)
        structure = copy.deepcopy(module).requires_grad_(False)
        if not reveal_buffers:
            for layer in structure.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.reset_running_stats()
        model = cls(architecture, mode, parameters, buffers if reveal_buffers else None, structure, reduction, frozen)
        return model.assume(mode=mode)

    def assume(
        self, *, mode: Mode | None = None, reduction: Reduction | None = None, buffers: Tensors | None = None
    ) -> Self:
        """The same parameters under another belief about the mode, the reduction or the buffers."""
        mode = mode or self.mode
        module = copy.deepcopy(self.module).train(mode == "train")
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                # In train mode the running statistics do not enter the gradient: leave them out of the call.
                layer.track_running_stats = mode == "eval"
            elif isinstance(layer, nn.modules.dropout._DropoutNd):
                layer.eval()  # the masks are not observed; checks.py says so
        reduction, buffers = reduction or self.reduction, self.buffers if buffers is None else buffers
        return replace(self, mode=mode, reduction=reduction, buffers=buffers, module=module)

    def state_hash(self) -> str:
        """Fingerprint of the parameters, and of the buffers where they are known."""
        return fingerprint({**self.parameters, **(self.buffers or {})})

    def logits(self, parameters: Tensors, images: Tensor) -> Tensor:
        """(batch, channel, height, width) in [0, 1] -> (batch, classes), with `parameters` in place of the known ones."""
        result: Tensor = functional_call(
            self.module, {**self.parameters, **parameters, **(self.buffers or {})}, (images,)
        )
        return result

    def loss(self, parameters: Tensors, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy over the batch; labels are (batch,) class indices or (batch, classes) probabilities."""
        return F.cross_entropy(self.logits(parameters, images), labels, reduction=self.reduction)

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same model on another device, or with its floating-point tensors in another precision."""

        def move(tensors: Tensors) -> Tensors:
            return {
                k: v.to(where) if isinstance(where, torch.device) or v.is_floating_point() else v
                for k, v in tensors.items()
            }

        buffers = None if self.buffers is None else move(self.buffers)
        return replace(
            self, parameters=move(self.parameters), buffers=buffers, module=copy.deepcopy(self.module).to(where)
        )


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The gradient of the loss over one private batch (federated SGD, gradient accumulation, a debug dump).

    model       the model at the moment of the gradient
    released    {parameter name: gradient}, the shapes of the parameters
    batch_size  number of private images, or None
    labels      (batch,) int64 class indices, or None
    precision   the number format in which it was released, e.g. "float32", "float16"
    """

    model: Model
    released: Tensors = field(repr=False)
    batch_size: int | None = None
    labels: Tensor | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_fits(self.released, self.model)

    def simulate(self, images: Tensor, labels: Tensor) -> Tensors:
        """dL/dtheta of this batch: what would have been released, had the secret been (images, labels)."""
        trained = {name: self.model.parameters[name] for name in self.released}
        gradient: Tensors = grad(self.model.loss)(trained, images, labels)
        return gradient

    def as_gradient(self) -> Tensors:
        """The released tensors in units of a gradient of the loss."""
        return self.released

    def threat_model(self) -> list[Item]:
        """One row per thing the attacker may know, made from the fields: what it is, whether it was revealed, how."""
        model, buffers = self.model, self.model.buffers
        norm = "batch statistics, buffers play no part" if model.mode == "train" else "running statistics"
        return [
            _item("released", True, f"{type(self).__name__}: {len(self.released)} tensors in {self.precision}"),
            _item("architecture", True, f"{model.architecture.name}, {_by(model.architecture.input_shape)}"),
            _item("parameters", True, f"{sum(p.numel() for p in model.parameters.values()):,} numbers"),
            _item(
                "buffers",
                buffers is not None,
                "initial values assumed" if buffers is None else f"{len(buffers)} tensors",
            ),
            _item("mode", True, f"{model.mode} ({norm})"),
            _item("loss", True, f"cross entropy, {model.reduction} over the batch"),
            _item(
                "batch size", self.batch_size is not None, str(self.batch_size) if self.batch_size else "to be guessed"
            ),
            _item("labels", self.labels is not None, "recovered by the attack" if self.labels is None else "given"),
            _item("images", False, "the secret"),
        ]

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same observation on another device, or in another floating-point precision."""
        labels = self.labels.to(where) if self.labels is not None and isinstance(where, torch.device) else self.labels
        released = {name: tensor.to(where) for name, tensor in self.released.items()}
        return replace(self, model=self.model.to(where), released=released, labels=labels)


@dataclass(frozen=True, kw_only=True)
class Update(Gradient):
    """What a client of federated averaging sends: parameters after local training minus parameters before.

    released is that difference. Local training is plain SGD over the private images in their order, in chunks of
    `local_batch_size`, starting over at the end (McMahan et al. 2017, ClientUpdate, without shuffling).
    """

    learning_rate: float
    local_steps: int
    local_batch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.learning_rate > 0 and self.local_steps > 0 and self.local_batch_size > 0):
            raise BadInput(
                "An update needs a learning rate, a number of local steps and a local batch size above zero."
            )

    def simulate(self, images: Tensor, labels: Tensor) -> Tensors:
        """theta_k - theta_0 after `local_steps` SGD steps on (images, labels), unrolled, differentiable."""
        before = {name: self.model.parameters[name] for name in self.released}
        recipe = Recipe(learning_rate=self.learning_rate, steps=self.local_steps, batch_size=self.local_batch_size)
        after = train(self.model.loss, before, images, labels, recipe)
        return {name: after[name] - before[name] for name in before}

    def as_gradient(self) -> Tensors:
        """The mean of the local gradients: -released / (learning rate x steps); exact for one step, else a first guess."""
        scale = -1 / (self.learning_rate * self.local_steps)
        return {name: scale * tensor for name, tensor in self.released.items()}

    def threat_model(self) -> list[Item]:
        """The rows of a gradient, and the recipe of the local training."""
        recipe = (
            f"{self.local_steps} SGD steps, learning rate {self.learning_rate:g}, local batch {self.local_batch_size}"
        )
        return [*super().threat_model()[:-1], _item("local training", True, recipe), super().threat_model()[-1]]


UNKNOWN = Recipe(learning_rate=1.0, steps=1)  # what is assumed of an adapter that comes without its recipe


@dataclass(frozen=True)
class Sketch:
    """What one factor of an adapter tells of a weight's gradient: the linear equation S = M F^T.

    module    the layer whose weight it is
    side      "right": M = G (out, in), F = A, from B's change; "left": M = G^T (in, out), F = B^T, from A's change
    measured  S (rows of M, rank)
    factor    F (rank, columns of M)
    """

    module: str
    side: Literal["right", "left"]
    measured: Tensor
    factor: Tensor


@dataclass(frozen=True, kw_only=True)
class Adapter(Gradient):
    """A released LoRA adapter, with the base model that it belongs to.

    released  {module.lora_A or module.lora_B: its change during training}; only factors whose start is known
    start     {module.lora_A and module.lora_B, for every adapted module: where training started}. PEFT's default starts
              B at zero; A's start is then taken to be the released A, which is exact for one step
    scaling   {module: s}, alpha / r, or alpha / sqrt(r) (rslora)
    recipe    how it was trained, or None: one SGD step is then assumed, and only directions can be told
    dropout   probability with which inputs of the adapter may have been dropped in training; the masks are not known
    """

    start: Tensors = field(repr=False)
    scaling: dict[str, float] = field(repr=False)
    recipe: Recipe | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for module in self.scaling:
            if missing := [f for f in ("lora_A", "lora_B") if f"{module}.{f}" not in self.start]:
                raise BadInput(f"The adapter of {module} has no {missing[0]}: both factors at the start are needed.")
            A, B, weight = self.start[f"{module}.lora_A"], self.start[f"{module}.lora_B"], f"{module}.weight"
            if weight not in self.model.parameters:
                raise BadInput(f"The adapter changes {module}, which has no weight in the base model.")
            made, shape = (B.shape[0], *A.shape[1:]), self.model.parameters[weight].shape
            if B.shape[1] != A.shape[0] or made != shape:
                raise BadInput(
                    f"The adapter of {module} makes a weight of {_by(made)}, the base model's is {_by(shape)}: "
                    "they do not belong together."
                )
        check_finite(self.start)
        check_finite(self.released)

    def simulate(self, images: Tensor, labels: Tensor) -> Tensors:
        """The change of the released factors after training on (images, labels), unrolled, differentiable.

        Without a recipe the learning rate is unknown: the change is brought to the length of what was released.
        """
        recipe = self.recipe or UNKNOWN
        # In one step no factor meets the other's change: those that are not released need no gradient.
        names = self.released if recipe.steps == 1 else self.start
        before = {name: self.start[name] for name in names}
        after = train(self.loss, before, images, labels, recipe)
        change = {name: after[name] - before[name] for name in self.released}
        if self.recipe is not None:
            return change
        size, wanted = (flatten(tensors).square().sum() for tensors in (change, self.released))
        ratio = wanted / size.clamp_min(torch.finfo(size.dtype).tiny)
        scale = torch.where((size > 0) & (wanted > 0), ratio, 1.0).sqrt()
        return {name: scale * tensor for name, tensor in change.items()}

    def loss(self, factors: Tensors, images: Tensor, labels: Tensor) -> Tensor:
        """The base model's loss with the adapter in place: cross entropy over the batch."""
        return self.model.loss(self.merged(factors), images, labels)

    def merged(self, factors: Tensors) -> Tensors:
        """{module.weight: W + s B A}, with `factors` in place of those at the start."""
        own = {**self.start, **factors}
        return {
            f"{module}.weight": self.model.parameters[f"{module}.weight"]
            + s * product(own[f"{module}.lora_A"], own[f"{module}.lora_B"])
            for module, s in self.scaling.items()
        }

    def sketches(self) -> list[Sketch]:
        """One equation per released factor, in units of a gradient: exact for one SGD step, else a mean over the steps."""
        recipe = self.recipe or UNKNOWN
        found = []
        for module, s in self.scaling.items():
            unit = -1 / (recipe.learning_rate * recipe.steps * s)
            A, B = (self.start[f"{module}.{factor}"].flatten(1) for factor in ("lora_A", "lora_B"))
            if f"{module}.lora_B" in self.released and bool(A.any()):
                found.append(Sketch(module, "right", unit * self.released[f"{module}.lora_B"].flatten(1), A))
            if f"{module}.lora_A" in self.released and bool(B.any()):
                found.append(Sketch(module, "left", unit * self.released[f"{module}.lora_A"].flatten(1).T, B.T))
        return found

    def as_gradient(self) -> Tensors:
        """{module.weight: the gradient of least norm that explains its sketch}: M = S (F F^T)^-1 F."""
        return {
            f"{s.module}.weight": self.weight_shaped(s, s.measured @ torch.linalg.pinv(s.factor).T)
            for s in sorted(self.sketches(), key=lambda s: s.side)  # where both factors were released, B's change stays
        }

    def weight_shaped(self, sketch: Sketch, M: Tensor) -> Tensor:
        """A sketch's unknown M as a gradient of its module's weight."""
        return (M if sketch.side == "right" else M.T).reshape(self.model.parameters[f"{sketch.module}.weight"].shape)

    def threat_model(self) -> list[Item]:
        """The rows of a gradient, the rank, the start and the recipe."""
        ranks = sorted({tensor.shape[0] for name, tensor in self.start.items() if name.endswith("lora_A")})
        rank = f"{len(self.scaling)} modules of rank {', '.join(map(str, ranks))}"
        recipe = "one SGD step assumed; only directions are compared" if self.recipe is None else str(self.recipe)
        rows = super().threat_model()
        return [*rows[:-1], _item("adapter", True, rank), _item("recipe", self.recipe is not None, recipe), rows[-1]]

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same observation on another device, or in another floating-point precision."""
        moved = {name: tensor.to(where) for name, tensor in self.start.items()}
        return replace(super().to(where), start=moved)


def check_fits(released: Tensors, model: Model) -> None:
    """BadInput naming the first tensor by which `released` differs from the model, or that is not finite."""
    parameters = {name: tensor for name, tensor in model.parameters.items() if name not in model.frozen}
    for name, parameter in parameters.items():
        if name not in released:
            raise BadInput(
                f"The model has a parameter {name} {_by(parameter.shape)}, but no gradient of that name was released."
            )
        if released[name].shape != parameter.shape:
            sizes = f"{_by(released[name].shape)} in the release and {_by(parameter.shape)} in the model"
            raise BadInput(f"Released tensor {name} is {sizes}: it was taken from another architecture.")
    for name, tensor in released.items():
        if name not in parameters:
            raise BadInput(f"Released tensor {name} {_by(tensor.shape)} is not a trained parameter of the model.")
    check_finite(released)


def check_finite(released: Tensors) -> None:
    """BadInput naming the first tensor that holds NaN or infinity."""
    for name, tensor in released.items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(
                f"Released tensor {name} has entries that are NaN or infinite: nothing can be learnt from it."
            )


def _item(item: str, revealed: bool, detail: str) -> Item:
    return {"item": item, "revealed": revealed, "detail": detail}


def _by(shape: tuple[int, ...] | torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"
