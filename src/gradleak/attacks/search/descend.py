"""How an attack searches: K independent problems (observations x restarts) descend side by side, as rows of one tensor.

An objective is a pure function of one problem: objective(x, *given) -> scalar. It is differentiated and vectorised over
the rows here, so that an attack never loops over restarts.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from gradleak.errors import BadInput
from gradleak.observations.adapter import UNKNOWN
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors, fingerprint, flatten

RECORDED_AFTER = (
    100  # calls: a recording takes as long as 50 to 400 of them, .3 s for a small network and 3 s for a transformer
)
Objective = Callable[..., Tensor]
OnStep = Callable[[int, int, float], None]  # (iteration, iterations in all, best objective so far)


@dataclass(frozen=True)
class Descent:
    """Where K searches ended: x (K, ...), their objective (K,), and thinned (iteration, best objective) pairs per row."""

    x: Tensor
    value: Tensor
    iterations: int
    trace: list[tuple[int, list[float]]]


def stack(observations: Sequence[PictureObservation], copies: int = 1) -> Tensors:
    """The released tensors of several observations of one model, each `copies` times: {name: (observations * copies, ...)}.

    Raises BadInput if they were not taken from the same state, in the same way, from batches of one size.
    """
    first = observations[0]
    if len(observations) > 1 and any(_circumstances(o) != _circumstances(first) for o in observations[1:]):
        raise BadInput("Only observations of one model state, taken in one way, can be attacked side by side.")
    return {
        name: torch.stack([o.released[name] for o in observations]).repeat_interleave(copies, dim=0)
        for name in first.released
    }


def _circumstances(o: PictureObservation) -> dict[str, Any]:
    shared = {
        field.name: getattr(o, field.name)
        for field in fields(o)
        if field.name not in ("model", "release", "released", "labels")
    }
    settings = {field.name: getattr(o.release, field.name) for field in fields(o.release)}
    shared |= {name: fingerprint(value) if name == "start" else value for name, value in settings.items()}
    if settings.get("recipe", UNKNOWN) is None:
        shared["size"] = float(flatten(o.released).norm())  # to which a simulation is scaled
    if any(
        defense.reads for defense in o.defenses or ()
    ):  # what a simulation is compared with depends on what was released
        shared["own"] = fingerprint(o.released)
    state = {"mode": o.model.mode, "loss": o.model.criterion, "state": o.model.state_hash()}
    return shared | state | {"kind": o.release.name}


def record(function: Callable[..., Any], *example: Any, compiled: bool = False) -> Callable[..., Any]:
    """Run `function` once and record its tensor operations, so that later calls skip autograd's bookkeeping.

    The recording computes the same numbers, faster. A model whose control flow depends on its data cannot be recorded:
    the function itself is then returned. compiled: also generate machine code (torch.compile), which takes from ten
    seconds to minutes and pays for long runs; ignored where there is no C++ compiler.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # a fifth of a second: not at import time

    try:
        graph = make_fx(function)(*example)
    except (RuntimeError, ValueError, NotImplementedError):
        return function
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if compiled and (shutil.which("g++") or shutil.which("clang++")):
        return torch.compile(graph, dynamic=False)
    return graph


def rowwise(objective: Objective, rows: int, *, compiled: bool = False) -> Callable[..., Any]:
    """(x (K, ...), *given) -> gradient (K, ...), objective (K,), for K rows and always the same shapes.

    It is recorded when it has been called so often that this pays; compiled: at the first call."""
    alone = grad_and_value(objective)

    def single(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:  # one row: vmap would only cost
        gradient, value = alone(*map(_first_row, (x, *given)))
        return gradient[None], value[None]

    function, calls = vmap(alone) if rows > 1 else single, 0

    def evaluate(x: Tensor, *given: Any) -> Any:
        nonlocal function, calls
        if calls == (0 if compiled else RECORDED_AFTER):
            function = record(function, x, *given, compiled=compiled)
        calls += 1
        return function(x, *given)

    return evaluate


def evaluated(evaluate: Callable[..., Any], x: Tensor, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(gradient, objective) of what `rowwise` has made, without a graph."""
    with torch.no_grad():
        gradient, value = evaluate(x, *given)
    return gradient, value


def _first_row(rows: Any) -> Any:
    return {name: tensor[0] for name, tensor in rows.items()} if isinstance(rows, dict) else rows[0]


def descend(
    objective: Objective,
    x: Tensor,
    given: tuple[Any, ...],
    *,
    steps: int,
    step_size: float,
    on_step: OnStep | None = None,
    compiled: bool = False,
) -> Descent:
    """Signed Adam in the box [0, 1], with the step size divided by 10 after 3/8, 5/8 and 7/8 of the steps.

    x: the starts, (K, ...); given: what the objective needs beside x, tensors or {name: tensor}, each (K, ...).
    """
    best, best_value = x.clone(), x.new_full(x.shape[:1], torch.inf)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    evaluate = rowwise(objective, len(x), compiled=compiled)
    trace = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            gradient, value = evaluate(x, *given)
        better = value < best_value
        rows = better.view(-1, *[1] * (x.dim() - 1))  # (K, 1, ...)
        best, best_value = torch.where(rows, x, best), torch.where(better, value, best_value)
        gradient = gradient.sign()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        rate = step_size * 0.1 ** sum(step > steps * milestone / 8 for milestone in (3, 5, 7))
        direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        x = (x - rate * direction).clamp(0, 1)
        if step % max(steps // 100, 1) == 0 or step == steps:
            trace.append((step, best_value.tolist()))
            if on_step is not None:
                on_step(step, steps, float(best_value.min()))
    return Descent(best, best_value, steps, trace)


def best_of_restarts(
    found: Descent, observations: Sequence[PictureObservation], labels: Tensor
) -> Iterator[tuple[PictureObservation, Tensor, Tensor, float, list[tuple[int, float]]]]:
    """Per observation: itself, the best of its rows, its labels, the objective there, and that row's trace."""
    copies = len(found.x) // len(observations)
    for index, observation in enumerate(observations):
        row = index * copies + int(found.value[index * copies : (index + 1) * copies].argmin())
        trace = [(step, values[row]) for step, values in found.trace]
        yield observation, found.x[row], labels[index], float(found.value[row]), trace
