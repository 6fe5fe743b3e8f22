"""What a first layer tells of the inputs that it was trained on: how many, the space between them, how they were mixed.

With h = W x + s B A x and G = Delta^T X, gradient descent moves B by -lr s G A^T and A by -lr s B^T G. Hence, after any number
of steps, in any batches, also with momentum:

    A_T - A_0 = (r x N) X            every row is a combination of the inputs                         (1)
    B_T - B_0 = sum_i d_i (A x_i)^T  up to how far A turns; d_i is zero where unit j was off for x_i  (2)

A gradient of the weight itself is dW = sum_i delta_i x_i^T, which is both with A = 1 (SPEAR, Dimitrov et al., NeurIPS 2024,
arXiv:2403.03945, theorem 3.1). Adam divides every number by its own size and leaves the span.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Update
from gradleak.observations.tensors import rounding

STEPS = 300  # of a training whose recipe is unknown: each rounds the weights once
ABOVE = 3.0  # how far a singular value stands above those of the rounding
TAIL = 10.0  # and above the middle one of a gradient, which is a sum of rounded products
CLEARLY = 1e-3  # of the last singular value of N samples, what is left is rounding
EVEN = 0.3  # of the largest change of B the median one, where Adam made it; products of two random numbers have a tenth
SUMMED = 1e-6  # of the largest singular value: eight roundings of float32, as sums of some dozen products leave them
TURNED = 1 / 3  # mean of (t / T)^2: from B = 0, B grows with t and A moves with t^2


@dataclass(frozen=True)
class Span:
    """The space of the inputs, and how the first layer mixes them. N samples, all in float64.

    network  the network before training
    basis    V (N, in): orthonormal rows, the inputs are c V with unknown c (N, N)
    spread   (N,) singular values of the change whose rows these are: the basis is known to noise / spread
    noise    standard deviation of the rounding of one number of that change
    mixed    M (out, k) = sum_i d_i (F c_i)^T, d_i the summed gradient at the units' outputs          (2)
    factor   F (k, N): A V^T of an adapter, the identity of a gradient
    bias     (out,) sum_i d_i where the layer's bias was trained beside its weight, or None
    hidden   H (N, out): orthonormal rows, of which the layer's activations are combinations, where the gradient of the second
             layer tells them and there is `bias`; else None
    """

    network: FullyConnected
    basis: Tensor
    spread: Tensor
    noise: float
    mixed: Tensor
    factor: Tensor
    bias: Tensor | None = None
    hidden: Tensor | None = None

    def pictures(self, c: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Coordinates (n, N) -> pictures (n, channel, height, width), not clamped; black where rounding hides what is left."""
        pixels = self.network.images(c @ self.basis, shape)
        rounded = self.noise * (c / self.spread).norm(dim=1)[:, None] * self.network.scale.abs()
        return torch.where(pixels < 3 * rounded.view_as(pixels), 0.0, pixels)

    @property
    def told(self) -> int:
        """How many directions of the basis are more than rounding."""
        return int((self.spread > self.noise * self.basis.shape[1] ** 0.5).sum())

    @cached_property
    def black(self) -> Tensor | None:
        """u (N,) with u c = 1 for every input's coordinates c, where pixels are black in all inputs; else None.

        Such a pixel is low = -shift / scale in every input: their columns of the basis over low are one vector, u.
        """
        N, low = len(self.basis), -self.network.shift / self.network.scale
        if bool((low == 0).any()):
            return None
        alike = (self.basis / low).T * self.spread  # (pixels, N), all numbers with the same noise
        near = torch.cdist(alike, alike) < 8 * self.noise / float(low.abs().min()) * N**0.5 + 1e-5 * alike.norm(dim=1)
        most = near[near.sum(1).argmax()]
        return alike[most].mean(0) / self.spread if int(most.sum()) > N else None


def span_of(observation: PictureObservation) -> Span:
    """The span of the first layer's inputs. NotObserved where that layer is not fully connected, was not trained or moved by
    Adam; where the start of an adapter is unknown; and where there are more samples than the span can tell."""
    observation = observation.to(torch.float64)
    model, release, released = observation.model, observation.release, observation.released
    recipe = getattr(release, "recipe", None)
    if recipe is not None and recipe.optimizer in ("adam", "adamw"):
        raise NotObserved(f"Trained with {recipe.optimizer}, which divides every number by its size: no span is left.")
    if isinstance(release, Adapter):
        return span_of_adapter(observation, release)
    network = FullyConnected.of(model.module, model.parameters, model.architecture.input_shape)
    name = network.names[0]
    if name not in released:
        raise NotObserved(f"The first layer's {name} was not trained: nothing tells of its inputs.")
    gradient = observation.as_gradient()
    U, S, V = torch.linalg.svd(gradient[name], full_matrices=False)
    noise = number_noise(observation, gradient[name], model.parameters[name])
    N = observation.batch_size or min(rank(S, noise, gradient[name]), int((S / S.median() > TAIL).sum()))
    if not 0 < N < len(S):
        raise NotObserved(f"The first layer's gradient of {len(S)} dimensions does not tell its {N} samples apart.")
    bias = gradient.get(name.removesuffix("weight") + "bias")
    hidden = None
    if bias is not None and len(network.names) > 2 and network.names[1] in gradient:
        T, H = torch.linalg.svd(gradient[network.names[1]], full_matrices=False)[1:]
        hidden = H[:N] if len(T) > N and bool(T[N] < CLEARLY * T[N - 1]) else None
    return Span(network, V[:N], S[:N], noise, U[:, :N] * S[:N], torch.eye(N, dtype=S.dtype), bias, hidden)


