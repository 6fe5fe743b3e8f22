"""Slow references that are obviously correct: plain PyTorch and loops, nothing of gradleak's own computations."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def gradient_by_autograd(
    module: nn.Module, images: Tensor, labels: Tensor, *, mode: str = "eval", reduction: str = "mean"
) -> Tensors:
    """backward() on a copy of the module, as every training loop does it: {parameter name: gradient}."""
    module = copy.deepcopy(module).train(mode == "train")
    module.zero_grad(set_to_none=True)
    loss = F.cross_entropy(module(images), labels, reduction=reduction)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def update_by_sgd(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    learning_rate: float,
    local_steps: int,
    local_batch_size: int,
    mode: str = "eval",
) -> Tensors:
    """Parameters after torch.optim.SGD minus before. Chunks in order, over and over; the last of a pass may be short."""
    module = copy.deepcopy(module).train(mode == "train")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimiser = torch.optim.SGD(module.parameters(), lr=learning_rate)
    chunks = [
        (images[start : start + local_batch_size], labels[start : start + local_batch_size])
        for start in range(0, len(images), local_batch_size)
    ]
    for x, y in itertools.islice(itertools.cycle(chunks), local_steps):
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {name: p.detach() - before[name] for name, p in module.named_parameters()}


def shared_labels(a: Sequence[int], b: Sequence[int]) -> int:
    """Size of the intersection of two multisets of labels: how many of b were found in a, each label counted once."""
    left, found = list(a), 0
    for label in b:
        if label in left:
            left.remove(label)
            found += 1
    return found


def labels_of(*found: Any) -> list[int]:
    """The labels of some reconstructions, one after the other."""
    return [int(label) for one in found for label in one.labels]


def psnr_db_by_hand(a: Tensor, b: Tensor) -> float:
    """10 log10(1 / mean squared error) of two pictures with pixels in [0, 1]; infinite when they are equal."""
    squares = [(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
    mean = torch.tensor(sum(squares) / len(squares), dtype=torch.float64)
    return float(-10 * mean.log10())


def tensors_inside(thing: object, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor with numbers in it that can be reached from an object through attributes, mappings and sequences."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | type | None):
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [] if thing.is_meta else [thing.detach()]
    if isinstance(thing, dict):
        parts = [*thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset):
        parts = [*thing]
    else:
        parts = [*getattr(thing, "__dict__", {}).values()]
    return [tensor for part in parts for tensor in tensors_inside(part, seen)]


def lora_b_by_autograd(
    module: nn.Module, images: Tensor, labels: Tensor, A: Tensors, *, scaling: float, learning_rate: float = 1.0
) -> Tensor:
    """The change of all factors B, from zero, in one SGD step of y = W x + scaling B A x; flat, by name of the layer.

    A: {layer: (r, in) or (r, in, k, k)}. Differentiable by the images.
    """
    module = copy.deepcopy(module).requires_grad_(False)
    weights = dict(module.named_parameters())
    B = {k: a.new_zeros(len(weights[f"{k}.weight"]), len(a), requires_grad=True) for k, a in A.items()}

    def adapted(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if isinstance(layer, nn.Conv2d):
                low = F.conv2d(inputs[0], A[name], stride=layer.stride, padding=layer.padding)
                return output + scaling * torch.einsum("or,brhw->bohw", B[name], low)
            return output + scaling * inputs[0] @ A[name].T @ B[name].T

        return hook

    for name in A:
        module.get_submodule(name).register_forward_hook(adapted(name))
    loss = F.cross_entropy(module(images), labels)
    gradients = torch.autograd.grad(loss, [B[name] for name in sorted(B)], create_graph=True)
    return torch.cat([-learning_rate * g.reshape(-1) for g in gradients])


def dense_jacobian(release: Callable[[Tensor], Tensor], images: Tensor) -> np.ndarray:
    """d release / d images, one reverse pass per released number: (equations, unknowns) float64."""
    J: Tensor = torch.autograd.functional.jacobian(release, images.double())  # type: ignore[no-untyped-call]
    return np.asarray(J.reshape(len(J), -1))


def posterior_by_conditioning(J: np.ndarray, noise_std: float, C: np.ndarray) -> np.ndarray:
    """The covariance of x ~ N(mean, C) given J x + noise, by conditioning the joint Gaussian of x and what is seen."""
    seen = J @ C @ J.T + noise_std**2 * np.eye(len(J))
    return np.asarray(C - C @ J.T @ np.linalg.solve(seen, J @ C))


def text_gradient_by_autograd(
    module: Any, tokens: Sequence[Sequence[int]], labels: Tensor | None, *, causal: bool
) -> Tensors:
    """backward() through the library's own network, one unpadded text at a time: {parameter name: gradient}."""
    module.zero_grad(set_to_none=True)
    own = dict(module.named_parameters())
    losses = []
    for number, row in enumerate(tokens):
        ids = torch.tensor([row])
        logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if causal:
            losses += [F.cross_entropy(logits[0, t][None], ids[0, t + 1][None]) for t in range(len(row) - 1)]
        else:
            assert labels is not None
            losses.append(F.cross_entropy(logits, labels[number][None]))
    torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()}


