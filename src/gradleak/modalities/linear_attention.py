"""Packed attention, taken apart into the linear layers that it consists of: torch.nn.MultiheadAttention keeps the weights of queries, keys
and values as one parameter, and multiplies by them without any layer that could be seen to run.

After that every layer has its name: `attention.in_proj` (query, key and value, one above the other), `attention.out_proj`.
"""

import copy

import torch
from torch import Tensor, nn

PACKED = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias"}  # names of parameters, before and after


class LinearAttention(nn.Module):
    """What a MultiheadAttention computes, of its own parameters; dropout is a layer, as it is elsewhere."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = packed.embed_dim, packed.num_heads, packed.batch_first
        self._qkv_same_embed_dim = (
            False  # a TransformerEncoderLayer then calls this, and no kernel that takes it all at once
        )
        self.in_proj = nn.Linear(packed.embed_dim, 3 * packed.embed_dim, bias=False, device="meta")
        self.in_proj.weight, self.in_proj.bias = packed.in_proj_weight, packed.in_proj_bias
        self.out_proj, self.dropout = packed.out_proj, nn.Dropout(packed.dropout)
        self.train(packed.training)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """As MultiheadAttention has it."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As MultiheadAttention's: (length, batch, width), or (batch, length, width) where batch_first, or (length, width)."""
        alone = query.ndim == 2
        if query is key and key is value:
            parts = self.in_proj(query).chunk(3, dim=-1)
        else:
            biases = (None, None, None) if self.in_proj.bias is None else self.in_proj.bias.chunk(3)
            weights = zip((query, key, value), self.in_proj.weight.chunk(3), biases, strict=True)
            parts = tuple(nn.functional.linear(x, W, b) for x, W, b in weights)
        if alone:
            parts = tuple(part[None] for part in parts)
        elif not self.batch_first:
            parts = tuple(part.transpose(0, 1) for part in parts)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts
        )  # (batch, heads, length, width)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if attn_mask is not None:
            whole = attn_mask.reshape(-1, self.num_heads, *attn_mask.shape[1:]) if attn_mask.ndim == 3 else attn_mask
            scores = scores + additive(whole, scores)
        elif is_causal:
            scores = scores + additive(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), scores)
        if key_padding_mask is not None:
            padding = key_padding_mask[None] if alone else key_padding_mask
            scores = scores + additive(padding[:, None, None], scores)
        attention = scores.softmax(-1)
        mixed = self.out_proj((self.dropout(attention) @ v).transpose(1, 2).flatten(2))
        if alone:
            mixed, attention = mixed[0], attention[0]
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        shown = attention.mean(-3) if average_attn_weights else attention
        return mixed, shown if need_weights else None


def taken_apart(name: str) -> str:
    """The name that a parameter has afterwards."""
    before, _, leaf = name.rpartition(".")
    return f"{before}.{PACKED[leaf]}".removeprefix(".") if leaf in PACKED else name


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: minus infinity where a mask of truth values is set."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def with_linear_attention(module: nn.Module) -> nn.Module:
    """The module itself where it has no packed attention; else a copy, with the same parameters, in which it is taken apart.

    Attention with keys or values of other widths, or with biases among them, stays as it is.
    """
    if not any(packed(part) for part in module.modules()):
        return module
    kept = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    module = copy.deepcopy(module, dict(kept))
    if packed(module):
        return LinearAttention(module)  # type: ignore[arg-type]
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if packed(child):
                setattr(part, name, LinearAttention(child))  # type: ignore[arg-type]
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
    return module


def packed(module: nn.Module) -> bool:
    """Whether it is a MultiheadAttention with one weight for query, key and value, and nothing added to them."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )
