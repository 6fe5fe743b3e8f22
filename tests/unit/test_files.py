"""What is written can be read, and what cannot be trusted is refused with a sentence. Nothing is ever imported or unpickled."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.errors import BadInput
from gradleak.formats.observation_file import (
    check_provenance,
    has_provenance,
    load_observation,
    load_state,
    load_tensors,
    save_observation,
)
from gradleak.formats.reconstruction_file import load_reconstruction, save_reconstruction
from gradleak.formats.secret_file import Secret, load_secret, save_secret
from gradleak.modalities.language_models import Task
from gradleak.modalities.losses import BinaryCrossEntropy, CrossEntropy, FocalLoss, Loss, Reduction
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.modalities.texts import load_texts
from gradleak.observations import tensor_file
from gradleak.observations.adapter import Adapter
from gradleak.observations.defenses import Defense, GaussianNoise, Sign, TopK
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors, fingerprint
from gradleak.observations.trained_weights import Stationarity, Weights
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, share_update
from gradleak.victims.small_language import Kind, small_model, train_tokenizer

MLP = Architecture("mlp", (1, 8, 8), 10)
RESNET = Architecture("resnet20", (1, 8, 8), 10)

Header = dict[str, str]


def private() -> Pictures:
    return load("digits", indices=(3, 1, 4))


def victim(architecture: Architecture) -> nn.Module:
    module = architecture.build(5).train()
    with torch.no_grad():
        module(load("digits", "train", limit=8).images)
    return module


def captured(
    architecture: Architecture = MLP, *, mode: Mode = "eval", **arguments: Any
) -> tuple[PictureObservation, Secret]:
    return capture_gradient(Model.of(victim(architecture), architecture, mode=mode), private(), **arguments)


def stored(path: Path) -> tuple[dict[str, Tensor], Header]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def altered(path: Path, change: Callable[[dict[str, Tensor], Header], object]) -> Path:
    """The file again, after `change` was made to its tensors or its header."""
    tensors, header = stored(path)
    change(tensors, header)
    save_file(tensors, path, metadata=header)
    return path


def provenance(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Tensor], Header], None]:
    def edit(tensors: dict[str, Tensor], header: Header) -> None:
        about = json.loads(header["gradleak"])
        change(about)
        header["gradleak"] = json.dumps(about)

    return edit


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file as it is written."""
    path = tmp_path_factory.mktemp("observation") / "o"
    save_observation(captured()[0], path)
    return path.read_bytes()


@pytest.fixture
def observation_file(tmp_path: Path, saved: bytes) -> Path:
    (tmp_path / "observation.safetensors").write_bytes(saved)
    return tmp_path / "observation.safetensors"


# --- Round trips ---


