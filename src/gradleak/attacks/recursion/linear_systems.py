"""The equations that a linear or convolutional layer of one example gives of its input, and their weighted solution.

With the input's patches U (inputs of one output, positions), a layer is Z = W U + b and its weight's gradient is
G = Delta U^T. Both are linear in the input. Every quantity is a Belief, and an equation counts as much as it is sure of.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSE = 4096  # unknowns up to which all of the normal matrix is factorised
ROUNDS = 6  # in which rows of the gradient may be left out
OUTLIER = 30  # times the median of the squared misfit
SAMPLES = 64  # of the posterior, for its variance where the exact one would cost more than the solution


@dataclass(frozen=True)
class Belief:
    """What is known of a tensor: independent Gaussians of that value and variance, inf where nothing is known."""

    value: Tensor
    variance: Tensor

    def reshape(self, *shape: int) -> "Belief":
        """The same entries in another shape."""
        return Belief(self.value.reshape(*shape), self.variance.reshape(*shape))


@dataclass(frozen=True)
class LinearMap:
    """Z = weight U + bias, with U = input[index].

    weight (out, channels * taps), bias (out,), index (channels * taps, positions) into the flat input of `size` entries;
    the index `size` is the padding, 0. A linear layer has one position, one tap, and its inputs as channels.
    """

    weight: Tensor
    bias: Tensor
    index: Tensor
    size: int
    taps: int

    def patches(self, u: Tensor) -> Tensor:
        """(size,) -> (channels * taps, positions)."""
        return torch.cat([u, u.new_zeros(1)])[self.index]

    def __call__(self, u: Tensor) -> Tensor:
        """W U without the bias: (size,) -> (out, positions)."""
        return self.weight @ self.patches(u)

    def adjoint(self, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """(out, positions) -> (size,): what flows back through the layer, or through one of another weight."""
        spread = ((self.weight if weight is None else weight).T @ y).flatten()
        return y.new_zeros(self.size + 1).index_add_(0, self.index.flatten(), spread)[:-1]

    def correlations(self, delta: Tensor) -> Tensor:
        """D (out * taps, spatial) with dL/dW[o, channel, k] = D[(o, k)] . input[channel], for delta (out, positions)."""
        spatial = self.size // (self.weight.shape[1] // self.taps)
        where = self.index[: self.taps].clamp_max(spatial)  # those of the first channel; `spatial` is the padding
        D = delta.new_zeros(len(delta), self.taps, spatial + 1)
        D.scatter_add_(2, where.expand(len(delta), -1, -1), delta[:, None].expand(-1, self.taps, -1))
        return D[:, :, :-1].flatten(0, 1)

    def back(self, delta: Belief) -> Belief:
        """The gradient at the layer's input, from that at its output."""
        return Belief(self.adjoint(delta.value), self.adjoint(delta.variance, self.weight.square()))


