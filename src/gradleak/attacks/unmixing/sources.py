"""Telling the samples in a span apart: by pixels that are black (`by_pixels`), and by units that are off (`by_units`).

Both look for q (N,) such that many entries of Y q are zero, for a matrix Y (rows, N) that every sample mixes in its own way:

    pixels  Y q >= 0 are the pixels of a combination of the samples. Of the combinations that no pixel makes negative, the
            samples are the ones with many black pixels: extreme rays of a cone, found by linear programs
    units   M q with M = sum_i d_i f_i^T is d_i where q is orthogonal to every f but f_i, and zero wherever sample i had the
            unit off. N - 1 random rows that are zero for one sample have its q as their null vector
            (SPEAR, Dimitrov et al., NeurIPS 2024, arXiv:2403.03945, sections 3.2 and 3.3)
"""

import torch
from torch import Tensor

from gradleak.attacks.unmixing.span import Span

ROUNDS = 8  # in which the zeros of a candidate are found again, and the candidate from them
HOPELESS = 5  # programs without a picture, after which there are no black pixels
SAME = 0.98  # cosine from which on two candidates are one
APART = 0.03  # a candidate as near to the span of those before it adds nothing
DEPENDENT = 3.0  # pivots under it are noise: these rows have more null vectors than one
POOL = 3  # draws are made among one third of the rows
CHUNK = 1_000  # draws side by side, all from one pool


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


def by_units(span: Span, tries: int, tolerance: float, generator: torch.Generator) -> Tensor:
    """Coordinates (found, N) of the samples up to a factor each: at most N, from this many draws of N - 1 rows."""
    N = len(span.basis)
    U, S, Q = torch.linalg.svd(span.mixed, full_matrices=False)
    U, S, Q = U[:, :N], S[:N], Q[:N]
    size = (U * S).norm(dim=1)
    live = size > 1e-4 * size.max()
    Y = U[live] / U[live].norm(dim=1, keepdim=True)
    W = whitening(Y, tolerance, 0.0)
    Y, reach, found = Y @ W, (span.network.weights[0] @ span.basis.T)[live], list[Tensor]()
    for _ in range(0, tries, CHUNK):
        # Units that a direction of the span switches off are off for every sample that is near to it.
        direction = torch.randn(N, generator=generator, dtype=Y.dtype)
        pool = Y[(reach @ direction).argsort()[: max(len(Y) // POOL, 2 * N)]]
        q = null_vectors(pool, CHUNK, generator)
        found.append(q[distinct(q @ Y.T, 2 * N)])
    q = refined(torch.cat(found), Y)
    q = q[distinct(q @ Y.T, len(q))]
    q = q[apart(q @ Y.T, N)] @ W.T  # rows
    f = torch.linalg.pinv(q.T) @ (S[:, None] * Q)  # M = (U q^T) f
    c: Tensor = f @ torch.linalg.pinv(span.factor).T
    return c


def null_vectors(Y: Tensor, tries: int, generator: torch.Generator) -> Tensor:
    """Unit vectors (at most tries, N), each orthogonal to N - 1 random rows of Y (rows, N), and these to nothing else."""
    rows, N = Y.shape
    chosen = torch.rand(tries, rows, generator=generator).topk(N - 1, dim=1).indices
    anything = torch.randn(tries, 1, N, generator=generator, dtype=Y.dtype) * Y.norm() / len(Y) ** 0.5
    LU, pivots, _ = torch.linalg.lu_factor_ex(torch.cat([Y[chosen], anything], dim=1).mT)
    told = LU.diagonal(dim1=1, dim2=2).abs().amin(1) > DEPENDENT
    last = torch.zeros(int(told.sum()), N, 1, dtype=Y.dtype)
    last[:, -1] = 1
    q: Tensor = torch.linalg.lu_solve(LU[told], pivots[told], last, adjoint=True)[..., 0]
    q = q / q.norm(dim=1, keepdim=True)
    return q


def distinct(z: Tensor, most: int) -> Tensor:
    """Indices of the rows of z (n, rows) with the most zeros, none like one before it: at most that many."""
    left, chosen = zeros(z), list[int]()
    z = z / z.norm(dim=1, keepdim=True)
    while len(chosen) < most and bool((left > 0).any()):
        chosen.append(int(left.argmax()))
        left[(z @ z[chosen[-1]]).abs() > SAME] = 0
    return torch.tensor(chosen).long()