def span_of_adapter(observation: PictureObservation, release: Adapter) -> Span:
    """The same of an adapter whose start is known."""
    network, module = adapted_first_layer(observation, release)
    names = [f"{module}.lora_A", f"{module}.lora_B"]
    if release.gradient or release.origin == "unknown" or any(name not in observation.released for name in names):
        raise NotObserved(
            "The pictures lie in the span of A_T - A_0, and A_0 is not known: the adapter before training is needed, or the "
            "seed that drew it."
        )
    (dA, dB), (A, B) = ([tensors[name] for name in names] for tensors in (observation.released, release.start))
    if divided(release, dB):
        raise NotObserved(
            "All numbers of lora_B are of one size, as Adam leaves them: no span is left. adam-epsilon and adam-unmixing "
            "read that."
        )
    noise, r, from_zero = number_noise(observation, dA, A), len(A), not bool(B.any())
    N = samples(observation, dB) if from_zero else rank(torch.linalg.svdvals(dA), noise, dA)
    if observation.batch_size and observation.batch_size > 1:  # one is what is said where nobody knows
        N = observation.batch_size
    if not 0 < N <= r:
        raise NotObserved(f"{N} samples cannot be told by the {r} rows of the adapter: the span is full, or empty.")
    change = dA
    if from_zero:  # the columns of A_T - A_0 lie in the row space of B_T; what is beside it is rounding
        _, size, Q = torch.linalg.svd(dB, full_matrices=False)
        if module in release.unmerged:  # B (A_T - A_0) is what is known, and its noise is white
            noise, change = release.unmerged[module] / release.scaling[module], size[:N, None] * (Q[:N] @ dA)
        else:
            noise = float((Q[N:] @ dA).square().mean().sqrt()) if r > N else noise
            change = Q[:N] @ dA
    _, S, V = torch.linalg.svd(change, full_matrices=False)
    if not bool(S[N - 1] > 0):
        raise NotObserved("lora_A did not move: after one step from B = 0 nothing tells the span of the pictures.")
    turned = A + (TURNED if from_zero else 0.5) * dA
    return Span(network, V[:N], S[:N], noise, -dB / release.scaling[module], turned @ V[:N].T)


def adapted_first_layer(observation: PictureObservation, release: Adapter) -> tuple[FullyConnected, str]:
    """The network at the start, and the name of its first layer; NotObserved where the adapter does not change that one."""
    parameters = {**observation.model.parameters, **release.merged(observation.model, {})}
    network = FullyConnected.of(observation.model.module, parameters, observation.model.architecture.input_shape)
    module = network.names[0].removesuffix(".weight")
    if module not in release.scaling:
        raise NotObserved(f"The adapter does not change {module}, the layer that sees the pictures.")
    return network, module


def with_samples_counted(observation: Observation[Any]) -> Observation[Any]:
    """The observation with the number of samples that the rank of lora_B tells, where an adapter began at B = 0 on a first layer that is
    fully connected, and where there are several, but fewer than its rank; the same otherwise."""
    release = observation.release
    if not isinstance(release, Adapter) or not isinstance(observation.model.architecture, Architecture):
        return observation
    try:
        name = f"{adapted_first_layer(observation, release)[1]}.lora_B"
    except NotObserved:
        return observation
    plain = not release.gradient or release.undone is not None
    if not plain or name not in observation.released or bool(release.start[name].any()):
        return observation
    B = observation.released[name].double()
    if divided(release, B):
        return observation  # rank and number of samples have nothing to do with each other
    N = samples(observation, B)
    return replace(observation, batch_size=N) if 1 < N < B.shape[1] else observation


def divided(release: Adapter, B: Tensor) -> bool:
    """Whether Adam has divided every number of lora_B by its own size, of a training that nobody told."""
    sizes = B[B != 0].abs()
    return release.guessed() and len(sizes) > 0 and float(sizes.median()) > EVEN * float(sizes.max())


def samples(observation: PictureObservation, B: Tensor) -> int:
    """The rank of lora_B (out, r) after training from zero: N, or r where there are r samples or more."""
    return rank(torch.linalg.svdvals(B), number_noise(observation, B, B), B)


def rank(values: Tensor, noise: float, matrix: Tensor) -> int:
    """How many singular values (k,) of a matrix stand above those of such noise, which reach sqrt(rows) + sqrt(columns)."""
    white, sums = ABOVE * noise * sum(side**0.5 for side in matrix.shape), SUMMED * float(values[0])
    return int((values > max(white, sums)).sum())


def number_noise(observation: PictureObservation, change: Tensor, weight: Tensor) -> float:
    """Standard deviation of the rounding of one number: of the weight (rows, columns) in every step, and of what was released."""
    release, kept = observation.release, getattr(torch, observation.precision)
    saved, trained, unit = weight if isinstance(release, Adapter) else change, 0.0, 1.0
    if isinstance(release, Adapter | Update):
        steps = STEPS if release.recipe is None else release.recipe.steps
        trained = float(rounding(weight, torch.float32).square().mean().sqrt()) * steps**0.5
        unit = abs(release.unit) if isinstance(release, Update) else 1.0
    return math.hypot(unit * trained, float(rounding(saved, kept).square().mean().sqrt()))
