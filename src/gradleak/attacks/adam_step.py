"""The first step of Adam undone: the gradient that it divided by its own size, out of the epsilon that it added.

Sees      Adapter or Update after one step of Adam or AdamW; of an adapter whose recipe is not told, one whose start is known
Recovers  the gradient, as an observation of the kind that all attacks on gradients read
Solves    from moments of zero the first step is u = g / (|g| + epsilon), whatever the betas are (Kingma and Ba 2015,
          arXiv:1412.6980, algorithm 1 at t = 1). Hence g = epsilon u / (1 - |u|). We know of no publication that did this
Errors    float32 keeps u to `KEPT`, and what is stored rounds it again: a number g is known to (|g| + epsilon)^2 / epsilon times
          that. Of 1e-3 it is half a percent; above .1 there is the sign alone. `Undone.error` sums it up
Misses    formats that round epsilon away: there the signs are all there is, and the observation stays as it was
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors, flatten, rounding
from gradleak.observations.training import EPSILON, OPTIMISERS, Recipe, Undone

KEPT = 5e-8  # deviation of m / (sqrt v + epsilon) near 1 in float32, after its five roundings
WORTH = 0.8  # of the gradient's length: where more stays unknown, signs are as good
EVEN = 1e-2  # of the largest: how much smaller the middle change is, at most, after one step of Adam
MOST, SWEEPS, CHI = 16, 10, 4.0  # ranks that are tried; sweeps for each; squared errors of what is explained
TOLD = 0.25  # share of the numbers that have to be known better than to their half
EXACT = 1e-4  # of a learning rate of two digits, as people type: the largest gradient is 1e-4 or more
SHORTER = {"float16": 3e-3, "bfloat16": 2e-2}  # formats whose rounding is of the size of such errors


def with_step_undone(observation: Observation[Any]) -> Observation[Any]:
    """The observation of the gradient behind a single step of Adam; the same where there is none, or too little is left of it."""
    release = observation.release
    if not isinstance(release, Adapter | Update) or (isinstance(release, Adapter) and release.gradient):
        return observation
    recipe = release.recipe or (recognised(observation) if isinstance(release, Adapter) else None)
    if recipe is None or recipe.optimizer not in ("adam", "adamw") or recipe.steps != 1 or observation.defenses != ():
        return observation
    start = release.start if isinstance(release, Adapter) else observation.model.parameters
    names = [name for name in observation.released if not isinstance(release, Adapter) or has_gradient(name, start)]
    found = {
        name: completed(*undone(observation.released[name], start[name], recipe, observation.precision))
        for name in names
    }
    error = float(flatten({n: e for n, (_, e) in found.items()}).norm())
    gradient: Tensors = {name: g.to(observation.released[name]) for name, (g, _) in found.items()}
    error /= max(float(flatten(gradient).double().norm()), 1e-300)
    if not error < WORTH:
        return observation
    step = Undone(recipe=recipe, error=error)
    after = (
        replace(release, gradient=True, recipe=recipe, undone=step)
        if isinstance(release, Adapter)
        else Gradient(undone=step)
    )
    typical = sorted(float(e.norm() / g.norm().clamp_min(1e-300)) for g, e in found.values())[len(found) // 2]
    precision = next((name for name, most in SHORTER.items() if typical <= most), "bfloat16")
    return replace(observation, release=after, released=gradient, precision=precision)


def undone(change: Tensor, start: Tensor, recipe: Recipe, precision: str) -> tuple[Tensor, Tensor]:
    """The gradient behind the first step of Adam, and the error of each number; both in the shape of the change, float64."""
    change, start = change.double(), start.double()
    decay = recipe.decay if recipe.optimizer == "adamw" else 0.0
    u = (-change / recipe.learning_rate - decay * start) / largest(recipe)
    stored = rounding((start + change).reshape(-1, 1), getattr(torch, precision)).view_as(u) / recipe.learning_rate
    kept = (stored.square() + KEPT**2).sqrt()
    g = EPSILON * u / torch.maximum(1 - u.abs(), kept)
    error = (g.abs() + EPSILON).square() / EPSILON * kept
    return g - (recipe.decay * start if recipe.optimizer == "adam" else 0.0), error


@cache
def largest(recipe: Recipe) -> float:
    """The u that float32 makes of gradients far above epsilon: 1, up to the rounding of the learning rate and of the betas."""
    g = torch.linspace(0.5, 2.0, 1_000)
    parameter = torch.nn.Parameter(torch.zeros_like(g))
    parameter.grad = g
    OPTIMISERS[recipe.optimizer]([parameter], recipe.learning_rate).step()
    return float((-parameter.detach().double() / recipe.learning_rate + EPSILON / g.double()).mean())


def completed(g: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's gradient (out, in) with the least rank that explains it within its errors, and what is then uncertain. Few samples
    make a gradient of low rank, and the numbers that are known well complete those that are not. As it was where none does."""
    told = g.dim() == 2 and float((error < g.abs() / 2)[g != 0].double().mean()) > TOLD
    most = min(MOST, *(side // 2 for side in g.shape)) if told else 0
    if not most:
        return g, error.minimum(g.abs())
    _, S, V = torch.linalg.svd(g, full_matrices=False)
    begun = S[:, None].sqrt() * V
    found = {rank: explained(g, error, begun[:rank]) for rank in {1, most}}
    low, high = (0, 1) if found.get(1) else (1, most)
    if not found.get(high):
        return g, error.minimum(g.abs())
    while high - low > 1:  # where a rank explains it, every larger one does
        rank = (low + high) // 2
        found[rank] = explained(g, error, begun[:rank])
        low, high = (low, rank) if found[rank] else (rank, high)
    best = found[high]
    assert best is not None
    return best


def explained(g: Tensor, error: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
    """The matrix of the rank of `right` (k, in), where the search begins, that is nearest to g (out, in) in units of its errors, and its
    deviation; None where it is not that near."""
    sure = error / (g.abs() + EPSILON).square()  # what the error of a number is beside its square
    fit, rank = g, len(right)
    for _ in range(SWEEPS):
        blur = sure * (fit.abs() + EPSILON).square()  # of the fit: a number that came out too small looks too sure
        left = solved(g, blur, right)[0]
        right = solved(g.T, blur.T, left.T)[0].T
        fit = left @ right
    left, covariance = solved(g, blur, right)
    freedom = g.numel() - rank * (sum(g.shape) - rank)
    if not float(((g - fit) / blur).square().sum()) < CHI * freedom:
        return None
    return fit, torch.einsum("ki,jkl,li->ji", right, covariance, right).clamp_min(0).sqrt()


def solved(g: Tensor, error: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """min over left (out, k) of ||(g - left right) / error||, right (k, in); and the covariance (out, k, k) of each row."""
    weight = error.pow(-2)
    normal = torch.einsum("ki,ji,li->jkl", right, weight, right)
    normal = normal + 1e-12 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(len(right)).to(g)
    covariance: Tensor = torch.linalg.inv(normal)
    return torch.einsum("jkl,jl->jk", covariance, (g * weight) @ right.T), covariance


def recognised(observation: Observation[Any]) -> Recipe | None:
    """One step of Adam at a learning rate, where an adapter shows it: from B = 0, A stayed, and all of B moved by the same."""
    release, released = observation.adapter, observation.released
    sides = {name: tensor for name, tensor in released.items() if name.endswith("lora_B")}
    begun = any(bool(tensor.any()) for name, tensor in release.start.items() if name.endswith("lora_B"))
    if release.origin == "unknown" or begun or not sides:
        return None
    B = flatten(sides).abs().double()
    rate, moved = float(B.max()), B[B > 0]
    for name, start in release.start.items():
        change = released.get(name)
        if name.endswith("lora_A") and change is not None and bool(start.any()):
            decay = float((change * start).sum() / start.square().sum())  # of AdamW
            left = (change - decay * start).double()
            allowed = rounding((start + change).reshape(1, -1), getattr(torch, observation.precision))
            if float(left.square().mean().sqrt()) > 4 * float(allowed):
                return None
    if not len(moved) or float(moved.median()) < (1 - EVEN) * rate:
        return None
    typed = float(f"{rate:.1e}")
    return Recipe(optimizer="adam", learning_rate=typed if abs(rate / typed - 1) < EXACT else rate, steps=1)


def has_gradient(factor: str, start: Tensors) -> bool:
    """Whether a factor of an adapter has a gradient at its start: where the other one is not zero."""
    module, side = factor.rsplit(".lora_", 1)
    return bool(start[f"{module}.lora_{'B' if side == 'A' else 'A'}"].any())
