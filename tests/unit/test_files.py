"""What is written can be read, and what cannot be trusted is refused with a sentence. Nothing is ever imported or unpickled."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.errors import BadInput
from gradleak.formats.observation_file import (
    check_provenance,
    has_provenance,
    load_observation,
    load_reconstruction,
    load_secret,
    load_state,
    load_tensors,
    save_observation,
    save_reconstruction,
    save_secret,
)
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.observation import Adapter, Gradient, Model, Update
from gradleak.observations.tensors import fingerprint
from gradleak.observations.training import Recipe
from gradleak.victims.federated import share_update
from gradleak.victims.gradient import capture_gradient

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


def captured(architecture: Architecture = MLP, **arguments: Any) -> tuple[Gradient, Secret]:
    return capture_gradient(victim(architecture), architecture, private(), **arguments)


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


@pytest.fixture
def observation_file(tmp_path: Path) -> Path:
    observation, _ = captured()
    save_observation(observation, tmp_path / "observation.safetensors")
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
    ],
    ids=["labels", "train, no batch size", "no buffers", "float16", "bfloat16"],
)
def test_a_gradient_comes_back_bit_by_bit(tmp_path: Path, arguments: dict[str, Any]) -> None:
    observation, secret = captured(RESNET, **arguments)
    path = tmp_path / "new folder" / "observation.safetensors"
    save_observation(observation, path)
    back = load_observation(path)
    assert type(back) is Gradient
    assert has_provenance(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing unfinished is left
    assert fingerprint(back.released) == fingerprint(observation.released)
    assert back.model.state_hash() == observation.model.state_hash()
    for name in ("batch_size", "precision"):
        assert getattr(back, name) == getattr(observation, name)
    for name in ("architecture", "mode", "reduction", "frozen"):
        assert getattr(back.model, name) == getattr(observation.model, name)
    assert (back.labels is None) == (observation.labels is None)
    assert back.labels is None or torch.equal(back.labels, secret.labels)
    assert (back.model.buffers is None) == (observation.model.buffers is None)
    assert back.threat_model() == observation.threat_model()
    simulated = (o.simulate(secret.images, secret.labels) for o in (observation, back))
    assert len({fingerprint(s) for s in simulated}) == 1


def test_a_half_precision_file_is_half_as_large(tmp_path: Path) -> None:
    for precision in (torch.float32, torch.float16):
        observation, _ = captured(precision=precision)
        save_observation(observation, tmp_path / str(precision))
    released = sum(4 * t.numel() for t in observation.released.values())
    sizes = [(tmp_path / str(precision)).stat().st_size for precision in (torch.float32, torch.float16)]
    assert sizes[0] - sizes[1] == pytest.approx(released / 2, rel=0.01)


def test_an_update_comes_back_with_its_recipe(tmp_path: Path) -> None:
    gradient, secret = captured(RESNET, mode="train")
    recipe = {"learning_rate": 0.03, "local_steps": 4, "local_batch_size": 2}
    update = share_update(gradient, secret, gradient.model, **recipe)  # type: ignore[arg-type]
    save_observation(update, tmp_path / "o")
    back = load_observation(tmp_path / "o")
    assert isinstance(back, Update)
    assert {name: getattr(back, name) for name in recipe} == recipe
    assert fingerprint(back.released) == fingerprint(update.released)
    assert fingerprint(back.simulate(secret.images, secret.labels)) == fingerprint(update.released)


def adapter(recipe: Recipe | None = None, precision: str = "float32") -> Adapter:
    """Two layers of the MLP at ranks 2 and 3, both factors of one of them released."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"2.lora_A": (2, 64), "2.lora_B": (256, 2), "6.lora_A": (3, 256), "6.lora_B": (10, 3)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Adapter(
        model=Model.of(victim(MLP), MLP),
        released={name: start[name] / 3 for name in ("2.lora_A", "2.lora_B", "6.lora_B")},
        start=start,
        scaling={"2": 1 / 3, "6": 2**0.5},
        recipe=recipe,
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
    observation = adapter(recipe, precision)
    save_observation(observation, tmp_path / "o")
    back = load_observation(tmp_path / "o")
    assert isinstance(back, Adapter)
    for name in ("scaling", "recipe", "precision", "batch_size"):
        assert getattr(back, name) == getattr(observation, name)
    assert list(back.scaling) == list(observation.scaling)
    assert fingerprint(back.released) == fingerprint(observation.released)
    assert fingerprint(back.start) == fingerprint(observation.start)
    assert back.model.state_hash() == observation.model.state_hash()
    assert back.threat_model() == observation.threat_model()
    images, labels = private().images, private().labels
    assert fingerprint(back.simulate(images, labels)) == fingerprint(observation.simulate(images, labels))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("adapter"),
        lambda about: about.update(kind="Gradient"),
        lambda about: about["adapter"].pop("recipe"),
        lambda about: about["adapter"].update(recipe={"optimizer": "sgd"}),
        lambda about: about["adapter"]["recipe"].update(optimizer="lion"),
        lambda about: about["adapter"]["recipe"].update(steps=0),
        lambda about: about["adapter"]["recipe"].update(batch_size=-1),
        lambda about: about["adapter"].update(scaling={}),
        lambda about: about["adapter"].update(scaling={"2": "one", "6": 1}),
        lambda about: about["adapter"]["scaling"].update({"4": 1.0}),
        lambda about: about["adapter"]["scaling"].pop("2"),
    ],
)
def test_adapters_that_make_no_sense_are_bad_input(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    save_observation(adapter(Recipe(learning_rate=0.1, steps=3)), tmp_path / "o")
    altered(tmp_path / "o", provenance(change))
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
    with pytest.raises(BadInput, match=r"the change of 4\.lora_B"):
        load_observation(tmp_path / "o")


def test_sum_reduction_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    module = victim(MLP)
    module.get_parameter("4.weight").requires_grad_(False)
    model = Model.of(module, MLP, reduction="sum")
    released = {k: torch.ones_like(p) for k, p in model.parameters.items() if k != "4.weight"}
    save_observation(Gradient(model=model, released=released, batch_size=2), tmp_path / "o")
    back = load_observation(tmp_path / "o").model
    assert back.reduction == "sum"
    assert back.frozen == ("4.weight",)


def test_secret_and_reconstruction_come_back(tmp_path: Path) -> None:
    _, secret = captured()
    save_secret(secret, tmp_path / "secret")
    again = load_secret(tmp_path / "secret")
    assert torch.equal(again.images, secret.images)
    assert torch.equal(again.labels, secret.labels)
    assert again.source == secret.source == "digits test"
    found = Reconstruction(secret.images, secret.labels, 0.25, 'It "worked": 100 %.', 7, [(1, 2.5), (7, 0.5)])
    save_reconstruction(found, tmp_path / "found")
    back = load_reconstruction(tmp_path / "found")
    assert torch.equal(back.images, found.images)
    assert torch.equal(back.labels, found.labels)
    assert (back.residual, back.status, back.iterations, back.trace) == (0.25, found.status, 7, found.trace)


# --- Secrets stay out ---


def test_neither_images_nor_their_indices_are_in_the_observation_file(tmp_path: Path) -> None:
    observation, secret = captured(reveal_batch_size=False)
    secret = replace(secret, source="digits test 1741 1742")
    save_observation(observation, tmp_path / "observation")
    save_secret(secret, tmp_path / "secret")
    own, other = ((tmp_path / name).read_bytes() for name in ("observation", "secret"))
    rows = [row.contiguous().numpy().tobytes() for image in secret.images for row in image[0] if len(row.unique()) > 3]
    assert len(rows) > 10  # of 24; with four grey levels or more a row does not occur by chance
    assert all(row in other for row in rows)
    assert not any(row in own for row in rows)
    for trace in (secret.labels.numpy().tobytes(), b"1741", b"digits", b"test"):
        assert trace in other
        assert trace not in own
    assert set(key.partition("/")[0] for key in stored(tmp_path / "observation")[0]) == {"parameters", "released"}


def test_withheld_buffers_are_not_in_the_file(tmp_path: Path) -> None:
    module = victim(RESNET)
    observation, _ = capture_gradient(module, RESNET, private(), reveal_buffers=False)
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
    altered(observation_file, lambda _, header: header.update(schema="gradleak/observation/2"))
    with pytest.raises(BadInput, match=r"gradleak/observation/2, not gradleak/observation/1"):
        load_observation(observation_file)


@pytest.mark.parametrize(
    "key",
    [
        "architecture",
        "kind",
        "mode",
        "reduction",
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
    altered(observation_file, provenance(lambda about: about.update(kind="Update")))
    with pytest.raises(BadInput, match="impossible provenance"):
        load_observation(observation_file)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Photograph"},
        {"mode": "asleep"},
        {"reduction": "median"},
        {"precision": "float99"},
        {"batch_size": "three"},
        {"batch_size": -1},
        {"frozen": ["2.nothing"]},
        {"frozen": 3},
        {"state_hash": None},
        {"architecture": {"name": "mlp", "input_shape": 8, "classes": 10}},
        {"architecture": {"name": "mlp", "input_shape": [1, 8], "classes": 10}},
        {"architecture": {"name": "mlp", "input_shape": [1, 8, 8], "classes": -1}},
        {"architecture": {"name": "mlp", "input_shape": [1, 8, 8], "classes": "ten"}},
        {"architecture": "mlp"},
        {"kind": "Update", "recipe": {"learning_rate": -1, "local_steps": 1, "local_batch_size": 1}},
        {"kind": "Update", "recipe": {"learning_rate": 0.1, "local_steps": "two", "local_batch_size": 1}},
    ],
    ids=str,
)
def test_provenance_that_makes_no_sense_is_bad_input(observation_file: Path, change: dict[str, Any]) -> None:
    altered(observation_file, provenance(lambda about: about.update(change)))
    with pytest.raises(BadInput):
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
    altered(tmp_path / "secret", lambda tensors, _: tensors.pop("images"))
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
    altered(observation_file, provenance(lambda about: about["architecture"].update(classes=7)))
    with pytest.raises(BadInput, match=r"6\.\w+ is \(10,.* in the weights and \(7,.* in the model"):
        load_observation(observation_file)


def test_missing_tensors_are_named(observation_file: Path) -> None:
    content = observation_file.read_bytes()
    altered(observation_file, lambda tensors, _: tensors.pop("parameters/2.bias"))
    with pytest.raises(BadInput, match=r"lack 2\.bias"):
        load_observation(observation_file)
    observation_file.write_bytes(content)
    altered(observation_file, lambda tensors, _: tensors.pop("released/2.bias"))
    with pytest.raises(BadInput, match=r"2\.bias 256, but no gradient of that name"):
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
    altered(observation_file, provenance(lambda about: about["architecture"].update(name="planted_factory:build")))
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
