"""What an audit says beforehand: counted against what attacks then do, in operations and bytes; never in seconds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trained
from gradleak.attacks.attack import Effort
from gradleak.attacks.dataset_size import SampleCount
from gradleak.attacks.dlg import DLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.past_the_rank import PastTheRank
from gradleak.attacks.recursion.recursive import Recursive
from gradleak.audit import plan
from gradleak.audit.loop import audit
from gradleak.audit.scoring import SCORING
from gradleak.audit.verdict import of_attacks
from gradleak.audit.written import untried
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.modalities.texts import load_texts
from gradleak.observations import work
from gradleak.observations.defenses import Defense, RelativeNoise
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, keep_secret

SHAPE = (1, 8, 8)
MIB = 2**20


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gradient(name: str = "vit", *defenses: Defense) -> Observation[Any]:
    architecture = Architecture(name, SHAPE, 10)
    model = Model.of(architecture.build(0).eval(), architecture)
    return capture_gradient(model, load("digits", indices=[0]), reveal_labels=True, defenses=defenses)[0]


def adapter(steps: int = 1) -> Observation[Any]:
    architecture = Architecture("mlp", SHAPE, 10)
    model = Model.of(architecture.build(0), architecture)
    secret = keep_secret(model, load("digits", indices=[0]))
    recipe = Recipe(learning_rate=0.1, steps=steps)
    return share_adapter(model, secret, modules=["2", "6"], rank=4, recipe=recipe)


def text_adapter() -> Observation[Any]:
    model = trained.language_model("bert", "classification")
    secret = keep_secret(model, load_texts("embedded", indices=[0]))
    names = [name for block in range(2) for name in layout_of(model).queries(block)]
    return share_adapter(model, secret, modules=names, rank=10)  # the text has 12 to 15 tokens


# --- Counting ---


def test_the_operations_of_a_product_and_the_bytes_that_live_at_one_time_are_counted() -> None:
    x, y = torch.ones(30, 40), torch.ones(40, 50)
    assert work.work_of(lambda: x @ y).operations == 2 * 30 * 40 * 50  # a multiplication and an addition each

    def three_tensors() -> Tensor:
        a = torch.zeros(MIB // 4)
        b = a + 1
        del a
        return b + 1  # beside b; a is gone

    assert work.work_of(three_tensors).bytes == 2 * MIB
    known = torch.zeros(MIB)
    assert work.work_of(lambda: known.view(2, -1).T).bytes == 0  # nothing was made


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_gradients_of_gradients_of_parametrised_layers_are_counted(norm: Any) -> None:
    """Torch's record of modules hooks into such layers in a way that a gradient of a gradient does not survive."""
    layer, x = norm(nn.Linear(8, 4)).eval(), torch.rand(2, 8, requires_grad=True)

    def twice() -> None:
        [first] = torch.autograd.grad(layer(x).sigmoid().sum(), x, create_graph=True)
        torch.autograd.grad(first.square().sum(), x)

    assert work.work_of(twice).operations >= 3 * 2 * 2 * 8 * 4  # forth, back, and back through that