def linear_map(layer: nn.Module, shape: tuple[int, ...], pool: int = 1) -> LinearMap:
    """The layer on inputs of that shape, (inputs,) or (channel, height, width), averaged over pool x pool outputs.

    Raises TypeError for any other layer.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise TypeError(f"{layer} is neither a linear layer nor a convolution.")
    size, weight = math.prod(shape), layer.weight.detach()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return LinearMap(weight, bias, torch.arange(size)[:, None], size, 1)
    if isinstance(layer.padding, str):
        raise TypeError(f"{layer} has its padding in words.")
    down, across = layer.stride
    if pool > 1:  # the mean of convolutions at neighbouring positions is one with a larger kernel
        single, (high, wide) = weight, weight.shape[2:]
        weight = single.new_zeros(*single.shape[:2], high + (pool - 1) * down, wide + (pool - 1) * across)
        for y in range(0, pool * down, down):
            for x in range(0, pool * across, across):
                weight[:, :, y : y + high, x : x + wide] += single / pool**2
    entries = torch.arange(1, size + 1, dtype=torch.float64).view(1, *shape)
    kernel, stride = (weight.shape[2], weight.shape[3]), (down * pool, across * pool)
    index = F.unfold(entries, kernel, padding=layer.padding, stride=stride)[0].long() - 1
    index[index < 0] = size
    return LinearMap(weight.flatten(1), bias, index, size, math.prod(kernel))


@dataclass(frozen=True)
class Equations:
    """All that one layer tells of its input.

    layer     the layer whose weight's gradient was released
    gradient  of that weight, (out, channels * taps)
    delta     the loss's gradient at the layer's output, (out, positions)
    output    the layer, with what follows it, up to where its values are known
    values    those values, (out, positions), or None where none are
    prior     of the input, (size,), with one variance for all entries
    """

    layer: LinearMap
    gradient: Belief
    delta: Belief
    output: LinearMap
    values: Belief | None
    prior: Belief

    def solve(self, precision: Tensor | None = None) -> tuple[Belief, Tensor | None]:
        """The posterior of the input, and the lower factor L of its inverse covariance L L^T where a precision was given.

        precision: the prior's inverse covariance (size, size), if it is not the diagonal one of `prior`. One unit that is
        taken for active and was not spoils its output's row of the gradient: rows that fit far worse than the others are left out.
        """
        weight, D, G = self._of_gradient()
        out, taps, channels = len(self.delta.value), self.layer.taps, G.shape[1]
        for _ in range(ROUNDS):
            found = self._weighted(weight, D, G, precision)
            left = G - D @ found[0].value.view(channels, -1).T
            misfit = (weight * left.square()).view(out, -1).mean(1)
            used = weight.view(out, taps).amax(1) > 0
            wrong = used & (misfit > OUTLIER * misfit[used].median())
            if not bool(wrong.any()) or int((used & ~wrong).sum()) < 0.75 * out:
                break
            weight = weight.masked_fill(wrong.repeat_interleave(taps)[:, None], 0)
        belief, factor = found
        if (
            scale := float(misfit[used].median())
        ) > OUTLIER:  # the equations contradict each other: something above is wrong
            belief = Belief(belief.value, belief.variance * scale)
        return belief, factor

    def left(self) -> float:
        """The share of the prior's variance that the gradient alone leaves, on average."""
        weight, D, _ = self._of_gradient()
        told = torch.linalg.eigvalsh(D.T @ (weight * D))
        told = torch.where(told > 1e-12 * told[-1], told, 0)  # the rest is rounding
        return float((1 / (1 + told * self.prior.variance.mean())).mean())

    def _of_gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        """The equations G = D input^T: weight (out * taps, 1), D (out * taps, spatial), G (out * taps, channels)."""
        taps, (out, positions) = self.layer.taps, self.delta.value.shape
        channels = self.layer.weight.shape[1] // taps
        second = self.layer.patches(self.prior.variance + self.prior.value.square())
        second = second.view(channels, taps, positions).mean(0)  # (taps, positions), E[u^2]
        blurred = self.delta.variance @ second.T  # (out, taps): an error of delta is one of the equation
        weight = 1 / (self.gradient.variance.view(out, channels, taps).mean(1) + blurred).view(-1, 1)
        G = self.gradient.value.view(out, channels, taps).transpose(1, 2).reshape(out * taps, channels)
        return weight, self.layer.correlations(self.delta.value), G

    def _weighted(self, weight: Tensor, D: Tensor, G: Tensor, precision: Tensor | None) -> tuple[Belief, Tensor | None]:
        """`solve` for the equations G = D input^T, each of that weight (out * taps, 1)."""
        n, (spatial, channels) = self.layer.size, (D.shape[1], G.shape[1])
        block = D.T @ (weight * D)  # (spatial, spatial), the same for every channel
        sure = None if self.values is None else 1 / self.values.variance  # (out, positions')

        def prior_times(u: Tensor) -> Tensor:
            return u / self.prior.variance if precision is None else precision @ u

        def descent(u: Tensor) -> Tensor:  # minus the gradient of half the weighted squares
            r = (D.T @ (weight * (G - D @ u.view(channels, spatial).T))).T.flatten() + prior_times(self.prior.value - u)
            if self.values is not None and sure is not None:
                r = r + self.output.adjoint(sure * (self.values.value - self.output.bias[:, None] - self.output(u)))
            return r

        def normal(u: Tensor) -> Tensor:
            r = (block @ u.view(channels, spatial).T).T.flatten() + prior_times(u)
            return r if sure is None else r + self.output.adjoint(sure * self.output(u))

        factor = None
        if precision is None and (sure is None or 2 * sure.numel() < n or n > DENSE):
            few = sure is not None and sure.numel() <= DENSE // 2
            inverse, variance = _by_blocks(block, self.prior.variance, self.output, sure if few else None)
        else:
            A = torch.diag(1 / self.prior.variance) if precision is None else precision.clone()
            every = torch.arange(channels)
            A.view(channels, spatial, channels, spatial)[every, :, every] += block
            if sure is not None:
                A += _gram(self.output, sure)
            inverse, variance, L = _by_cholesky(A)
            factor = None if precision is None else L
        u = self.prior.value
        for _ in range(3):  # refinement: the equations' own residual does not square the condition
            u = u + conjugate_gradient(normal, inverse, descent(u))
        return Belief(u, variance), factor