def longest_common_subsequence(a: Sequence[object], b: Sequence[object]) -> int:
    """By trying every subset of a, longest first."""
    for size in range(len(a), 0, -1):
        for chosen in itertools.combinations(a, size):
            rest = iter(b)
            if all(any(token == other for other in rest) for token in chosen):
                return size
    return 0


class _SmoothedReLU(torch.autograd.Function):
    """ReLU forwards, sigmoid(sharpness z) as its derivative backwards, as Haim et al. (2022) extract."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, sharpness: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.sharpness = sharpness
        return z.relu()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        slope = torch.sigmoid(ctx.sharpness * z) if ctx.sharpness < float("inf") else (z > 0).to(z)
        return above * slope, None


def _chain(weights: Sequence[Tensor], biases: Sequence[Tensor | None], x: Tensor, sharpness: float) -> Tensor:
    for k, (W, b) in enumerate(zip(weights, biases, strict=True)):
        z = torch.nn.functional.linear(x, W, b)
        x = _SmoothedReLU.apply(z, sharpness) if k < len(weights) - 1 else z  # type: ignore[no-untyped-call]
    return x


def kkt_distance_by_autograd(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    x: Tensor,
    C: Tensor,
    goal: Sequence[Tensor],
    goal_biases: Sequence[Tensor | None],
    factors: Sequence[float],
    sharpness: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """||goal - d<C, f(x)>/dtheta||^2 with the gradient formed, and its derivatives by x and C by autograd."""
    own = [w.clone().requires_grad_() for w in weights]
    shifts = [None if b is None else b.clone().requires_grad_() for b in biases]
    x, C = x.clone().requires_grad_(), C.clone().requires_grad_()
    known = [b for b in shifts if b is not None]
    made = torch.autograd.grad((_chain(own, shifts, x, sharpness) * C).sum(), [*own, *known], create_graph=True)
    of_biases = iter(made[len(own) :])
    value = torch.zeros((), dtype=x.dtype)
    for factor, g, w, shift, b in zip(factors, made, goal, shifts, goal_biases, strict=False):
        value = value + factor * (w - g).square().sum()
        to_bias = None if shift is None else next(of_biases)
        if b is not None and to_bias is not None:  # of a bias that was not trained nothing is asked
            value = value + factor * (b - to_bias).square().sum()
    to_x, to_C = torch.autograd.grad(value, (x, C))
    return value.detach(), to_x, to_C


def gradient_descent_by_autograd(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    x: Tensor,
    labels: Tensor,
    learning_rate: float,
    weight_decay: float,
    epochs: int,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Full-batch gradient descent on the mean cross entropy; one output is the logit of class 1 against zero."""
    own = [w.clone().requires_grad_() for w in weights]
    shifts = [None if b is None else b.clone().requires_grad_() for b in biases]
    everything = [*own, *[b for b in shifts if b is not None]]
    optimiser = torch.optim.SGD(everything, learning_rate, weight_decay=weight_decay)
    for _ in range(epochs):
        logits = _chain(own, shifts, x, float("inf"))
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return [w.detach() for w in own], [None if b is None else b.detach() for b in shifts]


def one_run_p_value_by_sums(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 of Steinke et al. 2023 (arXiv:2305.08846), term by term in exact fractions: P[B >= v], and the largest of
    2 m delta (P[B >= v - i] - P[B >= v]) / i."""
    chance = Fraction(1 / (1 + math.exp(-epsilon)))

    def tail(least: int) -> Fraction:
        terms = range(max(least, 0), guesses + 1)
        return sum((math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in terms), Fraction(0))

    most = max(((tail(right - i) - tail(right)) / i for i in range(1, right + 1)), default=Fraction(0))
    return float(min(Fraction(1), tail(right) + 2 * m * Fraction(delta) * most))