@pytest.mark.parametrize(
    "arguments",
    [
        {"reveal_labels": True},
        {"mode": "train", "reveal_batch_size": False},
        {"reveal_buffers": False},
        {"precision": torch.float16},
        {"precision": torch.bfloat16},
        {"defenses": (GaussianNoise(0.25), Sign(), TopK(0.5))},
    ],
    ids=["labels", "train, no batch size", "no buffers", "float16", "bfloat16", "defenses"],
)
def test_a_gradient_comes_back_bit_by_bit(tmp_path: Path, arguments: dict[str, Any]) -> None:
    observation, secret = captured(RESNET, **arguments)
    path = tmp_path / "new folder" / "observation.safetensors"
    save_observation(observation, path)
    back = load_observation(path)
    assert back.release == Gradient()
    assert has_provenance(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing unfinished is left
    assert fingerprint(back.released) == fingerprint(observation.released)
    assert back.model.state_hash() == observation.model.state_hash()
    for name in ("batch_size", "precision", "defenses"):
        assert getattr(back, name) == getattr(observation, name)
    for name in ("architecture", "mode", "criterion", "frozen"):
        assert getattr(back.model, name) == getattr(observation.model, name)
    assert (back.labels is None) == (observation.labels is None)
    assert secret.labels is not None
    assert back.labels is None or torch.equal(back.labels, secret.labels)
    assert (back.model.buffers is None) == (observation.model.buffers is None)
    assert back.threat_model() == observation.threat_model()
    simulated = (o.simulate(secret.inputs, secret.labels) for o in (observation, back))
    assert len({fingerprint(s) for s in simulated}) == 1


def test_gradients_that_are_views_of_each_other_are_written_apart(tmp_path: Path) -> None:
    tokens = torch.arange(6.0).view(1, 3, 2)
    tensors = {
        "positions": tokens,
        "first": tokens[:, :1],
        "none": torch.zeros(0),
    }  # as autograd gives those of a transformer
    tensor_file.write(tensors, "gradleak/test/1", {}, tmp_path / "views.safetensors")
    read, _ = tensor_file.read(tmp_path / "views.safetensors", "gradleak/test/1")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_half_precision_file_is_half_as_large(tmp_path: Path) -> None:
    for precision in (torch.float32, torch.float16):
        observation, _ = captured(precision=precision)
        save_observation(observation, tmp_path / str(precision))
    released = sum(4 * t.numel() for t in observation.released.values())
    sizes = [(tmp_path / str(precision)).stat().st_size for precision in (torch.float32, torch.float16)]
    assert sizes[0] - sizes[1] == pytest.approx(released / 2, rel=0.01)


def test_an_update_comes_back_with_its_recipe(tmp_path: Path) -> None:
    gradient, secret = captured(RESNET, mode="train")
    update = share_update(gradient, secret, Recipe(learning_rate=0.03, steps=4, batch_size=2))
    save_observation(update, tmp_path / "o")
    back = load_observation(tmp_path / "o")
    assert back.release == update.release
    assert fingerprint(back.released) == fingerprint(update.released)
    assert fingerprint(back.simulate(secret.inputs, secret.labels)) == fingerprint(update.released)


def adapter(recipe: Recipe | None = None, precision: str = "float32", **settings: Any) -> PictureObservation:
    """Two layers of the MLP at ranks 2 and 3, both factors of one of them released."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"2.lora_A": (2, 64), "2.lora_B": (256, 2), "6.lora_A": (3, 256), "6.lora_B": (10, 3)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Observation(
        model=Model.of(victim(MLP), MLP),
        release=Adapter(start=start, scaling={"2": 1 / 3, "6": 2**0.5}, recipe=recipe, **settings),
        released={name: start[name] / 3 for name in ("2.lora_A", "2.lora_B", "6.lora_B")},
        precision=precision,
        labels=torch.tensor([3, 1, 4]),
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "recipe",
    [None, Recipe(learning_rate=0.1, steps=3), Recipe(optimizer="adamw", learning_rate=1e-3, steps=2, batch_size=2)],
    ids=str,
)
def test_an_adapter_comes_back_bit_by_bit(tmp_path: Path, recipe: Recipe | None, precision: str) -> None:
    """Also at half precision: the change between two such numbers needs more digits than they have."""
    observation = adapter(recipe, precision, dropout=0.05)
    save_observation(observation, tmp_path / "o")
    back = load_observation(tmp_path / "o")
    for name in ("precision", "batch_size"):
        assert getattr(back, name) == getattr(observation, name)
    new, old = back.adapter, observation.adapter
    assert (new.scaling, new.recipe, new.dropout, new.gradient) == (old.scaling, recipe, 0.05, False)
    assert list(new.scaling) == list(old.scaling)
    assert fingerprint(back.released) == fingerprint(observation.released)
    assert fingerprint(new.start) == fingerprint(old.start)
    assert back.model.state_hash() == observation.model.state_hash()
    assert back.threat_model() == observation.threat_model()
    images, labels = private().images, private().labels
    assert fingerprint(back.simulate(images, labels)) == fingerprint(observation.simulate(images, labels))


def test_the_gradient_of_an_adapter_comes_back_as_one(tmp_path: Path) -> None:
    save_observation(adapter(gradient=True), tmp_path / "o")
    assert load_observation(tmp_path / "o").adapter.gradient


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("settings"),
        lambda about: about.update(release="gradient"),
        lambda about: about.update(release="weights"),
        lambda about: about["settings"].update(recipe={"optimizer": "sgd"}),
        lambda about: about["settings"]["recipe"].update(optimizer="lion"),
        lambda about: about["settings"]["recipe"].update(steps=0),
        lambda about: about["settings"]["recipe"].update(batch_size=-1),
        lambda about: about["settings"].pop("scaling"),
        lambda about: about["settings"].update(scaling={"2": "one", "6": 1}),
        lambda about: about["settings"]["scaling"].update({"4": 1.0}),
        lambda about: about["settings"].update(dropout="often"),
    ],
)
def test_adapters_that_make_no_sense_are_bad_input(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    save_observation(adapter(Recipe(learning_rate=0.1, steps=3)), tmp_path / "o")
    altered(tmp_path / "o", provenance(change))
    with pytest.raises(BadInput):
        load_observation(tmp_path / "o")


def test_an_adapter_without_its_start_is_bad_input(tmp_path: Path) -> None:
    def forget(tensors: dict[str, Tensor], _: Header) -> None:
        for name in [name for name in tensors if name.startswith("start/")]:
            del tensors[name]

    save_observation(adapter(), tmp_path / "o")
    altered(tmp_path / "o", forget)
    with pytest.raises(BadInput):
        load_observation(tmp_path / "o")


@pytest.mark.parametrize("name", ["start/2.lora_A", "start/6.lora_B", "released/2.lora_A"])
@pytest.mark.parametrize("shape", [(2, 63), (2,), ()], ids=str)
def test_factors_of_impossible_shapes_are_bad_input(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    save_observation(adapter(), tmp_path / "o")
    altered(tmp_path / "o", lambda tensors, _: tensors.update({name: torch.ones(shape)}))
    with pytest.raises(BadInput):
        load_observation(tmp_path / "o")


def test_a_released_factor_that_was_not_adapted_is_bad_input(tmp_path: Path) -> None:
    save_observation(adapter(), tmp_path / "o")
    altered(tmp_path / "o", lambda tensors, _: tensors.update({"released/4.lora_B": torch.ones(256, 2)}))
    with pytest.raises(BadInput, match=r"[Tt]he change of 4\.lora_B"):
        load_observation(tmp_path / "o")


LOSSES: list[Loss] = [
    CrossEntropy(reduction="sum"),
    CrossEntropy(class_weights=tuple(0.1 + k for k in range(10)), label_smoothing=0.1),
    BinaryCrossEntropy(reduction="sum"),
    FocalLoss(gamma=1.5),
]


@pytest.mark.parametrize("criterion", LOSSES, ids=str)
def test_losses_and_frozen_parameters_come_back(tmp_path: Path, criterion: Loss) -> None:
    module = victim(MLP)
    module.get_parameter("4.weight").requires_grad_(False)
    model = Model.of(module, MLP, criterion=criterion)
    save_observation(Observation(model=model, released=model.trained, batch_size=2), tmp_path / "o")
    back = load_observation(tmp_path / "o").model
    assert back.criterion == criterion
    assert back.frozen == ("4.weight",)


@dataclass(frozen=True)
class Own(Defense):
    """A loss and a defense of somebody's own."""

    random: ClassVar[bool] = False
    reduction: Reduction = "mean"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.square().mean()

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        return released


def test_a_loss_or_a_defense_of_ones_own_stays_in_python(tmp_path: Path) -> None:
    observation, _ = captured()
    own = replace(observation, model=observation.model.assume(criterion=Own()))
    with pytest.raises(BadInput, match=r"Files know the loss cross-entropy.*, not Own: keep this one in Python"):
        save_observation(own, tmp_path / "o")
    with pytest.raises(BadInput, match=r"Files know the defense gaussian-noise.*, not Own"):
        save_observation(replace(observation, defenses=(Own(),)), tmp_path / "o")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "release", [Gradient(), Update(recipe=Recipe(learning_rate=0.1, steps=2))], ids=lambda r: r.name
)
def test_a_release_of_some_parameters_comes_back_as_such(tmp_path: Path, release: Release) -> None:
    whole, _ = captured()
    part = {name: tensor for name, tensor in whole.released.items() if name in ("2.bias", "6.weight")}
    save_observation(replace(whole, release=release, released=part), tmp_path / "o")
    assert set(load_observation(tmp_path / "o").released) == {"2.bias", "6.weight"}


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """What was released are the parameters: a file that held both would be twice as large."""
    model = Model.of(victim(MLP), MLP)
    save_observation(Observation(model=model, release=Weights(), released=model.parameters), tmp_path / "o")
    assert (tmp_path / "o").stat().st_size < 1.1 * sum(4 * p.numel() for p in model.parameters.values())
    assert fingerprint(load_observation(tmp_path / "o").released) == fingerprint(model.parameters)


