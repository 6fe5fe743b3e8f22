"""Adapters that PEFT merged into the weights: the rank of the change tells them, the seed of their start is found, the factors follow."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak.attacks import merged as seeds
from gradleak.attacks.draws import draw
from gradleak.attacks.merged import recover_merged_seed, with_merged_recovered
from gradleak.attacks.seed import ALARM
from gradleak.attacks.unmixing.unmixing import Unmixing
from gradleak.audit.metrics.matching import match
from gradleak.audit.metrics.pictures import psnr_db
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.modalities import pictures
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import UNKNOWN, Adapter
from gradleak.observations.low_rank import low_rank, rounding_errors
from gradleak.observations.merged import Merged, merged, was_merged, with_start
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Update
from gradleak.observations.training import OPTIMISERS, Optimizer, Recipe
from gradleak.victims.adapter import fine_tune

GREY = Architecture("mlp", (1, 8, 8), 10)
CONVNET = Architecture("convnet", (1, 8, 8), 10)
UNUSUAL = 2_000_000_011  # not among the usual seeds


@pytest.fixture(autouse=True)
def _peft_reads_what_transformers_deprecates() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def digits(count: int = 4) -> Pictures:
    return pictures.load("digits", "test", indices=range(count))


def tuned(
    out: Path,
    architecture: Architecture = GREY,
    *,
    rate: float = 0.05,
    steps: int = 60,
    count: int = 4,
    **arguments: Any,
) -> tuple[Observation[Any], nn.Module]:
    """An adapter as PEFT trained it, and the network that it gives with `merge_and_unload`."""
    from peft import PeftModel

    recipe = Recipe(learning_rate=rate, steps=steps, optimizer=arguments.pop("optimizer", "sgd"))
    model = Model.of(architecture.build(0), architecture)
    settings = {"rank": 8, "target_modules": "all", "seed": 42, **arguments}
    adapter = fine_tune(model, digits(count), out=out, recipe=recipe, **settings)[0]
    whole: Any = PeftModel.from_pretrained(model.solid(), str(out / "adapter"))
    return adapter, whole.merge_and_unload()


def change(model: Model[Any], after: nn.Module, precision: torch.dtype = torch.float32) -> Observation[Any]:
    """What lies between the weights before and after, these in a number format."""
    state = {name: p.detach().to(precision).double() for name, p in after.named_parameters()}
    moved = {name: (state[name] - p.double()).float() for name, p in model.parameters.items()}
    still = tuple(name for name, d in moved.items() if not d.any())
    released = {name: d for name, d in moved.items() if name not in still}
    name = str(precision).removeprefix("torch.")
    return Observation(model=model, release=Update(recipe=UNKNOWN), released=released, precision=name, beside=still)


def told(observation: Observation[Any], recipe: Recipe | None = None) -> Merged:
    found = merged(observation, recipe)
    assert found is not None
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# --- What is a merged adapter ---


def test_the_rank_of_the_change_tells_a_merged_adapter(tmp_path: Path) -> None:
    """Four digits leave a rank of 4, by LoRA's gradient; 16, a rank of 8, that of the adapter."""
    for count, rank in ((4, 4), (16, 8)):
        adapter, after = tuned(tmp_path / str(count), count=count, target_modules="all-linear")
        found = told(change(adapter.model, after))
        assert found.plain
        assert found.sure
        release = found.observation.adapter
        first = next(iter(release.scaling))
        assert len(release.start[f"{first}.lora_A"]) == rank
        for name, tensor in release.merged(adapter.model, release.ended(found.observation.released)).items():
            weight = after.state_dict()[name]
            assert (tensor - weight).abs().max() <= 2**-22 * weight.abs().max()  # four roundings of float32


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_of_all_weights_is_none(optimizer: Optimizer) -> None:
    """Although few samples leave a low rank in the first layer: the biases moved."""
    model, data = Model.of(GREY.build(0), GREY), digits()
    for bias in (True, False):
        module = model.solid()
        parameters = [p for name, p in module.named_parameters() if bias or not name.endswith("bias")]
        step = OPTIMISERS[optimizer](parameters, 1e-3)
        for _ in range(20):
            step.zero_grad()
            model.criterion(module(data.images), data.labels).backward()  # type: ignore[no-untyped-call]
            step.step()
        observation = change(model, module)
        assert bias is False or merged(observation, None) is None
        assert optimizer == "sgd" or merged(observation, None) is None  # Adam's signs have any rank
        if not bias:  # a low rank is no proof: without a seed, what is said to be an update stays one
            partial = replace(observation, beside=())
            assert with_merged_recovered(partial, seeds=range(50)).release is partial.release


