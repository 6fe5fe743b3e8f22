"""Folders of PEFT and of transformers are read as they are, and what cannot be trusted is refused with a sentence."""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.formats.model_folder import read_base, write_base
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.formats.peft import is_adapter, read_adapter
from gradleak.modalities.networks import Architecture
from gradleak.modalities.transformers_networks import quiet_transformers, structure
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.training import Recipe

SHAPE = (1, 6, 6)
OWN = Architecture("own", SHAPE, 4)
MLP = Architecture("mlp", (1, 8, 8), 10)


class Attention(nn.Module):
    """The names that diffusers gives to the parts of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 6)
        self.to_out = nn.ModuleList([nn.Linear(6, 6), nn.Identity()])
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.to_out[0](self.to_q(images)).mean(2).flatten(1)[:, :4]
        return result


class Network(nn.Module):
    """Two such parts with the same names inside, so that a name can be ambiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = Attention(), Attention()

    def forward(self, images: Tensor) -> Tensor:
        return self.down(images) + self.up(images)  # type: ignore[no-any-return]


def model() -> PictureModel:
    torch.manual_seed(0)
    return Model.of(Network(), OWN)


def pair(rank: int = 2, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator)


A, B = pair()
PLAIN = {"base_model.model.down.to_q.lora_A.weight": A, "base_model.model.down.to_q.lora_B.weight": B}


def written(folder: Path, tensors: dict[str, Tensor] = PLAIN, **config: Any) -> Path:
    """A PEFT folder made by hand; None leaves a key of the config out."""
    folder.mkdir(parents=True, exist_ok=True)
    full = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "init_lora_weights": True, **config}
    stored = {key: value for key, value in full.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(stored))
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


# --- Where training began ---


@pytest.mark.parametrize(
    ("init", "start", "zero", "kept"),
    [
        (True, None, "lora_B", "lora_A"),
        (None, None, "lora_B", "lora_A"),
        ("gaussian", None, "lora_B", "lora_A"),
        ("eva", None, "lora_B", "lora_A"),
        ("mica", None, "lora_A", "lora_B"),
        (False, "A=0", "lora_A", "lora_B"),
        (False, "B=0", "lora_B", "lora_A"),
        (True, "A=0", "lora_A", "lora_B"),
    ],
)
def test_the_factor_that_began_at_zero_is_released(tmp_path: Path, init: Any, start: Any, zero: str, kept: str) -> None:
    end = {"lora_A": A, "lora_B": B}
    adapter = read_adapter(written(tmp_path, init_lora_weights=init), model(), start=start)
    assert adapter.adapter.scaling == {"down.to_q": 3.0}
    assert adapter.released.keys() == {f"down.to_q.{zero}"}
    assert torch.equal(adapter.released[f"down.to_q.{zero}"], end[zero])
    assert torch.equal(adapter.adapter.start[f"down.to_q.{kept}"], end[kept])
    assert not adapter.adapter.start[f"down.to_q.{zero}"].any()
    assert (adapter.adapter.recipe, adapter.batch_size, adapter.labels, adapter.precision) == (
        None,
        None,
        None,
        "float32",
    )


def test_the_decay_of_adamw_is_undone(tmp_path: Path) -> None:
    """Three steps at 0.1 shrink what has no gradient by (1 - 0.1 x 0.01)^3, as torch.optim.AdamW does."""
    recipe = Recipe(optimizer="adamw", learning_rate=0.1, steps=3)
    parameter = nn.Parameter(A.clone())
    optimiser = torch.optim.AdamW([parameter], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
    tensors = {**PLAIN, "base_model.model.down.to_q.lora_A.weight": parameter.detach()}
    adapter = read_adapter(written(tmp_path, tensors), model(), recipe=recipe)
    assert torch.allclose(adapter.adapter.start["down.to_q.lora_A"], A, rtol=1e-6)
    assert adapter.adapter.recipe == recipe


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "lora_ga", "corda", "orthogonal", False])
def test_a_start_that_is_not_known_has_to_be_given(tmp_path: Path, init: Any) -> None:
    folder = written(tmp_path / "end", init_lora_weights=init)
    with pytest.raises(BadInput, match="before training"):
        read_adapter(folder, model())
    before = {key: tensor - 0.25 for key, tensor in PLAIN.items()}
    adapter = read_adapter(folder, model(), initial=written(tmp_path / "start", before, init_lora_weights=init))
    assert adapter.released.keys() == adapter.adapter.start.keys() == {"down.to_q.lora_A", "down.to_q.lora_B"}
    for name, change in adapter.released.items():
        assert torch.allclose(change, torch.tensor(0.25), atol=1e-6)
        assert torch.equal(adapter.adapter.start[name], (A if "A" in name else B) - 0.25)
    weights = [m.parameters["down.to_q.weight"] for m in (model(), adapter.model)]
    subtracted = 3 * (B - 0.25) @ (A - 0.25) if init not in (False, "orthogonal") else torch.zeros(6, 6)
    assert torch.allclose(weights[0] - weights[1], subtracted, atol=1e-5)