def test_secret_and_reconstruction_come_back(tmp_path: Path) -> None:
    _, secret = captured()
    assert secret.labels is not None
    save_secret(secret, tmp_path / "secret")
    again = load_secret(tmp_path / "secret")
    assert torch.equal(again.inputs, secret.inputs)
    assert again.labels is not None
    assert torch.equal(again.labels, secret.labels)
    assert again.source == secret.source == "digits test"
    found = Reconstruction(
        secret.inputs,
        secret.labels,
        0.25,
        'It "worked": 100 %.',
        Outcome.STUCK,
        iterations=7,
        trace=[(1, 2.5), (7, 0.5)],
    )
    save_reconstruction(found, tmp_path / "found")
    back = load_reconstruction(tmp_path / "found")
    assert torch.equal(back.value, secret.inputs)
    assert back.labels is not None
    assert torch.equal(back.labels, secret.labels)
    assert replace(back, value=None, labels=None) == replace(found, value=None, labels=None)


def test_a_search_that_diverged_comes_back(tmp_path: Path) -> None:
    """Its residual is no number, which JSON has no word for."""
    images, labels = torch.rand(1, 1, 8, 8), torch.tensor([3])
    save_reconstruction(
        Reconstruction(images, labels, math.nan, "No.", Outcome.DIVERGED, trace=[(1, math.inf)]), tmp_path / "found"
    )
    back = load_reconstruction(tmp_path / "found")
    assert math.isnan(back.residual)
    assert not math.isfinite(back.trace[0][1])
    assert back.outcome is Outcome.DIVERGED


