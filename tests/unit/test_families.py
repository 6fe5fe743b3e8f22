"""Families of language models, none of which is known by name: each gives its text from an adapter of one step."""

from functools import cache
from typing import Any

import transformers

from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import LanguageArchitecture, Task, build
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import LanguageModel, Model
from gradleak.observations.observation import TextObservation
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.small_language import train_tokenizer

WIDTH, POSITIONS, RANK = 64, 40, 32
PLAIN = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
GROUPED = PLAIN | {"num_key_value_heads": 2}
# {family: (its configuration in transformers, whether it is an encoder, sizes)}; what is behind a dash is a form of it
FAMILIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "BERT": ("BertConfig", True, PLAIN),
    "RoBERTa": ("RobertaConfig", True, PLAIN),
    "DistilBERT": (
        "DistilBertConfig",
        True,
        {"dim": WIDTH, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": POSITIONS},
    ),
    "ELECTRA": ("ElectraConfig", True, PLAIN | {"embedding_size": WIDTH}),
    "ELECTRA-small": ("ElectraConfig", True, PLAIN | {"embedding_size": WIDTH // 2}),
    "MiniLM": ("BertConfig", True, PLAIN | {"hidden_size": 48, "num_attention_heads": 12}),
    "GPT-2": ("GPT2Config", False, {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
    "GPT-Neo": (
        "GPTNeoConfig",
        False,
        {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": POSITIONS,
        },
    ),
    "OPT": (
        "OPTConfig",
        False,
        {
            "hidden_size": WIDTH,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": WIDTH,
        },
    ),
    "OPT-350m": (
        "OPTConfig",
        False,
        {
            "hidden_size": WIDTH,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": WIDTH // 2,
            "do_layer_norm_before": False,
        },
    ),
    "Llama": ("LlamaConfig", False, GROUPED),
    "Mistral": ("MistralConfig", False, GROUPED),
    "Qwen2": ("Qwen2Config", False, GROUPED),
    "Qwen3": ("Qwen3Config", False, GROUPED | {"head_dim": 16}),
    "Gemma2": ("Gemma2Config", False, GROUPED | {"head_dim": 16}),
    "Gemma3": ("Gemma3TextConfig", False, GROUPED | {"head_dim": 16}),
    "Phi-3": ("Phi3Config", False, GROUPED),
    "OLMo": ("OlmoConfig", False, GROUPED),
    "OLMo2": ("Olmo2Config", False, GROUPED),
    "T5": ("T5Config", True, {"d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}),
    "GPT-NeoX": ("GPTNeoXConfig", False, PLAIN),
    "GPT-J": (
        "GPTJConfig",
        False,
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8},
    ),
    "Phi": ("PhiConfig", False, GROUPED),
    "Falcon": ("FalconConfig", False, PLAIN | {"ffn_hidden_size": 128}),
    "BLOOM": ("BloomConfig", False, {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4}),
    "DeBERTa-v2": ("DebertaV2Config", True, PLAIN),
    "DeBERTa-v3": (
        "DebertaV2Config",
        True,
        PLAIN
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "share_att_key": True,
        },
    ),
    "ModernBERT": ("ModernBertConfig", True, PLAIN),
    "Mamba": ("MambaConfig", False, {"hidden_size": WIDTH, "num_hidden_layers": 2}),
    "ALBERT": ("AlbertConfig", True, PLAIN | {"embedding_size": WIDTH // 2}),
    "FNet": ("FNetConfig", True, PLAIN),
}


@cache
def tokenizer(encoder: bool) -> Any:
    return train_tokenizer(load_texts("embedded", "train").texts, "bert" if encoder else "gpt2", size=420)


@cache
def model(family: str, task: Task | None = None, spread: float = 0.02) -> LanguageModel:
    name, encoder, sizes = FAMILIES[family]
    known = tokenizer(encoder and family != "T5")
    ends = {"bos_token_id": None, "eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id}
    if encoder and family != "T5":
        ends = {"pad_token_id": known.pad_token_id}
    if family == "ModernBERT":
        ends |= {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    config = getattr(transformers, name)(vocab_size=len(known), **sizes, **ends)
    task = task or ("classification" if encoder and family != "T5" else "causal-lm")
    module, config = build(config, task, classes=2, tokenizer=known, seed=0)
    return Model.of(module, LanguageArchitecture(family, config, task, known))


def adapted(own: LanguageModel, text: int = 0) -> tuple[TextObservation, Secret]:
    """What a client shares: the LoRA factors of query, key and value after one step of SGD on one text."""
    _, secret = capture_gradient(own, load_texts("embedded", indices=[text]))
    modules = [name for block in range(2) for name in layout_of(own).queries(block)]
    return share_adapter(own, secret, modules=modules, rank=RANK, recipe=Recipe(learning_rate=1e-2, steps=1)), secret
