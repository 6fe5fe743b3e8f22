"""Where the transformers of a family keep the parts that matter here: names of modules, by config.model_type."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradleak.errors import BadInput


@dataclass(frozen=True)
class Family:
    """One kind of transformer.

    causal      a token sees only those before it
    base        prefix of the modules' names
    layers      the list of blocks
    norm        the normalisation whose output is the first layer's input
    attention   query, key and value of a block, or the one module that computes all three
    output      the attention's output projection in a block
    hidden      the linear layers of a block's perceptron that read the same input
    passed      the linear layer that reads what these pass on
    after       of encoders: the normalisation between the attention and the perceptron, on the sum of both branches
    placed      whether the first layer's inputs depend on the position
    offset      the position id of the first token
    head        of masked language models: the module from the last block's outputs to logits, and its first linear layer
    """

    causal: bool
    base: str
    layers: str
    norm: str
    attention: tuple[str, ...]
    output: str
    hidden: tuple[str, ...]
    passed: tuple[str, ...]
    after: str | None = None
    placed: bool = True
    offset: int = 0
    head: tuple[str, str] | None = None

    def block(self, number: int) -> str:
        """The name of a block."""
        return f"{self.base}.{self.layers}.{number}"

    def queries(self, number: int) -> tuple[str, ...]:
        """The modules of a block whose inputs are its own."""
        return tuple(f"{self.block(number)}.{part}" for part in self.attention)

    def first_norm(self) -> str:
        """The full name of the first normalisation."""
        return f"{self.base}.{self.norm}"

    def linear(self, config: Any) -> Sequence[str]:
        """The linear layers whose gradients the attacks read."""
        return [
            name
            for number in range(config.num_hidden_layers)
            for name in (
                *self.queries(number),
                *(f"{self.block(number)}.{part}" for part in (self.output, *self.hidden, *self.passed)),
            )
        ]


_BERT = {
    "causal": False,
    "layers": "encoder.layer",
    "norm": "embeddings.LayerNorm",
    "attention": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "output": "attention.output.dense",
    "hidden": ("intermediate.dense",),
    "passed": ("output.dense",),
    "after": "attention.output.LayerNorm",
}
_LLAMA = Family(
    causal=True,
    base="model",
    layers="layers",
    norm="layers.0.input_layernorm",
    attention=tuple(f"self_attn.{part}_proj" for part in "qkv"),
    output="self_attn.o_proj",
    hidden=("mlp.gate_proj", "mlp.up_proj"),
    passed=("mlp.down_proj",),
    placed=False,
)
FAMILIES = {
    "bert": Family(base="bert", head=("cls", "predictions.transform.dense"), **_BERT),  # type: ignore[arg-type]
    "roberta": Family(base="roberta", offset=2, head=("lm_head", "dense"), **_BERT),  # type: ignore[arg-type]
    "gpt2": Family(
        causal=True,
        base="transformer",
        layers="h",
        norm="h.0.ln_1",
        attention=("attn.c_attn",),
        output="attn.c_proj",
        hidden=("mlp.c_fc",),
        passed=("mlp.c_proj",),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}


def family_of(config: Any) -> Family:
    """The family of a configuration; BadInput for one that is not supported."""
    if config.model_type not in FAMILIES:
        raise BadInput(
            f"Models of the kind {config.model_type!r} are not supported for text: only {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.model_type]