def test_what_only_the_owner_may_see_is_for_the_owner_only(tmp_path: Path) -> None:
    save_secret(captured()[1], tmp_path / "secret")
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0


# --- Files of schema 1 ---


def old_file(path: Path, schema: str, about: dict[str, Any], tensors: Tensors) -> Path:
    """A file as gradleak wrote them before releases had schemas of their own; see CHANGELOG.md."""
    save_file(tensors, path, metadata={"schema": schema, "gradleak": json.dumps(about)})
    return path


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}/{name}": tensor.contiguous() for name, tensor in tensors.items()}


def old_pictures(observation: PictureObservation, kind: str, **more: Any) -> dict[str, Any]:
    """The header that the classes Gradient, Update, Adapter and Weights had."""
    model = observation.model
    return {
        "kind": kind,
        "architecture": {"name": "mlp", "input_shape": [1, 8, 8], "classes": 10},
        "mode": model.mode,
        "reduction": model.criterion.reduction,
        "frozen": list(model.frozen),
        "buffers_revealed": True,
        "state_hash": model.state_hash(),
        "batch_size": observation.batch_size,
        "precision": observation.precision,
        "torch": "2.6.0",
        **more,
    }


def same(back: Observation[Any], expected: Observation[Any]) -> None:
    """Every field, bit by bit."""
    for name in ("batch_size", "precision", "defenses"):
        assert getattr(back, name) == getattr(expected, name)
    assert (back.labels is None) == (expected.labels is None)
    assert back.labels is None or (expected.labels is not None and torch.equal(back.labels, expected.labels))
    assert fingerprint(back.released) == fingerprint(expected.released)
    assert type(back.release) is type(expected.release)
    for field in fields(expected.release):
        new, old = getattr(back.release, field.name), getattr(expected.release, field.name)
        assert fingerprint(new) == fingerprint(old) if field.name in ("start", "initial") and old else new == old
    for name in ("mode", "criterion", "frozen"):
        assert getattr(back.model, name) == getattr(expected.model, name)
    assert back.model.state_hash() == expected.model.state_hash()


def test_an_old_gradient_is_read(tmp_path: Path) -> None:
    model = Model.of(victim(MLP), MLP, mode="train", criterion=CrossEntropy(reduction="sum"))
    gradient, _ = capture_gradient(model, private(), reveal_labels=True, precision=torch.float16)
    assert gradient.labels is not None
    tensors = under("parameters", model.parameters) | {"labels": gradient.labels}
    tensors |= under("released", {name: tensor.half() for name, tensor in gradient.released.items()})
    path = old_file(tmp_path / "o", "gradleak/observation/1", old_pictures(gradient, "Gradient"), tensors)
    same(load_observation(path), gradient)
    altered(path, lambda tensors, _: tensors.pop("released/4.bias"))
    with pytest.raises(BadInput, match=r"lacks what was released of 4\.bias"):  # they held every trained parameter
        load_observation(path)


def test_an_old_update_is_read(tmp_path: Path) -> None:
    gradient, secret = captured()
    update = share_update(gradient, secret, Recipe(learning_rate=0.03, steps=4, batch_size=2))
    recipe = {"learning_rate": 0.03, "local_steps": 4, "local_batch_size": 2}
    tensors = under("parameters", update.model.parameters) | under("released", update.released)
    about = old_pictures(update, "Update", recipe=recipe)
    same(load_observation(old_file(tmp_path / "o", "gradleak/observation/1", about, tensors)), update)


@pytest.mark.parametrize("recipe", [None, Recipe(optimizer="adamw", learning_rate=1e-3, steps=2)], ids=str)
def test_an_old_adapter_is_read(tmp_path: Path, recipe: Recipe | None) -> None:
    seen = adapter(recipe, dropout=0.1)
    assert seen.labels is not None
    own = {"scaling": seen.adapter.scaling, "recipe": recipe and asdict(recipe), "dropout": 0.1}
    tensors = under("parameters", seen.model.parameters) | under("released", seen.released)
    tensors |= under("start", seen.adapter.start) | {"labels": seen.labels}
    about = old_pictures(seen, "Adapter", adapter=own)
    same(load_observation(old_file(tmp_path / "o", "gradleak/observation/1", about, tensors)), seen)


