"""Files and folders as still other tools leave them: axolotl, unsloth, DeepSpeed, FSDP, LyCORIS, MLX, torchtune, mixed precision. Each is read
as what it is, or refused by its name; and weights that were trained whole beside an adapter are read as the update that they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradleak import Analytic
from gradleak.attacks.factor import with_factor_found
from gradleak.audit.checks import REPLAY_TOLERANCE
from gradleak.cli.app import main
from gradleak.errors import BadInput
from gradleak.formats.model_folder import write_base
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.formats.own_arrays import load_arrays
from gradleak.formats.peft import read_adapter
from gradleak.modalities.networks import Architecture
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Update
from gradleak.observations.training import Recipe
from gradleak.observations.whole_weights import whole_weights
from gradleak.report import record

OWN = Architecture(f"{__name__}:factory", (1, 4, 4), 3)
PICTURES, LABELS = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
ONE = Recipe(learning_rate=0.1, steps=1)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def factory(shape: tuple[int, int, int] = (1, 4, 4), classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = {"flat": nn.Flatten(), "fc1": nn.Linear(16, 12), "act": nn.Tanh(), "fc2": nn.Linear(12, 3)}
    whole, inner = nn.Sequential(), nn.Sequential()
    for name, layer in layers.items():
        inner.add_module(name, layer)
    whole.add_module("body", inner)
    return whole


def model() -> Model[Architecture]:
    return Model.of(factory(), OWN)


def trained(folder: Path, count: int = 2, steps: int = 1, **settings: Any) -> Any:
    """PEFT's adapter after SGD on the first pictures, saved."""
    from peft import LoraConfig, get_peft_model

    network: Any = factory()
    torch.manual_seed(1)
    usual = {"r": 4, "lora_alpha": 8, "target_modules": ["fc1", "fc2"]}
    adapted: Any = get_peft_model(network, LoraConfig(**{**usual, **settings}))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], ONE.learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(adapted(PICTURES[:count]), LABELS[:count]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    trained(folder)
    return folder


def copied(plain: Path, out: Path, change: Callable[[str], str] = str, **config: Any) -> Path:
    """The adapter under other names, with more in its config."""
    out.mkdir(parents=True)
    tensors = {change(name): tensor for name, tensor in load_file(plain / WEIGHTS).items()}
    save_file(tensors, out / WEIGHTS)
    about = json.loads((plain / CONFIG).read_text()) | config
    (out / CONFIG).write_text(json.dumps(about))
    return out


def read(folder: Path) -> Observation[Any]:
    return read_adapter(folder, model(), recipe=ONE, batch_size=2)


def check(folder: Path) -> None:
    """It replays as PEFT and torch have trained it."""
    assert read(folder).residual(PICTURES, LABELS) < REPLAY_TOLERANCE["float32"]


# --- Adapters ---


NAMES: dict[str, Callable[[str], str]] = {
    "the name of the adapter inside": lambda name: name.replace(".weight", ".default.weight"),
    "another name of the adapter": lambda name: name.replace(".weight", ".my-run_2.weight"),
    "DeepSpeed": lambda name: f"module.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(".fc", "._fsdp_wrapped_module.fc"),
    "FSDP with checkpointing": lambda name: name.replace(".fc", "._checkpoint_wrapped_module.fc"),
    "compiled inside": lambda name: name.replace("model.body", "model._orig_mod.body"),
    "without PEFT's own wrapper": lambda name: name.removeprefix("base_model.model."),
    "Lightning": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("tool", NAMES)
def test_names_as_tools_leave_them(plain: Path, tmp_path: Path, tool: str) -> None:
    check(copied(plain, tmp_path / "a", NAMES[tool]))


def test_factors_of_a_head_that_peft_wrapped_twice(plain: Path, tmp_path: Path) -> None:
    """LoRA on a classifier that PEFT also keeps as a module to save: the same factors under two names, and a third time as they began."""
    folder = copied(plain, tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in list(tensors.items()):
        if ".fc2." in name:
            for wrapper, kept in (("modules_to_save", tensor.clone()), ("original_module", torch.zeros_like(tensor))):
                tensors[name.replace(".fc2.", f".fc2.{wrapper}.")] = kept
    save_file(tensors, folder / WEIGHTS)
    check(folder)


def test_the_output_of_axolotl_and_unsloth(plain: Path, tmp_path: Path) -> None:
    """Settings that PEFT does not know, a model card, and checkpoints inside the folder of the adapter itself."""
    more: dict[str, Any] = {
        "unsloth_fixed": True,
        "auto_mapping": {"base_model_class": "X", "unsloth_fixed": True},
        "qalora_group_size": 16,
    }
    folder = copied(plain, tmp_path / "lora-out", **more, lora_bias=False, corda_config=None, modules_to_save=None)
    copied(plain, folder / "checkpoint-5")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (folder / "debug.log").write_text("step 1\n")
    check(folder)
    check(folder / "checkpoint-5")


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {}], ids=str)
def test_mixed_ranks_with_both_scalings(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained(tmp_path / "a", rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 3}, **settings)
    check(tmp_path / "a")
    root = settings.get("use_rslora")
    assert read(tmp_path / "a").adapter.scaling == pytest.approx(
        {"body.fc1": 8 / 2**0.5 if root else 4.0, "body.fc2": 3 / 2 if root else 0.75}
    )


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": ["body.fc1.weight"]}, "target_parameters"),
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "TRAINABLE_TOKENS"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_its_name(
    plain: Path, tmp_path: Path, about: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        read(copied(plain, tmp_path / "a", **about))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("oft_blocks", "OFT"),
        ("dora_scale", "DoRA"),
        ("diff", "whole"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
    ],
)
def test_the_methods_of_lycoris_are_named(tmp_path: Path, part: str, said: str) -> None:
    save_file(
        {
            f"lycoris_body_fc1.{part}": torch.ones(4, 4),
            "lycoris_body_fc1.alpha": torch.tensor(4.0),
            "lycoris_body_fc2.lora_down.weight": torch.ones(2, 12),
            "lycoris_body_fc2.lora_up.weight": torch.ones(3, 2),
        },
        tmp_path / "x.safetensors",
    )
    with pytest.raises(BadInput, match=said):
        read(tmp_path / "x.safetensors")


def test_lora_of_lycoris_is_read(plain: Path, tmp_path: Path) -> None:
    """LoCon without a factor in the middle is LoRA, under kohya's names and a prefix of its own."""
    tensors = {}
    for name, tensor in load_file(plain / WEIGHTS).items():
        module, side = name.removeprefix("base_model.model.").split(".lora_")
        tensors[f"lycoris_{module.replace('.', '_')}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = tensor
    save_file(tensors | {f"lycoris_body_fc{n}.alpha": torch.tensor(8.0) for n in (1, 2)}, tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors")


def test_mlx_and_torchtune_say_which_they_are(plain: Path, tmp_path: Path) -> None:
    """MLX keeps factors the other way round and its own config; torchtune writes lora_a and lora_b."""
    out = copied(plain, tmp_path / "mlx")
    (out / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}))
    with pytest.raises(BadInput, match="MLX"):
        read(out)
    lower = copied(plain, tmp_path / "tune", lambda name: name.replace("lora_A", "lora_a").replace("lora_B", "lora_b"))
    with pytest.raises(BadInput, match="lora_a"):
        read(lower)


def test_a_gguf_file_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 64)
    with pytest.raises(BadInput, match="safetensors"):
        read(tmp_path / "adapter.gguf")


