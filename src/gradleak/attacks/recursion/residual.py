"""A residual block backwards: its two ways meet in a sum, whose gradient is the same for both.

Below a global average pooling nothing is known of a map but its mean. What is known is the gradient of the convolution
before, G = Delta U^T, with one column of U (channels * taps, positions) per position. Where the outputs are as many as the
positions, the rows of G span the patches: U^T = T V^T for the leading right singular vectors V. Neighbouring patches
overlap, and those at the border hold the padding, 0. Both are linear in T, and at stride 1 they hold for a multiple of the
truth only, since nothing else commutes with the shifts to all sides. So U is known up to one factor, and Delta = G (U^T)^+
says which units were active: each entry is 0 or the known gradient behind the activation, which is the check.
"""

import operator
from typing import Self

import torch
from torch import Tensor, fx, nn

from gradleak.attacks.recursion.linear_systems import DENSE, LinearMap
from gradleak.observations.sequence import Layers, Recorder, layer_of, unrolled

SUMS = (operator.add, operator.iadd, torch.add)
CLEAR = 0.1  # how far a slope may be from 0 or 1
ROUNDS = 4  # of inverse iteration


class Residual(nn.Module):
    """after(branch(x) + shortcut(x)): `whole`, taken apart. Layers are named as their parameters are in `whole`."""

    def __init__(self, whole: nn.Module, branch: Layers, shortcut: Layers, after: nn.Module) -> None:
        super().__init__()
        self.whole, self.branch, self.shortcut, self.after = whole, branch, shortcut, after

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """None for what is no activation of a sum of two sequences."""
        try:
            nodes = list(Recorder().trace(module).nodes)
        except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return None
        last = nodes[-1].args[0]
        if not isinstance(last, fx.Node) or (after := layer_of(last, module)) is None:
            return None
        total = last.args[0]
        if not isinstance(total, fx.Node) or total.target not in SUMS or total.kwargs:
            return None
        ways = [_way(node, nodes[0], module) for node in total.args]
        known = sorted((way for way in ways if way is not None), key=len)
        return cls(module, known[1], known[0], after) if len(known) == len(ways) == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """What the block does."""
        y: Tensor = self.whole(x)
        return y


def _way(node: object, start: fx.Node, module: nn.Module) -> Layers | None:
    """The layers from the input to a summand."""
    layers: Layers = []
    while node is not start:
        if not isinstance(node, fx.Node) or not node.args or (layer := layer_of(node, module)) is None:
            return None
        name = str(node.target) if node.op == "call_module" else node.name
        layers = [*unrolled(name, layer), *layers]
        node = node.args[0]
    return layers


def active(layer: LinearMap, gradient: Tensor, delta: Tensor) -> Tensor | None:
    """Which units behind a convolution were active, (out, positions) 0 or 1; None where that stays unclear.

    gradient (out, channels * taps) of its weight; delta (out, positions): the gradient at its output, were all active.
    """
    positions = delta.shape[1]
    if layer.taps == 1 or positions**2 > DENSE or positions > min(gradient.shape):
        return None
    V = torch.linalg.svd(gradient, full_matrices=False)[2][:positions]  # (positions, channels * taps)
    T = _commuting(layer, V)
    if T is None:
        return None
    found = gradient @ torch.linalg.pinv(T @ V)  # Delta up to a factor
    used = delta.abs().amax(1) > 1e-6 * delta.abs().max()
    slope = torch.where(used[:, None], found / delta, 0)
    sign = slope.sum().sign()
    slope = sign * slope
    slope = slope / slope[slope > slope.amax() / 2].median()
    clear = torch.minimum(slope.abs(), (slope - 1).abs()) < CLEAR
    return slope.round() if bool(clear.all()) else None


def _commuting(layer: LinearMap, V: Tensor) -> Tensor | None:
    """T (positions, positions) of unit norm such that the patches T V agree best wherever they overlap, and with the padding;
    None where rounding leaves no positive definite matrix."""
    positions, taps = len(V), layer.taps
    rows = V.view(positions, -1, taps)
    gram = torch.einsum("ack,bcl->klab", rows, rows)  # (taps, taps, positions, positions)
    where = layer.index[:taps]  # the sites that the patches read, (taps, positions)
    M = V.new_zeros(positions, positions, positions, positions)  # squares of what disagrees: (row, entry, row, entry)
    for site in set(where.flatten().tolist()):
        readers = [(int(p), int(k)) for k, p in (where == site).nonzero()]
        for p, k in readers:
            M[p, :, p, :] += gram[k, k]
            if site < layer.size:
                for q, m in readers:
                    M[p, :, q, :] -= gram[k, m] / len(readers)
    whole = M.view(positions**2, positions**2)
    whole.diagonal().add_(1e-13 * whole.diagonal().mean())
    L, failed = torch.linalg.cholesky_ex(whole)
    if int(failed):
        return None
    t = torch.randn(positions**2, 1, dtype=V.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(ROUNDS):
        t = torch.cholesky_solve(t, L)
        t = t / t.norm()
    return t.view(positions, positions)