@pytest.mark.parametrize("start_known", [False, True])
def test_old_weights_are_read(tmp_path: Path, start_known: bool) -> None:
    model = Model.of(victim(MLP), MLP)
    initial = {name: p + 1 for name, p in model.parameters.items()} if start_known else None
    done = Stationarity(200, 2.7e-4, 3e-3, 0.265)
    release = Weights(initial=initial, weight_decay=0.01, stationarity=done)
    seen = Observation(model=model, release=release, released=model.parameters, batch_size=2)
    about = old_pictures(seen, "Weights", weights={"weight_decay": 0.01, "stationarity": asdict(done)})
    tensors = under("parameters", model.parameters) | under("initial", initial or {})
    same(load_observation(old_file(tmp_path / "o", "gradleak/observation/1", about, tensors)), seen)


@pytest.mark.parametrize("kind", ["TextGradient", "TextUpdate", "TextAdapter"])
def test_old_observations_of_texts_are_read(tmp_path: Path, kind: str) -> None:
    family: Kind = "gpt2" if kind == "TextUpdate" else "bert"
    texts = load_texts("embedded", indices=[0])
    tokenizer = train_tokenizer(load_texts("embedded", "train", limit=40).texts, family, size=300)
    task: Task = "causal-lm" if kind == "TextUpdate" else "classification"
    model = small_model(family, tokenizer, task, width=16, layers=1, heads=2)
    seen, secret = capture_gradient(model, texts)
    more: dict[str, Any] = {}
    tensors = under("parameters", model.parameters)
    if kind == "TextUpdate":
        seen = share_update(seen, secret, Recipe(learning_rate=0.01, steps=1, batch_size=1))
        more = {"recipe": {"learning_rate": 0.01, "local_steps": 1, "local_batch_size": 1}}
    elif kind == "TextAdapter":
        modules = list(layout_of(model).queries(0))
        seen = share_adapter(model, secret, modules=modules, rank=4)
        more = {"adapter": {"scaling": seen.adapter.scaling, "recipe": None, "gradient": True}}
        tensors |= under("start", seen.adapter.start)
    special = {name: getattr(tokenizer, name) for name in ("unk_token", "pad_token")}
    special |= (
        {"eos_token": "[END]"}
        if family == "gpt2"
        else {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    )
    about = {
        "kind": kind,
        "name": "a folder",
        "config": model.architecture.config.to_json_string(use_diff=False),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": special,
        "task": task,
        "frozen": [],
        "state_hash": model.state_hash(),
        "batch_size": 1,
        "precision": "float32",
        "torch": "2.6.0",
        **more,
    }
    tensors |= under("released", seen.released)
    back = load_observation(old_file(tmp_path / "o", "gradleak/text-observation/1", about, tensors))
    same(back, seen)
    assert back.model.architecture.encode(texts.texts) == secret.inputs
    assert back.model.architecture.task == task
    expected = seen.simulate(secret.inputs, secret.labels)
    for name, tensor in back.simulate(secret.inputs, secret.labels).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)  # float32