def test_a_norm_that_moved_was_trained_with_all_the_rest(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 50, bias=False), nn.LayerNorm(50), nn.Linear(50, 10, bias=False))
    model, after = Model.of(module, GREY), copy.deepcopy(module)
    linear, norm = list(after.parameters())[:2]
    linear.data += torch.outer(torch.randn(50), torch.randn(64)) / 100
    assert told(change(model, after)).plain
    norm.data += 0.01
    assert merged(change(model, after), None) is None


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_of_rounding_has_no_rank(kind: torch.dtype) -> None:
    """Rounding alone moves no parameter, and a rank above it is counted exactly: by Bai and Yin, noise ends at
    sqrt(rows) + sqrt(columns) of its deviation, and the signal's least singular value is ten times that."""
    generator = torch.Generator().manual_seed(0)
    if kind != torch.float32:
        model = Model.of(nn.Sequential(nn.Flatten(), nn.Linear(64, 200)), GREY)
        assert merged(change(model, model.solid(), kind), None) is None
    W = torch.randn(300, 200, generator=generator, dtype=torch.float64) / 14
    errors = rounding_errors(W, torch.zeros_like(W), str(kind).removeprefix("torch."))
    size = 10 * float(errors.square().mean().sqrt()) * (300**0.5 + 200**0.5)
    left, right = (torch.linalg.qr(torch.randn(n, 5, generator=generator, dtype=torch.float64))[0] for n in (300, 200))
    d = (W + size * left @ right.T).to(kind).double() - W
    found = low_rank(d, rounding_errors(W + d, d, str(kind).removeprefix("torch.")))
    assert found is not None
    assert len(found.right) == 5