# --- Gradients and weights ---


def test_a_dropout_by_a_function_gets_a_sentence() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(F.dropout(x.flatten(1), 0.5, self.training))
            return logits

    Model.of(Dropped(), OWN, mode="eval").check_works()
    with pytest.raises(BadInput, match=r"draws random numbers .* nn\.Dropout"):
        Model.of(Dropped(), OWN, mode="train").check_works()


def gradient(count: int = 2) -> tuple[nn.Module, dict[str, Tensor]]:
    network = factory()
    loss = F.cross_entropy(network(PICTURES[:count]), LABELS[:count])
    parameters = dict(network.named_parameters())
    return network, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("how", ["float16 times 65536 / 2^12", "bfloat16 times 1024"])
def test_gradients_of_mixed_precision_are_scaled_back(how: str) -> None:
    """GradScaler multiplies by a power of 2, which is exact; what is left is the rounding of the short format."""
    kind, scale = (torch.float16, 16.0) if "float16 times 6" in how else (torch.bfloat16, 1024.0)
    _, grads = gradient(1)
    seen = Observation(model=model(), released={n: (g * scale).to(kind) for n, g in grads.items()}, batch_size=1)
    found = with_factor_found(seen)
    assert found.factor == pytest.approx(scale, rel=REPLAY_TOLERANCE[found.precision])
    assert found.residual(PICTURES[:1], LABELS[:1]) < REPLAY_TOLERANCE[found.precision]


