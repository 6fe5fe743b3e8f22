"""The second step of Adam undone: the gradient behind the only step that has moved an adapter's A.

From B = 0, A has no gradient in the first step and stays, while B moves. Its moments are zero until its first gradient g comes,
in the second step, so that, with the bias corrections of t = 2 (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1),

    u = (g / (1 + b1)) / (|g| / sqrt(1 + b2) + epsilon),    A_2 = (1 - lr decay)^2 A_0 - lr u              (1)

is a function of g alone. It is |u| < .744, from which epsilon / |g| parts it: float32 keeps that of numbers up to about 1e-3. g = H^T X has
the rank N of its samples, and the numbers that are known well complete those that are not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.adam_step import KEPT, TOLD, solved
from gradleak.errors import NotObserved
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import rounding
from gradleak.observations.training import BETAS, EPSILON, Recipe

FIRST, SECOND = 1 / (1 + BETAS[0]), (1 + BETAS[1]) ** -0.5
LIMIT = FIRST / SECOND  # of |u|
EVEN = 1e-4  # how much smaller than the limit the largest u is, at most: that of a gradient of 1e-4
SURE = 0.3  # error of a number, as a share of it, up to which it counts as known
FLAT = 1e-4  # of the largest gradient: errors are not taken to be smaller, lest few numbers decide everything
SWEEPS = 30  # of alternating least squares
MOST = 1.25  # median error of the numbers that are known, in units of rounding's: of a rank that explains them
MEDIAN = 3**0.5 / 2  # of an even error, in its deviations


@dataclass(frozen=True)
class SecondStep:
    """The gradient of the first layer's A at the second step. N samples, rank r, all in float64.

    gradient  (r, in), of rank N
    noise     deviation of its numbers that are known, for a typical one
    left      median of their errors: 1 if nothing but rounding is left
    """

    gradient: Tensor
    noise: float
    left: float


def recognised(observation: PictureObservation, release: Adapter, module: str) -> Recipe | None:
    """Two steps of Adam or AdamW, told, or told by their sizes: those of B are two steps, those of A (1)'s limit."""
    if release.recipe is not None:
        adam = release.recipe.optimizer in ("adam", "adamw") and release.recipe.steps == 2
        return release.recipe if adam and release.recipe.clip is None else None
    largest = float(observation.released[f"{module}.lora_B"].abs().max()) / 2
    if not largest > 0:
        return None
    rate = float(f"{largest:.1e}")
    for optimizer in ("adamw", "adam"):
        recipe = Recipe(optimizer=optimizer, learning_rate=rate, steps=2)
        u = moved(observation.released[f"{module}.lora_A"], release.start[f"{module}.lora_A"], recipe)
        if abs(float(u.abs().max()) / LIMIT - 1) < EVEN:
            return recipe
    return None


def moved(change: Tensor, start: Tensor, recipe: Recipe) -> Tensor:
    """u of (1), float64: what weight decay did is done again, in float32 as it was."""
    left = (1 - recipe.learning_rate * recipe.decay) if recipe.optimizer == "adamw" else 1.0
    ended = (start.double() + change.double()).float()
    return ((start.float() * left * left).double() - ended.double()) / recipe.learning_rate


def second_step(change: Tensor, start: Tensor, recipe: Recipe, precision: str, samples: int | None) -> SecondStep:
    """What (1) tells of A (r, in): with this number of samples, or the least that explains it.

    NotObserved where rounding covers epsilon, and where no number of samples below r explains u.
    """
    u = moved(change, start, recipe)
    stored = rounding((start + change).reshape(-1, 1), getattr(torch, precision)).view_as(u) / recipe.learning_rate
    kept = (stored.square() + KEPT**2).sqrt()
    told = behind(u, kept)
    if float(told[2].double().mean()) < TOLD:
        raise NotObserved("Rounding covers the epsilon of Adam: of most numbers of the gradient only the sign is left.")
    low, high = (samples - 1, samples) if samples else (0, len(u) - 1)
    best = explained(u, kept, told, high)
    while high - low > 1:  # where a number explains it, every larger one does
        middle = (low + high) // 2
        found = explained(u, kept, told, middle)
        low, high, best = (low, middle, found) if found.left < MOST else (middle, high, best)
    if not best.left < MOST:
        raise NotObserved(
            f"No gradient of {high} samples is behind what the second step of Adam did to A: there were more samples, other "
            f"samples in the first step, or another training."
        )
    return best


def behind(u: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g of (1), its error, and where it is known."""
    g = EPSILON * u / torch.maximum(FIRST - SECOND * u.abs(), kept)
    error = (SECOND * g.abs() + EPSILON).square() / (EPSILON * FIRST) * kept
    return g, error, (error < SURE * g.abs())


def explained(u: Tensor, kept: Tensor, told: tuple[Tensor, Tensor, Tensor], rank: int) -> SecondStep:
    """The gradient of this rank that explains u best: first the numbers that are known, then all by (1), linear around the fit."""
    g, error, known = told
    top = float(g.abs()[known].sort().values[int(0.99 * (int(known.sum()) - 1))])
    goal = torch.where(known, g, g.sign() * top)
    blur = torch.where(known, error.clamp_min(FLAT * top), 3 * top)
    right = torch.linalg.svd(goal, full_matrices=False)[2][:rank]
    fit = goal
    for sweep in range(2 * SWEEPS):
        if sweep >= SWEEPS:
            slope = FIRST * EPSILON / (SECOND * fit.abs() + EPSILON).square()
            most = fit.abs() / 2 + 0.01 * top
            goal = fit + ((u - step(fit)) / slope).maximum(-most).minimum(most)
            blur = (kept / slope).clamp_min(FLAT * top)
        left = solved(goal, blur, right)[0]
        right = torch.linalg.qr(solved(goal.T, blur.T, left.T)[0])[0].T
        fit = solved(goal, blur, right)[0] @ right
    off = ((u - step(fit)) / kept)[known].abs().median() / MEDIAN
    return SecondStep(fit, float(error[known].median()), float(off))


def step(g: Tensor) -> Tensor:
    """u of (1)."""
    u: Tensor = FIRST * g / (SECOND * g.abs() + EPSILON)
    return u
