"""The weights of a perceptron from public pairs (picture, gradient): what Exact-GIT's generator consists of.

The gradient of one picture is g_l = delta_l a_{l-1}^T, so that every pair tells delta_l and a_{l-1} of every layer, and
    W_l a_{l-1} + b_l = z_l         where a_l determines z_l; at the top z_L = log(delta_L + y) up to a constant
    W_l^T delta_l = delta_{l-1} / s'(z_{l-1})        where s' is not 0
are linear equations for W_l: the first for its rows, the second for its columns. Each row and column is projected on
what its own equations tell, and conjugate gradients join both (`solve_layer`). The first layer has rows only: it takes more
pairs than pixels, of a ReLU unit more that activate it. No pair tells of weights between units that were never active
together (`determined`); these are close to 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.learned.pairs import Pairs, check
from gradleak.errors import BadInput
from gradleak.modalities.networks import Normalise
from gradleak.observations.model import PictureModel
from gradleak.observations.sequence import layers_of
from gradleak.observations.tensors import Tensors

ROUNDING = 2.0**-24  # of float32, in which pairs are released
RIDGE = 1e-12  # of a unit's equations, relative to their squares: what float64 can factorise
SWEEPS = 60  # conjugate gradients, at most
FLOOR = 1e-5  # eigenvalues of the joint equations below it are noise
EPS = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Chain:
    """A perceptron: biased linear layers with activations between them, behind a scaling and shift of each pixel.

    names          of the linear layers, first to last
    sizes          (out, in) of each
    activations    between them, one fewer
    scale, shift   (pixels,) float64: the input of the first layer is scale * pixel + shift
    """

    names: list[str]
    sizes: list[tuple[int, ...]]
    activations: list[nn.Module]
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, model: PictureModel) -> "Chain":
        """The structure of the model; none of its weights is read. Raises BadInput naming the first layer that does not fit."""
        trained = {name for name in model.parameters if name not in model.frozen}
        pixels = torch.stack([f(model.architecture.input_shape).double() for f in (torch.zeros, torch.ones)])
        linear, activations = list[tuple[str, nn.Linear]](), list[nn.Module]()
        for name, layer in layers_of(model.module):
            between = len(linear) > len(activations)
            if not linear and isinstance(layer, nn.Flatten | Normalise):
                pixels = layer(pixels)
            elif isinstance(layer, nn.Linear) and not between and {f"{name}.weight", f"{name}.bias"} <= trained:
                linear.append((name, layer))
            elif isinstance(layer, nn.ReLU | nn.Sigmoid | nn.Tanh) and between:
                activations.append(layer)
            else:
                raise BadInput(
                    f"The exact form cannot read {name or 'the model'} ({type(layer).__name__}): it reads biased linear layers "
                    "with one ReLU, sigmoid or tanh between each two. The coarse form reads any module: gradleak train git."
                )
        if len(linear) < 2 or len(activations) == len(linear):
            raise BadInput("The exact form needs two biased linear layers or more, the last one without an activation.")
        flat = pixels.flatten(1)
        sizes: list[tuple[int, ...]] = [(layer.out_features, layer.in_features) for _, layer in linear]
        return cls([name for name, _ in linear], sizes, activations, flat[1] - flat[0], flat[0])


def inverse(activation: nn.Module, a: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z and s'(z) with s(z) = a, and where a tells z for certain, a being known up to `error` (broadcast)."""
    if isinstance(activation, nn.Sigmoid):
        a = a.clamp(1e-9, 1 - 1e-9)
        slope = a * (1 - a)
        return a.logit(), slope, slope > 1e-6
    if isinstance(activation, nn.Tanh):
        a = a.clamp(-1 + 1e-9, 1 - 1e-9)
        slope = 1 - a.square()
        return a.atanh(), slope, slope > 1e-6
    on = a > torch.maximum(3 * error, 1e-6 * a.abs().max())
    return a * on, on.double(), on


@dataclass(frozen=True)
class Factors:
    """What the pairs tell, in float64: g_l = delta_l a_{l-1}^T for each.

    pixels  (n, pixels), the input of the first layer; float32
    inputs  a_{l-1} for l = 2 .. L, each (n, in)
    deltas  delta_l for l = 1 .. L, each (n, out)
    labels  (n,)
    noise   standard deviation of an entry of the released gradients beyond rounding, as their rank shows it
    """

    pixels: Tensor
    inputs: list[Tensor]
    deltas: list[Tensor]
    labels: Tensor
    noise: float

    def input_error(self, layer: int) -> Tensor:
        """Standard deviation of a_{l-1}, (n, 1), from least squares over the rows of g_l."""
        return self._error(self.inputs[layer - 1], self.deltas[layer].norm(dim=1, keepdim=True))

    def delta_error(self, layer: int) -> Tensor:
        """The same of delta_l, from its bias and the columns of g_l."""
        return self._error(self.deltas[layer], self.inputs[layer - 1].norm(dim=1, keepdim=True))

    def _error(self, found: Tensor, length: Tensor) -> Tensor:
        error: Tensor = torch.hypot(self.noise / length.clamp_min(EPS), ROUNDING * rms(found))
        return error.clamp_min(EPS)


