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
from gradleak.models import Architecture
from gradleak.tensors import Tensors, fingerprint

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
        starts = range(0, len(images), self.local_batch_size)
        parameters = before
        for step in range(self.local_steps):
            start = starts[step % len(starts)]
            rows = slice(start, start + self.local_batch_size)
            gradient = grad(self.model.loss)(parameters, images[rows], labels[rows])
            parameters = {name: p - self.learning_rate * gradient[name] for name, p in parameters.items()}
        return {name: parameters[name] - before[name] for name in before}

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
        if not bool(tensor.isfinite().all()):
            raise BadInput(
                f"Released tensor {name} has entries that are NaN or infinite: nothing can be learnt from it."
            )


def _item(item: str, revealed: bool, detail: str) -> Item:
    return {"item": item, "revealed": revealed, "detail": detail}


def _by(shape: tuple[int, ...] | torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"