def test_an_initial_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    up = {key.replace("down", "up"): tensor for key, tensor in PLAIN.items()}
    folder = written(tmp_path / "end")
    for initial in (written(tmp_path / "up", up), written(tmp_path / "alpha", lora_alpha=1)):
        with pytest.raises(BadInput, match="other modules, ranks or scalings"):
            read_adapter(folder, model(), initial=initial)


def test_an_adapter_that_has_learnt_nothing(tmp_path: Path) -> None:
    zero = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in PLAIN.items()}
    with pytest.raises(BadInput, match="learnt nothing"):
        read_adapter(written(tmp_path, zero), model())
    with pytest.raises(BadInput, match="learnt nothing"):
        read_adapter(written(tmp_path / "end"), model(), initial=tmp_path / "end")


# --- Scaling and ranks ---


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 5}, 2.5),
        ({"lora_alpha": 0.5}, 0.25),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"r": 8, "rank_pattern": {"to_q": 2}}, 3.0),
        ({"r": 8, "rank_pattern": {"up.to_q": 4, "down.to_q": 2}}, 3.0),
        ({"rank_pattern": {"^to_q": 4}}, 3.0),
        ({"alpha_pattern": {r"^down\.to_q$": 1}}, 0.5),
        ({"alpha_pattern": {"q": 1, "own.to_q": 1}, "rank_pattern": None}, 3.0),
        ({"r": 9, "rank_pattern": {"down.to_q": 2}, "alpha_pattern": {"to_q": 8}, "use_rslora": True}, 8 / 2**0.5),
    ],
    ids=str,
)
def test_scaling(tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    assert read_adapter(written(tmp_path, **config), model()).adapter.scaling["down.to_q"] == pytest.approx(scaling)


def test_scaling_is_what_peft_computes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    patterns: dict[str, Any] = {"rank_pattern": {"^up.to_q": 3, "conv": 1}, "alpha_pattern": {"down.conv": 7}}
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "conv"], use_rslora=True, **patterns)
    adapted: Any = get_peft_model(Network(), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    adapted.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, model())
    layers = {module: adapted.base_model.model.get_submodule(module) for module in adapter.adapter.scaling}
    assert adapter.adapter.scaling == pytest.approx(
        {module: layer.scaling["default"] for module, layer in layers.items()}
    )
    assert adapter.adapter.scaling.keys() == {f"{part}.{name}" for part in ("down", "up") for name in ("to_q", "conv")}
    assert {k: v.shape[0] for k, v in adapter.adapter.start.items() if "lora_A" in k} == {
        f"{module}.lora_A": layer.r["default"] for module, layer in layers.items()
    }


# --- Names ---


@pytest.mark.parametrize(
    ("key_a", "key_b", "module"),
    [
        ("base_model.model.down.to_q.lora_A.weight", "base_model.model.down.to_q.lora_B.weight", "down.to_q"),
        ("base_model.model.up.to_q.lora_A.default.weight", "base_model.model.up.to_q.lora_B.default.weight", "up.to_q"),
        ("down.to_q.lora_A.weight", "down.to_q.lora_B.weight", "down.to_q"),
        ("unet.down.to_q.lora_A.weight", "unet.down.to_q.lora_B.weight", "down.to_q"),
        ("unet.up.to_out.0.lora.down.weight", "unet.up.to_out.0.lora.up.weight", "up.to_out.0"),
        ("up.processor.to_q_lora.down.weight", "up.processor.to_q_lora.up.weight", "up.to_q"),
        ("unet.down.processor.to_out_lora.down.weight", "unet.down.processor.to_out_lora.up.weight", "down.to_out.0"),
        ("up.to_q.lora_down.weight", "up.to_q.lora_up.weight", "up.to_q"),
    ],
)
def test_names_of_factors(tmp_path: Path, key_a: str, key_b: str, module: str) -> None:
    adapter = read_adapter(written(tmp_path, {key_a: A, key_b: B}), model())
    assert torch.equal(adapter.released[f"{module}.lora_B"], B)
    assert torch.equal(adapter.adapter.start[f"{module}.lora_A"], A)


