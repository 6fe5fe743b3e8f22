"""Telling the samples in a span apart: by pixels that are black (`by_pixels`), and by units that are off (`by_units`).

Both look for q (N,) such that many entries of Y q are zero, for a matrix Y (rows, N) that every sample mixes in its own way:

    pixels  Y q >= 0 are the pixels of a combination of the samples. Of the combinations that no pixel makes negative, the
            samples are the ones with many black pixels: extreme rays of a cone, found by linear programs
    units   M q with M = sum_i d_i f_i^T is d_i where q is orthogonal to every f but f_i, and zero wherever sample i had the
            unit off (SPEAR, Dimitrov et al., NeurIPS 2024, arXiv:2403.03945, theorem 3.1): about half of the entries.
            Sparse vectors of a subspace are minima of a smooth L1 norm on its sphere (Sun, Qu and Wright 2015,
            arXiv:1504.06785), found by descent from random starts
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.unmixing.span import Span

ROUNDS = 8  # in which the zeros of a candidate are found again, and the candidate from them
HOPELESS = 5  # programs without a picture, after which there are no black pixels
SAME = 0.98  # cosine from which on two candidates are one
APART = 0.03  # a candidate as near to the span of those before it adds nothing
STEPS, SMOOTH, STEP = 600, (1.0, 0.05), (1.0, 0.02)  # of the descent: mu and step, from first to last
SIDE = 32  # candidates of a search, at most
LIKELY = 0.15  # a candidate has this share of zeros and one per dimension: of a Gaussian, .08 are under SMALL
SMALL = 0.1  # of the root mean square: entries that are zero while a search goes on
OFF = 0.3  # the share of the units that every sample switches off, at least
BALANCED = 5  # rounds of the rows' factors
ASIDE = 0.3  # of a random vector is added to a start
ON = 1e-2  # of the mean activation: units above it are on
AGREES = 1e-3  # the rounding of float32 leaves 1e-5 of what an input explains of its activations, a false one tenths


def whitening(Y: Tensor, tolerance: float, noise: float) -> Tensor:
    """W (N, N) such that entries of Y W q under 1, for a unit vector q, are zero as far as one can tell.

    That is, up to `tolerance` of the root mean square of Y W q, and to noise of that deviation in every number of Y (rows, N).
    """
    values, vectors = torch.linalg.eigh(Y.T @ Y / len(Y))
    values = values.clamp_min(torch.finfo(Y.dtype).eps * values[-1])
    W: Tensor = vectors / (tolerance**2 * values + noise**2).sqrt()
    return W


def refined(q: Tensor, Y: Tensor) -> Tensor:
    """Unit vectors (n, N) moved to where the entries of Y q that are under 1 have the least squares."""
    for _ in range(ROUNDS):
        kept = ((q @ Y.T).abs() < 1).to(Y)  # (n, rows)
        least = torch.linalg.eigh(torch.einsum("nr,ri,rj->nij", kept, Y, Y))[1][..., 0]
        q = least * (least * q).sum(1, keepdim=True).sign()
    return q


def zeros(z: Tensor) -> Tensor:
    """The share of entries of each row of z (n, rows) under 1: (n,)."""
    return (z.abs() < 1).to(z).mean(1)


def apart(z: Tensor, most: int) -> list[int]:
    """Indices of the first rows of z (n, rows) that are no combination of those before them, at most that many."""
    z, chosen = z / z.norm(dim=1, keepdim=True), list[int]()
    for i in range(len(z)):
        if len(chosen) < most and float(torch.linalg.svdvals(z[[*chosen, i]])[-1]) > APART:
            chosen.append(i)
    return chosen


# -- pixels


def by_pixels(span: Span, tolerance: float, generator: torch.Generator) -> Tensor:
    """Coordinates (found, N) of the pictures that are vertices of the box: at most N, those with many black pixels.

    Solves min sum(Y q) subject to Y q >= 0, g q = 1. Of two pictures it returns the one with more of g. g is random, and
    orthogonal to what was found, so that each program finds another picture. Pixels that are black in all pictures look alike;
    where there are some, they fix the scale of a picture; else the edge of the box does.
    """
    rows, unit = pixel_rows(span)
    noise = span.noise * float(span.network.scale.abs().max())
    rows = rows[rows.norm(dim=1) > 6 * noise * rows.shape[1] ** 0.5 + 1e-9 * rows.norm(dim=1).max()]
    W = whitening(rows, tolerance, noise)
    Y, found, failures = rows @ W, rows.new_zeros(0, rows.shape[1]), 0
    while len(found) < len(span.basis) and failures < (4 * len(span.basis) if len(found) else HOPELESS):
        g = torch.randn(Y.shape[1], generator=generator, dtype=Y.dtype)
        if len(found):
            taken = torch.linalg.qr(found.T)[0]
            g = g - taken @ (taken.T @ g)
        q = sparsest(Y, g / g.norm(), tolerance)
        if is_picture(q, Y) and float((q @ g).abs() / g.norm()) > APART:
            found = torch.cat([found, q])
        else:
            failures += 1
    for i in range(len(found) if len(found) == Y.shape[1] else 0):  # once more, now that all the others are known
        others = torch.cat([found[:i], found[i + 1 :]])
        g = torch.linalg.svd(others)[2][-1]
        q = sparsest(Y, g * (g @ found[i]).sign(), tolerance)
        if is_picture(q, Y) and float(zeros(q @ Y.T)) >= float(zeros(found[i : i + 1] @ Y.T)):
            found[i] = q
    q = found @ W.T
    q = q[q @ unit > 0]
    return (q / (q @ unit)[:, None])[:, : len(span.basis)] * span.spread


def pixel_rows(span: Span) -> tuple[Tensor, Tensor]:
    """Y (pixels, n) and u (n,): the picture with coordinates (spread * q) / (u q) is Y q / (u q).

    u q is the sum of the coefficients of a combination of samples. Black pixels tell it, n = N; else it is one more coordinate.
    """
    network, black = span.network, span.black
    rows = network.scale[:, None] * span.basis.T * span.spread
    if black is not None:
        unit = black * span.spread
        return rows + network.shift[:, None] * unit, unit
    unit = torch.zeros(len(span.basis) + 1, dtype=rows.dtype)
    unit[-1] = 1
    return torch.cat([rows, network.shift[:, None]], dim=1), unit


def sparsest(Y: Tensor, g: Tensor, tolerance: float) -> Tensor:
    """The refined unit vector (1, N) of least sum(Y q) with g q = 1 and no entry under -tolerance of the mean, or none: (0, N)."""
    from scipy.optimize import linprog

    mean = Y.mean(0)
    low = -(Y + tolerance * mean).numpy()
    found = linprog(mean.numpy(), low, [0.0] * len(low), g[None].numpy(), [1.0], (None, None))
    if found.status != 0:
        return Y[:0]
    q = torch.as_tensor(found.x)[None]
    return refined(q / q.norm(), Y)


def is_picture(q: Tensor, Y: Tensor) -> bool:
    """Whether there is a candidate (0 or 1, N), with more black pixels than five times those that are negative."""
    z = q @ Y.T
    return len(q) == 1 and float(zeros(z)) > 0.05 + 5 * float((z <= -1).to(z).mean())


# -- units


def by_units(span: Span, searches: int, tolerance: float, generator: torch.Generator) -> Tensor:
    """Coordinates (found, N) of the samples, at most N, after at most so many searches: up to a factor each, or, where the second
    layer tells what the first gave (span.hidden), as they are.

    There, each q leads to its sample alone (`activated`), and as the q of all other samples are orthogonal to that one's f, the
    next search has a dimension less. Elsewhere a search starts orthogonal to the q before, which are nearly so; there, entries
    of M q under this tolerance, in parts of their root mean square, are the zeros that candidates are ranked by.
    """
    N = len(span.basis)
    U, S, Q = torch.linalg.svd(span.mixed, full_matrices=False)
    U, S, Q = U[:, :N], S[:N], Q[:N]
    size = (U * S).norm(dim=1)
    live = size > 1e-4 * size.max()
    Y = balanced(U[live])
    W = whitening(Y, 1.0, 0.0)
    Y, q, c = Y @ W, U.new_zeros(0, N), U.new_zeros(0, N)
    for _ in range(searches):
        taken = q if span.hidden is None else c @ span.factor.T @ Q.T / S @ W
        P = torch.linalg.svd(taken)[2][len(taken) :].T if len(taken) else torch.eye(N, dtype=Y.dtype)  # (N, n)
        start = torch.randn(2 * N, N, generator=generator, dtype=Y.dtype)
        if span.hidden is not None:
            new = sparse(Y @ P, start[: 2 * P.shape[1]] @ P, SMALL, LIKELY + P.shape[1] / len(Y)) @ P.T
            told = [activated(span, live, off) for off in (new @ Y.T).abs()]
            c = torch.cat([c, *(x[None] for x in told if x is not None)])
        elif N > 1:
            before, q = q, torch.cat([q, sparse(Y, start @ P @ P.T + ASIDE * start, tolerance, 0.0)])
            q = q[distinct(q @ Y.T / tolerance, len(q))]
            q = q[apart(q, N)]
            if len(q) == N and torch.equal(before, q):
                break
        if len(c) >= N:
            break
    if span.hidden is None:
        f = torch.linalg.pinv((q @ W.T).T) @ (S[:, None] * Q)  # M = (U q^T) f
        c = f @ torch.linalg.pinv(span.factor).T
    first: Tensor = c[:N]
    return first


def balanced(Y: Tensor) -> Tensor:
    """Y (rows, N) with a factor for each row such that, in the coordinates where Y^T Y is the identity, all are as long (Tyler
    1987, Annals of Statistics 15): a row counts by its direction."""
    for _ in range(BALANCED):
        Y = Y / (Y @ whitening(Y, 1.0, 0.0)).norm(dim=1, keepdim=True)
    return Y


def sparse(Y: Tensor, q: Tensor, tolerance: float, least: float) -> Tensor:
    """Unit vectors (found, N) with many zeros in Y q, for a Y (rows, N) with Y^T Y / rows = 1, from starts (n, N) on. They have
    more than this least share of entries under the tolerance before the last squares."""
    q, rows = F.normalize(q).float(), Y.float()
    for at in range(STEPS):
        mu, step = (first * (last / first) ** (at / STEPS) for first, last in (SMOOTH, STEP))
        slope = torch.tanh(q @ rows.T / mu) @ rows / len(rows)  # of the mean of mu log cosh(Y q / mu)
        q = F.normalize(q - step * (slope - (slope * q).sum(1, keepdim=True) * q))
    q = q.to(Y)
    z = q @ Y.T / SMALL
    some = distinct(z, SIDE)
    q = q[some[zeros(z[some]) > least]] if Y.shape[1] > 1 else q[:1]
    for _ in range(ROUNDS):
        z = (q @ Y.T).abs()
        off = (z <= z.quantile(OFF, dim=1, keepdim=True)).to(Y) if len(q) else z
        q = torch.linalg.eigh(torch.einsum("nr,ri,rj->nij", off, Y, Y))[1][..., 0]
    q = q[distinct(q @ Y.T / tolerance, len(q))]
    return q


def activated(span: Span, live: Tensor, signal: Tensor) -> Tensor | None:
    """Coordinates (N,) of the sample with the least signal (live units,) where it has units off, or None where there is none.

    Its activations h = g H are zero at these units, which tells g up to a factor t, and t h = R c + b at the others tells c.
    With the signals' sum, the gradient of the bias, s c = 1 for every sample tells t.
    """
    assert span.hidden is not None
    assert span.bias is not None
    W, b, H = span.network.weights[0], span.network.biases[0], span.hidden[:, live]
    assert b is not None
    rows = F.normalize(H, dim=0)[:, signal <= signal.quantile(OFF)]
    h = torch.linalg.eigh(rows @ rows.T)[1][:, 0] @ H
    h = h * h.sum().sign()
    on = h > ON * h.abs().mean()
    if not len(span.basis) < int(on.sum()):
        return None
    R, b = W[live][on] @ span.basis.T, b[live][on]
    by_h, by_b = torch.linalg.lstsq(R, torch.stack([h[on], b], dim=1)).solution.T
    s = torch.linalg.lstsq(span.mixed, span.bias[:, None]).solution[:, 0]
    c = (1 + s @ by_b) / (s @ by_h) * by_h - by_b
    z = R @ c + b
    t = z @ h[on] / h[on].square().sum()
    return c if float((z - t * h[on]).norm()) < AGREES * float(z.norm()) else None


def distinct(z: Tensor, most: int) -> Tensor:
    """Indices of the rows of z (n, rows) with the most zeros, none like one before it: at most that many."""
    left, chosen = zeros(z), list[int]()
    z = z / z.norm(dim=1, keepdim=True)
    while len(chosen) < most and bool((left > 0).any()):
        chosen.append(int(left.argmax()))
        left[(z @ z[chosen[-1]]).abs() > SAME] = 0
    return torch.tensor(chosen).long()
