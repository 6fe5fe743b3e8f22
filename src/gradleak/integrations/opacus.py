"""Differentially private training with Opacus: what does a step still give away, next to the epsilon that was spent?

    seen = observe(optimizer, model, Architecture("package.module:Net", (3, 32, 32), 10), engine=engine, delta=1e-5)
    ...                                                                    # one step of the training, as ever
    audit_to(seen.observation, Path("leakage"), secret=Secret(pictures, labels))

With `for batch in seen.keeping(loader)` around that step, `seen.secret` is what it was made of.

What is observed is what DP-SGD releases: the noisy gradient that the optimizer inside steps with.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from gradleak.errors import BadInput, NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.integrations.auditing import audit_to as audit_to
from gradleak.integrations.fed_batches import of_pairs
from gradleak.modalities.losses import CROSS_ENTROPY, Loss
from gradleak.modalities.networks import Architecture
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import Observation
from gradleak.observations.private_step import PrivateStep
from gradleak.observations.releases import Gradient


@dataclass
class Seen:
    """What `observe` waits for."""

    kept: Observation[Any] | None = field(default=None, repr=False)
    fed: list[Any] = field(default_factory=list, repr=False)  # batches before that step

    @property
    def observation(self) -> Observation[Any]:
        """The gradient of the step that was observed; NotObserved before there was one."""
        if self.kept is None:
            raise NotObserved("No step has been taken since: the optimizer has to step once.")
        return self.kept

    def keeping(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches of (pictures in [0, 1], labels); those before the step are kept as its secret."""
        for batch in loader:
            if self.kept is None:
                self.fed.append(batch)
            yield batch

    @property
    def secret(self) -> Secret:
        """The samples that the step was made of, to score with; NotObserved before there was one, or without `keeping`."""
        _ = self.observation
        return of_pairs(self.fed)


def observe(
    optimizer: Any,
    model: nn.Module,
    architecture: Any,
    *,
    engine: Any = None,
    delta: float = 1e-5,
    batch_size: int | None = None,
    labels: Tensor | None = None,
    criterion: Loss = CROSS_ENTROPY,
) -> Seen:
    """Keep what the next step of a private training releases, with the model as it is before that step. Training is not changed.

    optimizer     of PrivacyEngine.make_private; plain DP-SGD
    model         that it trains
    architecture  its blueprint: Architecture("package.module:factory", (channel, height, width), classes), of pixels in [0, 1]
    engine        the PrivacyEngine, whose accountant then says the epsilon that was spent, at this delta
    batch_size, labels  of the samples that were drawn, where the attacker is to know them; Poisson sampling draws another number
                  each time
    criterion     the loss; its mean over the batch where Opacus was told so

    Raises BadInput for an optimizer of another kind: its gradients are cut in another way.
    """
    if type(optimizer) is not DPOptimizer:
        kind = type(optimizer).__name__
        raise BadInput(
            f"What is observed are steps of Opacus' DPOptimizer, and this is a {kind}, which cuts gradients otherwise."
        )
    network = getattr(model, "_module", model)
    seen = Seen()

    def keep(*_: Any) -> None:
        handle.remove()
        mean = optimizer.loss_reduction == "mean"
        noise = float(optimizer.noise_multiplier)
        spent = epsilon(engine, delta) if engine is not None and noise else None
        rate, steps = counted(engine, noise)
        private = PrivateStep(
            clip=float(optimizer.max_grad_norm),
            noise_multiplier=noise,
            divisor=float(optimizer.expected_batch_size * optimizer.accumulated_iterations) if mean else 1.0,
            epsilon=spent,
            delta=None if spent is None else delta,
            sample_rate=rate,
            steps=steps,
        )
        mode: Mode = "train" if network.training and isinstance(architecture, Architecture) else "eval"
        seen.kept = Observation(
            model=without_hooks(Model.of(network, architecture, mode=mode, criterion=criterion), network),
            release=Gradient(private=private),
            released={n: p.grad.detach().clone() for n, p in network.named_parameters() if p.grad is not None},
            batch_size=batch_size,
            labels=labels,
            defenses=private.defenses,
        )

    inner: torch.optim.Optimizer = optimizer.original_optimizer
    # By then Opacus has cut, added noise and counted, and the parameters have not moved yet.
    handle = inner.register_step_pre_hook(keep)
    return seen


def counted(engine: Any, noise: float) -> tuple[float, int] | tuple[None, None]:
    """(sample rate, steps) of the accountant's history; None where there is no engine, or where noise or rate have changed on the way."""
    history = [] if engine is None else list(getattr(engine.accountant, "history", []))
    if len(history) != 1 or not noise or float(history[0][0]) != noise:
        return None, None
    return float(history[0][1]), int(history[0][2])


def epsilon(engine: Any, delta: float) -> float | None:
    """What the accountant says was spent; None where its numerics give up, as those of `prv` do at little noise, or it is infinite."""
    try:
        spent = float(engine.get_epsilon(delta))
    except (RuntimeError, ValueError, ArithmeticError):
        return None
    return spent if math.isfinite(spent) else None


def without_hooks(model: Model[Any], network: nn.Module) -> Model[Any]:
    """The snapshot without the hooks by which Opacus takes gradients of single samples: its parameters are plain tensors."""
    theirs = {handle.id for handle in getattr(network, "autograd_grad_sample_hooks", [])}
    for layer in model.module.modules():
        for hooks in (layer._forward_hooks, layer._backward_hooks):
            for key in theirs & set(hooks):
                del hooks[key]
    return model
