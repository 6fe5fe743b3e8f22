"""Adapters that begin elsewhere: PEFT's own starts come back from the base model's weights, and the report says what cannot be known."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gradleak.attacks.seed import has_open_start, with_start_recovered
from gradleak.errors import BadInput
from gradleak.formats.peft import read_adapter
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.starts import computed, pissa
from gradleak.observations.training import Recipe
from gradleak.victims.adapter import Init, fine_tune

MLP = Architecture("mlp", (1, 8, 8), 10)
RECIPE = Recipe(optimizer="sgd", learning_rate=0.02, steps=20, batch_size=4)


@pytest.fixture(autouse=True)
def _peft_reads_what_transformers_deprecates() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def pictures() -> Pictures:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(8, 1, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    return Pictures(images, labels, tuple(map(str, range(10))), "random", "train")


def tuned(out: Path, init: Init, **arguments: Any) -> Observation[Any]:
    """The adapter in out/adapter, read with its start in out/initial; rank 4, scaled by 2."""
    model = Model.of(MLP.build(0), MLP)
    settings = {"rank": 4, "alpha": 8.0, "target_modules": "all", "init": init, "recipe": RECIPE, **arguments}
    return fine_tune(model, pictures(), out=out, **settings)[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_base_model_gives_the_start(init: Init, rslora: bool, tmp_path: Path) -> None:
    """After 20 steps of real PEFT: to 1e-4, float32's rounding over the relative gaps of singular values, some hundredths here;
    the trained model is the base as PEFT left it with the factors as they ended, whose rounding is that of W."""
    given = tuned(tmp_path, init, rslora=rslora)
    base = Model.of(MLP.build(0), MLP)
    if init == "olora":
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(config.read_text().replace('"olora"', '"OLoRA"'))  # PEFT takes both
    found = read_adapter(tmp_path / "adapter", base, recipe=RECIPE)
    assert (found.adapter.origin, found.adapter.seed, found.adapter.init) == ("recovered", None, init)
    for name, start in given.adapter.start.items():
        assert relative(found.adapter.start[name], start) < 1e-4
        assert relative(found.released[name], given.released[name]) < 1e-2  # a small difference of large numbers
    for name, after in (found.adapter.after(found.model, found.released) or {}).items():
        wanted = given.adapter.after(given.model, given.released) or {}
        assert torch.allclose(after, wanted[name], atol=1e-5)
    for name, before in found.adapter.merged(found.model, {}).items():  # training begins at the base model
        assert torch.allclose(before, base.parameters[name], atol=1e-6)
    told = {row["item"]: row["detail"] for row in found.threat_model()}
    assert told["initial adapter"] == "recovered: the base model's weights give it"
    assert [level for name, level, _ in found.reservations() if name == "seed"] == ["warning"]
    assert with_start_recovered(found) is found


def test_signs_are_those_of_the_end() -> None:
    """LAPACK's signs are arbitrary: a row of A and its column of B may have been drawn with the other one."""
    base = Model.of(MLP.build(0), MLP)
    A, B = pissa(base.parameters["2.weight"], 3, 2.0)
    sign = torch.tensor([-1.0, 1.0, -1.0])
    ended = {"2.lora_A": sign[:, None] * A * 1.1, "2.lora_B": sign * B * 0.9}
    start = computed("pissa", base, ended, {"2": 2.0})
    assert torch.equal(start["2.lora_A"], sign[:, None] * A)
    assert torch.equal(start["2.lora_B"], sign * B)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_converted_adapter_holds_its_start(init: Any, rslora: bool, tmp_path: Path) -> None:
    """PEFT saves [A_T; A_0] and [B_T, -B_0], says init_lora_weights=true, and doubles the rank."""
    from peft import LoraConfig, get_peft_model

    base = Model.of(MLP.build(0), MLP)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["2", "4"], "use_rslora": rslora}
    whole: Any = get_peft_model(copy.deepcopy(base.solid()), LoraConfig(**settings, init_lora_weights=init))
    whole.peft_config["default"].init_lora_weights = True
    whole.save_pretrained(tmp_path / "start")
    factors = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    started = {f"{n}": p.detach().clone() for n, p in whole.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(factors, lr=0.1)
    private = pictures()
    for _ in range(20):
        optimiser.zero_grad()
        nn.functional.cross_entropy(whole(private.images), private.labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    whole.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert load_file(tmp_path / "end" / "adapter_model.safetensors")["base_model.model.2.lora_A.weight"].shape[0] == 8
    found = read_adapter(tmp_path / "end", base)
    assert found.adapter.origin == "given"
    assert found.adapter.scaling["2"] == pytest.approx(8 / (2 if rslora else 4))
    for module in ("2", "4"):
        layer = whole.base_model.model.get_submodule(module)
        for factor in ("lora_A", "lora_B"):
            name = f"{module}.{factor}"
            start = started[f"base_model.model.{name}.default.weight"]
            assert torch.equal(found.adapter.start[name], start)
            assert torch.equal(found.released[name], getattr(layer, factor)["default"].weight.detach() - start)
        residual = layer.base_layer.weight.detach()
        assert torch.allclose(found.model.parameters[f"{module}.weight"], residual, atol=1e-6)


def test_an_ordinary_adapter_of_even_rank_holds_no_start(tmp_path: Path) -> None:
    tuned(tmp_path, True)
    found = read_adapter(tmp_path / "adapter", Model.of(MLP.build(0), MLP))
    assert (found.adapter.origin, found.adapter.start["2.lora_A"].shape[0]) == ("unknown", 4)


def test_another_base_contradicts_the_config(tmp_path: Path) -> None:
    tuned(tmp_path, "pissa")
    with pytest.raises(
        BadInput, match=r"contradicts the factors of 2, which are far from where pissa begins with these weights"
    ):
        read_adapter(tmp_path / "adapter", Model.of(MLP.build(1), MLP))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"pissa"', '"olora"'))
    with pytest.raises(BadInput, match="far from where olora begins"):
        read_adapter(tmp_path / "adapter", Model.of(MLP.build(0), MLP))
    config.write_text(config.read_text().replace('"olora"', '"pissa"').replace('"lora_alpha": 8.0', '"lora_alpha": -8'))
    with pytest.raises(BadInput, match="far from where pissa begins"):  # the root of a negative number is none
        read_adapter(tmp_path / "adapter", Model.of(MLP.build(0), MLP))


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa_niter_4", "decomposition is randomised"),
        ("lora_ga", "a gradient of the private data"),
        ("corda", "seen through what its layers were fed with"),
        ("orthogonal", "not searched for seeds"),
    ],
)
def test_the_reason_is_told_where_neither_factor_is_zero(init: str, reason: str, tmp_path: Path) -> None:
    tuned(tmp_path, True)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{init}"'))
    with pytest.raises(BadInput, match=rf"began at '{init}'.*{reason}.*before training"):
        read_adapter(tmp_path / "adapter", Model.of(MLP.build(0), MLP))