def flattened_table(grads: dict[str, Tensor], path: Path) -> None:
    """As pandas writes a frame of (parameter, flattened array) without shapes."""
    names, values = list(grads), [g.flatten().tolist() for g in grads.values()]
    parquet.write_table(pa.table({"name": names, "values": pa.array(values, pa.list_(pa.float32()))}), path)


@pytest.mark.parametrize("form", ["arr_0.npz", "flat.parquet", "big-endian.npz", "float64.npz", "prefixed.safetensors"])
def test_arrays_as_people_save_them(tmp_path: Path, form: str) -> None:
    _, grads = gradient()
    path = tmp_path / form
    if form == "arr_0.npz":
        np.savez_compressed(path, *[g.numpy() for g in grads.values()])
    elif form == "flat.parquet":
        flattened_table(grads, path)
    elif form == "big-endian.npz":
        np.savez(path, **{name: g.numpy().astype(">f4") for name, g in grads.items()})  # type: ignore[arg-type]
    elif form == "float64.npz":
        np.savez(path, **{name.replace(".", "/"): g.double().numpy() for name, g in grads.items()})  # type: ignore[arg-type]
    else:
        save_file({f"_fsdp_wrapped_module.module.{name}.grad": g for name, g in grads.items()}, path)
    seen = Observation(model=model(), released=load_arrays(path), batch_size=2)
    assert set(seen.released) == set(grads)
    assert seen.residual(PICTURES, LABELS) < REPLAY_TOLERANCE["float32"]


# --- Weights beside an adapter ---


def test_a_first_layer_that_was_trained_whole_gives_its_picture(tmp_path: Path) -> None:
    """PEFT trains modules_to_save as they are: a step of SGD leaves their gradient (Phong et al. 2017, section III), and the bias of the
    head rises for the label alone (iDLG, arXiv:2001.02610)."""
    trained(tmp_path / "a", count=1, target_modules=["fc2"], modules_to_save=["fc1", "act"], bias="all")
    seen = read_adapter(tmp_path / "a", model(), recipe=ONE, batch_size=1)
    assert set(seen.adapter.changed) == {"body.fc1.weight", "body.fc1.bias", "body.fc2.bias"}
    labels = [sentence for name, _, sentence in seen.reservations() if name == "labels"]
    assert len(labels) == 1
    assert f"rose for the classes {int(LABELS[0])}:" in labels[0]
    save_observation(seen, tmp_path / "o.safetensors")
    for observation in (seen, load_observation(tmp_path / "o.safetensors", factory=OWN.name)):
        whole = whole_weights(observation)
        assert whole is not None
        assert isinstance(whole.release, Update)
        found = Analytic()(Observation(**{**vars(whole), "labels": LABELS[:1]}), generator=torch.Generator())
        assert (
            float((found.value - PICTURES[:1]).abs().max()) < 1e-3
        )  # a difference of weights of size 0.3 keeps four digits
        assert found.residual < REPLAY_TOLERANCE["float32"] * 10  # the same digits


def test_an_adapter_alone_has_no_whole_weights(plain: Path) -> None:
    assert whole_weights(read(plain)) is None


def test_an_audit_reads_what_was_trained_whole(tmp_path: Path) -> None:
    write_base(model(), tmp_path / "base")
    trained(tmp_path / "a", count=1, target_modules=["fc2"], modules_to_save=["fc1"])
    args = ["audit", str(tmp_path / "a"), "--base", str(tmp_path / "base"), "--model", OWN.name, "--lr", "0.1"]
    assert main([*args, "--attacks", "analytic", "--out", str(tmp_path / "out")]) == 0
    rows = record.read(tmp_path / "out" / "record.json")["results"]
    ran = {row["observation"]["name"]: row["ran"] for row in rows}
    assert ran == {"adapter": False, "weights beside": True}
