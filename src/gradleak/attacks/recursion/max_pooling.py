"""Which unit of each max-pooling cell was the greatest: read off the gradient of the convolution below.

Only the winner j(o, c) of cell c passes the known delta_oc on, so that row o of the gradient is sum_c delta_oc U_j(o, c),
with the patches U of the unknown input, and W_o U_j(o, c) + b_o is the known maximum. As in expectation maximisation,
alternate: least squares for the input under the expected winners; the chance of every unit to be the winner, by its
output and by its part in the gradient, one cell after another. Exact once the winners are found.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.recursion.inverses import Signal
from gradleak.attacks.recursion.linear_systems import Belief, LinearMap

ITERATIONS, WARM_UP = 40, 3  # in the first ones the gradient has no say: the patches are too blurred to compare
REDUNDANCY = 3  # equations for each unknown, below which the winners have never come out
CAUTION = 0.1  # what the gradient's residual is worth: it is the blur of the patches, hence far from independent
CLEAR = 0.02  # mean chance of another winner at which the search has ended


def find_winners(
    layer: LinearMap, gradient: Belief, pooled: Signal, typical: Tensor, size: torch.Size
) -> Signal | None:
    """The signal at a convolution's output, (out, height, width) = size, from that after k x k max-pooling of it.

    typical: inputs of the convolution for other pictures, (pictures, channel, height, width). None if it stays unclear.
    """
    m, d, k, channels = pooled.value.value, pooled.delta.value, pooled.choice, typical.shape[1]
    spatial, known = layer.size // channels, pooled.value.variance.isfinite()
    if len(m) * layer.taps < REDUNDANCY * spatial or not bool(known.any()):
        return None
    mean = typical.mean((0, 2, 3))[:, None].expand(-1, spatial)  # (channels, spatial)
    maps = (typical - typical.mean((0, 2, 3), keepdim=True)).flatten(0, 1)  # (pictures * channels, height, width)
    rows, blur = maps.flatten(1), _cells(maps, k).var(-1).mean()
    covariance = rows.T @ rows / len(rows)
    covariance.diagonal().add_(0.01 * covariance.diagonal().mean())
    precision = torch.linalg.inv(covariance)
    G = gradient.value.view(len(m), channels, -1).transpose(1, 2).reshape(-1, channels)  # (out * taps, channels)
    chance = torch.full((*m.shape, k * k), 1 / k**2, dtype=m.dtype)
    rest, history = m.new_zeros(len(m)), list[float]()  # rest: the residual of each row, (out,)
    for iteration in range(ITERATIONS):
        expected = chance * d[..., None]
        D = layer.correlations(_whole(expected, k, size))
        doubt = (chance * (1 - chance) * d[..., None].square()).sum((1, 2, 3)) * blur  # (out,)
        doubt = torch.maximum(doubt, rest)  # a row with a wrong winner must not spoil the input for the others
        weight = 1 / (doubt.repeat_interleave(layer.taps)[:, None] + gradient.variance.mean())
        L = torch.linalg.cholesky(D.T @ (weight * D) + precision)
        u = mean
        for _ in range(2):  # the second time for what the normal matrix lost to rounding
            u = u + torch.cholesky_solve(D.T @ (weight * (G - D @ u.T)) - precision @ (u - mean).T, L).T
        left = (G - D @ u.T).square()
        z = _cells((layer(u.flatten()) + layer.bias[:, None]).view(size), k)  # (out, h, w, k * k)
        error = (z.amax(-1) - m)[known].square().mean().sqrt() + 1e-7 * m[known].abs().max()
        log_chance = _log_chance(z, m, error)
        if iteration < WARM_UP:
            chance = log_chance.softmax(-1)
        else:
            rest = left.view(len(m), -1).mean(1)
            noise = rest + gradient.variance.mean()
            chance = _by_gradient(layer, gradient.value, u, d, chance, log_chance, noise / CAUTION, k, size)
        history.append(float(left.mean()))
        unclear = (1 - chance.amax(-1))[known].mean()
        if iteration > WARM_UP and unclear < CLEAR and history[-1] < 4 * gradient.variance.mean():
            return _signal(pooled, chance, size)
        if iteration > WARM_UP + 5 and history[-1] > 0.5 * history[-5]:
            return None
        blur = _cells(u.view(channels, *typical.shape[2:]), k).var(-1).mean()
    return None


def _log_chance(z: Tensor, m: Tensor, error: Tensor) -> Tensor:
    """Of each unit to be the greatest, from outputs z (..., units) known up to that error and the maximum m (...)."""
    apart = (m[..., None] - z) / error
    below = torch.special.log_ndtr(apart)
    log_chance: Tensor = below.sum(-1, keepdim=True) - below - apart.square() / 2
    return log_chance


def _by_gradient(
    layer: LinearMap,
    G: Tensor,
    u: Tensor,
    d: Tensor,
    chance: Tensor,
    log_chance: Tensor,
    noise: Tensor,
    k: int,
    size: torch.Size,
) -> Tensor:
    """The chances, once each cell's part in the gradient is compared with what the other cells leave over."""
    U, chance = layer.patches(u.flatten()), chance.clone()
    gram, along = U.T @ U, G @ U  # (positions, positions), (out, positions)
    squares = gram.diagonal()
    where = _cells(torch.arange(size[1] * size[2]).view(1, *size[1:]), k)[0]  # (h, w, k * k)
    delta = _whole(chance * d[..., None], k, size)  # (out, positions)
    for y in range(where.shape[0]):
        for x in range(where.shape[1]):
            q, here = where[y, x], d[:, y, x, None]
            others = delta @ gram[:, q] - (chance[:, y, x] * here) @ gram[q][:, q]
            gain = (
                here * (along[:, q] - others) - here.square() * squares[q] / 2
            )  # half the fall of the squared residual
            chance[:, y, x] = (gain / noise[:, None] + log_chance[:, y, x]).softmax(-1)
            delta[:, q] = chance[:, y, x] * here
    return chance


def _signal(pooled: Signal, chance: Tensor, size: torch.Size) -> Signal:
    """Winners carry the maximum and its delta; of the others nothing is known but that their delta is zero."""
    k, d = pooled.choice, pooled.delta
    won = chance > 1 - CLEAR
    spread = chance * d.variance[..., None] + chance * (1 - chance) * d.value[..., None].square()
    variance = torch.where(won, pooled.value.variance[..., None], torch.inf)
    value = pooled.value.value[..., None].expand(chance.shape)
    unseen = _whole(torch.ones_like(chance), k, size) == 0  # rows and columns that no cell covers
    return Signal(
        Belief(_whole(value, k, size), _whole(variance, k, size).masked_fill(unseen, torch.inf)).reshape(*size),
        Belief(_whole(chance * d.value[..., None], k, size), _whole(spread, k, size)).reshape(*size),
    )


def _cells(maps: Tensor, k: int) -> Tensor:
    """(n, height, width) -> (n, h, w, k * k), without the rest at the lower and right edge."""
    h, w = maps.shape[1] // k, maps.shape[2] // k
    return maps[:, : h * k, : w * k].reshape(-1, h, k, w, k).transpose(2, 3).flatten(3)


def _whole(cells: Tensor, k: int, size: torch.Size) -> Tensor:
    """The inverse of _cells for maps of that size, zero at the edge: (n, height * width)."""
    n, h, w, _ = cells.shape
    maps = cells.reshape(n, h, w, k, k).transpose(2, 3).reshape(n, h * k, w * k)
    return F.pad(maps, (0, size[2] - maps.shape[2], 0, size[1] - maps.shape[1])).flatten(1)
