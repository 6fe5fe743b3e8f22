"""Adapters that the PEFT library trains are what `Adapter.simulate` predicts; the victim saves what is then attacked."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.formats.model_folder import read_base
from gradleak.formats.observation_file import load_tensors
from gradleak.formats.peft import read_adapter
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.tensors import Tensors, fingerprint, flatten
from gradleak.observations.training import Optimizer, Recipe
from gradleak.victims.adapter import fine_tune, share_adapter
from gradleak.victims.gradient import keep_secret
from oracles import lora_b_by_autograd

OWN = Architecture("own", (1, 6, 6), 4)
MLP = Architecture("mlp", (1, 8, 8), 10)
VIT = Architecture("vit", (1, 8, 8), 10)
PLAIN: dict[str, Any] = {"lora_alpha": 6}
RSLORA: dict[str, Any] = {"lora_alpha": 6, "use_rslora": True}
PATTERNS: dict[str, Any] = {"lora_alpha": 3, "rank_pattern": {"3": 1, "^7": 4}, "alpha_pattern": {"7": 5}}
# What module 0, 3 and 7 of those are scaled by: alpha / rank, or alpha / sqrt(rank), worked out by hand.
SCALING = {str(PLAIN): (3, 3, 3), str(RSLORA): (6 / 2**0.5,) * 3, str(PATTERNS): (1.5, 3, 1.25)}


@pytest.fixture(autouse=True)
def _peft_reads_what_transformers_deprecates() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def network() -> nn.Module:
    """Two convolutions, one of them strided, and two linear layers: smooth, in double precision."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 5, 3, stride=2, padding=1), nn.Tanh(), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 2), nn.Tanh())
    return (
        nn.Sequential(*layers, nn.Flatten(), nn.Identity(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 4))
        .double()
        .eval()
    )


def batch(size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 1, 6, 6, generator=generator).double(), torch.tensor([2, 0, 3, 1])[:size]


def factors(module: nn.Module) -> Tensors:
    """{MODULE.lora_A, MODULE.lora_B} of a network that PEFT has adapted."""
    names = {
        k: k.replace(".default.weight", "").removeprefix("base_model.model.") for k, _ in module.named_parameters()
    }
    return {names[k]: p.detach().clone() for k, p in module.named_parameters() if "lora_" in k}