def test_a_name_may_leave_out_what_the_base_model_is_wrapped_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapped = Model.of(nn.Sequential(nn.Identity(), Network()), OWN)
    assert read_adapter(written(tmp_path), wrapped).adapter.scaling == {"1.down.to_q": 3.0}


def test_the_names_of_older_vision_transformers(tmp_path: Path) -> None:
    """transformers 4 called the same weights otherwise; its save_pretrained still writes those names."""
    architecture = Architecture("vit", (1, 8, 8), 10)
    base = Model.of(architecture.build(0), architecture)
    inputs = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    parts = (*inputs, "attention.output.dense", "intermediate.dense", "output.dense")
    write_base(base, tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    tensors = {}
    for number, part in enumerate(parts):
        weight = stored[f"vit.encoder.layer.{number % 2}.{part}.weight"]
        tensors[f"base_model.model.vit.encoder.layer.{number % 2}.{part}.lora_A.weight"] = weight[:2]
        tensors[f"base_model.model.vit.encoder.layer.{number % 2}.{part}.lora_B.weight"] = weight[:, :2]
    adapter = read_adapter(written(tmp_path / "adapter", tensors), base)
    assert len(adapter.adapter.scaling) == 6
    for module in adapter.adapter.scaling:  # it must be the module that holds this very weight
        assert torch.equal(adapter.adapter.start[f"{module}.lora_A"], base.parameters[f"{module}.weight"][:2])
        assert torch.equal(adapter.released[f"{module}.lora_B"], base.parameters[f"{module}.weight"][:, :2])


def test_convolutions(tmp_path: Path) -> None:
    tensors = {"down.conv.lora_A.weight": torch.randn(2, 1, 3, 3), "down.conv.lora_B.weight": torch.randn(2, 2, 1, 1)}
    adapter = read_adapter(written(tmp_path, tensors), model())
    assert adapter.released["down.conv.lora_B"].shape == (2, 2, 1, 1)
    images, labels = torch.rand(1, *SHAPE), torch.tensor([1])
    assert adapter.simulate(images, labels)["down.conv.lora_B"].shape == (2, 2, 1, 1)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, precision: torch.dtype) -> None:
    adapter = read_adapter(written(tmp_path, {k: t.to(precision) for k, t in PLAIN.items()}), model())
    assert adapter.precision == str(precision).removeprefix("torch.")
    assert {t.dtype for t in (*adapter.adapter.start.values(), *adapter.released.values())} == {torch.float32}
    assert torch.equal(adapter.released["down.to_q.lora_B"], B.to(precision).float())


# --- What was trained beside the adapter ---