def test_the_report_says_that_no_seed_draws_eva(tmp_path: Path) -> None:
    observation = tuned(tmp_path, True, seed=42)
    eva = replace(observation, release=replace(observation.adapter, init="eva"))
    assert not has_open_start(eva)
    assert with_start_recovered(eva) is eva
    told = {name: (level, sentence) for name, level, sentence in eva.reservations()}
    assert told["no_seed"][0] == "info"
    assert "EVA takes A from singular vectors of what its layers were fed with" in told["no_seed"][1]


def test_the_config_says_how_the_start_was_drawn(tmp_path: Path) -> None:
    """A default adapter whose config says "gaussian" is looked for among normal draws only."""
    observation = tuned(tmp_path, True, seed=42)
    assert observation.adapter.init == "True"
    assert with_start_recovered(observation).adapter.seed == 42
    wrong = replace(observation, release=replace(observation.adapter, init="gaussian"))
    assert with_start_recovered(wrong, seeds=range(30, 50)).adapter.origin == "unknown"
    silent = replace(observation, release=replace(observation.adapter, init=""))
    assert with_start_recovered(silent, seeds=range(30, 50)).adapter.seed == 42


def test_no_convolution_begins_with_pissa(tmp_path: Path) -> None:
    """PEFT has no such adapters: a config that says so contradicts its factors."""
    convnet = Architecture("convnet", (1, 8, 8), 10)
    fine_tune(
        Model.of(convnet.build(0), convnet), pictures(), rank=4, target_modules="all", recipe=RECIPE, out=tmp_path
    )
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(BadInput, match="far from where pissa begins"):
        read_adapter(tmp_path / "adapter", Model.of(convnet.build(0), convnet))
