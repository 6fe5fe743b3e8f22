"""Descent in the box, against minima that are known in closed form; recordings, against the functions they record."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gradleak.attacks.search.descend
from gradleak.attacks.search.descend import best_of_restarts, descend, record, rowwise, stack
from gradleak.errors import BadInput
from gradleak.modalities.losses import CROSS_ENTROPY, CrossEntropy, FocalLoss, Loss
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.defenses import Sign
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient, share_update

MLP = Architecture("mlp", (1, 8, 8), 10)


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def quadratic(x: Tensor, centre: Tensor, given: Tensors) -> Tensor:
    """sum_i w_i (x_i - c_i)^2: in the box its minimum is the centre, clamped."""
    return (given["weight"] * (x - centre).square()).sum()


def problems(rows: int) -> tuple[Tensor, Tensor, Tensors]:
    centre = 2 * random(rows, 3, 4, seed=1) - 0.5  # in [-0.5, 1.5]: about half of it outside the box
    return random(rows, 3, 4), centre, {"weight": 0.1 + 10 * random(rows, 3, 4, seed=2)}


# --- descend ---


@pytest.mark.parametrize("rows", [1, 4])
def test_descend_reaches_the_minimum_in_the_box(rows: int) -> None:
    x, centre, weight = problems(rows)
    found = descend(quadratic, x, (centre, weight), steps=400, step_size=0.1)
    # Signed steps end at the length of the last ones, 0.1 / 1000, around the minimum.
    torch.testing.assert_close(found.x, centre.clamp(0, 1), rtol=0, atol=1e-3)
    values = torch.stack([quadratic(*row) for row in rows_of(found.x, centre, weight)])
    torch.testing.assert_close(found.value, values)
    assert found.iterations == 400


def rows_of(x: Tensor, centre: Tensor, given: Tensors) -> list[tuple[Tensor, Tensor, Tensors]]:
    return [(x[k], centre[k], {name: t[k] for name, t in given.items()}) for k in range(len(x))]


def test_rows_are_independent() -> None:
    x, centre, weight = problems(3)
    together = descend(quadratic, x, (centre, weight), steps=50, step_size=0.1)
    for k in range(3):
        one = slice(k, k + 1)
        given = (centre[one], {"weight": weight["weight"][one]})
        alone = descend(quadratic, x[one], given, steps=50, step_size=0.1)
        torch.testing.assert_close(together.x[one], alone.x, rtol=0, atol=1e-6)


def test_a_row_that_is_nan_disturbs_nobody() -> None:
    x, centre, weight = problems(3)
    healthy = descend(quadratic, x, (centre, weight), steps=30, step_size=0.1)
    centre[1] = torch.nan
    found = descend(quadratic, x, (centre, weight), steps=30, step_size=0.1)
    assert torch.equal(found.x[[0, 2]], healthy.x[[0, 2]])
    assert found.x[1].isfinite().all()
    assert found.value[1] == torch.inf


def test_the_best_iterate_is_kept_and_the_trace_falls() -> None:
    x, centre, weight = problems(2)
    start = centre.clamp(0, 1)  # at the minimum: every step leads away
    found = descend(quadratic, start, (centre, weight), steps=5, step_size=0.3)
    assert torch.equal(found.x, start)
    reports: list[tuple[int, int, float]] = []
    found = descend(
        quadratic, x, (centre, weight), steps=250, step_size=0.1, on_step=lambda *report: reports.append(report)
    )
    values = torch.tensor([values for _, values in found.trace])
    assert (values[1:] <= values[:-1]).all()
    assert found.trace[-1] == (250, found.value.tolist())
    assert len(found.trace) <= 126
    assert reports[-1] == (250, 250, float(found.value.min()))
    assert (x == random(2, 3, 4)).all()  # the start is not written to


def test_best_of_restarts_takes_the_best_row_of_each_observation() -> None:
    observations = [observe(row) for row in (0, 1)]
    target = random(2, 1, seed=5).repeat_interleave(3, dim=0)  # 2 observations, 3 restarts
    found = descend(lambda x, t: (x - t).abs().sum(), random(6, 1), (target,), steps=4, step_size=0.05)
    labels = torch.tensor([[7], [8]])
    results = list(best_of_restarts(found, observations, labels))
    for index, (observation, x, label, value, trace) in enumerate(results):
        rows = range(3 * index, 3 * index + 3)
        row = min(rows, key=lambda r: float(found.value[r]))
        assert observation is observations[index]
        assert torch.equal(x, found.x[row])
        assert value == float(found.value[row])
        assert label.tolist() == labels[index].tolist()
        assert trace == [(step, values[row]) for step, values in found.trace]


# --- stack ---


def observe(row: int, *, model: int = 0, mode: Mode = "eval", criterion: Loss = CROSS_ENTROPY) -> PictureObservation:
    known = Model.of(MLP.build(model), MLP, mode=mode, criterion=criterion)
    return capture_gradient(known, load("digits", indices=[row]))[0]


def update(row: int, *, learning_rate: float = 0.1, steps: int = 2, batch: int = 1) -> PictureObservation:
    gradient, secret = capture_gradient(Model.of(MLP.build(0), MLP), load("digits", indices=[row]))
    return share_update(gradient, secret, Recipe(learning_rate=learning_rate, steps=steps, batch_size=batch))


def test_stack_repeats_each_observation() -> None:
    observations = [observe(0), observe(1)]
    stacked = stack(observations, copies=3)
    for name, tensor in stacked.items():
        assert torch.equal(tensor, torch.stack([observations[k // 3].released[name] for k in range(6)]))


@pytest.mark.parametrize(
    "other",
    [
        lambda: observe(1, model=1),
        lambda: observe(1, mode="train"),
        lambda: replace(observe(1), batch_size=2),
        lambda: update(1),
        lambda: observe(1, criterion=CrossEntropy(reduction="sum")),
        lambda: observe(1, criterion=FocalLoss()),
        lambda: replace(observe(1), defenses=(Sign(),)),
    ],
    ids=["state", "mode", "batch size", "kind", "reduction", "loss", "defenses"],
)
def test_stack_refuses_what_does_not_belong_together(other: Any) -> None:
    with pytest.raises(BadInput, match="side by side"):
        stack([observe(0), other()])


@pytest.mark.parametrize("different", [{"learning_rate": 0.2}, {"steps": 3}, {"batch": 2}], ids=str)
def test_stack_refuses_updates_of_different_recipes(different: dict[str, Any]) -> None:
    stack([update(0), update(1)])
    with pytest.raises(BadInput, match="side by side"):
        stack([update(0), update(1, **different)])


# --- record ---


def attack_objective(compiled: bool = False) -> tuple[Any, Any, tuple[Any, ...]]:
    """The gradient matching of an attack: (recorded, plain, arguments)."""
    observation = observe(3)
    labels = torch.tensor([[4], [5]])
    released = {name: t.expand(2, *t.shape).contiguous() for name, t in observation.released.items()}

    def objective(x: Tensor, y: Tensor, released: Tensors) -> Tensor:
        simulated = observation.simulate(x, y)
        parts = [(simulated[name] - released[name]).square().sum() for name in simulated]
        return torch.stack(parts).sum()

    def plain(x: Tensor, y: Tensor, released: Tensors) -> tuple[Tensor, Tensor]:  # a loop over rows, plain autograd
        gradients, values = [], []
        for k in range(len(x)):
            row = x[k].clone().requires_grad_()
            value = objective(row, y[k], {name: t[k] for name, t in released.items()})
            gradients.append(torch.autograd.grad(value, row)[0])
            values.append(value.detach())
        return torch.stack(gradients), torch.stack(values)

    given = (random(2, 1, 1, 8, 8), labels, released)
    return rowwise(objective, 2, compiled=compiled), plain, given


def test_a_recording_gives_the_numbers_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[Callable[..., Any]]()

    def recorded_once(function: Callable[..., Any], *example: Any, compiled: bool) -> Callable[..., Any]:
        made.append(record(function, *example, compiled=compiled))
        assert made[-1] is not function
        return made[-1]

    monkeypatch.setattr(gradleak.attacks.search.descend, "record", recorded_once)
    monkeypatch.setattr(gradleak.attacks.search.descend, "RECORDED_AFTER", 1)
    recorded, plain, (x, *given) = attack_objective()
    first, second = recorded(x, *given), recorded(x, *given)
    assert len(made) == 1  # at the second call
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # float32, another order of sums
    for other in (x, random(2, 1, 1, 8, 8, seed=9)):  # at the pictures of the recording and at others
        with torch.no_grad():
            gradient, value = recorded(other, *given)
        expected_gradient, expected_value = plain(other, *given)
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)  # float32, another order of sums


def test_one_row_and_many_rows_agree() -> None:
    x, centre, weight = problems(2)
    many = rowwise(quadratic, 2)(x, centre, weight)
    one = slice(1, 2)
    given = (centre[one], {"weight": weight["weight"][one]})
    single = rowwise(quadratic, 1)(x[one], *given)
    for a, b in zip(many, single, strict=True):
        torch.testing.assert_close(a[one], b)


def test_control_flow_that_depends_on_the_data_is_not_recorded() -> None:
    def kinked(x: Tensor) -> Tensor:
        return x.sum() if bool(x.sum() > 0) else -2 * x.sum()

    function = record(kinked, torch.ones(3))
    assert function is kinked
    assert float(function(-torch.ones(3))) == 6
    assert float(function(torch.ones(3))) == 3


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # torch's own
def test_machine_code_agrees_with_the_recording() -> None:
    x, centre, weight = problems(2)
    eager, compiled = (
        descend(quadratic, x, (centre, weight), steps=20, step_size=0.05, compiled=choice) for choice in (False, True)
    )
    # The same operations on float32, fused: a sum may be taken in another order.
    torch.testing.assert_close(compiled.value, eager.value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled.x, eager.x, rtol=0, atol=1e-4)


def test_without_a_compiler_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    x, centre, weight = problems(2)
    found = descend(quadratic, x, (centre, weight), steps=5, step_size=0.05, compiled=True)
    assert torch.equal(found.x, descend(quadratic, x, (centre, weight), steps=5, step_size=0.05).x)