@pytest.mark.parametrize(
    ("key", "shape"), [("down.to_out.0.weight", (6, 6)), ("up.to_q.bias", (6,)), ("down.to_q.lora_B.bias", (6,))]
)
def test_what_was_trained_besides_is_told(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    """A whole weight is trained along, in one step as in several; the bias of a factor is held."""
    folder = written(tmp_path, {**PLAIN, f"base_model.model.{key}": torch.randn(shape)})
    own = "lora_B" not in key
    for recipe in (None, Recipe(learning_rate=1, steps=1), Recipe(learning_rate=1, steps=2)):
        adapter = read_adapter(folder, model(), recipe=recipe)
        assert adapter.adapter.scaling.keys() == {"down.to_q"}
        assert adapter.adapter.beside == ((key,) if own else ())
        assert len(adapter.adapter.held) == (0 if own else 1)
        assert any(key in sentence for _, _, sentence in adapter.reservations()) == own


# --- Refusals ---


def config_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save(PLAIN, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "no PEFT folder"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "There is no file"),
        (pickled, r"is a pickle: it could run code, so it is not opened.*safe_serialization"),
        (lambda f: torch.save(PLAIN, f / "adapter_model.safetensors"), "is a pickle"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 9), "truncated"),
        (config_text("{"), "is not JSON"),
        (config_text("[" * 100_000), "is not JSON"),
        (config_text("[1]"), "not the config of an adapter"),
        (config_text("{}"), "missing required field `peft_type`"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], object], hint: str) -> None:
    folder = written(tmp_path / "adapter")
    damage(folder)
    with pytest.raises(BadInput, match=hint):
        read_adapter(folder, model())
    with pytest.raises(BadInput, match="There is no folder"):
        read_adapter(tmp_path / "none", model())
    assert not is_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"peft_type": "IA3"}, "type 'IA3': only LORA"),
        ({"peft_type": 3}, "type '3': only LORA"),
        ({"use_dora": True}, "use_dora is set"),
        ({"fan_in_fan_out": True}, "transposed layers .fan_in_fan_out is set"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is set"),
        ({"r": "2"}, r"Expected `int`, got `str` - at `\$\.r`"),
        ({"r": None}, "missing required field `r`"),
        ({"lora_alpha": [1]}, r"Expected `float`, got `array` - at `\$\.lora_alpha`"),
        ({"init_lora_weights": 7}, r"Expected `bool \| str`, got `int` - at `\$\.init_lora_weights`"),
        ({"use_rslora": "yes"}, r"Expected `bool`, got `str` - at `\$\.use_rslora`"),
        ({"rank_pattern": {"to_q": "2"}}, r"Expected `int`, got `str` - at `\$\.rank_pattern"),
        ({"alpha_pattern": {"(a+)+": 2}}, r"the pattern '\(a\+\)\+': write out"),
        ({"r": 3}, r"lora_A of down.to_q is \(2, 6\), not \(3, 6\) .* rank 3"),
        ({"r": 0}, "not fit"),
        ({"r": -2}, "not fit"),
        ({"lora_alpha": 0}, "alpha 0: neither may be 0"),
        ({"rank_pattern": {"to_q": 4}}, "rank 4"),
    ],
    ids=str,
)
def test_configs_that_cannot_be(tmp_path: Path, config: dict[str, Any], hint: str) -> None:
    with pytest.raises(BadInput, match=hint):
        read_adapter(written(tmp_path, **config), model())


@pytest.mark.parametrize(
    ("tensors", "hint"),
    [
        ({}, "holds no LoRA factor"),
        ({"to_q.lora_A.weight": A, "to_q.lora_B.weight": B}, "'to_q' could be down.to_q or up.to_q"),
        (
            {"side.to_q.lora_A.weight": A, "side.to_q.lora_B.weight": B},
            "changes 'side.to_q', but the base model has no",
        ),
        ({"../../x.lora_A.weight": A, "../../x.lora_B.weight": B}, r"changes '\.\./\.\./x', but the base model has no"),
        ({"os.system.lora_A.weight": A}, "changes 'os.system'"),
        ({"down.to_q.lora_A.weight": A}, "lacks lora_B of down.to_q"),
        (
            {"down.to_q.lora_A.weight": A, "down.to_q.lora_B.weight": B[:5]},
            r"lora_B of down.to_q is \(5, 2\), not \(6, 2\)",
        ),
        ({"down.to_q.lora_A.weight": A[:, :5], "down.to_q.lora_B.weight": B}, r"lora_A of down.to_q is \(2, 5\)"),
        ({"down.to_q.lora_A.weight": A[0], "down.to_q.lora_B.weight": B}, r"lora_A of down.to_q is \(6,\)"),
        ({**PLAIN, "base_model.model.down.to_q.lora_magnitude_vector": A[0]}, "is DoRA"),
        ({**PLAIN, "down.lora_embedding_A": A}, "'down', which is neither a LoRA factor nor an embedding"),
        ({**PLAIN, "down.to_q.scale": A[0]}, "'down.to_q.scale', which is neither a LoRA factor nor"),
        ({**PLAIN, "down.to_out.0.bias": A[0][:3]}, "down.to_out.0.bias is 3 in the adapter and 6 in the base model"),
        ({**PLAIN, "down.to_q.lora.down.weight": A}, "holds down.to_q.lora_A twice"),
        ({**PLAIN, "down.to_q.lora_B.weight": B * torch.nan}, "NaN or infinite"),
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], hint: str) -> None:
    with pytest.raises(BadInput, match=hint):
        read_adapter(written(tmp_path, tensors), model())


def test_an_adapter_comes_back_from_an_observation_file(tmp_path: Path) -> None:
    tensors = {
        f"{layer}.lora_{side}.weight": torch.randn(shape) for layer in ("2", "6") for side, shape in sizes(layer)
    }
    recipe = Recipe(optimizer="momentum", learning_rate=0.1, steps=2)
    module = MLP.build(0)
    adapter = read_adapter(
        written(tmp_path / "adapter", tensors, lora_dropout=0.1), Model.of(module, MLP), recipe=recipe, batch_size=3
    )
    save_observation(adapter, tmp_path / "observation")
    again = load_observation(tmp_path / "observation")
    own = again.adapter
    assert (own.recipe, own.scaling, own.dropout, again.batch_size) == (recipe, adapter.adapter.scaling, 0.1, 3)
    assert again.threat_model() == adapter.threat_model()