def test_old_secrets_and_reconstructions_are_read(tmp_path: Path) -> None:
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([3, 1])
    old_file(tmp_path / "s", "gradleak/secret/1", {"source": "digits test 3"}, {"images": images, "labels": labels})
    secret = load_secret(tmp_path / "s")
    assert torch.equal(secret.inputs, images)
    assert secret.labels is not None
    assert torch.equal(secret.labels, labels)
    assert secret.source == "digits test 3"
    about = {"residual": 0.5, "status": "So.", "iterations": 3, "trace": [[1, 2.0]]}
    old_file(tmp_path / "r", "gradleak/reconstruction/1", about, {"images": images, "labels": labels})
    found = load_reconstruction(tmp_path / "r")
    assert torch.equal(found.value, images)
    assert (found.residual, found.status, found.iterations, found.trace) == (0.5, "So.", 3, [(1, 2.0)])


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("kind"),
        lambda about: about.update(kind="Photograph"),
        lambda about: about.update(kind="Update"),
        lambda about: about.update(recipe={"learning_rate": 0.1, "local_steps": 1, "local_batch_size": 1}),
        lambda about: about.update(
            kind="Update", recipe={"learning_rate": 0.1, "local_steps": "two", "local_batch_size": 1}
        ),
        lambda about: about.update(kind="Adapter", adapter={"scaling": {}, "recipe": None, "dropout": 0.0}),
        lambda about: about.update(kind="Adapter", adapter=3),
        lambda about: about.pop("architecture"),
        lambda about: about.pop("state_hash"),
        lambda about: about.update(frozen=3),
    ],
)
def test_old_files_that_make_no_sense_are_bad_input(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    gradient, _ = captured()
    about = old_pictures(gradient, "Gradient")
    change(about)
    tensors = under("parameters", gradient.model.parameters) | under("released", gradient.released)
    with pytest.raises(BadInput):
        load_observation(old_file(tmp_path / "o", "gradleak/observation/1", about, tensors))


# --- Secrets stay out ---


def test_neither_images_nor_their_indices_are_in_the_observation_file(tmp_path: Path) -> None:
    observation, secret = captured(reveal_batch_size=False)
    secret = replace(secret, source="digits test 1741 1742")
    save_observation(observation, tmp_path / "observation")
    save_secret(secret, tmp_path / "secret")
    own, other = ((tmp_path / name).read_bytes() for name in ("observation", "secret"))
    assert secret.labels is not None
    rows = [row.contiguous().numpy().tobytes() for image in secret.inputs for row in image[0] if len(row.unique()) > 3]
    assert len(rows) > 10  # of 24; with four grey levels or more a row does not occur by chance
    assert all(row in other for row in rows)
    assert not any(row in own for row in rows)
    for trace in (secret.labels.numpy().tobytes(), b"1741", b"digits", b"test"):
        assert trace in other
        assert trace not in own
    assert set(key.partition("/")[0] for key in stored(tmp_path / "observation")[0]) == {"parameters", "released"}


def test_withheld_buffers_are_not_in_the_file(tmp_path: Path) -> None:
    module = victim(RESNET)
    observation, _ = capture_gradient(Model.of(module, RESNET), private(), reveal_buffers=False)
    save_observation(observation, tmp_path / "o")
    content = (tmp_path / "o").read_bytes()
    statistics = [v.numpy().tobytes() for k, v in module.state_dict().items() if "running" in k]
    assert statistics
    assert not any(s in content for s in statistics)
    assert load_observation(tmp_path / "o").model.buffers is None


# --- Refusals ---


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_unopened(tmp_path: Path, protocol: int, zipped: bool) -> None:
    path = tmp_path / "observation.pt"
    with path.open("wb") as file:
        torch.save({"w": torch.ones(2)}, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    for read in (load_observation, load_secret, load_reconstruction, load_tensors, has_provenance):
        with pytest.raises(BadInput, match=r"pickle .* could run code.* safetensors\.torch\.save_file"):
            read(path)


def test_truncated_foreign_and_missing_files(observation_file: Path) -> None:
    content = observation_file.read_bytes()
    for length in (0, 3, 8, 100, len(content) // 2, len(content) - 1):
        observation_file.write_bytes(content[:length])
        with pytest.raises(BadInput, match="truncated, or something else"):
            load_observation(observation_file)
    observation_file.write_text("{}")
    with pytest.raises(BadInput, match="not a readable safetensors file"):
        load_observation(observation_file)
    with pytest.raises(BadInput, match="There is no file"):
        load_observation(observation_file.with_name("missing"))
    with pytest.raises(BadInput, match="There is no file"):
        load_observation(observation_file.parent)


def test_each_kind_of_file_is_only_taken_for_what_it_is(tmp_path: Path, observation_file: Path) -> None:
    save_secret(captured()[1], tmp_path / "secret")
    with pytest.raises(BadInput, match=r"not a observation|not an observation"):
        load_observation(tmp_path / "secret")
    with pytest.raises(BadInput, match="not a secret file"):
        load_secret(observation_file)
    with pytest.raises(BadInput, match="not a reconstruction file"):
        load_reconstruction(observation_file)
    save_file({"w": torch.ones(1)}, tmp_path / "plain")
    assert not has_provenance(tmp_path / "plain")
    with pytest.raises(BadInput, match="no gradleak header"):
        load_observation(tmp_path / "plain")


def test_an_unknown_schema_is_named(observation_file: Path) -> None:
    altered(observation_file, lambda _, header: header.update(schema="gradleak/observation/3"))
    with pytest.raises(BadInput, match=r"gradleak/observation/3, not gradleak/observation/2"):
        load_observation(observation_file)


@pytest.mark.parametrize(
    "key",
    [
        "release",
        "settings",
        "modality",
        "blueprint",
        "mode",
        "criterion",
        "frozen",
        "buffers_revealed",
        "state_hash",
        "batch_size",
        "precision",
    ],
)
def test_missing_provenance_is_named(observation_file: Path, key: str) -> None:
    altered(observation_file, provenance(lambda about: about.pop(key)))
    with pytest.raises(BadInput, match=f"no usable provenance .*{key}"):
        load_observation(observation_file)


def test_an_update_without_its_recipe_is_refused(observation_file: Path) -> None:
    altered(observation_file, provenance(lambda about: about.update(release="update")))
    with pytest.raises(BadInput, match="impossible provenance"):
        load_observation(observation_file)


@pytest.mark.parametrize(
    "change",
    [
        {"release": "photograph"},
        {"modality": "smells"},
        {"modality": "texts"},
        {"mode": "asleep"},
        {"criterion": {"name": "cross-entropy", "reduction": "median"}},
        {"criterion": {"name": "hinge"}},
        {"criterion": {"reduction": "mean"}},
        {"criterion": {"name": "focal", "gamma": "two"}},
        {"defenses": [{"name": "prayer"}]},
        {"defenses": [{"name": "gaussian-noise"}]},
        {"defenses": [{"name": "top-k", "share": 2.0}]},
        {"defenses": 3},
        {"precision": "float99"},
        {"batch_size": "three"},
        {"batch_size": -1},
        {"frozen": ["2.nothing"]},
        {"frozen": 3},
        {"state_hash": None},
        {"known": 3},
        {"released": ["2.nothing"]},
        {"blueprint": {"name": "mlp", "input_shape": 8, "classes": 10}},
        {"blueprint": {"name": "mlp", "input_shape": [1, 8], "classes": 10}},
        {"blueprint": {"name": "mlp", "input_shape": [1, 8, 8], "classes": -1}},
        {"blueprint": {"name": "mlp", "input_shape": [1, 8, 8], "classes": "ten"}},
        {"blueprint": "mlp"},
        {"release": "update", "settings": {"recipe": {"learning_rate": -1, "steps": 1}}},
        {"release": "update", "settings": {"recipe": {"learning_rate": 0.1, "steps": "two"}}},
        {"release": "update", "settings": {"recipe": {"learning_rate": 0.1, "steps": 1, "optimizer": "lion"}}},
    ],
    ids=str,
)
def test_provenance_that_makes_no_sense_is_bad_input(observation_file: Path, change: dict[str, Any]) -> None:
    altered(observation_file, provenance(lambda about: about.update(change)))
    with pytest.raises(BadInput):
        load_observation(observation_file)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1, 2]),
        torch.tensor([1, 2, 10]),
        torch.tensor([1, 2, -1]),
        torch.zeros(3, 2, dtype=torch.int64),
        torch.tensor(1),
    ],
    ids=str,
)
def test_labels_that_make_no_sense_are_bad_input(observation_file: Path, labels: Tensor) -> None:
    altered(observation_file, lambda tensors, _: tensors.update({"labels": labels}))
    with pytest.raises(BadInput, match=r"labels|label"):
        load_observation(observation_file)