def test_rows_side_by_side_fit_into_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ROOM", 5 * MIB)
    assert work.side_by_side(lambda: torch.zeros(MIB // 2), 25) == 2  # 2 MiB each
    assert work.side_by_side(lambda: torch.zeros(8 * MIB), 25) == 1  # at least one
    assert work.side_by_side(lambda: torch.zeros(1), 25) == 25  # at most those that are wanted


def test_the_number_of_samples_is_the_same_however_few_adapters_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, public = adapter(), trained.public()
    counts = []
    for room in (work.ROOM, 1):
        monkeypatch.setattr(work, "ROOM", room)
        ready = SampleCount(largest=2, copies=5).prepared(seen, public, generator=seed())
        counts.append(ready(seen, generator=seed()))
    assert counts[0].value == counts[1].value


# --- Efforts: within a factor of 3 of the operations that the attack takes ---

SEARCHES: dict[str, tuple[Callable[[], Observation[Any]], Any]] = {
    "inverting-gradients": (lambda: gradient("lenet"), InvertingGradients(steps=8)),
    "dlg": (lambda: gradient("lenet"), DLG(evaluations=8, rounds=0, restarts=1)),
    "dlg whitened": (
        lambda: gradient("lenet"),
        DLG(evaluations=5, rounds=1, round_evaluations=20, restarts=1, goal=0.0),
    ),
    "recursive": (
        lambda: gradient("lenet", RelativeNoise(0.01)),
        Recursive(evaluations=100),
    ),  # noise: a search follows
    "map-inversion": (gradient, MapInversion(evaluations=2, pairs=10)),
    "dataset-size": (adapter, SampleCount(largest=2, copies=6)),
    "dataset-size of 3 steps": (lambda: adapter(3), SampleCount(largest=2, copies=6)),
    "past-the-rank": (text_adapter, PastTheRank(sweeps=2, choices=3, starts=1, insertions=2)),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_what_an_attack_says_is_within_a_factor_of_three_of_what_it_does(name: str) -> None:
    observe, attack = SEARCHES[name]
    seen = observe()
    scoring = SCORING[attack.modality]
    public = trained.public() if attack.modality == "pictures" else scoring.public("embedded", "train", seen.model)
    step = plan.step_of(seen, public, torch.device("cpu"))
    effort: Effort = attack.effort(seen)
    assert step is not None

    def everything() -> None:
        ready = attack.prepared(seen, public, generator=seed()) if hasattr(attack, "prepared") else attack
        ready(seen, generator=seed())

    taken = work.work_of(everything)
    single = effort.simulations / (
        2 if isinstance(attack, DLG | Recursive) else 1
    )  # an operation of float64 counts as two of float32
    said = (single + effort.abreast) * seen.release.steps() * step.operations + effort.algebra
    assert taken.operations / 3 <= said <= 3 * taken.operations, f"{said / taken.operations:.2f}"
    made = plan.Plan({name: effort}, step, 1, 0, 0, None, 1, {})
    held = plan.bytes_of(seen) + made.bytes(name)
    assert taken.bytes <= 3 * held, f"{taken.bytes / held:.2f}"


# --- The plan ---


def test_what_takes_too_long_is_not_tried_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, public, attacks = gradient(), trained.public(), {"inverting-gradients": InvertingGradients(steps=2)}
    monkeypatch.setattr(plan, "LONGEST", 0.0)
    bare, named = (plan.plan_of(seen, attacks, public, named=named) for named in (False, True))
    assert not named.skipped
    assert list(bare.skipped) == ["inverting-gradients"]
    assert "Not tried, which says nothing about what leaks: inverting-gradients (" in bare.sentence()
    assert "run it with --attacks inverting-gradients" in bare.skipped["inverting-gradients"]
    [row] = audit(seen, attacks, public, skipped=bare.skipped)
    assert not row.result["ran"]
    assert row.result["status"].startswith("Not tried: would cost up to")
    said = of_attacks([row.result], {}, untried(seen, set(attacks) - set(bare.skipped)))
    assert said["level"] == "unscored"  # nothing is called safe
    assert "inverting-gradients" in said["sentence"].partition("Not tried: ")[2]


def test_an_attack_that_finds_too_little_memory_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, public, attacks = gradient(), trained.public(), {"inverting-gradients": InvertingGradients(steps=2)}
    free = 2 * plan.bytes_of(seen)  # for the observation, and not for graphs of gradients of gradients
    monkeypatch.setattr(plan, "free_bytes", lambda where: free)
    assert "of memory" in plan.plan_of(seen, attacks, public, named=False).skipped["inverting-gradients"]
    with pytest.raises(BadInput, match="inverting-gradients would take"):
        plan.plan_of(seen, attacks, public, named=True)
    monkeypatch.setattr(plan, "free_bytes", lambda where: free - 1)
    with pytest.raises(BadInput, match="are free"):
        plan.plan_of(seen, attacks, public, named=False)


def test_a_control_that_is_attacked_too_doubles_the_time() -> None:
    seen, public, attacks = gradient(), trained.public(), {"dlg": DLG()}
    alone, scored = (plan.plan_of(seen, attacks, public, named=True, scored=scored) for scored in (False, True))
    assert scored.step is not None
    assert replace(alone, step=scored.step).seconds("dlg") * 2 == scored.seconds("dlg")


def test_what_refuses_or_has_a_closed_form_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, public = gradient(), trained.public()

    def refuse(self: MapInversion, observation: Any) -> Effort:
        raise NotObserved("too large")

    monkeypatch.setattr(MapInversion, "effort", refuse)
    made = plan.plan_of(seen, {"map-inversion": MapInversion(), "past-the-rank": PastTheRank()}, public, named=False)
    assert not made.efforts
    assert made.step is None
    assert made.sentence().startswith("Plan: closed forms")


def test_the_plan_says_the_whole_once_and_each_part() -> None:
    step, effort = work.Work(1e6, MIB, 0.5), Effort(20.0, 1.0)
    one, two = (
        plan.Plan({n: effort for n in names}, step, 1, 0, 0, None, 1, {}) for names in (["dlg"], ["dlg", "ntk"])
    )
    assert one.sentence().startswith(
        "Plan: at most dlg 10 CPU-seconds, less where a search converges; closed forms besides"
    )
    assert two.sentence().startswith("Plan: at most 20 CPU-seconds (dlg 10 CPU-seconds, ntk 10 CPU-seconds), less")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.02, "0.02 CPU-seconds"), (59.0, "59 CPU-seconds"), (600, "10 CPU-minutes"), (7_200, "2.0 CPU-hours")],
)
def test_time_is_said_in_units_that_one_grasps(seconds: float, said: str) -> None:
    assert plan.duration(seconds) == said