def trained_by_peft(recipe: Recipe, config: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """The factors before and after training with PEFT and torch.optim."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(network(), LoraConfig(r=2, target_modules=["0", "3", "7"], **config))
    adapted.eval()
    start = factors(adapted)
    parameters: list[nn.Parameter] = [p for p in adapted.parameters() if p.requires_grad]
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(parameters, recipe.learning_rate),
        "momentum": lambda: torch.optim.SGD(parameters, recipe.learning_rate, momentum=0.9),
        "adam": lambda: torch.optim.Adam(parameters, recipe.learning_rate),
        "adamw": lambda: torch.optim.AdamW(parameters, recipe.learning_rate),
    }
    optimiser = made[recipe.optimizer]()
    images, labels = batch()
    chunks = [slice(0, 2), slice(2, 3)] if recipe.batch_size else [slice(0, 3)]
    for step in range(recipe.steps):
        chunk = chunks[step % len(chunks)]
        optimiser.zero_grad()
        F.cross_entropy(adapted(images[chunk]), labels[chunk]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return start, factors(adapted)


def observed(start: Tensors, end: Tensors, scaling: dict[str, float], recipe: Recipe) -> PictureObservation:
    change = {name: end[name] - start[name] for name in start}
    release = Adapter(start=start, scaling=scaling, recipe=recipe)
    return Observation(model=Model.of(network(), OWN), release=release, released=change)


# --- simulate is what PEFT does ---


@pytest.mark.parametrize("config", [PLAIN, RSLORA, PATTERNS], ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_simulate_is_the_training_of_peft(optimizer: Optimizer, steps: int, config: dict[str, Any]) -> None:
    recipe = Recipe(optimizer=optimizer, learning_rate=0.05, steps=steps, batch_size=2 if steps > 1 else None)
    start, end = trained_by_peft(recipe, config)
    scaling = dict(zip(("0", "3", "7"), SCALING[str(config)], strict=True))
    adapter = observed(start, end, scaling, recipe)
    predicted = adapter.simulate(*batch())
    assert predicted.keys() == start.keys()
    assert all(bool(end[f"{module}.lora_B"].any()) for module in scaling)
    for name, change in adapter.released.items():  # double precision; Adam divides by what rounding has made
        assert (predicted[name] - change).norm() <= 1e-8 * (change.norm() + 1e-6), name


def test_the_first_step_is_a_sketch_of_the_gradient() -> None:
    """B_1 = -lr s G A^T and A_1 = A, with G from the untouched network by plain autograd."""
    recipe = Recipe(learning_rate=0.1, steps=1)
    start, end = trained_by_peft(recipe, RSLORA)
    plain, (images, labels) = network(), batch()
    F.cross_entropy(plain(images), labels).backward()  # type: ignore[no-untyped-call]
    adapter = observed(start, end, dict.fromkeys(("0", "3", "7"), 6 / 2**0.5), recipe)
    sketches = {sketch.module: sketch for sketch in adapter.sketches()}
    for module in ("0", "3", "7"):
        weight = plain.get_parameter(f"{module}.weight").grad
        assert weight is not None
        G, A = weight.flatten(1), start[f"{module}.lora_A"].flatten(1)
        assert torch.equal(end[f"{module}.lora_A"], start[f"{module}.lora_A"])
        B = end[f"{module}.lora_B"].flatten(1)
        assert torch.allclose(B, -0.1 * 6 / 2**0.5 * G @ A.T, rtol=1e-10, atol=1e-14)
        assert torch.allclose(sketches[module].measured, G @ A.T, rtol=1e-10, atol=1e-14)
        assert sketches[module].side == "right"


def test_what_many_small_steps_tell_is_the_gradient_too() -> None:
    """Three steps so short that nothing moves: their mean is dL/dW A^T, in units of the gradient."""
    recipe = Recipe(learning_rate=1e-6, steps=3)
    start, end = trained_by_peft(recipe, RSLORA)
    plain, (images, labels) = network(), batch()
    F.cross_entropy(plain(images), labels).backward()  # type: ignore[no-untyped-call]
    for sketch in observed(start, end, dict.fromkeys(("0", "3", "7"), 6 / 2**0.5), recipe).sketches():
        if sketch.side == "right":
            weight = plain.get_parameter(f"{sketch.module}.weight").grad
            assert weight is not None
            expected = weight.flatten(1) @ start[f"{sketch.module}.lora_A"].flatten(1).T
            assert torch.allclose(sketch.measured, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_an_adapter_is_shared_without_peft() -> None:
    """From PEFT's start: A uniform as Kaiming has it at a = sqrt(5), B zero; the step is autograd's."""
    model, (images, labels) = Model.of(network(), OWN), batch()
    secret, modules = Secret(images, labels), ("0", "3", "7")
    one, gradient = (
        share_adapter(model, secret, modules=modules, rank=2, recipe=recipe, seed=3)
        for recipe in (Recipe(learning_rate=0.1, steps=1), None)
    )
    A = {name: one.adapter.start[f"{name}.lora_A"] for name in modules}
    for tensor in A.values():
        bound = tensor[0].numel() ** -0.5
        assert 0.7 * bound < float(tensor.abs().max()) <= bound
    assert not any(bool(tensor.any()) for name, tensor in one.adapter.start.items() if name.endswith("lora_B"))
    expected = lora_b_by_autograd(network(), images, labels, A, scaling=1.0, learning_rate=0.1).detach()
    for seen, unit in ((one, 1.0), (gradient, -0.1)):
        assert set(seen.released) == {f"{name}.lora_B" for name in modules}
        assert torch.allclose(unit * flatten(seen.released), expected, rtol=1e-9, atol=1e-14)
        assert seen.batch_size == 3
    assert gradient.adapter.gradient
    assert all(torch.equal(gradient.adapter.start[f"{name}.lora_A"], A[name]) for name in modules)
    longer = share_adapter(model, secret, modules=modules, rank=2, recipe=Recipe(learning_rate=0.1, steps=2), seed=3)
    moved = [longer.adapter.start[f"{name}.lora_A"] - A[name] for name in modules]
    assert all(bool(step.any()) for step in moved)  # where A ended: all that such a folder holds
    wild, plain = Recipe(learning_rate=1e30, steps=3), Model.of(MLP.build(0), MLP)
    with pytest.raises(BadInput, match=r"diverged at learning rate 1e\+30"):
        share_adapter(plain, keep_secret(plain, private()), modules=("2", "6"), rank=2, recipe=wild)


# --- The victim ---


def private() -> Pictures:
    return load("digits", indices=(3, 1, 4))


def tuned(out: Path, architecture: Architecture = MLP, **arguments: Any) -> PictureObservation:
    recipe = arguments.pop("recipe", Recipe(learning_rate=0.05, steps=1))
    pictures, model = arguments.pop("private", private()), Model.of(architecture.build(0), architecture)
    return fine_tune(model, pictures, rank=2, out=out, recipe=recipe, **arguments)[0]


def loaded_by_peft(folder: Path, architecture: Architecture) -> nn.Module:
    """The network with its adapter, as PEFT's own user would load it from out/base and out/adapter."""
    from peft import PeftModel

    module, _ = read_base(folder / "base")
    inner = module.get_submodule("network") if architecture is VIT else module
    PeftModel.from_pretrained(inner, str(folder / "adapter")).eval()
    return module


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("architecture", [MLP, VIT], ids=["mlp", "vit"])
def test_peft_loads_what_we_attack(tmp_path: Path, architecture: Architecture, init: Any) -> None:
    """The attacker's W + s B A classifies like the model that PEFT makes of the folder."""
    recipe = Recipe(optimizer="momentum", learning_rate=0.05, steps=3, batch_size=2)
    adapter = tuned(tmp_path, architecture, recipe=recipe, init=init, rslora=True)
    end = {name: start + adapter.released.get(name, 0) for name, start in adapter.adapter.start.items()}
    images = private().images
    with torch.no_grad():
        ours = adapter.model.logits(adapter.adapter.merged(adapter.model, end), images)
        theirs = loaded_by_peft(tmp_path, architecture)(images)
        untuned = architecture.build(0)(images)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, untuned, atol=1e-2)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_an_initial_adapter_makes_the_base_model_whole_again(tmp_path: Path, init: Any) -> None:
    """W - s B A + s B A: before training it is the base model; after one step, the saved change is the simulated one."""
    adapter = tuned(tmp_path, init=init, target_modules=("2", "4"))
    images, labels = private().images, private().labels
    with torch.no_grad():
        assert torch.allclose(
            adapter.model.logits(adapter.adapter.merged(adapter.model, {}), images), MLP.build(0)(images), atol=1e-5
        )
    predicted = adapter.simulate(images, labels)
    assert set(predicted) == set(adapter.adapter.start)
    for name, change in adapter.released.items():  # float32: the change is the difference of numbers about one
        assert (predicted[name] - change).abs().max() < 2e-6, name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("architecture", "target"), [(MLP, "all-linear"), (VIT, "q_proj"), (VIT, "all")])
