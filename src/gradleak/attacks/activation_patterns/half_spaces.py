"""A Gaussian, given linear equations and half-spaces: expectation propagation (Minka 2001, arXiv:1301.2294, section 4; the
sites in parallel as in Cunningham, Hennig and Lacoste-Julien 2011, arXiv:1111.6832).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.8  # of a sweep: 1 would replace every site outright, which may oscillate
BLUR = 1e-3  # noise of a half-space, in standard deviations of the Gaussian across it: keeps every site finite


@dataclass(frozen=True)
class Gaussian:
    """N(mean, factor factor^T): mean (n,), factor (n, k)."""

    mean: Tensor
    factor: Tensor

    def given(self, rows: Tensor, values: Tensor, noise: Tensor) -> "Gaussian":
        """Conditioned on rows x = values up to noise, a standard deviation each: (m, n), (m,), (m,)."""
        U, s, Vh = torch.linalg.svd((rows @ self.factor) / noise[:, None], full_matrices=False)
        seen = U.T @ ((values - rows @ self.mean) / noise)
        mean = self.mean + self.factor @ (Vh.T @ (s / (1 + s.square()) * seen))
        return Gaussian(mean, self.factor - (self.factor @ Vh.T) * (1 - (1 + s.square()).rsqrt()) @ Vh)


@dataclass(frozen=True)
class Sites:
    """One Gaussian factor exp(shift g - precision g^2 / 2) per half-space g = row x + offset > 0: (sides,) each."""

    precision: Tensor
    shift: Tensor


def cut(
    state: Gaussian, rows: Tensor, offsets: Tensor, sites: Sites, *, sweeps: int, tolerance: float
) -> tuple[Gaussian, Sites, list[float]]:
    """`state` given rows x + offsets > 0: its first two moments, the sites to go on from, the change in every sweep.

    rows (sides, n), offsets (sides,). Stops when no entry of the mean changes by more than `tolerance`, after `sweeps`, or
    when the half-spaces turn out to contradict each other, with an infinite change.
    """
    P = rows @ state.factor  # (sides, k): over the whitened unknowns
    centre = rows @ state.mean + offsets
    blur = (BLUR * P.norm(dim=1)).square()  # variance
    posterior, changes = state, list[float]()
    for _ in range(sweeps):
        precision = torch.eye(P.shape[1], dtype=P.dtype) + (P.T * sites.precision) @ P
        root, failed = torch.linalg.cholesky_ex(precision)
        if bool(failed):
            return posterior, sites, [*changes, math.inf]
        white = torch.cholesky_solve((P.T @ (sites.shift - sites.precision * centre))[:, None], root)[:, 0]
        mean = state.mean + state.factor @ white
        changes.append(float((mean - posterior.mean).abs().max()))
        posterior = Gaussian(mean, torch.linalg.solve_triangular(root, state.factor.T, upper=False).T)
        if len(changes) > 1 and changes[-1] < tolerance:  # the first sweep has no news
            break
        variance = torch.linalg.solve_triangular(root, P.T, upper=False).square().sum(0)
        cavity = (1 / variance - sites.precision).clamp_min(1e-9 / variance)  # precision without the site's own
        middle = ((centre + P @ white) / variance - sites.shift) / cavity
        matched, spread = truncated(middle, 1 / cavity, blur)
        new = (1 / spread - cavity).clamp_min(0), matched / spread - middle * cavity
        sites = Sites(torch.lerp(sites.precision, new[0], DAMPING), torch.lerp(sites.shift, new[1], DAMPING))
    return posterior, sites, changes


def truncated(mean: Tensor, variance: Tensor, blur: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of g ~ N(mean, variance) given g + N(0, blur) > 0 (Rasmussen and Williams 2006, section 3.9)."""
    total = variance + blur
    z = mean / total.sqrt()
    far = z.clamp(max=-30.0)  # there z + ratio is a difference of large numbers: -1/z + 2/z^3 instead
    ratio = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(z)).exp()  # N(z) / Phi(z)
    tail = -1 / far + 2 / far**3
    ratio, excess = torch.where(z < -30, tail - z, ratio), torch.where(z < -30, tail, ratio + z)
    kept = 1 - variance / total * (ratio * excess)
    nearly = 1 / far.square() - 6 / far**4 + blur / total  # 1 - ratio excess, and what the blur leaves
    return mean + variance / total.sqrt() * ratio, variance * torch.where(z < -30, nearly, kept).clamp(1e-12, 1.0)


def nearest_in_box(state: Gaussian, steps: int = 300) -> Tensor:
    """The most probable x in [0, 1]^n: alternating directions (Boyd et al. 2011, section 5.2)."""
    covariance = state.factor @ state.factor.T
    rho = len(covariance) / covariance.trace()
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    gain = torch.cholesky_solve(eye, torch.linalg.cholesky(eye + rho * covariance))  # (I + rho C)^-1
    x, dual = state.mean.clamp(0, 1), torch.zeros_like(state.mean)
    for _ in range(steps):
        aim = x - dual
        free = aim + gain @ (state.mean - aim)
        x = (free + dual).clamp(0, 1)
        dual = dual + free - x
    return x