@pytest.mark.parametrize("header", [{"gradleak": "not JSON"}, {"gradleak": "[1]"}, {}])
def test_a_damaged_header_is_bad_input(observation_file: Path, header: Header) -> None:
    def damage(tensors: dict[str, Tensor], old: Header) -> None:
        schema = old["schema"]
        old.clear()
        old.update(header, schema=schema)

    altered(observation_file, damage)
    with pytest.raises(BadInput):
        load_observation(observation_file)


def test_a_secret_without_images_is_bad_input(tmp_path: Path) -> None:
    save_secret(captured()[1], tmp_path / "secret")
    altered(tmp_path / "secret", lambda tensors, _: tensors.pop("inputs"))
    with pytest.raises(BadInput):
        load_secret(tmp_path / "secret")


def test_tampered_parameters_are_noticed(observation_file: Path) -> None:
    def flip(tensors: dict[str, Tensor], _: Header) -> None:
        tensors["parameters/4.weight"].view(torch.int32)[0, 0] ^= 1

    altered(observation_file, flip)
    with pytest.raises(BadInput, match=r"another state .* it was altered"):
        load_observation(observation_file)


def test_tampered_buffers_are_noticed(tmp_path: Path) -> None:
    save_observation(captured(RESNET)[0], tmp_path / "o")

    def shift(tensors: dict[str, Tensor], _: Header) -> None:
        tensors["buffers/2.running_mean"] += 1e-6

    altered(tmp_path / "o", shift)
    with pytest.raises(BadInput, match=r"another state .* it was altered"):
        load_observation(tmp_path / "o")