# --- The seed ---


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"rank": 4}, {"optimizer": "adamw", "rate": 1e-3, "steps": 200}])
def test_the_seed_of_a_merged_adapter_is_found(settings: dict[str, Any], kind: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit the start that PEFT drew, of the rank that it had; the right seed has a z of 20 or more, and the threshold is below 8."""
    adapter, after = tuned(tmp_path, seed=3407, **settings)
    found = recover_merged_seed(told(change(adapter.model, after, kind)).observation, seeds=[*range(300), 3407])
    assert found is not None
    assert (found.seed, found.before) == (3407, "")
    assert found.false_alarm <= ALARM
    torch.manual_seed(3407)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=settings.get("rank", 8), target_modules=[*adapter.adapter.scaling])
    drawn: Any = get_peft_model(adapter.model.solid(), config)
    for name, layer in drawn.base_model.model.named_modules():
        if f"{name}.lora_A" in found.start:
            assert torch.equal(found.start[f"{name}.lora_A"], layer.lora_A["default"].weight)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_so_it_is_of_convolutions_and_normal_draws(init: Any, tmp_path: Path) -> None:
    adapter, after = tuned(tmp_path, CONVNET, init=init, rank=2)
    known = with_merged_recovered(change(adapter.model, after))
    assert known.adapter.seed == 42


@pytest.mark.parametrize("init", ["pissa", "other", "seed"])
def test_a_start_that_no_tried_seed_drew_stays_unknown(init: str, tmp_path: Path) -> None:
    """Another base, another draw, another seed: the rank is told, and that nothing draws it."""
    settings = {"init": "pissa", "target_modules": "all-linear"} if init == "pissa" else {"seed": UNUSUAL}
    _, after = tuned(tmp_path, **settings)
    base = Model.of(GREY.build(0), GREY)  # of PiSSA, before W - s B A of the start was put in its place
    if init == "other":
        after = base.solid()
        after[2].weight.data += torch.randn(256, 4) @ torch.randn(4, 64) / 100  # type: ignore[index]
    known = with_merged_recovered(change(base, after), seeds=range(300))
    assert was_merged(known)
    assert (known.adapter.origin, known.adapter.tried) == ("unknown", 300)
    assert {"merged", "no_seed"} <= {name for name, _, _ in known.reservations()}
    if init == "seed":
        assert with_merged_recovered(known, seeds=range(UNUSUAL - 3, UNUSUAL + 3)).adapter.seed == UNUSUAL


def test_another_base_is_no_base(tmp_path: Path) -> None:
    _, after = tuned(tmp_path)
    other = Model.of(GREY.build(1), GREY)
    assert merged(change(other, after), None) is None


def test_wrong_seeds_agree_as_the_bound_says(tmp_path: Path) -> None:
    """P(z >= t) <= exp(-t^2 / 2): of 3,000 seeds and 8 tests, at t = 3 at most 267 on average, 267 + 5 sqrt(267) = 349; none at 6."""
    adapter, after = tuned(tmp_path, seed=UNUSUAL)
    observation = told(change(adapter.model, after)).observation
    rows = {m: observation.adapter.start[f"{m}.lora_A"] for m in observation.adapter.scaling}
    bases = {m: torch.linalg.qr(V.flatten(1).double().T)[0].T.float() for m, V in rows.items()}
    factors = {m: (V.new_empty(8, V.shape[1]), 8 * 10) for m, V in rows.items()}
    tests = [
        seeds.EnergyTest.of(factors, bases, g, skipped, n)
        for g in (False, True)
        for skipped in (0, 650)
        for n in (320, 1024)
    ]
    z = seeds.energies(list(range(3000)), tests)
    assert int((z >= 3).sum()) <= 349
    assert float(z.max()) < 6
    assert abs(float((z > 0).mean()) - 0.5) < 0.15  # the median of chi^2 lies a third below its mean, for d = 4 by 16 %


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_quick_test_reads_the_right_words(gaussian: bool) -> None:
    """Of rows of A itself, the energy of A in them is that of A."""
    factors = {"0": (torch.empty(3, 50), 3 * 50), "1": (torch.empty(3, 50), 3 * 50)}
    drawn = dict(zip(factors, draw(42, 7, factors, gaussian), strict=True))
    bases = {m: torch.linalg.qr(A.double().T)[0].T.float() for m, A in drawn.items()}
    whole = seeds.EnergyTest.of(factors, bases, gaussian, 7, 300)
    assert whole.freedom == 3 * 3 * 2
    z = seeds.energies([41, 42], [whole])[0]
    energy = (
        float(z[1]),
        6 * 50.0,
    )  # 300 squares of deviation 1, give or take 5 sqrt(600) and 30 numbers of each row that are not read
    lost = 6 * 30 if gaussian else 0
    low, high = (float(seeds.signed_root(e, 18)) for e in (energy[1] - lost - 5 * 600**0.5, energy[1] + 5 * 600**0.5))
    assert low < z[1] < high
    assert abs(z[0]) < 5


# --- The factors, and what they give away ---


@pytest.mark.parametrize(("alpha", "steps"), [(4, 60), (8, 30), (16, 15)])
def test_the_factors_follow(alpha: int, steps: int, tmp_path: Path) -> None:
    """Gradient flow conserves A A^T - B^T B, and steps of a rate of .05 to 5 %: that part of the change of A is known so well; without it
    the part in A_0's rows would be missing, sqrt(8 / 64) = 35 % of it. The scaling is found."""
    adapter, after = tuned(tmp_path, alpha=alpha, steps=steps, target_modules=("2",))
    known = with_merged_recovered(change(adapter.model, after))
    assert known.adapter.scaling == {"2": alpha / 8}
    start, ended = known.adapter.start, adapter.adapter.ended(adapter.released)
    assert error(known.released["2.lora_A"], ended["2.lora_A"] - start["2.lora_A"]) < 0.05
    assert error(known.released["2.lora_B"], ended["2.lora_B"]) < 0.05


def test_digits_of_a_whole_fine_tuning_come_back(tmp_path: Path) -> None:
    """As from the adapter itself: without the start nothing comes; with it each of them above 30 dB, where the mean image has 11."""
    adapter, after = tuned(tmp_path, target_modules="all-linear", steps=20)
    known = with_merged_recovered(change(adapter.model, after))
    found = Unmixing()(replace(known, batch_size=4), generator=torch.Generator().manual_seed(0))
    images = digits().images
    assert psnr_db(found.value[match(found.value, images)], images).min() > 30


def test_the_factors_of_adam_explain_the_weights_too(tmp_path: Path) -> None:
    """No flow that conserves anything: A is the nearest to A_0, and s B A is the change, to float32's rounding."""
    adapter, after = tuned(tmp_path, optimizer="adamw", rate=1e-3, steps=100)
    recipe = Recipe(optimizer="adamw", learning_rate=1e-3, steps=100)
    unknown = told(change(adapter.model, after), recipe).observation
    found = recover_merged_seed(unknown)
    assert found is not None
    known = with_start(unknown, found.start, found.seed)
    weights, state = known.after() or {}, after.state_dict()
    for name, weight in weights.items():
        before = adapter.model.parameters[name]
        assert error(weight - before, state[name] - before) < 1e-5
    assert len(weights) == 3


def test_it_survives_a_file(tmp_path: Path) -> None:
    adapter, after = tuned(tmp_path / "a")
    known = with_merged_recovered(change(adapter.model, after))
    save_observation(known, tmp_path / "seen.safetensors")
    again = load_observation(tmp_path / "seen.safetensors")
    assert isinstance(again.release, Adapter)
    assert again.release.unmerged == known.adapter.unmerged
    assert again.threat_model() == known.threat_model()