def rms(rows: Tensor) -> Tensor:
    """(n, k) -> (n, 1)."""
    found: Tensor = rows.square().mean(1, keepdim=True).sqrt()
    return found


def factorise(chain: Chain, shards: Iterable[Pairs]) -> Factors:
    """Shard by shard, so that no more than one shard's gradients are in memory.

    Raises BadInput for gradients that are not finite, of another model, or of more than one picture.
    """
    rows, left, size = list[list[Tensor]](), 0.0, 0.0
    for number, pairs in enumerate(shards):
        check(pairs, f"shard {number}")
        check_model(chain, pairs)
        x = (pairs.images.flatten(1).double() * chain.scale + chain.shift).float()
        inputs, deltas = list[Tensor](), list[Tensor]()
        for place, name in enumerate(chain.names):
            g, b = (pairs.gradients[f"{name}.{kind}"] for kind in ("weight", "bias"))
            if place == 0:  # the picture is known
                weighted = (g @ x[:, :, None])[:, :, 0].double() + b
                deltas.append(weighted / (x.double().square().sum(1, keepdim=True) + 1))
            else:
                g, delta = g.double(), b.double()
                for _ in range(2):  # alternating least squares
                    a = (delta[:, None] @ g)[:, 0] / delta.square().sum(1, keepdim=True).clamp_min(EPS)
                    delta = ((g @ a[:, :, None])[:, :, 0] + b) / (a.square().sum(1, keepdim=True) + 1)
                deltas.append(delta)
                inputs.append(a)
        # The last layer: its gradients have rank one, what is left is noise.
        left += float((g - delta[:, :, None] * a[:, None]).square().mean((1, 2)).sum())
        size += float(g.square().mean((1, 2)).sum())
        rows.append([x, pairs.labels[:, 0], *inputs, *deltas])
    if not rows:
        raise BadInput("There are no pairs to recover the weights from.")
    x, labels, *rest = (torch.cat(parts) for parts in zip(*rows, strict=True))
    noise = (left / len(x)) ** 0.5 if left > 16 * ROUNDING**2 * size else 0.0
    return Factors(x, rest[: len(chain.names) - 1], rest[len(chain.names) - 1 :], labels, noise)


def check_model(chain: Chain, pairs: Pairs) -> None:
    """BadInput naming what differs, if the pairs are not single pictures with gradients of this model."""
    if pairs.images.shape[1] != 1:
        raise BadInput(f"The exact form reads weights off pairs of one picture, not of {pairs.images.shape[1]}.")
    if pairs.images[0].numel() != len(chain.scale):
        pictures = "x".join(map(str, pairs.images.shape[2:]))
        raise BadInput(f"The pairs have pictures of {pictures}, the model takes {len(chain.scale)} pixels.")
    for name, size in zip(chain.names, chain.sizes, strict=True):
        for key, shape in ((f"{name}.weight", size), (f"{name}.bias", size[:1])):
            g = pairs.gradients.get(key)
            if g is None or tuple(g.shape[1:]) != shape:
                shape_given = "none" if g is None else tuple(g.shape[1:])
                raise BadInput(
                    f"The model's {key} is {shape}, its gradient in the pairs {shape_given}: they are of another model."
                )


def solve(chain: Chain, seen: Factors) -> Tensors:
    """{parameter: its value, float64}, from the last layer down; those of the last are of mean 0 over the classes."""
    weights, top = Tensors(), len(chain.names) - 1
    for layer in reversed(range(len(chain.names))):
        if layer == top:
            z, z_error = logits(seen.deltas[layer], seen.labels, seen.noise)
            sure = torch.ones_like(z, dtype=torch.bool)
        else:
            error = seen.input_error(layer + 1)
            z, slope, sure = inverse(chain.activations[layer], seen.inputs[layer], error)
            z_error = error / slope.clamp_min(1e-9)
        if layer == 0:
            x = F.pad(seen.pixels.double(), (0, 1), value=1)
            W = solve_first(x, z, sure / torch.hypot(ROUNDING * rms(x), z_error))
        else:
            a, error, delta = seen.inputs[layer - 1], seen.input_error(layer), seen.deltas[layer]
            _, slope, below = inverse(chain.activations[layer - 1], a, error)
            slope = slope.clamp_min(1e-9)
            rows = project(F.pad(a, (0, 1), value=1), z, sure / error.hypot(z_error))
            below_error = (seen.delta_error(layer - 1) / slope).hypot(seen.delta_error(layer))
            columns = project(delta, seen.deltas[layer - 1] / slope, below / below_error)
            W = solve_layer(*rows, *columns)
        weights[f"{chain.names[layer]}.weight"] = W[:, :-1].contiguous()
        weights[f"{chain.names[layer]}.bias"] = W[:, -1].contiguous()
    return weights


