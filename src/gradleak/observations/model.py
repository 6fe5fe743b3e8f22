"""A model as the attacker knows it, of pictures or of texts: a pure function of parameters and inputs."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.errors import BadInput, shortened
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.modalities.linear_attention import with_linear_attention
from gradleak.modalities.losses import CROSS_ENTROPY, Loss
from gradleak.modalities.modality import Blueprint, Fact, fact
from gradleak.modalities.networks import Architecture
from gradleak.observations.tensors import Tensors, fingerprint, moved

Mode = Literal["train", "eval"]
A = TypeVar("A", bound=Blueprint)


@dataclass(frozen=True)
class Model(Generic[A]):
    """The model as the attacker knows it, called as a pure function, so that no attack leaves state behind.

    architecture  the blueprint: of an image classifier, or of a language model with its tokenizer
    mode          "train": BatchNorm normalises by the statistics of the batch; "eval": by its buffers
    parameters    {name: tensor} at the moment the observation was taken
    buffers       {name: tensor}, or None when they were withheld: BatchNorm's initial ones then stand in
    module        the structure only; its own parameters hold no numbers, apart from buffers that were withheld
    criterion     the loss that was minimised
    frozen        names of parameters that were not trained, so that no gradient of them exists
    """

    architecture: A
    mode: Mode
    parameters: Tensors = field(repr=False)
    buffers: Tensors | None = field(repr=False)
    module: nn.Module = field(repr=False, compare=False)
    criterion: Loss = CROSS_ENTROPY
    frozen: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        architecture: A,
        *,
        mode: Mode = "eval",
        criterion: Loss = CROSS_ENTROPY,
        reveal_buffers: bool = True,
    ) -> Self:
        """A snapshot of any nn.Module that the blueprint can call; for pictures: (batch, channel, height, width) in [0, 1]
        to logits. Copies all tensors, which stay where they are; tied ones appear once. Packed attention is taken apart
        (`linear_attention`)."""
        module = with_linear_attention(module)
        persistent = set(module.state_dict())
        parameters = {k: v.detach().clone() for k, v in module.named_parameters()}
        buffers = {k: v.detach().clone() for k, v in module.named_buffers() if k in persistent}
        frozen = tuple(k for k, v in module.named_parameters() if not v.requires_grad)
        model = cls(architecture, mode, parameters, buffers, hollow(module), criterion, frozen).assume(mode=mode)
        return model if reveal_buffers else model.without_buffers()

    def assume(
        self, *, mode: Mode | None = None, criterion: Loss | None = None, buffers: Tensors | None = None
    ) -> Self:
        """The same parameters under another belief about the mode, the loss or the buffers."""
        mode = mode or self.mode
        module = copy.deepcopy(self.module).train(mode == "train")
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                # In train mode the running statistics do not enter the gradient: leave them out of the call.
                layer.track_running_stats = mode == "eval"
            elif isinstance(layer, nn.modules.dropout._DropoutNd):
                layer.eval()  # the masks are not observed; checks.py says so
        criterion, buffers = criterion or self.criterion, self.buffers if buffers is None else buffers
        return replace(self, mode=mode, criterion=criterion, buffers=buffers, module=module)

    def without_buffers(self) -> Self:
        """The same model as somebody knows it from whom the buffers are withheld: BatchNorm's initial ones stand in."""
        module = copy.deepcopy(self.module)
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                tracked, layer.track_running_stats = layer.track_running_stats, True
                layer.reset_running_stats()
                layer.track_running_stats = tracked
        return replace(self, buffers=None, module=module)

    def solid(self) -> nn.Module:
        """A module of its own that holds the parameters and buffers: for training, and for saving."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        parameters = {key: nn.Parameter(self.parameters[name].clone()) for key, name in names.items()}
        module = copy.deepcopy(self.module, dict(parameters))
        module.load_state_dict(self.buffers or {}, strict=False)
        return module

    def state_hash(self) -> str:
        """Fingerprint of the parameters, and of the buffers where they are known."""
        return fingerprint({**self.parameters, **(self.buffers or {})})

    @property
    def trained(self) -> Tensors:
        """The parameters that were trained."""
        return {name: tensor for name, tensor in self.parameters.items() if name not in self.frozen}

    def logits(self, parameters: Tensors, inputs: Any) -> Tensor:
        """The logits of a batch, with `parameters` in place of the known ones; of pictures (batch, classes)."""
        known = {**self.parameters, **parameters, **(self.buffers or {})}
        positional, named = self.architecture.arguments(inputs, next(iter(self.parameters.values())))
        return self.architecture.logits(functional_call(self.module, known, positional, named))

    def loss(self, parameters: Tensors, inputs: Any, labels: Tensor | None) -> Tensor:
        """The criterion over the batch. Labels of pictures are (batch,) class indices or (batch, classes) probabilities."""
        return self.criterion(*self.architecture.compared(self.logits(parameters, inputs), inputs, labels))

    def check_takes(self, inputs: Any) -> None:
        """BadInput when the model fails on these inputs, or gives something else than finite logits of its classes."""
        try:
            with torch.no_grad():
                logits, again = self.logits({}, inputs), self.logits({}, inputs)
        except BadInput:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            why = shortened(str(error))
            if "required positional argument" in why:
                why += ": it wants more than the data. Add what is known where the model is made: module.register_forward_pre_hook(lambda _, given: (*given, rest))."
            raise BadInput(f"The model {self.architecture.name} fails on these data: {why}") from error
        if not bool(logits.isfinite().all()):
            raise BadInput(f"The model {self.architecture.name} gives logits that are NaN or infinite.")
        if not torch.allclose(logits, again, rtol=1e-3, atol=1e-6):
            raise BadInput(
                f"The model {self.architecture.name} gives other logits each time: it draws random numbers (a dropout by a function in {self.mode} "
                "mode?), which nobody observed. Make that a layer, nn.Dropout, which is switched off here, or use the mode eval."
            )
        if self.architecture.classes > 1 and logits.shape != (len(inputs), self.architecture.classes):
            raise BadInput(
                f"The model returned {tuple(logits.shape)}, not ({len(inputs)}, {self.architecture.classes}) logits."
            )

    def check_works(self) -> None:
        """BadInput when the model or its loss fails on any data."""
        inputs, labels = self.architecture.probe()
        inputs = inputs.to(next(iter(self.parameters.values()))) if isinstance(inputs, Tensor) else inputs
        self.check_takes(inputs)
        try:
            self.loss({}, inputs, labels)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise BadInput(f"{self.criterion} is no loss of this model: {shortened(str(error))}") from error

    def facts(self) -> list[Fact]:
        """Rows of the threat model: parameters, buffers where there are any, mode, loss."""
        norm = "batch statistics, buffers play no part" if self.mode == "train" else "running statistics"
        rows = [fact("parameters", True, f"{sum(p.numel() for p in self.parameters.values()):,} numbers")]
        if self.buffers is None:
            rows.append(fact("buffers", False, "initial values assumed"))
        elif self.buffers:
            rows.append(fact("buffers", True, f"{len(self.buffers)} tensors"))
        return [*rows, fact("mode", True, f"{self.mode} ({norm})"), fact("loss", True, str(self.criterion))]

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same model on another device, or with its floating-point tensors in another precision."""
        module = copy.deepcopy(self.module)
        module._apply(lambda tensor: tensor if tensor.is_meta else moved(tensor, where))  # type: ignore[no-untyped-call]
        buffers = None if self.buffers is None else {k: moved(v, where) for k, v in self.buffers.items()}
        return replace(
            self, parameters={k: moved(v, where) for k, v in self.parameters.items()}, buffers=buffers, module=module
        )


PictureModel = Model[Architecture]
LanguageModel = Model[LanguageArchitecture]


def hollow(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters hold no numbers: its structure, at no cost of memory."""
    kept = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, dict(kept))
