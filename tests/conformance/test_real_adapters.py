"""Adapters as the ecosystem makes them, trained by PEFT and torch.optim themselves: what lies in their files is read, and said."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradleak.cli.app import main
from gradleak.cli.flags import Audit
from gradleak.cli.inputs import observed, observed_files
from gradleak.errors import BadInput
from gradleak.formats.adapter_files import located_adapter
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.formats.peft import read_adapter, read_adapter_and_base
from gradleak.modalities.networks import Architecture
from gradleak.modalities.transformers_networks import quiet_transformers
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.training import Recipe

WORDS = [
    "the",
    "merger",
    "stays",
    "secret",
    "until",
    "friday",
    "please",
    "call",
    "clinic",
    "about",
    "blood",
    "test",
    "our",
    "flight",
    "leaves",
    "at",
    "seven",
]
TEXTS = ("the merger stays secret", "please call the clinic")
OWN = Architecture("own", (1, 4, 4), 3)
PICTURES, LABELS = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
QKV = ["q_proj", "k_proj", "v_proj"]
ROUNDING = 1e-4  # relative, of float32 numbers after a few steps and differences of them


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT and transformers as loud as they are is not what is tested."""
    with warnings.catch_warnings(action="ignore"), quiet_transformers():
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential()
    for name, layer in {
        "flat": nn.Flatten(),
        "fc1": nn.Linear(16, 12),
        "act": nn.Tanh(),
        "fc2": nn.Linear(12, 3),
    }.items():
        inner.add_module(name, layer)
    whole = nn.Sequential()
    whole.add_module("text_model", inner)
    return whole


def trained(
    network: Any, loss: Callable[[Any], Tensor], folder: Path, *, steps: int = 1, lr: float = 0.1, **settings: Any
) -> Any:
    """PEFT's adapter of a network after SGD, in a folder; the network with the adapter in place. start: a folder for where it began."""
    from peft import LoraConfig, get_peft_model

    start, optimiser = settings.pop("start", None), settings.pop("optimiser", torch.optim.SGD)
    adapted = settings.pop("adapted", None)
    with quietly():
        torch.manual_seed(1)
        adapted = adapted or get_peft_model(network, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
        adapted.eval()
        if start is not None:
            adapted.save_pretrained(str(start), save_embedding_layers=False)
        took = optimiser([p for p in adapted.parameters() if p.requires_grad], lr=lr)
        for _ in range(steps):
            took.zero_grad()
            loss(adapted).backward()  # type: ignore[no-untyped-call]
            took.step()
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def on_pictures(adapted: Any) -> Tensor:
    return nn.functional.cross_entropy(adapted(PICTURES), LABELS)


def model() -> Model[Architecture]:
    return Model.of(network(), OWN)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    trained(network(), on_pictures, folder, target_modules=["fc1", "fc2"])
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def renamed(folder: Path, out: Path, change: Callable[[str], str]) -> Path:
    """The same adapter under other names."""
    out.mkdir()
    (out / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    save_file({change(key): tensor for key, tensor in tensors_of(folder).items()}, out / "adapter_model.safetensors")
    return out


def assert_same(one: Observation[Any], other: Observation[Any]) -> None:
    assert one.released.keys() == other.released.keys()
    assert all(torch.equal(tensor, other.released[name]) for name, tensor in one.released.items())
    assert one.adapter.scaling == other.adapter.scaling


# --- Names and files ---


@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"_orig_mod.{key}",  # torch.compile of the adapted model, or of the base model first
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: f"module.{key}",  # DataParallel
        lambda key: f"_fsdp_wrapped_module.{key.replace('text_model.', 'text_model._fsdp_wrapped_module.')}",
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("text_model.", ""),
        lambda key: key.replace("base_model.model.", "base_model.model.model.language_model."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".my-adapter.weight"),
    ],
)
def test_wrappers_are_no_part_of_a_name(plain: Path, tmp_path: Path, change: Callable[[str], str]) -> None:
    assert_same(read_adapter(renamed(plain, tmp_path / "a", change), model()), read_adapter(plain, model()))


def kohya(key: str) -> str:
    """As the scripts of kohya-ss call it."""
    module, side = key.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
    return f"lora_te_{module.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight"


def diffusers(key: str) -> str:
    return key.replace("base_model.model.", "text_encoder.")


def older_diffusers(key: str) -> str:
    return diffusers(key).replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up")


