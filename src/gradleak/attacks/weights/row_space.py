"""What the rows of a first layer tell of the inputs that it was trained on: how many there were, and where they lie.

Gradient descent moves that layer only within the span of its inputs, after any number of steps: what stands out of the
singular values of its weight, or of its change, spans the training images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.observations.fully_connected import FullyConnected

ROUNDING = 1e-5  # singular values below so much of the largest are rounding in float32
FAR_OUTSIDE = 0.3  # relative distance from the box at which a hidden unit is no start


@dataclass(frozen=True)
class Span:
    """The affine set origin + (anything) basis that the training inputs lie in: (in,), (rank, in) orthonormal rows."""

    origin: Tensor
    basis: Tensor

    def project(self, x: Tensor) -> Tensor:
        """The nearest points of the set: (..., in) -> (..., in)."""
        return self.origin + self.along(x - self.origin)

    def along(self, direction: Tensor) -> Tensor:
        """The part of directions that stays in the set."""
        return (direction @ self.basis.T) @ self.basis


def rank_of(network: FullyConnected) -> int:
    """How many singular values of the first layer stand out of the noise that it started from; 0 where none does.

    Those above omega(beta) times the median (Gavish and Donoho 2014, equation 11). All, where over half of them would.
    """
    W = with_bias(network)
    values = torch.linalg.svdvals(W)
    beta = min(W.shape) / max(W.shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    rank = int(((values > omega * values.median()) & (values > ROUNDING * values[0])).sum())
    return rank if rank < len(values) / 2 else len(values)


def span_of(network: FullyConnected) -> Span | None:
    """Where the training inputs must lie; None when the first layer tells nothing: its rows span everything, evenly.

    With a bias, its column is the inputs' last coordinate, which is 1: the set is affine.
    """
    rank, W = rank_of(network), with_bias(network)
    if not 0 < rank < min(W.shape):
        return None
    V = torch.linalg.svd(W, full_matrices=False)[2][:rank]  # (rank, in or in + 1)
    if network.biases[0] is None:
        return Span(torch.zeros_like(V[0]), V)
    last = V[:, -1]
    origin = V.T @ (last / last.square().sum())
    flat = V - torch.outer(last / last.square().sum(), last @ V)  # directions along which the last coordinate rests
    basis = torch.linalg.svd(flat[:, :-1], full_matrices=False)[2][: rank - 1]
    return Span(origin[:-1], basis)


def unit_inputs(network: FullyConnected, space: Span | None) -> Tensor:
    """Rows of the first layer over their biases that are nearly pictures: (k, in), none where there is no bias."""
    bias = network.biases[0]
    if bias is None:
        return network.weights[0][:0]
    x = network.weights[0][bias != 0] / bias[bias != 0, None]
    x = x if space is None else space.project(x)
    low, high = ((edge - network.shift) / network.scale for edge in (0, 1))
    inside = x.clamp(low, high)
    return inside[(x - inside).norm(dim=1) < FAR_OUTSIDE * x.norm(dim=1)]


def with_bias(network: FullyConnected) -> Tensor:
    """The first layer's weight with its bias as a last column."""
    W, b = network.weights[0], network.biases[0]
    return W if b is None else torch.cat([W, b[:, None]], dim=1)