def sizes(layer: str) -> list[tuple[str, tuple[int, int]]]:
    return [("A", (2, 64)), ("B", (256, 2))] if layer == "2" else [("A", (2, 256)), ("B", (10, 2))]


# --- Base models ---


def vit_folder(folder: Path, **preprocessor: Any) -> Any:
    """A tiny vision transformer of nobody's size, as transformers saves it."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=12, patch_size=4
    )
    config.num_labels = 3
    torch.manual_seed(1)
    network: Any = ViTForImageClassification(config)
    network.eval()
    with quiet_transformers():
        network.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return network


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({}, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10's, ours
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.125]}, (0.5, 0.4, 0.3), (0.5, 0.25, 0.125)),
        ({"do_normalize": False, "image_mean": [1, 1, 1]}, (0, 0, 0), (1, 1, 1)),
    ],
)
def test_a_folder_of_transformers(tmp_path: Path, preprocessor: Any, mean: Any, std: Any) -> None:
    network = vit_folder(tmp_path, **preprocessor)
    module, architecture = read_base(tmp_path)
    assert architecture == Architecture(str(tmp_path), (3, 12, 12), 3)
    assert not module.training
    images = torch.rand(2, 3, 12, 12)
    standard = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = network(pixel_values=standard).logits
        assert torch.allclose(module(images), expected, atol=1e-6)
        built = architecture.build(0)  # the same structure and first layer, from config.json alone
        built.load_state_dict(module.state_dict())
        assert torch.equal(built.eval()(images), module(images))
    inner: Any = module.get_submodule("network")
    assert inner.config._attn_implementation == "eager"


def test_an_observation_of_a_foreign_transformer_comes_back_with_its_folder(tmp_path: Path) -> None:
    vit_folder(tmp_path / "base", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    base = Model.of(*read_base(tmp_path / "base"))
    a, b = pair(2, 24)
    name = "base_model.model.vit.layers.1.attention.v_proj"
    adapter = read_adapter(written(tmp_path / "a", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}), base)
    assert adapter.adapter.scaling.keys() == {"network.vit.layers.1.attention.v_proj"}
    save_observation(adapter, tmp_path / "o")
    with pytest.raises(BadInput, match=r"none of ours: .*--model"):  # a file cannot choose what is opened
        load_observation(tmp_path / "o")
    (tmp_path / "base" / "model.safetensors").unlink()
    again = load_observation(tmp_path / "o", factory=str(tmp_path / "base"))
    images, labels = torch.rand(1, 3, 12, 12), torch.tensor([2])
    released = (o.simulate(images, labels)["network.vit.layers.1.attention.v_proj.lora_B"] for o in (adapter, again))
    assert torch.equal(*released)


def test_a_folder_for_other_pictures_is_not_the_architecture(tmp_path: Path) -> None:
    vit_folder(tmp_path)
    with pytest.raises(BadInput, match="for pictures of 3x12x12 and 3 classes, not 3x32x32 and 10"):
        Architecture(str(tmp_path), (3, 32, 32), 10).build(0)


@pytest.mark.parametrize("name", ["mlp", "resnet20", "vit"])
def test_our_own_models_come_back(tmp_path: Path, name: str) -> None:
    architecture = Architecture(name, (1, 8, 8), 10)
    module = architecture.build(5)
    write_base(Model.of(module, architecture), tmp_path)
    state = torch.get_rng_state()
    again, found = read_base(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == architecture
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), module.eval()(images))
    if name == "vit":  # transformers reads it too, with the constants of its first layer beside it
        processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert processor["image_mean"] == pytest.approx([0.1307])
        assert structure(tmp_path)[1] == architecture


def test_a_vit_of_another_size_is_not_ours(tmp_path: Path) -> None:
    architecture = Architecture("vit", (1, 8, 8), 10)
    write_base(Model.of(architecture.build(0), architecture), tmp_path)
    for file, key, value in (
        ("config.json", "num_attention_heads", 8),
        ("preprocessor_config.json", "image_std", [0.5]),
    ):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(json.dumps({**json.loads(text), key: value}))
        assert read_base(tmp_path)[1].name == str(tmp_path)
        (tmp_path / file).write_text(text)
    assert read_base(tmp_path)[1].name == "vit"


def edited(file: str, **change: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        held = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({**held, **change}))

    return edit


def without(name: str) -> Callable[[Path], object]:
    def drop(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return drop


def spoilt(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda f: (f / "config.json").unlink(), "neither config.json .* nor gradleak.json"),
        (lambda f: (f / "config.json").write_text("no"), "no image classifier"),
        (edited("config.json", hidden_size="x"), "no image classifier"),
        (edited("config.json", hidden_size=-1), "no image classifier"),
        (edited("config.json", patch_size=0), "no image classifier"),
        (edited("config.json", hidden_act="os.system"), "no image classifier"),
        (edited("config.json", model_type="bert"), "no image classifier"),
        (edited("config.json", model_type="planted", auto_map={"AutoConfig": "planted.Config"}), "no image classifier"),
        (edited("config.json", num_attention_heads=5), "do not fit config.json: .* not"),
        (edited("config.json", image_size=[12, 12, 12]), "no image classifier"),
        (edited("config.json", num_channels=2), "do not fit config.json"),
        (edited("config.json", intermediate_size=33), r"do not fit config.json: .*\(32,\), not \(33,\)"),
        (edited("preprocessor_config.json", image_mean="0.5"), r"Expected `array`, got `str` - at `\$\.image_mean`"),
        (edited("preprocessor_config.json", image_std=[0.5, 0.5]), "for each of 3 channels"),
        (edited("preprocessor_config.json", image_std=[0.5, 0.5, 0]), "above zero"),
        (lambda f: (f / "model.safetensors").unlink(), "other formats can run code"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK"), "is a pickle"),
        (without("classifier.weight"), "lack classifier.weight"),
        (spoilt, "NaN or infinite"),
    ],
)
def test_base_models_of_transformers_that_cannot_be(
    tmp_path: Path, damage: Callable[[Path], object], hint: str
) -> None:
    vit_folder(tmp_path)
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    damage(tmp_path)
    with pytest.raises(BadInput, match=hint):
        read_base(tmp_path)
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda f: (f / "gradleak.json").write_text("[]"), "does not describe"),
        (edited("gradleak.json", schema="gradleak/base/2"), "'gradleak/base/2', not 'gradleak/base/1'"),
        (
            edited("gradleak.json", architecture={"name": "mlp", "input_shape": [1, 8], "classes": 10}),
            "of length 3, got 2",
        ),
        (edited("gradleak.json", architecture={"name": "mlp", "input_shape": [1, 0, 8], "classes": 10}), ">= 1"),
        (
            edited("gradleak.json", architecture={"name": "os:system", "input_shape": [1, 8, 8], "classes": 9}),
            "none of ours",
        ),
        (
            edited("gradleak.json", architecture={"name": "mlp", "input_shape": [1, 8, 8], "classes": 9}),
            r"6\.bias is \(10,\)",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "There is no file"),
    ],
)
def test_base_models_of_ours_that_cannot_be(tmp_path: Path, damage: Callable[[Path], object], hint: str) -> None:
    write_base(Model.of(MLP.build(0), MLP), tmp_path)
    damage(tmp_path)
    with pytest.raises(BadInput, match=hint):
        read_base(tmp_path)


def test_a_name_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/has-such-a-model", "/no/such/folder", "no such folder"):
        with pytest.raises(BadInput, match=f"'{name}' is no folder here, .* Hugging Face hub: .*Give the folder"):
            read_base(name)


def test_transformers_is_as_loud_as_before() -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def test_reading_warns_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vit_folder(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read_base(tmp_path)
    assert not said
    assert capfd.readouterr() == ("", "")


def test_dropout_makes_a_release_inexact(tmp_path: Path) -> None:
    recipe = Recipe(learning_rate=0.1, steps=1)
    clean = read_adapter(written(tmp_path / "clean"), model(), recipe=recipe)
    assert clean.release.inexact() == ""
    dropped = read_adapter(written(tmp_path / "dropped", lora_dropout=0.05), model(), recipe=recipe)
    assert "may have been trained with dropout 0.05" in dropped.release.inexact()


def test_an_adapter_without_one_of_its_factors_is_named(tmp_path: Path) -> None:
    whole = read_adapter(written(tmp_path), model())
    start = {name: tensor for name, tensor in whole.adapter.start.items() if not name.endswith("lora_A")}
    with pytest.raises(BadInput, match="has no lora_A"):
        replace(whole, release=replace(whole.adapter, start=start))