def _gram(output: LinearMap, sure: Tensor) -> Tensor:
    """W^T diag(sure) W of the whole map: (size, size)."""
    n, index = output.size + 1, output.index.T  # (positions, channels * taps)
    local = torch.einsum("oa,op,ob->pab", output.weight, sure, output.weight)
    pairs = index[:, :, None] * n + index[:, None, :]
    whole = sure.new_zeros(n * n).index_add_(0, pairs.flatten(), local.flatten())
    return whole.view(n, n)[:-1, :-1]


Inverse = Callable[[Tensor], Tensor]


def _cholesky(A: Tensor) -> Tensor:
    """L (n, n) with L L^T = A, nudged by some units in the last place of its diagonal until it is positive definite."""
    scale = A.diagonal().rsqrt()
    unit = A * scale[:, None] * scale
    nudge = 4 * torch.finfo(A.dtype).eps
    while True:
        unit.diagonal().add_(nudge)
        L, failed = torch.linalg.cholesky_ex(unit)
        if not int(failed) or nudge > 1:
            factor: Tensor = L.div_(scale[:, None])
            return factor
        nudge *= 10


def _solve(L: Tensor, b: Tensor) -> Tensor:
    """x (n, m) with L L^T x = b."""
    half = torch.linalg.solve_triangular(L, b, upper=False)
    x: Tensor = torch.linalg.solve_triangular(L.T, half, upper=True)
    return x


def _by_cholesky(A: Tensor) -> tuple[Inverse, Tensor, Tensor]:
    """The inverse of A, its diagonal, and the lower factor of A."""
    L = _cholesky(A)
    if len(A) <= DENSE // 4:
        variance = torch.cholesky_inverse(L).diagonal()
    else:
        noise = torch.randn(len(A), SAMPLES, dtype=A.dtype, generator=torch.Generator().manual_seed(0))
        variance = torch.linalg.solve_triangular(L.T, noise, upper=True).square().mean(1)
    return lambda r: _solve(L, r[:, None])[:, 0], variance, L


def _by_blocks(block: Tensor, prior: Tensor, output: LinearMap, sure: Tensor | None) -> tuple[Inverse, Tensor]:
    """The inverse of the gradient's part, one block (spatial, spatial) for all channels, joined by the output's equations
    where these are few (Woodbury); and its diagonal. prior: the variance of every entry, (size,)."""
    spatial, n = len(block), len(prior)
    L = _cholesky(block + torch.eye(spatial, dtype=block.dtype) / prior[0])

    def alone(r: Tensor) -> Tensor:  # (size,)
        return _solve(L, r.view(-1, spatial).T).T.flatten()

    inverse = torch.cholesky_inverse(L)
    variance = inverse.diagonal().repeat(n // spatial)
    if sure is None:
        return alone, variance
    rows = sure.flatten().sqrt()[:, None] * _dense(output)  # (out * positions, size)
    seen = (rows.view(-1, spatial) @ inverse).view(rows.shape)
    inner = _cholesky(seen @ rows.T + torch.eye(len(rows), dtype=rows.dtype))
    explained = torch.linalg.solve_triangular(inner, seen, upper=False).square().sum(0)

    def joined(r: Tensor) -> Tensor:
        u = alone(r)
        return u - seen.T @ _solve(inner, (rows @ u)[:, None])[:, 0]

    return joined, (variance - explained).clamp_min(1e-12 * variance)


def _dense(output: LinearMap) -> Tensor:
    """The matrix of a map: (out * positions, size)."""
    (out, _), positions = output.weight.shape, output.index.shape[1]
    rows = output.weight.new_zeros(positions, out, output.size + 1)
    where = output.index.T[:, None].expand(-1, out, -1)
    rows.scatter_add_(2, where, output.weight.expand(positions, -1, -1))
    return rows[:, :, :-1].transpose(0, 1).reshape(out * positions, output.size)


def conjugate_gradient(
    matrix: Callable[[Tensor], Tensor], inverse: Inverse, b: Tensor, *, steps: int = 100, tolerance: float = 1e-6
) -> Tensor:
    """x (n,) with matrix(x) = b up to that relative error in the norm of `inverse`, an approximate inverse."""
    x, r = torch.zeros_like(b), b
    z = inverse(r)
    p, rz = z, r @ z
    first = rz
    for _ in range(steps):
        if not rz > tolerance**2 * first:
            break
        q = matrix(p)
        length = rz / (p @ q)
        x, r = x + length * p, r - length * q
        z = inverse(r)
        rz, before = r @ z, rz
        p = z + rz / before * p
    return x
