"""A LoRA adapter that was merged into the weights: W_T = W_0 + s B A, of which both W are known, and neither factor.

The change has a low rank up to the rounding of W_T, and its rows span those of B's row space times A. Where A_0 is known too, the rest
follows. With A = A_0 + C, as training of B and A by gradient descent from B = 0 leaves them, and P the projector on the rows of A_0:

    dW A_0^+ = B (I + E),  E = C A_0^+               dW (1 - P) = B C (1 - P)                                 (1)
    A A^T - A_0 A_0^T = B^T B                        conserved by gradient flow (Arora et al., ICML 2018, arXiv:1802.06509) (2)
    C A_0^T = A_0 C^T                                exact where the gradient of W stays, else to first order  (3)

(2) and (3) give E A_0 A_0^T = (B^T B - C C^T) / 2, which (1) solves by iteration.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradleak.observations.adapter import Adapter, decay
from gradleak.observations.layers import is_adaptable, oriented
from gradleak.observations.low_rank import LowRank, apart, low_rank, rounding_errors
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe

ROUNDED = 0.51  # of the distance of two numbers: half of it, and what float32 rounds of that
GAP = 2.0  # between the last singular value and the next: so large a step is no chance
CLEAR = 2.0  # times the length that rounding gives a row of B C: shorter ones are that
LEAST = 1e-4  # of the largest direction of B: smaller ones move A by less than rounding, as gradient flow grows both
STEPS, SETTLED, FAR, DAMPED = (
    400,
    1e-10,
    5.0,
    0.5,
)  # of the iteration for E: how many, when it stands still, and the largest E
SCALES, OFF = (
    range(-4, 5),
    3.0,
)  # powers of two that alpha / rank may be; how far off, as a power of two, a share may be


@dataclass(frozen=True)
class Merged:
    """The adapter in a change of weights.

    observation  of the adapter, its start unknown
    plain        whether its rank ends with a step that no chance makes
    sure         whether nothing else makes such a change: the layers have biases, which did not move
    """

    observation: Observation[Any]
    plain: bool
    sure: bool


def merged(observation: Observation[Any], recipe: Recipe | None) -> Merged | None:
    """A change of weights as the adapter that may have been merged into them; None where it is not such a change.

    The factors are then known up to a matrix between them: A has orthogonal rows of the length that PEFT's have. What else was trained
    is beside it. recipe: of the adapter, None where it is not known.
    """
    model, change = observation.model, observation.released
    layers = low_rank_layers(model, change, observation.precision)
    if not layers:
        return None
    start: Tensors = {}
    released: Tensors = {}
    for module, layer in layers.items():
        weight = oriented(model, module, model.parameters[f"{module}.weight"])
        Q, R = torch.linalg.qr(layer.right.T)  # right = R^T Q^T
        B = 3**0.5 * layer.left @ R.T
        start[f"{module}.lora_A"] = (Q.T / 3**0.5 / decay(recipe)).view(-1, *weight.shape[1:]).float()
        released[f"{module}.lora_B"] = B.view(*B.shape, *(1 for _ in weight.shape[2:])).float()
        start[f"{module}.lora_B"] = torch.zeros_like(released[f"{module}.lora_B"])
    release = Adapter(
        start=start,
        scaling=dict.fromkeys(layers, 1.0),
        recipe=recipe,
        beside=tuple(
            name for name in moved(model, change, observation.precision) if name.removesuffix(".weight") not in layers
        ),
        unmerged={module: layer.noise for module, layer in layers.items()},
    )
    plain = any(layer.step >= GAP and layer.low for layer in layers.values())
    biases = any(f"{module}.bias" in {*observation.beside, *change} for module in layers)
    return Merged(replace(observation, release=release, released=released, factor=1.0), plain, plain and biases)


def was_merged(observation: Observation[Any]) -> bool:
    """Whether what was released is an adapter that was read off merged weights."""
    return isinstance(observation.release, Adapter) and bool(observation.release.unmerged)


def moved(model: Model[Any], change: Tensors, precision: str) -> dict[str, None]:
    """The parameters that changed by more than rounding to the number format, in their order."""
    return {
        name: None
        for name, d in change.items()
        if name in model.parameters
        and bool((d.abs() > ROUNDED * apart(model.parameters[name].double() + d, precision)).any())
    }


def low_rank_layers(model: Model[Any], change: Tensors, precision: str) -> dict[str, LowRank]:
    """{module: its change} of the layers that an adapter may have changed, in the order of the model; none where this is no adapter's.

    LoRA leaves biases and norms alone: a layer whose bias moved was trained as a whole, as heads are; where a norm did, all was.
    """
    modules = dict(model.module.named_modules())
    changed = moved(model, change, precision)
    owners = {name.rpartition(".")[0] for name in changed}
    weights = {m for m in owners if m in modules and is_adaptable(modules[m]) and f"{m}.weight" in changed}
    if any(change[name].ndim == 1 for name in changed if name.rpartition(".")[0] not in weights):
        return {}
    found: dict[str, LowRank] = {}
    for module in modules:
        if module not in weights or f"{module}.bias" in changed:
            continue
        d, before = (
            oriented(model, module, tensors[f"{module}.weight"]).flatten(1).double()
            for tensors in (change, model.parameters)
        )
        layer = low_rank(d, rounding_errors(before + d, d, precision))
        if layer is None:
            return {}
        if len(layer.right):
            found[module] = layer
    rank = max((len(layer.right) for layer in found.values() if layer.low), default=0)
    return {module: layer for module, layer in found.items() if len(layer.right) <= rank}


# -- the factors, where A_0 is known


def with_start(observation: Observation[Any], start: Tensors, seed: int) -> Observation[Any]:
    """The observation of a merged adapter with the start of all its factors, {MODULE.lora_A (r, in) and MODULE.lora_B}, and their changes.

    Where the adapter has not moved as gradient flow moves it (Adam, or far), A is the nearest to A_0 of those that explain the weights.
    """
    release = observation.adapter
    ended = release.ended(observation.released)
    parts: dict[str, Parts] = {}
    for module, noise in release.unmerged.items():
        A, B, A_0 = (t.flatten(1).double() for t in (*both(ended, module), start[f"{module}.lora_A"]))
        left, R = torch.linalg.qr(B)
        parts[module] = Parts.of(left, R @ A, A_0, noise)
    recipe = release.recipe
    flows = recipe is None or recipe.optimizer in ("sgd", "momentum")
    s, turns = flow([*parts.values()]) if flows else (1.0, [None] * len(parts))
    changes: Tensors = {}
    for (module, part), E in zip(parts.items(), turns, strict=True):
        B, C = part.factors(torch.zeros_like(part.A_0 @ part.A_0.T) if E is None else E)
        for factor, change in (("lora_A", C), ("lora_B", B / s)):
            changes[f"{module}.{factor}"] = change.view_as(start[f"{module}.{factor}"]).float()
    known = replace(release, start=start, scaling=dict.fromkeys(release.scaling, s), origin="recovered", seed=seed)
    return replace(observation, release=known, released=changes)


def both(factors: Tensors, module: str) -> tuple[Tensor, Tensor]:
    """A and B of a module."""
    return factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]


@dataclass(frozen=True)
class Parts:
    """What (1) says of a layer: s B (I + E) (out, r), and C (1 - P) up to a factor I + E from the left, (r, in).

    A_0 (r, in), to begin with
    """

    A_0: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor, A_0: Tensor, noise: float) -> "Parts":
        """Of left (out, k), orthonormal, times right (k, in), each number of which is known to `noise`."""
        through = right @ torch.linalg.pinv(A_0)
        u, size, v = torch.linalg.svd(through, full_matrices=False)
        beside = u.T @ (right - through @ A_0)  # rows of white noise
        beside[(beside.norm(dim=1) < CLEAR * noise * A_0.shape[1] ** 0.5) | (size < LEAST * size.max())] = 0
        return cls(A_0, left @ through, v.T @ (beside / size[:, None]))

    def factors(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """(s B, C)."""
        one = torch.eye(len(E)).to(E)
        return torch.linalg.solve(one + E, self.B, left=False), E @ self.A_0 + (one + E) @ self.C

    def turned(self, s: float) -> Tensor | None:
        """E by (2) and (3), or None where the iteration leads nowhere."""
        gram, one = self.A_0 @ self.A_0.T, torch.eye(len(self.A_0)).to(self.A_0)
        BB, CC, E = self.B.T @ self.B / s**2, self.C @ self.C.T, torch.zeros_like(gram)
        for _ in range(STEPS):
            inverse = torch.linalg.inv(one + E)
            rest = inverse.T @ BB @ inverse - E @ gram @ E.T - (one + E) @ CC @ (one + E).T
            step = torch.linalg.solve(gram, rest, left=False) / 2 - E
            E = E + DAMPED * step
            if not bool(E.norm() < FAR):
                return None
            if bool(step.norm() <= SETTLED * E.norm()):
                return E if bool((E @ gram).trace() > 0) else None  # A grows where it moves
        return None

    def share(self, E: Tensor) -> float:
        """The energy of C in the rows of A_0, over what chance gives it: r / in of all."""
        C = self.factors(E)[1]
        return float((E @ self.A_0).square().sum() / C.square().sum()) * self.A_0.shape[1] / len(self.A_0)


def flow(parts: list[Parts]) -> tuple[float, list[Tensor | None]]:
    """(s, E of each), s being a power of two as alpha / rank is; (1, None) where no such flow made the change.

    The data know nothing of A_0: C has as much of its energy in its rows as in any others. E, and with it that part of C, follows from s
    by (2); the share goes with s^-4.
    """
    moved = [i for i, part in enumerate(parts) if part.C.any()]
    tried: list[tuple[float, float, list[Tensor | None]]] = []
    for s in (2.0**power for power in SCALES if moved or power == 0):
        turns = [part.turned(s) for part in parts]
        shares = sorted(abs(math.log2(parts[i].share(E))) for i in moved if (E := turns[i]) is not None)
        if len(shares) == len(moved):
            tried.append((shares[len(shares) // 2] if shares else 0.0, s, turns))
    off, s, turns = min(tried, key=lambda one: one[0], default=(math.inf, 1.0, []))
    return (s, turns) if off < OFF else (1.0, [None for _ in parts])
