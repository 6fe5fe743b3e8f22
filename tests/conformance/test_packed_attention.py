"""Models of one's own with torch.nn.MultiheadAttention, whose queries, keys and values are one parameter: gradients under the names that
torch gives them, texts, and the adapter that PEFT puts on them."""

from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from gradleak.attacks.dager.dager import Dager
from gradleak.audit.checks import REPLAY_TOLERANCE
from gradleak.formats.peft import read_adapter
from gradleak.formats.plain_file import known_network, read_release
from gradleak.modalities.language_models import LanguageArchitecture, Task
from gradleak.modalities.linear_attention import LinearAttention, with_linear_attention
from gradleak.modalities.losses import CROSS_ENTROPY
from gradleak.modalities.networks import Architecture
from gradleak.observations.model import LanguageModel, Model
from gradleak.observations.observation import Observation
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.small_language import train_tokenizer

TEXTS = ("please call the clinic about the blood test", "our flight to lisbon leaves at seven")
WIDTH, LENGTH, RANK = 64, 40, 32
ROUNDING = 1e-5  # of sums of some hundred products in float32, each 6e-8


class Reader(nn.Module):
    """Tokens and places, torch's encoder, and a head: a text model as people write it."""

    def __init__(self, size: int, *, causal: bool, batch_first: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(size, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=batch_first, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.causal, self.batch_first = nn.Linear(WIDTH, size if causal else 2), causal, batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        n = input_ids.shape[1]
        x = self.words(input_ids) + self.places(torch.arange(n))
        mask = torch.ones(n, n).triu(1).bool() if self.causal else None
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask=mask, src_key_padding_mask=attention_mask == 0)
        x = x if self.batch_first else x.transpose(0, 1)
        return (self.head(x if self.causal else x.mean(1)),)


@cache
def tokenizer(task: Task) -> Any:
    return train_tokenizer(TEXTS, "gpt2" if task == "causal-lm" else "bert", size=330)


def reader(task: Task, batch_first: bool) -> tuple[Reader, LanguageArchitecture]:
    torch.manual_seed(0)
    known = tokenizer(task)
    about = cast(Any, PretrainedConfig)(
        vocab_size=len(known), max_position_embeddings=LENGTH, num_hidden_layers=2, pad_token_id=known.pad_token_id
    )
    network = Reader(len(known), causal=task == "causal-lm", batch_first=batch_first)
    for parameter in network.parameters():  # in_proj_bias and the norms begin at 0 and 1
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return network, LanguageArchitecture("own", about, task, known)


def fed(architecture: LanguageArchitecture) -> tuple[Any, Any]:
    inputs = architecture.encode(TEXTS[1:])
    return inputs, torch.tensor([1]) if architecture.task == "classification" else None


def loss_of(network: Any, architecture: LanguageArchitecture) -> Tensor:
    inputs, labels = fed(architecture)
    ids, mask = architecture.padded(inputs)
    logits = network(ids, mask)[0]
    return CROSS_ENTROPY(*architecture.compared(logits, inputs, labels))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["plain", "causal", "padded", "other keys", "alone"])
def test_it_computes_what_torch_computes(masked: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    packed.in_proj_bias.data.normal_()
    apart = with_linear_attention(packed)
    assert isinstance(apart, LinearAttention)
    shape = (3, 5, 16) if batch_first else (5, 3, 16)
    x = torch.randn(5, 16) if masked == "alone" else torch.randn(shape)
    y = torch.randn(shape) if masked == "other keys" else x
    settings: dict[str, Any] = {"average_attn_weights": batch_first}
    if masked == "causal":
        settings["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(5)
    if masked == "padded":
        settings["key_padding_mask"] = torch.arange(5) > torch.tensor([[4], [2], [3]])
    for one, two in zip(packed(x, y, y, **settings), apart(x, y, y, **settings), strict=True):
        assert torch.allclose(one, two, rtol=ROUNDING, atol=ROUNDING)


def test_what_is_no_packed_attention_stays_itself() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    assert with_linear_attention(module) is module
    odd = nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=4), nn.MultiheadAttention(8, 2, add_bias_kv=True)])
    assert with_linear_attention(odd) is odd


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_the_text_of_a_gradient_comes_back(task: Task, batch_first: bool) -> None:
    """Where the layers lie is found by running the model; the names of the gradients are torch's own."""
    network, architecture = reader(task, batch_first)
    network.train()
    loss_of(network, architecture).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert "encoder.layers.0.self_attn.in_proj_weight" in gradients
    model: LanguageModel = Model.of(network, architecture)
    seen = Observation(model=model, released=cast(Any, gradients), batch_size=1)
    inputs, labels = fed(architecture)
    assert seen.residual(inputs, labels) < REPLAY_TOLERANCE["float32"]
    assert layout_of(model).attention == {"encoder.layers.0.self_attn.in_proj": "all"}
    assert Dager()(seen, generator=torch.Generator().manual_seed(0)).value == inputs


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_the_text_of_pefts_adapter_comes_back(task: Task, tmp_path: Path) -> None:
    """PEFT adapts in_proj under the attention's own name, and out_proj; one step of SGD at fewer tokens than the rank (arXiv:2405.15586)."""
    network, architecture = reader(task, batch_first=True)
    model: LanguageModel = Model.of(network, architecture)
    adapted: Any = get_peft_model(cast(Any, network), LoraConfig(r=RANK, lora_alpha=16, target_modules=["self_attn"]))
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.01)
    loss_of(adapted, architecture).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    adapted.save_pretrained(str(tmp_path))
    inputs, labels = fed(architecture)
    seen = read_adapter(tmp_path, model, recipe=Recipe(learning_rate=0.01, steps=1), batch_size=1)
    assert set(seen.adapter.scaling) == {
        f"encoder.layers.{block}.self_attn.{part}" for block in range(2) for part in ("in_proj", "out_proj")
    }
    # PEFT takes the weights apart and together again around each pass, which leaves their rounding.
    assert seen.residual(inputs, labels) < 10 * REPLAY_TOLERANCE["float32"]
    assert Dager()(seen, generator=torch.Generator().manual_seed(0)).value == inputs


class Looker(nn.Module):
    """Rows of a picture as tokens, and an attention of one's own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0].transpose(0, 1)  # (height, batch, width)
        logits: Tensor = self.head(self.attention(rows, rows, rows)[0].mean(0))
        return logits


def looker(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return Looker()


def test_files_of_weights_and_gradients_in_torchs_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x, y = Looker(), torch.rand(1, 1, 8, 8), torch.tensor([3])
    CROSS_ENTROPY(network(x), y).backward()  # type: ignore[no-untyped-call]
    save_file({name: p.detach() for name, p in network.named_parameters()}, tmp_path / "w.safetensors")
    save_file({f"module.{n}": cast(Tensor, p.grad) for n, p in network.named_parameters()}, tmp_path / "g.safetensors")
    name = f"{__name__}:looker"
    model = known_network(name, (1, 8, 8), 10, tmp_path / "w.safetensors", "eval", CROSS_ENTROPY)
    seen = read_release(tmp_path / "g.safetensors", model, None, 1)
    assert seen.residual(x, y) < REPLAY_TOLERANCE["float32"]
    assert isinstance(Architecture(name, (1, 8, 8), 10).build(0).attention, LinearAttention)