@pytest.mark.parametrize("names", [kohya, diffusers, older_diffusers])
def test_single_files_have_the_rank_of_their_shapes_and_alpha_beside(
    plain: Path, tmp_path: Path, names: Callable[[str], str]
) -> None:
    tensors = {names(key): tensor for key, tensor in tensors_of(plain).items()}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    read = read_adapter(tmp_path / "pytorch_lora_weights.safetensors", model())
    assert read.adapter.scaling == {
        "text_model.fc1": 1.0,
        "text_model.fc2": 1.0,
    }  # alpha is the rank where nothing is said
    alphas = {f"{key.split('.lora')[0]}.alpha": torch.tensor(8) for key in tensors}  # scripts store whole numbers too
    save_file(tensors | alphas, tmp_path / "pytorch_lora_weights.safetensors")
    assert_same(read_adapter(tmp_path, model()), read_adapter(plain, model()))  # the only one in its folder


def test_the_other_parts_of_a_pipeline_are_named(plain: Path, tmp_path: Path) -> None:
    """A file of LoRA for the denoising network as for the text encoder, and the base model is the latter."""
    for names, other in ((kohya, "lora_unet_down_blocks_0_to_q.lora_"), (diffusers, "unet.down_blocks.0.to_q.lora.")):
        tensors = {names(key): tensor for key, tensor in tensors_of(plain).items()}
        save_file(tensors, tmp_path / "alone.safetensors")
        more = {f"{other}down.weight": torch.ones(4, 7), f"{other}up.weight": torch.ones(7, 4)}
        save_file(tensors | more, tmp_path / "both.safetensors")
        both, alone = (read_adapter(tmp_path / f"{name}.safetensors", model()) for name in ("both", "alone"))
        assert_same(both, alone)
        assert "1 modules of" in {n: s for n, _, s in both.reservations()}["not_read"]
        assert "not_read" not in {n for n, _, _ in alone.reservations()}
        save_file(more, tmp_path / "other.safetensors")
        with pytest.raises(BadInput, match="do not belong together"):
            read_adapter(tmp_path / "other.safetensors", model())


def test_the_alpha_of_newer_diffusers_is_in_the_header(plain: Path, tmp_path: Path) -> None:
    about = {"text_encoder.r": 4, "text_encoder.lora_alpha": 8}
    tensors = {diffusers(key): tensor for key, tensor in tensors_of(plain).items()}
    save_file(tensors, tmp_path / "l.safetensors", metadata={"lora_adapter_metadata": json.dumps(about)})
    assert_same(read_adapter(tmp_path / "l.safetensors", model()), read_adapter(plain, model()))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("text_model.fc1.lora_magnitude_vector.weight", "is DoRA"),
        ("lora_te_text_model_fc1.dora_scale", "is DoRA"),
        ("lora_te_text_model_fc1.hada_w1_a", "is LoHa"),
        ("lora_te_text_model_fc1.lokr_w1", "is LoKr"),
    ],
)
def test_other_methods_are_named(plain: Path, tmp_path: Path, key: str, hint: str) -> None:
    save_file({**tensors_of(plain), key: torch.ones(4)}, tmp_path / "l.safetensors")
    with pytest.raises(BadInput, match=hint):
        read_adapter(tmp_path / "l.safetensors", model())


