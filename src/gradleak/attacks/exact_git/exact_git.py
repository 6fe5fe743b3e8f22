"""Gradient Inversion Transcript, the exact form: the leaked weights out of pairs, then the backward pass read in reverse.

Sees      Gradient (or Update of one step) of up to classes - 1 pictures, and the weights that were recovered from public pairs of
          one picture (`gradleak train exact-git`); never the observation's own. Perceptrons: biased linear layers with
          ReLU, sigmoid or tanh; labels optional
Recovers  images (batch, channel, height, width) in [0, 1], labels
Solves    A_{l-1} = g_l^T (Delta_l^T)^+,  Delta_{l-1} = (W_l^T Delta_l) * s'(Z_{l-1}),  l = L .. 1. Of one picture Delta_L is
          the last bias gradient; of several, Delta_L = U R with g_L = U S V^T, and R solves the fixed point
              U R = softmax(W_L A_{L-1} + b_L) - Y,   A_{L-1}^T = R^{-1} S V^T     (Levenberg-Marquardt, several starts)
Differs   The weights are not trained by descent through pseudo-inverses but solved for, in float64 (leaked_weights.py): no step
          size, no start. Bias gradients, where there are any, say which ReLU units were active and correct each Delta:
          of one picture they are Delta, and the weights then change nothing (analytic needs none at all). Batches
          need linearly independent Delta_L, hence fewer pictures than classes that the model tells apart, gradients as
          exact as float32 and units that pairs activated; two or three pictures mostly come back, nine hardly ever
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev

from gradleak.attacks.attack import check_sees
from gradleak.attacks.exact_git import leaked_weights
from gradleak.attacks.exact_git.leaked_weights import ROUNDING, Chain, inverse
from gradleak.attacks.labels import known_or_recovered
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.generator import Shards
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.observations.model import PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors

STARTS = 20  # of the fixed point of a batch
STEPS = 60  # of Levenberg-Marquardt from each
WEIGHTS = 1e-5  # relative error of the recovered weights, and of what comes back through them
SOLVED = 1e-5  # relative residual of a fixed point that is one


class Recovered(nn.Module):
    """The recovered weights, and which entries of them the pairs tell: not trained, but solved for by `prepare`."""

    def __init__(self, model: PictureModel, *, batch: int = 1) -> None:
        super().__init__()
        if batch != 1:
            raise BadInput(f"The exact form reads weights off gradients of single pictures, not of batches of {batch}.")
        self.chain = Chain.of(model)
        names = [f"{name}.{kind}" for name in self.chain.names for kind in ("weight", "bias")]
        self.recovered = nn.ParameterDict({n.replace(".", "/"): torch.zeros_like(model.parameters[n]) for n in names})
        for name in names[::2]:
            self.register_buffer(f"told/{name}".replace(".", "/"), torch.zeros(model.parameters[name].shape).bool())

    def weights(self) -> Tensors:
        """{parameter: recovered}."""
        return {name.replace("/", "."): p.detach() for name, p in self.recovered.items()}

    def determined(self) -> Tensors:
        """{weight name: (out, in) bool}, see leaked_weights.determined."""
        return {name: self.get_buffer(f"told/{name}".replace(".", "/")) for name in self.weights() if "weight" in name}

    def hold_out(self, shard: int | None) -> None:
        """Nothing is trained."""

    def prepare(self, shards: Shards) -> None:
        """Solve for the weights over all pairs, in float64."""
        seen = leaked_weights.factorise(self.chain, shards())
        for name, tensor in leaked_weights.solve(self.chain, seen).items():
            self.recovered[name.replace(".", "/")].data.copy_(tensor)
        for name, tensor in leaked_weights.determined(self.chain, seen).items():
            self.get_buffer(f"told/{name}".replace(".", "/")).copy_(tensor)


@dataclass(frozen=True, kw_only=True)
class ExactGit:
    """generator: a file of `gradleak train exact-git`."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = Architecture.modality

    generator: Path | None = None

    def trained_on(self, images: Tensor) -> int:
        """How many of these pictures the generator was trained on."""
        return learned.trained_on(self.generator, images)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved without a file, for adapters, updates of several steps, and batches that are not determined;
        BadInput if the file is of another model."""
        check_sees(self, observation)
        if self.generator is None:
            raise NotObserved(
                "It needs recovered weights: `gradleak train exact-git` makes them; give them with --generator."
            )
        if reason := observation.release.inexact():
            raise NotObserved(f"The exact form reads one exact gradient: {reason}.")
        observation = observation.to(torch.device("cpu"))
        trained = learned.load(self.generator, "exact-git", Recovered, observation.model)
        trained.check(observation)
        assert isinstance(trained.network, Recovered)
        chain, weights = trained.network.chain, trained.network.weights()
        model = observation.model
        blind = replace(observation, model=replace(model, parameters={**model.parameters, **weights})).to(torch.float64)
        labels = known_or_recovered(blind)
        if len(labels) >= model.architecture.classes:
            raise NotObserved(
                f"The batch has {len(labels)} images: the last layer's gradient tells apart fewer than the "
                f"{model.architecture.classes} classes."
            )
        share = len(labels) if model.criterion.reduction == "mean" else 1
        gradient = {name: share * g for name, g in blind.as_gradient().items()}
        weights = {name: tensor.double() for name, tensor in weights.items()}
        delta = last_delta(chain, weights, gradient, labels, generator)
        images = invert(chain, weights, gradient, delta).view(-1, *model.architecture.input_shape).clamp(0, 1).float()
        residual = observation.residual(images, labels)
        status = f"With weights recovered from {len(trained.pictures):,} pairs; relative residual {residual:.2g}."
        if residual > 0.01:
            status += (
                " That is no solution: pictures that the model hardly tells apart, or units that no pair activated."
            )
        return Reconstruction(images, labels, residual, status, outcome_of(residual))


def invert(chain: Chain, weights: Tensors, gradient: Tensors, delta: Tensor) -> Tensor:
    """Pixels (batch, pixels) from Delta_L (batch, classes) and the gradients, summed over the batch; hidden biases may lack."""
    for layer in reversed(range(len(chain.names))):
        name = f"{chain.names[layer]}.weight"
        inverted = torch.linalg.pinv(delta, rtol=ROUNDING)  # (out, batch)
        a = inverted.T @ gradient[name]  # (batch, in)
        if layer:
            back, sums = delta @ weights[name], gradient.get(f"{chain.names[layer - 1]}.bias")
            # An entry's error: rounding of g carried through the pseudo-inverse, and what the weights lack.
            error = 8 * ROUNDING * (inverted.square().T @ gradient[name].square()).sqrt() + WEIGHTS * a.abs().amax()
            _, slope, _ = inverse(chain.activations[layer - 1], a, error / 3)
            if sums is not None and isinstance(chain.activations[layer - 1], nn.ReLU):
                slope = active(a, error, back, sums)
            delta = back * slope
            if sums is not None:  # what no pair told is missing from the weights: this says how much it makes in all
                delta = delta + slope / slope.sum(0).clamp_min(1e-9) * (sums - delta.sum(0))
    pixels: Tensor = (a - chain.shift) / chain.scale
    return pixels


def active(a: Tensor, error: Tensor, back: Tensor, sums: Tensor) -> Tensor:
    """Which ReLU units each picture activates, (batch, units) 1 or 0: those with a > 0, which is known up to `error`, such that
    what comes back through them sums to the bias gradient `sums` (units,). Tries all 2^batch patterns of each unit."""
    batch = len(a)
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=batch)), dtype=a.dtype)  # (patterns, batch)
    doubt = (a / error.clamp_min(torch.finfo(a.dtype).tiny)).clamp(-1e3, 1e3).square()  # (batch, units)
    flips = patterns @ (doubt * (a <= 0)) + (1 - patterns) @ (doubt * (a > 0))  # (patterns, units)
    missed = (patterns @ back - sums) / (WEIGHTS * (back.norm(dim=0) + 1e-3 * back.norm())).clamp_min(1e-300)
    best = (flips + missed.square().clamp_max(100)).argmin(0)
    on: Tensor = patterns[best].T
    return on


def last_delta(chain: Chain, weights: Tensors, gradient: Tensors, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Delta_L = softmax(Z_L) - Y, (batch, classes), of gradients that are summed over the batch; NotObserved where no start
    leads to a fixed point."""
    name = chain.names[-1]
    W, b, g, sums = (
        weights[f"{name}.weight"],
        weights[f"{name}.bias"],
        gradient[f"{name}.weight"],
        gradient[f"{name}.bias"],
    )
    if len(labels) == 1:
        return sums[None]
    truth, batch = F.one_hot(labels, len(sums)).double(), len(labels)
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    U, M = U[:, :batch], S[:batch, None] * Vh[:batch]  # g = U M
    reach, size = M @ W.T, truth.norm()

    def unexplained(R: Tensor) -> Tensor:
        delta = (U @ R).T  # (batch, classes)
        p = (torch.linalg.solve(R, reach) + b).softmax(1)
        return torch.cat([(p - truth - delta).flatten(), delta.sum(0) - sums])

    mean = ((sums + truth.sum(0)) / batch).clamp_min(1e-6).log()  # of the predictions, which is where to start
    for start in range(STARTS):
        spread = 0.1 * 2 ** (start % 5)
        p = (mean + spread * torch.randn(truth.shape, generator=generator, dtype=truth.dtype)).softmax(1)
        R = fixed_point(unexplained, U.T @ (p - truth).T)
        if float(unexplained(R).norm()) < SOLVED * float(size):
            delta: Tensor = (U @ R).T
            return delta
    raise NotObserved(
        f"No fixed point of the last layer was found for {batch} images: it needs gradients that are exact to float32, "
        "weights that were recovered well, and predictions that differ from image to image."
    )


def fixed_point(unexplained: Callable[[Tensor], Tensor], R: Tensor) -> Tensor:
    """The R (batch, batch) with the least squares of `unexplained`, by Levenberg-Marquardt from this one."""
    slopes = jacrev(unexplained)
    value, damping = float(unexplained(R).norm()), 1e-2
    for _ in range(STEPS):
        J = slopes(R).flatten(1)  # (equations, batch^2)
        normal = J.T @ J
        normal.diagonal().mul_(1 + damping)
        tried = R - torch.linalg.solve(normal, J.T @ unexplained(R)).view_as(R)
        new = float(unexplained(tried).norm())
        if new >= value * (1 - 1e-9) and damping > 1e6:
            break
        R, value, damping = (tried, new, damping / 10) if new < value else (R, value, damping * 10)
    return R
