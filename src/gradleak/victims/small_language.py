"""Small language models for experiments without a download: a byte-level BPE or WordPiece-like tokenizer and a transformer of
a supported architecture, both trained on local texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from gradleak.modalities.language_models import LanguageArchitecture, Task, build
from gradleak.observations.model import LanguageModel, Model
from gradleak.victims.training import adam_steps

Kind = Literal["bert", "gpt2", "llama"]
SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
OF_ENCODERS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
OF_DECODERS = {"eos_token": "[END]"}


def train_tokenizer(texts: Sequence[str], kind: Kind, *, size: int = 1_000) -> Any:
    """A fast byte-level BPE tokenizer of at most `size` tokens; that of an encoder puts [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL | (OF_ENCODERS if kind == "bert" else OF_DECODERS)
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "bert":
        ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokenizer, **special)


def small_model(
    kind: Kind,
    tokenizer: Any,
    task: Task,
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    positions: int = 64,
    classes: int = 2,
    spread: float = 0.02,
    seed: int = 0,
) -> LanguageModel:
    """A freshly initialised transformer of that architecture for this tokenizer. spread: deviation of its weights."""
    from transformers import BertConfig, GPT2Config, LlamaConfig

    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "initializer_range": spread}
    if kind != "bert":
        special |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    size = len(tokenizer)
    config: Any
    match kind:
        case "bert":
            config = BertConfig(
                vocab_size=size,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                max_position_embeddings=positions,
                **special,
            )
        case "gpt2":
            config = GPT2Config(
                vocab_size=size, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, **special
            )
        case "llama":
            config = LlamaConfig(
                vocab_size=size,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=positions,
                **special,
            )
    module, config = build(config, task, classes=classes, tokenizer=tokenizer, seed=seed)
    return Model.of(module, LanguageArchitecture(f"small {kind}", config, task, tokenizer))


def trained(
    model: LanguageModel,
    texts: Sequence[str],
    labels: torch.Tensor,
    *,
    steps: int,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
) -> LanguageModel:
    """The model after so many Adam steps on random batches of public texts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = model.architecture.encode(texts)

    def batches() -> Any:
        for _ in range(steps):
            rows = torch.randint(len(texts), (batch,), generator=generator)
            yield tuple(tokens[i] for i in rows.tolist()), labels[rows]

    return replace(model, parameters=adam_steps(model, batches(), rate))
