"""The course of a training: learning rates that change, samples that are shuffled, clients that are averaged; against torch's own optimizers
and loaders, and the schedules of transformers."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.checks import REPLAY_TOLERANCE, replay
from gradleak.audit.explanations import at_reconstruction
from gradleak.cli.flags import Audit
from gradleak.cli.inputs import observed
from gradleak.errors import BadInput
from gradleak.formats.trainer_state import Log, Trainer
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.orders import Schedule, Shuffler, batches, scheduled
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.training import OPTIMISERS, Optimizer, Recipe

ARCHITECTURE = Architecture("mlp", (1, 8, 8), 10)
PRIVATE = load("digits", indices=range(6))
RATE = 0.05
ROUNDING = 1e-3  # of a difference of weights: 1e-7 of weights of size 0.1, relative to changes of 1e-3


def schedule_of_transformers(kind: Schedule, optimizer: Any, warmup: int, planned: int) -> Any:
    import transformers

    library: Any = transformers
    if kind == "linear":
        return library.get_linear_schedule_with_warmup(optimizer, warmup, planned)
    return library.get_cosine_schedule_with_warmup(optimizer, warmup, planned)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_are_those_of_transformers(kind: Schedule, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], RATE)
    course, wanted = schedule_of_transformers(kind, optimizer, warmup, 10), []
    for _ in range(8):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        course.step()
    assert scheduled(kind, RATE, 8, warmup=warmup, planned=10) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(BadInput, match="the rate 0"):
        scheduled(kind, RATE, 1, warmup=3, planned=10)
    with pytest.raises(BadInput, match="no 11 steps of warm-up"):
        scheduled(kind, RATE, 1, warmup=11, planned=10)


def orders_of_torch(kind: Shuffler, count: int, size: int, seed: int, epochs: int) -> list[list[int]]:
    """The rows of each step, as the libraries themselves draw them."""
    rows: Any = list(range(count))
    if kind == "accelerate":
        from accelerate.data_loader import SeedableRandomSampler  # PEFT needs accelerate: it is there

        sampler = SeedableRandomSampler(rows, data_seed=seed)
        every = [list(sampler) for _ in range(epochs)]  # it counts its epochs itself
        return [order[i : i + size] for order in every for i in range(0, count, size)]
    generator = torch.Generator().manual_seed(seed) if kind == "loader" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(rows, batch_size=size, shuffle=True, generator=generator)
        return [batch.tolist() for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize("kind", ["loader", "global", "accelerate"])
def test_shuffled_samples_come_in_the_order_of_the_libraries(kind: Shuffler) -> None:
    before = torch.get_rng_state()
    ours = [list(rows) for rows in itertools.islice(batches(7, 3, (kind, 42)), 9)]
    assert ours == orders_of_torch(kind, 7, 3, 42, 3)
    assert torch.equal(torch.get_rng_state(), before)


def trained(steps: list[list[int]], rates: list[float], optimizer: Optimizer = "sgd") -> Observation[Any]:
    """The change by torch.optim, with the model before it, as an update of one step that nobody has told of yet."""
    module = ARCHITECTURE.build(0)
    model = Model.of(module, ARCHITECTURE)
    update = OPTIMISERS[optimizer](list(module.parameters()), rates[0])
    for rows, rate in zip(steps, rates, strict=True):
        update.param_groups[0]["lr"] = rate
        update.zero_grad()
        nn.functional.cross_entropy(module(PRIVATE.images[rows]), PRIVATE.labels[rows]).backward()  # type: ignore[no-untyped-call]
        update.step()
    change = {name: p.detach() - model.parameters[name] for name, p in module.named_parameters()}
    recipe = Recipe(learning_rate=RATE, steps=len(steps), batch_size=len(steps[0]), optimizer=optimizer)
    return Observation(model=model, release=Update(recipe=recipe), released=change, batch_size=len(PRIVATE.labels))


def told(seen: Observation[Any], **about: Any) -> Observation[Any]:
    recipe = seen.expect(Update).recipe
    known = {name: getattr(recipe, name) for name in ("learning_rate", "steps", "batch_size", "optimizer")}
    return Observation(**{**vars(seen), "release": Update(recipe=Recipe(**known | about))})


def residual(seen: Observation[Any]) -> float:
    return seen.residual(PRIVATE.images, PRIVATE.labels)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_a_schedule_replays_and_the_gradient_is_in_its_unit(optimizer: Optimizer) -> None:
    rows, rates = [[0, 1, 2], [3, 4, 5]] * 2, list(scheduled("linear", RATE, 4))
    seen = trained(rows, rates, optimizer)
    known = told(seen, rates=tuple(rates))
    assert residual(known) < REPLAY_TOLERANCE["float32"]
    assert residual(seen) > 0.1  # at a constant rate the change is 4 / 2.5 times as long
    if optimizer == "sgd":  # the mean of the gradients, weighted by the rates
        gradient = known.as_gradient()
        for name, tensor in seen.released.items():
            assert torch.allclose(gradient[name], -tensor / sum(rates))


def test_a_wrong_recipe_is_flagged_and_the_schedule_named() -> None:
    seen = trained([[0, 1, 2, 3, 4, 5]] * 6, list(scheduled("cosine", RATE, 6, planned=6)))
    found = Reconstruction(
        value=PRIVATE.images,
        labels=PRIVATE.labels,
        residual=residual(seen),
        status="",
        outcome="unsolved",  # type: ignore[arg-type]
    )
    sentences = [flag["sentence"] for flag in at_reconstruction(seen, found) if flag["name"] == "training"]
    assert len(sentences) == 1
    assert "rates 0.05 to" in sentences[0]


def test_shuffled_samples_are_found_by_the_usual_seeds() -> None:
    """Order matters in the second order of the learning rate, and that is what tells."""
    rows = orders_of_torch("loader", 6, 2, 1, 2)
    seen = trained(rows, [RATE] * len(rows))
    assert residual(seen) > 10 * REPLAY_TOLERANCE["float32"]
    known = told(seen, shuffle=("loader", 1))
    assert residual(known) < REPLAY_TOLERANCE["float32"]
    (flag,) = replay(seen, PRIVATE.images, PRIVATE.labels)
    assert flag["level"] == "info"
    assert "shuffled (loader, seed 1)" in flag["sentence"]
    other = trained(orders_of_torch("loader", 6, 2, 98_765, 2), [RATE] * len(rows))
    assert replay(other, PRIVATE.images, PRIVATE.labels)[0]["level"] != "info"


def test_the_mean_of_clients() -> None:
    """One step of SGD: the gradient of all their samples (McMahan et al. 2017, section 2). More steps: what each has trained, averaged."""
    parts = [[0, 1], [2, 3], [4, 5]]
    for steps in (1, 3):
        each = [trained([part] * steps, [RATE] * steps) for part in parts]
        mean = {k: torch.stack([seen.released[k] for seen in each]).mean(0) for k in each[0].released}
        release = Update(recipe=Recipe(learning_rate=RATE, steps=steps), clients=3)
        seen = Observation(**{**vars(each[0]), "release": release, "released": mean})
        assert residual(seen) < REPLAY_TOLERANCE["float32"]
        assert [name for name, _, _ in seen.reservations()] == ["clients"]
        whole = Observation(**{**vars(seen), "release": Gradient(), "released": seen.as_gradient()})
        # A mean of gradients taken elsewhere is another one; what is alike is alike to the rounding of a difference of weights.
        assert (residual(whole) < 1e-4) == (steps == 1)
    with pytest.raises(BadInput, match="not as many for each"):
        seen.simulate(PRIVATE.images[:5], PRIVATE.labels[:5])
    with pytest.raises(BadInput, match="not over 0"):
        Observation(**{**vars(seen), "release": Update(recipe=Recipe(learning_rate=RATE, steps=1), clients=0)})


def test_the_command_line_says_the_course(tmp_path: Path) -> None:
    rates = list(scheduled("linear", RATE, 4, warmup=1, planned=8))
    seen = trained(orders_of_torch("accelerate", 6, 3, 42, 2), rates)
    before = seen.model.parameters
    save_file(before, tmp_path / "before.safetensors")
    save_file({name: before[name] + change for name, change in seen.released.items()}, tmp_path / "after.safetensors")
    usual: dict[str, Any] = {
        "before": tmp_path / "before.safetensors",
        "after": tmp_path / "after.safetensors",
        "lr": RATE,
    }
    usual |= {
        "model": "mlp",
        "input_shape": (1, 8, 8),
        "classes": 10,
        "steps": 4,
        "local_batch_size": 3,
        "batch_size": 6,
    }
    usual |= {"warmup": 1, "out": tmp_path / "out"}
    course: dict[str, Any] = {"schedule": "linear", "planned_steps": 8, "shuffle": ("accelerate", 42)}
    assert residual(observed(Audit(**usual, **course))) < ROUNDING
    assert observed(Audit(**usual, **course, clients=2)).expect(Update).clients == 2
    with pytest.raises(BadInput, match="belong to a --schedule"):
        observed(Audit(**usual))


def logged(rates: tuple[float, ...], planned: int, every: int, late: int) -> Trainer:
    """What a Trainer writes: the rate of the step itself, or of the next."""
    whole = (*rates, 0.0)
    lines = [Log(step, whole[step - late]) for step in range(every, planned + 1, every)]
    return Trainer(global_step=planned, max_steps=planned, log_history=lines)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(("kind", "warmup"), [("linear", 0), ("cosine", 0), ("linear", 10), ("cosine", 10)])
def test_the_log_of_a_trainer_tells_the_schedule(kind: Schedule, warmup: int, late: int) -> None:
    rates = scheduled(kind, 2e-4, 40, warmup=warmup)
    assert logged(rates, 40, 5, late).course == pytest.approx(rates, rel=1e-9)


def test_a_log_that_no_schedule_explains_tells_none() -> None:
    odd = tuple(2e-4 / (1 + step) for step in range(40))
    assert logged(odd, 40, 5, 1).course == ()
    assert logged(scheduled("linear", 2e-4, 40), 40, 20, 1).course == ()  # two entries: a line and a cosine give both
    assert logged((1e-3,) * 41, 40, 5, 1).course == (1e-3,) * 40