def test_one_step_from_disk_is_simulated(
    tmp_path: Path, optimizer: Optimizer, architecture: Architecture, target: str
) -> None:
    recipe = Recipe(optimizer=optimizer, learning_rate=1e-2, steps=1)
    adapter = tuned(tmp_path, architecture, recipe=recipe, target_modules=target)
    predicted = adapter.simulate(private().images, private().labels)
    for name, change in adapter.released.items():  # float32; Adam makes a sign of a gradient that is rounding
        assert torch.nn.functional.cosine_similarity(predicted[name].flatten(), change.flatten(), dim=0) > 0.9999, name


def test_what_is_returned_is_what_is_on_disk(tmp_path: Path) -> None:
    recipe = Recipe(learning_rate=0.05, steps=2, batch_size=2)
    state = torch.get_rng_state()
    module = MLP.build(0)
    before = fingerprint(module.state_dict())
    adapter, secret = fine_tune(
        Model.of(module, MLP),
        private(),
        rank=2,
        alpha=7,
        out=tmp_path,
        recipe=recipe,
        precision=torch.float16,
        reveal_labels=True,
    )
    assert fingerprint(module.state_dict()) == before
    assert not any("lora" in name for name, _ in module.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    again = read_adapter(tmp_path / "adapter", Model.of(*read_base(tmp_path / "base")), recipe=recipe)
    assert fingerprint(again.released) == fingerprint(adapter.released)
    assert fingerprint(again.adapter.start) == fingerprint(adapter.adapter.start)
    assert again.model.state_hash() == adapter.model.state_hash()
    assert adapter.adapter.scaling == again.adapter.scaling == dict.fromkeys(("2", "4", "6"), 3.5)
    assert (adapter.adapter.recipe, adapter.batch_size, adapter.precision) == (recipe, 3, "float16")
    assert adapter.labels is not None
    assert secret.labels is not None
    assert torch.equal(adapter.labels, secret.labels)
    assert torch.equal(secret.inputs, private().images)
    assert {t.dtype for t in load_tensors(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {
        torch.float16
    }
    seeds = [tuned(tmp_path / str(n), seed=seed).adapter.start["2.lora_A"] for n, seed in enumerate((5, 5, 6))]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def test_labels_and_batch_size_are_withheld_when_asked(tmp_path: Path) -> None:
    adapter = tuned(tmp_path, reveal_batch_size=False)
    assert adapter.batch_size is None
    assert adapter.labels is None


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all-linear", {"2", "4", "6"}),
        ("all", {"2", "4", "6"}),
        (("4",), {"4"}),
        ("4", {"4"}),
        (("6", "2", "6"), {"2", "6"}),
    ],
)
def test_target_modules(tmp_path: Path, target: Any, expected: set[str]) -> None:
    assert set(tuned(tmp_path, target_modules=target).adapter.scaling) == expected


def test_target_modules_of_a_transformer(tmp_path: Path) -> None:
    linear, everything = (
        set(tuned(tmp_path / t, VIT, target_modules=t).adapter.scaling) for t in ("all-linear", "all")
    )
    assert len(linear) == 4 * 6 + 1  # per block q, k, v, o and two of the MLP; the classifier
    assert everything - linear == {"network.vit.embeddings.patch_embeddings.projection"}
    keys = load_tensors(tmp_path / "all" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight" in keys  # as PEFT users name them


THREE = replace(private(), labels=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"target_modules": ("qproj",), "architecture": VIT}, r"'qproj': choose among q_proj"),
        ({"target_modules": ("0",)}, r"no linear or convolutional layer called '0'"),
        ({"target_modules": ("2", "")}, r"called ''"),
        ({"recipe": Recipe(learning_rate=1e30, steps=3)}, r"diverged at learning rate 1e\+30"),
        ({"private": load("embedded")}, r"3x32x32, the model takes 1x8x8"),
        ({"init": "pissa", "target_modules": "all", "architecture": VIT}, r"projection is a convolution"),
        ({"init": "lora_ga", "architecture": replace(MLP, classes=3), "private": THREE}, r"at least 4x4"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_cannot_be_tuned_is_bad_input_and_leaves_nothing(tmp_path: Path, arguments: Any, hint: str) -> None:
    with pytest.raises(BadInput, match=hint):
        tuned(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_rank_of_none_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 1"):
        fine_tune(Model.of(MLP.build(0), MLP), private(), rank=0, out=tmp_path, recipe=Recipe(learning_rate=1, steps=1))
