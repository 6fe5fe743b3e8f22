"""Families of language models, none of which is known by name: where they keep their layers is found by running them, and a short
text comes back from an adapter of one step."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from gradleak.attacks.dager import arrangement
from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.dager.judge import Judge, layers_behind
from gradleak.attacks.dager.spans import FORWARD
from gradleak.attacks.dager.vocabulary import Embeddings
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import LanguageArchitecture, Task, build
from gradleak.modalities.texts import Texts
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel, Model
from gradleak.observations.observation import TextObservation
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.small_language import train_tokenizer

TEXTS = (
    "please call the clinic about the blood test",
    "our flight to lisbon leaves at seven",
    "my new address is behind the old mill",
)
WIDTH, LAYERS, POSITIONS, RANK = 64, 3, 40, 32
LONG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
PLAIN = LONG | {"intermediate_size": 128}
GROUPED = PLAIN | {"num_key_value_heads": 2}
SHORT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
OPT = LONG | {"ffn_dim": 128, "word_embed_proj_dim": WIDTH}
T5 = {"decoder_start_token_id": 1, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": LAYERS, "num_heads": 4}
DISTILBERT = {"dim": WIDTH, "hidden_dim": 128, "n_layers": LAYERS, "n_heads": 4, "max_position_embeddings": POSITIONS}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {  # {family: its configuration in transformers, and sizes}
    "BERT": ("BertConfig", PLAIN),
    "MiniLM": ("BertConfig", PLAIN | {"hidden_size": 48, "num_attention_heads": 12}),
    "RoBERTa": ("RobertaConfig", PLAIN),
    "DistilBERT": ("DistilBertConfig", DISTILBERT),
    "ELECTRA": ("ElectraConfig", PLAIN | {"embedding_size": WIDTH}),
    "ELECTRA-small": ("ElectraConfig", PLAIN | {"embedding_size": WIDTH // 2}),
    "DeBERTa-v2": ("DebertaV2Config", PLAIN),
    "DeBERTa-v3": ("DebertaV2Config", PLAIN | DISENTANGLED | {"share_att_key": True, "initializer_range": 0.1}),
    "RoFormer": ("RoFormerConfig", PLAIN | {"embedding_size": WIDTH, "initializer_range": 0.1}),
    "BigBird": ("BigBirdConfig", PLAIN),
    "ModernBERT": (
        "ModernBertConfig",
        PLAIN | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "T5": ("T5Config", T5),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2Config", SHORT),
    "GPT-Neo": ("GPTNeoConfig", LONG | {"attention_types": [[["global"], LAYERS]]}),
    "OPT": ("OPTConfig", OPT),
    "OPT-350m": ("OPTConfig", OPT | {"word_embed_proj_dim": WIDTH // 2, "do_layer_norm_before": False}),
    "Llama": ("LlamaConfig", GROUPED),
    "Mistral": ("MistralConfig", GROUPED),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "Gemma 2": ("Gemma2Config", GROUPED | {"head_dim": 16}),
    "Gemma 3": ("Gemma3TextConfig", GROUPED | {"head_dim": 16}),
    "Phi-3": ("Phi3Config", GROUPED),
    "OLMo": ("OlmoConfig", GROUPED),
    "OLMo 2": ("Olmo2Config", GROUPED),
    "Phi": ("PhiConfig", GROUPED),
    "Mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 2}),
    "GPT-J": ("GPTJConfig", SHORT | {"rotary_dim": 8}),
    "GPT-NeoX": ("GPTNeoXConfig", PLAIN),
    "Falcon": ("FalconConfig", PLAIN | {"ffn_hidden_size": 128}),
    "Mamba": ("MambaConfig", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS}),
}
# What they are, from their papers: whether the first layer sees absolute positions.
PLACED = {"BERT", "MiniLM", "RoBERTa", "DistilBERT", "ELECTRA", "ELECTRA-small", "DeBERTa-v2", "BigBird"} | {
    "GPT-2",
    "GPT-Neo",
    "OPT",
    "OPT-350m",
}
EVERY = [*ENCODERS, *DECODERS]


@cache
def tokenizer(kind: str) -> Any:
    return train_tokenizer(TEXTS, "bert" if kind == "bert" else "gpt2", size=360)


def made(name: str, sizes: dict[str, Any], task: Task) -> LanguageModel:
    """A tiny random one, with norms that are not the identity."""
    known = tokenizer("gpt2" if task == "causal-lm" else "bert")
    ends = {"pad_token_id": known.pad_token_id}
    if task == "causal-lm":
        ends |= {"bos_token_id": None, "eos_token_id": known.eos_token_id}
    config = getattr(transformers, name)(vocab_size=len(known), **ends | sizes)
    module, config = build(config, task, classes=2, tokenizer=known, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Model.of(module, LanguageArchitecture(name, config, task, known))


@cache
def model(family: str) -> LanguageModel:
    name, sizes = (ENCODERS | DECODERS)[family]
    return made(name, sizes, "causal-lm" if family in DECODERS or family == "T5" else "classification")


def shared(own: LanguageModel, number: int = 1) -> tuple[TextObservation, Secret]:
    """LoRA factors of query, key and value of every block, after one step of SGD on one text."""
    _, secret = capture_gradient(own, Texts((TEXTS[number],), torch.tensor([1]), 2, "here", "test"))
    modules = [name for block in range(LAYERS) for name in layout_of(own).queries(block)]
    return share_adapter(own, secret, modules=modules, rank=RANK, recipe=Recipe(learning_rate=1e-2, steps=1)), secret


def attack(seen: TextObservation) -> Reconstruction:
    return Dager()(seen, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", EVERY)
def test_a_short_text_comes_back_from_an_adapter(family: str) -> None:
    """Fewer tokens than the rank leave a span that they alone lie in (arXiv:2405.15586, section 4)."""
    seen, secret = shared(model(family))
    assert len(secret.inputs[0]) <= 16
    assert attack(seen).value == secret.inputs


@pytest.mark.parametrize("family", EVERY)
def test_a_family_is_what_its_paper_says(family: str) -> None:
    layout = layout_of(model(family))
    assert layout.causal == (family in DECODERS)
    assert layout.placed == (family in PLACED)
    roles = {
        "query": ("query", "query_proj", "q_proj", "q_lin", "q"),
        "key": ("key", "key_proj", "k_proj", "k_lin", "k"),
    }
    roles |= {"value": ("value", "value_proj", "v_proj", "v_lin", "v")}
    for name, role in layout.attention.items():  # names are what the code does not read
        assert role == next((known for known, names in roles.items() if name.split(".")[-1] in names), "all")


@pytest.mark.parametrize("family", EVERY)
def test_the_first_layers_inputs_are_listed(family: str) -> None:
    """Against the model's own in float64, for random sentences. float32 leaves 1e-6."""
    own, ids = model(family), torch.randint(5, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    exact, name = {key: p.double() for key, p in own.parameters.items()}, layout_of(own).queries(0)[0]
    true = layer_inputs(own, [name], ids, parameters=exact)[name]
    places = torch.arange(12).repeat(4) if layout_of(own).placed else torch.zeros(48, dtype=torch.long)
    listed = Embeddings.of(own).inputs(ids.flatten(), places).reshape(true.shape)
    assert float((listed - true).norm() / true.norm()) < 1e-5


def test_a_word_that_stands_twice_is_put_in_both_places() -> None:
    seen, secret = shared(model("T5"), 0)
    tokens = secret.inputs[0]
    assert len(set(tokens)) < len(tokens)
    found = attack(seen)
    assert (found.value, found.proven) == (secret.inputs, (True,))


def test_an_order_is_not_sure_while_another_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rounding of 1 every row passes, whatever the order."""
    monkeypatch.setattr(arrangement, "TRIED", 1)
    seen, secret = shared(model("T5"))
    rounding, generator = dict.fromkeys(layers_behind(seen.model), FORWARD), torch.Generator().manual_seed(0)
    judge = Judge.of(seen, len(secret.inputs[0]), rounding, generator)
    blurred = replace(judge, rounding=dict.fromkeys(rounding, 1.0))
    found = arrangement.arranged(blurred, sorted(secret.inputs[0]), generator=generator)
    assert found is not None
    assert found[0].passes
    assert not found[1]


def test_positions_end_where_the_table_does() -> None:
    """RoBERTa counts from behind the padding token's id, so that its table has room for fewer tokens than rows."""
    own = model("RoBERTa")
    assert layout_of(own).positions == POSITIONS - own.architecture.config.pad_token_id - 1
    assert layout_of(model("OPT")).positions == layout_of(model("BERT")).positions == POSITIONS


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("AlbertConfig", PLAIN | {"embedding_size": 32}, "first attention more than once"),
        (
            "FNetConfig",
            {key: size for key, size in PLAIN.items() if key != "num_attention_heads"},
            "mixes tokens before",
        ),
    ],
)
def test_a_family_without_a_list_of_inputs_is_refused_by_what_is_missing(
    name: str, sizes: dict[str, Any], reason: str
) -> None:
    own = made(name, sizes, "classification")
    seen, _ = capture_gradient(own, Texts((TEXTS[0],), torch.tensor([1]), 2, "here", "test"))
    with pytest.raises(NotObserved, match=reason):
        attack(seen)