def logits(delta: Tensor, labels: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """z_L (n, classes) of mean 0, from delta_L = softmax(z_L) - y, and its error (n, 1).

    p = delta + y: where the true class is improbable, its p is a difference of nearly equal numbers, lost in rounding.
    """
    truth = F.one_hot(labels, delta.shape[1])
    error = noise + ROUNDING * (truth + delta.abs())
    p = torch.maximum(delta + truth, error + EPS)
    z = p.log()
    return z - z.mean(1, keepdim=True), (error / p).square().mean(1, keepdim=True).sqrt()


def project(given: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Linear equations weight_ni (given_n . w_i) = weight_ni target_ni for each unit i: given (n, k), the others (n, units).

    Returns the projector on what they tell, (units, k, k), and their least solution (units, k). weight is the inverse of an
    equation's standard error; w_i is taken to be no longer than about 1, and a direction that is not known to a tenth of
    its share counts as untold.
    """
    k, units = given.shape[1], target.shape[1]
    P, solution = given.new_zeros(units, k, k), given.new_zeros(units, k)
    for unit in range(units):
        row_of_unit = weight[:, unit]
        if not unit or not torch.equal(row_of_unit, weight[:, unit - 1]):
            rows = row_of_unit.nonzero()[:, 0]
            X = given[rows] * row_of_unit[rows, None]
            values, vectors = torch.linalg.eigh(X.T @ X)
            V = vectors[:, values > max(100 * k, RIDGE * float(values[-1]))]
            kept = values[len(values) - V.shape[1] :]
        P[unit] = V @ V.T
        solution[unit] = V @ ((V.T @ (X.T @ (target[rows, unit] * row_of_unit[rows]))) / kept)
    return P, solution


def solve_layer(P: Tensor, right: Tensor, Q: Tensor, other: Tensor) -> Tensor:
    """[W, b] (out, in + 1) from the equations of its rows, P w_i = right_i, and of its columns, Q w^j = other_j.

    Holds out * in^2 + in * out^2 numbers.
    """
    k = len(Q)
    right += F.pad(other.T, (0, 1))
    W, residual, direction = torch.zeros_like(right), right, right
    square = right.square().sum()
    enough = 1e-24 * float(square)
    for _ in range(SWEEPS):
        if float(square) <= enough:
            break
        moved = (P @ direction[:, :, None])[:, :, 0] + FLOOR * direction
        moved[:, :k] += (Q @ direction[:, :k].T[:, :, None])[:, :, 0].T
        step = square / (direction * moved).sum()
        W, residual = W + step * direction, residual - step * moved
        before, square = square, residual.square().sum()
        direction = residual + square / before * direction
    return W


def solve_first(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """[W, b] (units, k) of the same equations for a long x (n, k), by a ridge in place of a projector."""
    W = x.new_zeros(z.shape[1], x.shape[1])
    for unit in range(len(W)):
        row_of_unit = weight[:, unit]
        if not unit or not torch.equal(row_of_unit, weight[:, unit - 1]):
            rows = row_of_unit.nonzero()[:, 0]
            X = x[rows] * row_of_unit[rows, None]
            gram = X.T @ X
            gram.diagonal().add_(max(x.shape[1], RIDGE * float(gram.trace())))
            factor = torch.linalg.cholesky(gram)
        W[unit] = torch.cholesky_solve((X.T @ (z[rows, unit] * row_of_unit[rows]))[:, None], factor)[:, 0]
    return W


def determined(chain: Chain, seen: Factors) -> Tensors:
    """{weight name: (out, in) bool}: the entries that the pairs can tell.

    Above the first layer, some pair must have had both units active. In the first, the unit must have been active in more pairs than
    it has inputs, and the pixel must have changed among those.
    """
    active = [(delta.abs() > 1e-6 * delta.abs().amax(1, keepdim=True)).double() for delta in seen.deltas]
    x, counts = seen.pixels.double(), active[0].sum(0)[:, None]  # (n, pixels), (units, 1)
    variance = (active[0].T @ x.square() - (active[0].T @ x).square() / counts.clamp_min(1)) / counts.clamp_min(1)
    known = {f"{chain.names[0]}.weight": (counts > x.shape[1] + 1) & (variance > 1e-6)}
    for layer in range(1, len(chain.names)):
        known[f"{chain.names[layer]}.weight"] = active[layer].T @ active[layer - 1] > 0
    return known