def test_numbers_that_are_not_finite_are_refused(observation_file: Path) -> None:
    def spoil(tensors: dict[str, Tensor], _: Header) -> None:
        tensors["released/2.bias"][0] = torch.nan

    altered(observation_file, spoil)
    with pytest.raises(BadInput, match=r"released/2\.bias has entries that are NaN or infinite"):
        load_observation(observation_file)


def test_another_architecture_is_named_by_its_first_tensor(observation_file: Path) -> None:
    with pytest.raises(BadInput, match=r"another architecture"):
        load_observation(observation_file, factory="lenet")
    altered(observation_file, provenance(lambda about: about["blueprint"].update(classes=7)))
    with pytest.raises(BadInput, match=r"6\.\w+ is \(10,.* in the weights and \(7,.* in the model"):
        load_observation(observation_file)


def test_missing_tensors_are_named(observation_file: Path) -> None:
    content = observation_file.read_bytes()
    altered(observation_file, lambda tensors, _: tensors.pop("parameters/2.bias"))
    with pytest.raises(BadInput, match=r"lack 2\.bias"):
        load_observation(observation_file)
    observation_file.write_bytes(content)
    altered(observation_file, lambda tensors, _: tensors.pop("released/2.bias"))
    with pytest.raises(BadInput, match=r"lacks what was released of 2\.bias"):
        load_observation(observation_file)


def test_a_file_cannot_make_us_import_code(
    tmp_path: Path, observation_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_factory.py").write_text(
        "from gradleak.modalities.networks import mlp\n"
        "from pathlib import Path\n"
        "Path(__file__).with_name('imported').touch()\n"
        "def build(shape, classes):\n    return mlp(shape, classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    altered(observation_file, provenance(lambda about: about["blueprint"].update(name="planted_factory:build")))
    with pytest.raises(BadInput, match=r"planted_factory:build', which is none of ours: .* --model"):
        load_observation(observation_file)
    assert not (tmp_path / "imported").exists()
    assert "planted_factory" not in sys.modules
    # Once the user names a factory it is theirs that is imported, not the file's.
    assert load_observation(observation_file, factory="mlp").model.state_hash() == captured()[0].model.state_hash()
    assert not (tmp_path / "imported").exists()
    load_observation(observation_file, factory="planted_factory:build")
    assert (tmp_path / "imported").exists()
    sys.modules.pop("planted_factory")


# --- Beliefs of the user ---


def test_check_provenance_names_what_differs(tmp_path: Path) -> None:
    observation, _ = captured(RESNET)
    state = victim(RESNET).state_dict()
    save_file(state, tmp_path / "weights")
    check_provenance(observation, weights=tmp_path / "weights", mode="eval")
    with pytest.raises(BadInput, match="taken in eval mode, not in train mode"):
        check_provenance(observation, mode="train")
    for name in ("1.weight", "2.running_mean"):
        save_file({**state, name: state[name] + 1e-6}, tmp_path / "other")
        with pytest.raises(BadInput, match=f"not the state .*: {name} differs"):
            check_provenance(observation, weights=tmp_path / "other")


def test_weights_that_share_no_name_with_the_model_are_not_its_state(tmp_path: Path) -> None:
    observation, _ = captured()
    save_file({"something.else": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(BadInput):
        check_provenance(observation, weights=tmp_path / "weights")


def test_load_state_names_the_first_misfit() -> None:
    module = MLP.build(0)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(BadInput, match=r"hold extra, which the model does not have"):
        load_state(module, {**state, "extra": torch.ones(1)})
    with pytest.raises(BadInput, match=r"2\.weight is \(2,\) in the weights and \(256, 64\) in the model"):
        load_state(module, {**state, "2.weight": torch.ones(2)})
    with pytest.raises(BadInput, match=r"lack 2\.weight"):
        load_state(module, {name: tensor for name, tensor in state.items() if name != "2.weight"})
    resnet = RESNET.build(0)
    parameters = {name: p.detach() for name, p in resnet.named_parameters()}
    load_state(resnet, parameters, partial=True)
    with pytest.raises(BadInput, match=r"lack 2\.running_mean"):
        load_state(resnet, parameters)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header, and pickles with bytes that are lengths too."""
    plain = save({"x": torch.ones(1)})
    header = int.from_bytes(plain[:8], "little")
    longer = 0x0280  # a pickle of protocol 2 begins with these two bytes, the low one first
    (tmp_path / "file").write_bytes(
        longer.to_bytes(8, "little") + plain[8 : 8 + header].ljust(longer) + plain[8 + header :]
    )
    assert load_tensors(tmp_path / "file")["x"] == 1