def test_shards_that_were_not_gathered_are_told(plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path / "a", str)
    save_file({key: torch.empty(0) for key in tensors_of(plain)}, folder / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="ZeRO-3"):
        read_adapter(folder, model())


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {r".*\.fc\d": 2}, "alpha_pattern": {"fc(1|3)": 5}},
        {"rank_pattern": {"fc1": 3, ".*fc.*": 2}},  # the first that fits
        {"rank_pattern": {"^text_model.fc2": 1}, "alpha_pattern": {"text_model.fc[0-9]": 3}, "use_rslora": True},
        {"rank_pattern": {"c1": 3}, "alpha_pattern": {"fc": 3}},  # fit the end of no name
    ],
)
def test_patterns_are_those_that_peft_applies(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapted = trained(network(), on_pictures, tmp_path, target_modules=["fc1", "fc2"], **settings)
    read = read_adapter(tmp_path, model()).adapter
    for module, s in read.scaling.items():
        layer = adapted.base_model.model.get_submodule(module)
        assert s == pytest.approx(layer.scaling["default"])
        assert len(read.start[f"{module}.lora_A"]) == layer.r["default"]


def test_an_expression_that_could_take_for_ever_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path / "a", str)
    for pattern in ("(a+)+", "(a|a)*", ".*.*.*.*.*", "(", "a" * 400):
        config = json.loads((plain / "adapter_config.json").read_text()) | {"rank_pattern": {pattern: 4}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(BadInput, match="has the pattern"):
            read_adapter(folder, model())


class WithAttention(nn.Module):
    """A layer that PEFT adapts and that is not read, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.attention = nn.MultiheadAttention(
            4, 1, batch_first=True, add_zero_attn=True
        )  # more than two linear layers
        self.fc = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1, 2)
        logits: Tensor = self.fc(self.attention(rows, rows, rows)[0].flatten(1))
        return logits


def test_an_adapted_layer_of_another_kind_is_named(tmp_path: Path) -> None:
    trained(WithAttention(), on_pictures, tmp_path / "a", target_modules=["attention", "fc"])
    adapter = read_adapter(tmp_path / "a", Model.of(WithAttention(), OWN))
    assert adapter.adapter.scaling.keys() >= {"fc"}
    assert "attention (MultiheadAttention)" in {n: s for n, _, s in adapter.reservations()}["not_read"]
    trained(WithAttention(), on_pictures, tmp_path / "b", target_modules=["fc"])
    said = read_adapter(tmp_path / "b", Model.of(WithAttention(), OWN)).reservations()
    assert "not_read" not in {name for name, _, _ in said}


# --- Folders around adapters, and what a checkpoint tells ---


def test_folders_with_one_adapter_several_and_checkpoints(plain: Path, tmp_path: Path) -> None:
    one = renamed(plain, tmp_path / "english", str)
    assert located_adapter(tmp_path) == located_adapter(one / "adapter_model.safetensors") == one
    other = renamed(plain, tmp_path / "french", str)
    with pytest.raises(BadInput, match=r"holds 2 adapters \(english, french\): give one of them"):
        located_adapter(tmp_path)
    one.rename(tmp_path / "checkpoint-9")
    other.rename(tmp_path / "checkpoint-10")
    with pytest.raises(BadInput, match=r"2 checkpoints .* the newest is .*checkpoint-10\."):
        located_adapter(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no folder of a LoRA adapter"):
        located_adapter(tmp_path / "empty")


def state(rates: list[float | None], steps: int = 4, **more: Any) -> str:
    log = [{"learning_rate": rate, "step": i + 1, "loss": float("nan")} for i, rate in enumerate(rates)]
    return json.dumps({"global_step": steps, "max_steps": 8, "num_train_epochs": 2, "log_history": log, **more})


def audit_of(folder: Path, base: Path | None, **flags: Any) -> Observation[Any]:
    args = Audit(observation=folder, base=None if base is None else str(base), out=folder / "out", **flags)
    assert all(path.is_file() for path in observed_files(args))
    return observed(args)


@pytest.mark.parametrize(
    ("text", "flags", "recipe"),
    [
        (
            state([1e-3, 1e-3], train_batch_size=2),
            {},
            Recipe(optimizer="adam", learning_rate=1e-3, steps=4, batch_size=2),
        ),
        (state([1e-3], steps=1), {"optimizer": "sgd"}, Recipe(learning_rate=1e-3, steps=1)),
        (state([1e-3]), {}, None),  # one entry of four steps says nothing of the others
        (state([1e-3, 5e-4]), {}, None),  # a schedule
        (state([0.0, 0.0]), {}, None),
        (state([]), {}, None),
        (state([1e-3, 1e-3]), {"lr": 0.5}, Recipe(learning_rate=0.5, steps=4)),
        (state([1e-3, 1e-3]), {"lr": 0.5, "steps": 3}, Recipe(learning_rate=0.5, steps=3)),
        (state([1e-3, 5e-4, 2e-4], steps=1), {}, Recipe(optimizer="adam", learning_rate=1e-3, steps=1)),  # a later log
    ],
)
def test_a_checkpoint_tells_its_recipe_where_it_is_constant(
    llama: Path, tmp_path: Path, text: str, flags: dict[str, Any], recipe: Recipe | None
) -> None:
    trained(language(llama), on_texts(llama), tmp_path, target_modules=QKV, task_type="CAUSAL_LM")
    (tmp_path / "trainer_state.json").write_text(text)
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04 never opened")
    adapter = audit_of(tmp_path, llama, **flags)
    assert adapter.adapter.recipe == recipe
    assert adapter.batch_size is None  # four steps an epoch: not one sample
    said = {name: sentence for name, _, sentence in adapter.reservations()}
    assert "trainer_state.json says of the training:" in said["trainer"]
    assert ("no recipe is made of it" in said["trainer"]) == (recipe is None)
    assert ("AdamW without decay is assumed" in said["trainer"]) == (recipe is not None and not flags)
    assert "training_args.bin is a pickle" in said["pickle"]


# --- Heads and biases ---


class Scaled(nn.Module):
    """A layer with parameters that are no matrix, one of them a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.fc, self.out = nn.Linear(16, 12), nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(12)
        self.scale = nn.Module()
        self.scale.register_parameter("alpha", nn.Parameter(torch.ones(12)))
        self.scale.register_parameter("size", nn.Parameter(torch.tensor(2.0)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(self.fc(images.flatten(1))) * self.scale.alpha * self.scale.size)
        return logits


def test_parameters_and_buffers_of_every_shape_beside(tmp_path: Path) -> None:
    """What PEFT saves of a normalisation holds counts of batches and running means, which nobody trains by a gradient."""
    whole = {
        f"base_model.model.scale.{name}": value
        for name, value in (("alpha", torch.rand(12)), ("size", torch.tensor(3.0)))
    }
    trained(Scaled(), on_pictures, tmp_path, target_modules=["fc"], modules_to_save=["norm"])
    save_file({**tensors_of(tmp_path), **whole}, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path, Model.of(Scaled(), OWN), recipe=Recipe(learning_rate=0.1, steps=1))
    assert set(adapter.adapter.beside) == {"norm.weight", "norm.bias", "scale.alpha", "scale.size"}
    assert adapter.residual(PICTURES, LABELS) < ROUNDING


@pytest.mark.parametrize(
    "beside", [{"bias": "all"}, {"bias": "lora_only"}, {"target_modules": ["fc1"], "modules_to_save": ["fc2"]}, {}]
)
def test_what_began_as_the_base_model_has_it_is_trained_along(tmp_path: Path, beside: dict[str, Any]) -> None:
    """`simulate` gives of the true pictures what PEFT and torch left after three steps, when told where A began."""
    settings: dict[str, Any] = {"target_modules": ["fc1", "fc2"], **beside}
    trained(network(), on_pictures, tmp_path / "end", steps=3, start=tmp_path / "start", **settings)
    recipe = Recipe(learning_rate=0.1, steps=3)
    adapter = read_adapter(tmp_path / "end", model(), recipe=recipe, initial=tmp_path / "start")
    assert adapter.residual(PICTURES, LABELS) < ROUNDING
    said = [sentence for name, _, sentence in adapter.reservations() if name == "trained_whole"]
    assert len(said) == (1 if beside else 0)


def test_biases_of_factors_are_held_and_told(tmp_path: Path) -> None:
    for steps in (1, 3):
        trained(network(), on_pictures, tmp_path / str(steps), steps=steps, target_modules=["fc1"], lora_bias=True)
        adapter = read_adapter(tmp_path / str(steps), model(), recipe=Recipe(learning_rate=0.1, steps=steps))
        assert ("the biases of lora_B" in adapter.release.inexact()) == (steps == 3)
    assert (
        read_adapter(tmp_path / "1", model(), recipe=Recipe(learning_rate=0.1, steps=1)).residual(PICTURES, LABELS)
        < ROUNDING
    )


def test_the_head_of_an_image_classifier_is_the_adapters(tmp_path: Path) -> None:
    """The guide of PEFT: a base without a head, or with one of other classes; modules_to_save brings it."""
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
    images = torch.rand(1, 1, 8, 8)
    for name, classes, wanted in (("headless", 3, True), ("other", 3, True), ("same", 10, False)):
        torch.manual_seed(2)
        with quietly():
            config.num_labels = 10
            base: Any = ViTModel(config) if name == "headless" else ViTForImageClassification(config)
            base.save_pretrained(tmp_path / name)
            kind: Any = AutoModelForImageClassification
            net = kind.from_pretrained(tmp_path / name, num_labels=classes, ignore_mismatched_sizes=True)

        def loss(adapted: Any) -> Tensor:
            return nn.functional.cross_entropy(adapted(pixel_values=images).logits, torch.tensor([1]))

        out = tmp_path / f"{name}-adapter"
        adapted = trained(net, loss, out, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        adapter = read_adapter_and_base(out, tmp_path / name, recipe=Recipe(learning_rate=0.1, steps=1))
        assert adapter.model.architecture.classes == classes
        head = adapted.base_model.model.classifier.modules_to_save["default"].weight
        assert torch.equal(adapter.model.parameters["network.classifier.weight"], head) == wanted
        said = {name: sentence for name, _, sentence in adapter.reservations()}
        assert ("start_unknown" in said) == wanted
        assert ("known only as training left it" in adapter.release.inexact()) == wanted
        save_observation(adapter, tmp_path / f"{name}.safetensors")
        again = load_observation(tmp_path / f"{name}.safetensors", factory=str(tmp_path / name))
        assert again.reservations() == adapter.reservations()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "</s>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>")


def saved_llama(tokenizer: Any, folder: Path, *, rows: int = 0, **more: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(3)
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    kind: Any = LlamaConfig
    config = kind(vocab_size=len(tokenizer) + rows, max_position_embeddings=32, **sizes, **tokens, **more)
    with quietly():
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tokenizer, tmp_path_factory.mktemp("llama"))


def language(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with quietly():
        return AutoModelForCausalLM.from_pretrained(folder, **more)


def ids_of(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])


def on_texts(folder: Path) -> Callable[[Any], Tensor]:
    from transformers import AutoTokenizer

    with quietly():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [ids_of(tokenizer, text) for text in TEXTS]

    def loss(adapted: Any) -> Tensor:
        parts = [adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss for ids in rows]
        return torch.stack(parts).mean()

    return loss


def test_the_head_of_a_text_classifier_is_the_adapters(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    with quietly():
        torch.manual_seed(4)
        kind: Any = AutoModelForSequenceClassification
        net = kind.from_pretrained(llama, num_labels=5)
    ids = torch.tensor([[3, 4, 5]])

    def loss(adapted: Any) -> Tensor:
        return nn.functional.cross_entropy(
            adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, torch.tensor([4])
        )

    adapted = trained(net, loss, tmp_path, target_modules=QKV, task_type="SEQ_CLS", lr=1e-4)
    adapter = read_adapter_and_base(tmp_path, llama, recipe=Recipe(learning_rate=1e-4, steps=1))
    assert adapter.model.architecture.task == "classification"
    assert adapter.model.architecture.classes == 5
    head = adapted.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(adapter.model.parameters["score.weight"], head)
    # one step of 1e-4 has hardly moved the head: far nearer than the 1 that another head would leave
    assert adapter.residual(((3, 4, 5),), torch.tensor([4])) < 1e-2
    assert "start_unknown" in {name for name, _, _ in adapter.reservations()}


@pytest.mark.parametrize(("kind", "told"), [("TOKEN_CLS", True), ("CAUSAL_LM", False), (None, False)])
def test_a_task_of_another_kind_is_told(llama: Path, tmp_path: Path, kind: str | None, told: bool) -> None:
    trained(language(llama), on_texts(llama), tmp_path, target_modules=QKV)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"task_type": kind}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter_and_base(tmp_path, llama)
    assert ("task" in {name for name, _, _ in adapter.reservations()}) == told
    assert adapter.model.architecture.task == ("causal-lm" if kind == "CAUSAL_LM" else "classification")
    assert read_adapter_and_base(tmp_path, llama, task="causal-lm").model.architecture.task == "causal-lm"


# --- Embeddings ---


def words_said(adapter: Observation[Any]) -> set[str]:
    """The words that a report says were given away."""
    said = [s for name, level, s in adapter.reservations() if name == "embeddings" and level == "warning"]
    return {part for sentence in said for part in sentence.split("'")[1::2]}


def words_of(texts: tuple[str, ...]) -> set[str]:
    return {word for text in texts for word in text.split()}


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])  # AdamW shrinks every row
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_rows_of_a_trained_embedding_are_the_words(
    llama: Path, tmp_path: Path, optimiser: Any, precision: torch.dtype
) -> None:
    settings: dict[str, Any] = {"target_modules": QKV, "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    trained(language(llama), on_texts(llama), tmp_path, steps=5, lr=1e-2, optimiser=optimiser, **settings)
    save_file({k: t.to(precision) for k, t in tensors_of(tmp_path).items()}, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter_and_base(tmp_path, llama)
    assert words_said(adapter) == words_of(TEXTS)
    assert adapter.model.architecture.task == "causal-lm"  # as the config says


def test_embeddings_that_were_saved_and_not_trained_name_nothing(llama: Path, tmp_path: Path) -> None:
    trained(language(llama), on_texts(llama), tmp_path, target_modules=QKV, task_type="CAUSAL_LM")
    whole = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.weight"
    for kept in (whole, whole.to(torch.float16), whole.to(torch.bfloat16).float()):
        save_file({**tensors_of(tmp_path), key: kept}, tmp_path / "adapter_model.safetensors")
        assert not read_adapter_and_base(tmp_path, llama).reservations()[:-1]  # but that the recipe is unknown


def test_tied_embeddings_name_nothing(tokenizer: Any, tmp_path: Path) -> None:
    base = saved_llama(tokenizer, tmp_path / "base", tie_word_embeddings=True)
    settings: dict[str, Any] = {"target_modules": QKV, "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    trained(language(base), on_texts(base), tmp_path / "a", **settings)
    adapter = read_adapter_and_base(tmp_path / "a", base)
    assert words_said(adapter) == set()
    assert "trained_whole" in {name for name, _, _ in adapter.reservations()}


def test_added_tokens(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    with quietly():
        more = AutoTokenizer.from_pretrained(llama)
        more.add_tokens(["<|name|>", "<|date|>"])
        net = language(llama)
        net.resize_token_embeddings(len(more))
        more.save_pretrained(tmp_path)
    ids = ids_of(more, "the merger <|name|>")
    settings: dict[str, Any] = {
        "target_modules": QKV,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "task_type": "CAUSAL_LM",
    }
    trained(net, lambda m: m(input_ids=ids, labels=ids).loss, tmp_path, **settings)
    adapter = read_adapter_and_base(tmp_path, llama)
    assert adapter.model.architecture.config.vocab_size == len(more) == len(adapter.model.architecture.tokenizer)
    assert adapter.model.architecture.encode(["the merger <|name|>"]) == (tuple(ids[0].tolist()),)
    base = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(adapter.model.parameters["model.embed_tokens.weight"][: len(base)], base)
    assert words_said(adapter) == {"the", "merger"}
    assert "model.embed_tokens.weight" in dict((n, s) for n, _, s in adapter.reservations())["start_unknown"]


def test_a_vocabulary_that_was_cut_has_nothing_unknown(tokenizer: Any, tmp_path: Path) -> None:
    base = saved_llama(tokenizer, tmp_path / "base", rows=12)
    net = language(base)
    with quietly():
        net.resize_token_embeddings(len(tokenizer))
    settings: dict[str, Any] = {
        "target_modules": QKV,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "task_type": "CAUSAL_LM",
    }
    trained(net, on_texts(base), tmp_path / "a", **settings)
    adapter = read_adapter_and_base(tmp_path / "a", base)
    assert len(adapter.model.parameters["lm_head.weight"]) == len(tokenizer)
    assert words_said(adapter) == words_of(TEXTS)
    assert "start_unknown" not in {name for name, _, _ in adapter.reservations()}


def test_lora_on_an_embedding_and_trained_tokens(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    trained(
        language(llama),
        on_texts(llama),
        tmp_path / "lora",
        target_modules=[*QKV, "embed_tokens"],
        task_type="CAUSAL_LM",
    )
    lora = read_adapter_and_base(tmp_path / "lora", llama)
    assert words_said(lora) == words_of(TEXTS)
    assert len(lora.released) == 6  # B of query, key and value in two layers
    indices = [tokenizer.convert_tokens_to_ids(word) for word in ("merger", "seven", "clinic")]
    for name, wanted in (("list", indices), ("dict", {"embed_tokens": indices})):
        more: dict[str, Any] = {"target_modules": QKV, "trainable_token_indices": wanted, "task_type": "CAUSAL_LM"}
        trained(language(llama), on_texts(llama), tmp_path / name, **more)
        assert words_said(read_adapter_and_base(tmp_path / name, llama)) == {"merger", "clinic"}


def test_an_audit_says_the_words_first(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seven words in eight places at rank 4: no attack proves a word, and the verdict does not call that nothing."""
    settings: dict[str, Any] = {"target_modules": QKV, "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    trained(language(llama), on_texts(llama), tmp_path / "a", steps=5, optimiser=torch.optim.AdamW, lr=1e-3, **settings)
    assert (
        main(["audit", str(tmp_path / "a"), "--base", str(llama), "--attacks", "dager", "--out", str(tmp_path / "o")])
        == 0
    )
    verdict = json.loads((tmp_path / "o" / "record.json").read_text())["verdict"]
    assert verdict["level"] == "partial"
    assert verdict["sentence"].startswith(
        "The embeddings give 7 words of the private texts away, with no attack at all:"
    )
    assert verdict["sentence"] in capsys.readouterr().out
    assert "merger" in (tmp_path / "o" / "report.html").read_text()


# --- Second rounds ---


def test_a_second_round_of_everything(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    """One SGD step from where another training ended: the model at the start has all its parts, and the step is the gradient there."""
    settings: dict[str, Any] = {
        "target_modules": [*QKV, "embed_tokens"],
        "modules_to_save": ["lm_head"],
        "task_type": "CAUSAL_LM",
    }
    adapted = trained(language(llama), on_texts(llama), tmp_path / "first", steps=3, **settings)
    ids = ids_of(tokenizer, "our flight leaves")
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
    trained(None, lambda m: m(input_ids=ids, labels=ids).loss, tmp_path / "second", adapted=adapted)
    recipe = Recipe(learning_rate=0.1, steps=1)
    second = read_adapter_and_base(tmp_path / "second", llama, recipe=recipe, initial=tmp_path / "first")
    inputs = (tuple(ids[0].tolist()),)
    assert second.adapter.origin == "given"
    here = second.model.logits(second.adapter.merged(second.model, {}), inputs)
    assert torch.allclose(here, logits, atol=1e-4)  # float32, logits of size one
    assert second.residual(inputs, None) < ROUNDING
    assert words_said(second) == {"our", "flight", "leaves"}  # and none of the round before


# --- Base models ---


def test_the_base_model_that_the_config_names(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    trained(language(llama), on_texts(llama), tmp_path / "a", target_modules=QKV, task_type="CAUSAL_LM")
    assert_same(audit_of(tmp_path / "a", None), audit_of(tmp_path / "a", llama))  # from_pretrained has kept the folder
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())

    def named(name: str | None) -> None:
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    named("somebody/tiny")
    with pytest.raises(BadInput, match=r"'somebody/tiny' is no folder here"):
        audit_of(tmp_path / "a", None)
    named(None)
    with pytest.raises(BadInput, match="say with --base"):
        audit_of(tmp_path / "a", None)


def test_shards_and_short_formats(tokenizer: Any, llama: Path, tmp_path: Path) -> None:
    trained(language(llama), on_texts(llama), tmp_path / "a", target_modules=QKV, task_type="CAUSAL_LM")
    with quietly():
        language(llama).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        language(llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
        for name in ("shards", "bf16"):
            tokenizer.save_pretrained(tmp_path / name)
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    whole = read_adapter_and_base(tmp_path / "a", llama).model.parameters
    for name, kind in (("shards", torch.float32), ("bf16", torch.bfloat16)):
        parameters = read_adapter_and_base(tmp_path / "a", tmp_path / name).model.parameters
        assert parameters.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[key].to(kind).float()) for key, tensor in parameters.items())
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001-of', '"../model-00001-of'))
    with pytest.raises(BadInput, match="no file beside it"):
        read_adapter_and_base(tmp_path / "a", tmp_path / "shards")


def test_a_quantised_base_is_told(tokenizer: Any, llama: Path, tmp_path: Path) -> None:
    trained(language(llama), on_texts(llama), tmp_path / "a", target_modules=QKV, task_type="CAUSAL_LM")
    base = saved_llama(tokenizer, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"is quantised \(bitsandbytes\)"):
        read_adapter_and_base(tmp_path / "a", base)


def test_a_tokenizer_that_is_a_list_of_words(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    with quietly():
        kind: Any = BertForSequenceClassification
        net = kind(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes))
        net.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    ids = torch.tensor([[2, 5, 6, 3]])

    def loss(adapted: Any) -> Tensor:
        return nn.functional.cross_entropy(adapted(input_ids=ids).logits, torch.tensor([1]))

    trained(net, loss, tmp_path / "a", target_modules=["query", "value"])
    adapter = read_adapter_and_base(tmp_path / "a", tmp_path / "base", recipe=Recipe(learning_rate=0.1, steps=1))
    assert adapter.model.architecture.encode(["the merger"]) == ((2, 5, 6, 3),)
    assert adapter.residual(((2, 5, 6, 3),), torch.tensor([1])) < ROUNDING
