"""L-BFGS for K independent problems side by side, and the change of variables that takes an ill-conditioned one apart.

L-BFGS: Nocedal and Wright, Numerical Optimization (2006), algorithm 7.4. Line search: Lewis and Overton, Nonsmooth
optimization via quasi-Newton methods (2013), algorithm 2.6, one trial per evaluation, each row on a clock of its own.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap

from gradleak.attacks.search.descend import Descent, OnStep, record

CHUNK = 128  # derivatives side by side

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]  # x (K, n) -> gradient (K, n), value (K,)

ARMIJO, WOLFE = 1e-4, 0.9  # how much a step must lower the value and flatten the slope


def lbfgs(
    evaluate: Evaluate,
    start: Tensor,
    *,
    evaluations: int,
    history: int = 20,
    goal: float = -torch.inf,
    on_step: OnStep | None = None,
) -> Descent:
    """Minimise K functions, one per row of start (K, n), with at most that many evaluations of each; values only fall.

    Row k of what `evaluate` returns may depend on row k of its argument only. A row stops at a value <= goal. A trial
    that is not finite counts as too long a step; a row that is not finite at its start stays there, with value inf. A
    row whose line search collapses forgets its history, and stops when steepest descent fails as well.
    """
    every = torch.arange(len(start), device=start.device)
    x = start.clone()
    gradient, value = (t.clone() for t in evaluate(x))
    finite = value.isfinite() & gradient.isfinite().all(1)
    value, gradient = torch.where(finite, value, torch.inf), torch.where(finite[:, None], gradient, 0)
    alive = finite & (value > goal) & (gradient != 0).any(1)  # (K,)
    steps, changes = x.new_zeros(history, *x.shape), x.new_zeros(history, *x.shape)  # of x, of the gradient
    rho = x.new_zeros(history, len(x))  # 1 / (s . y), 0 where the slot is empty
    head = torch.zeros_like(every)  # (K,) next slot of each row's ring
    direction, step = -gradient, _first_step(gradient)  # (K, n), (K,)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)  # the bracket around the step
    done, trace = 1, [(1, value.tolist())]
    while done < evaluations and bool(alive.any()):
        done += 1
        trial = x + (step * alive)[:, None] * direction
        trial_gradient, trial_value = evaluate(trial)
        slope = (gradient * direction).sum(1)  # (K,) negative
        finite = trial_value.isfinite() & trial_gradient.isfinite().all(1)
        short = finite & (trial_value <= value + ARMIJO * step * slope)
        far = (trial_gradient * direction).sum(1) >= WOLFE * slope
        take = alive & short & far
        low, high = torch.where(short & ~far, step, low), torch.where(short, high, step)
        step = torch.where(high.isfinite(), (low + high) / 2, 2 * low)
        collapsed = (high.isfinite() & (high - low <= 1e-12 * high)) | (high < 1e-16) | (low > 1e12)
        stuck = alive & ~take & collapsed
        if take.any():
            s, y, slot = trial[take] - x[take], trial_gradient[take] - gradient[take], (head[take], every[take])
            steps[slot], changes[slot], rho[slot] = s, y, 1 / (s * y).sum(1)  # s . y > 0, since the slope has flattened
            head = torch.where(take, (head + 1) % history, head)
            x[take], gradient[take], value = trial[take], trial_gradient[take], torch.where(take, trial_value, value)
        if stuck.any():
            alive = alive & ~(stuck & (rho == 0).all(0))
            rho[:, stuck] = 0
        fresh = take | stuck
        if fresh.any():
            direction[fresh] = -_inverse_hessian(gradient, steps, changes, rho, head, every[fresh])
            step = torch.where(fresh, torch.where((rho == 0).all(0), _first_step(gradient), 1), step)
            low, high = torch.where(fresh, 0, low), torch.where(fresh, torch.inf, high)
        alive = alive & (value > goal) & (gradient != 0).any(1)
        if done % max(evaluations // 100, 1) == 0 or done == evaluations or not alive.any():
            trace.append((done, value.tolist()))
            if on_step is not None:
                on_step(done, evaluations, float(value.min()))
    return Descent(x, value, done, trace)


def _first_step(gradient: Tensor) -> Tensor:
    """(K, n) -> (K,): the step that makes steepest descent move by 1."""
    length: Tensor = gradient.norm(dim=1)
    return length.clamp_min(torch.finfo(gradient.dtype).tiny).reciprocal()


def _inverse_hessian(
    gradient: Tensor, steps: Tensor, changes: Tensor, rho: Tensor, head: Tensor, rows: Tensor
) -> Tensor:
    """H g for the rows given, (R, n), by the two-loop recursion; newest pair first: slot head - 1, head - 2, ..."""
    q = gradient[rows]  # (R, n)
    slots = [((head[rows] - 1 - age) % len(steps), rows) for age in range(len(steps))]
    weights = []
    for slot in slots:
        weights.append(rho[slot] * (steps[slot] * q).sum(1))  # (R,)
        q = q - weights[-1][:, None] * changes[slot]
    curvature = changes[slots[0]].square().sum(1) * rho[slots[0]]  # y . y / s . y
    q = q / torch.where(curvature > 0, curvature, 1)[:, None]
    for slot, weight in zip(reversed(slots), reversed(weights), strict=True):
        q = q + (weight - rho[slot] * (changes[slot] * q).sum(1))[:, None] * steps[slot]
    return q


def gauss_newton_factor(
    residual: Callable[[Tensor], Tensor], x: Tensor, *, damping: float = 1e-4, chunk: int = CHUNK
) -> Tensor | None:
    """Lower L (n, n) with L L^T = J^T J + damping * mean(diag J^T J), J (p, n) the Jacobian of residual at x (n,).

    J takes n forward-mode derivatives, `chunk` at a time, in the precision of x. None if the matrix is not finite or
    not positive definite, and where an operation of the residual has no forward-mode derivative.
    """
    n, chunk = len(x), min(chunk, len(x))

    def columns(x: Tensor, tangents: Tensor) -> Tensor:  # (n,), (chunk, n) -> (chunk, p)
        derivative: Tensor = vmap(lambda t: jvp(residual, (x,), (t,))[1])(tangents)
        return derivative

    tangents = torch.eye(n + chunk, n, dtype=x.dtype, device=x.device)  # the zero rows fill the last chunk up
    try:
        with warnings.catch_warnings():  # torch's own: its first forward-mode derivative calls torch.jit.script
            warnings.simplefilter("ignore", DeprecationWarning)
            evaluate = record(columns, x, tangents[:chunk])
        with torch.no_grad():
            J = torch.cat([evaluate(x, tangents[i : i + chunk]) for i in range(0, n, chunk)])[:n]  # transposed: (n, p)
    except NotImplementedError:
        return None
    H = J @ J.T
    H.diagonal().add_(damping * H.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(H)
    return None if int(failed) or not bool(factor.isfinite().all()) else factor


def unwhiten(u: Tensor, factor: Tensor) -> Tensor:
    """u W with W = L^-1, hence W^T W = (L L^T)^-1: (K, n) -> (K, n)."""
    x: Tensor = torch.linalg.solve_triangular(factor, u, upper=False, left=False)
    return x


def whitened(evaluate: Evaluate, origin: Tensor, factor: Tensor) -> Evaluate:
    """The same function of u (K, n), at origin + u W: where L L^T is its Hessian, the Hessian in u is the identity."""

    def inside(u: Tensor) -> tuple[Tensor, Tensor]:
        gradient, value = evaluate(origin + unwhiten(u, factor))
        return torch.linalg.solve_triangular(factor.T, gradient, upper=True, left=False), value

    return inside
