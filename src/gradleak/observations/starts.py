"""Adapters that begin elsewhere than at a random A and B = 0: what the base model's weights W (out, in) tell of their start.

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Buyukakyuz 2024, arXiv:2406.01775) take both factors from W, as PEFT 0.21
does in tuners/lora/layer.py, and leave W - s B A in its place: whoever has W computes the start.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.observations.layers import oriented
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors

# Why no seed draws these, and W does not give them.
ELSEWHERE = {
    "pissa_niter": "its singular value decomposition is randomised, so the base model's weights give the start only roughly",
    "lora_ga": "LoRA-GA begins with singular vectors of a gradient of the private data, which no seed draws",
    "corda": "CorDA begins with the base model's weights seen through what its layers were fed with, which no seed draws",
    "eva": "EVA takes A from singular vectors of what its layers were fed with, which no seed draws",
    "loftq": "LoftQ begins with what quantising the base model left over, which no seed draws",
    "orthogonal": "orthogonal factors are drawn in a way that is not searched for seeds",
}
PARALLEL = 0.999  # cosine of what is parallel up to bfloat16's rounding of 2^-9, whose square is 4e-6


def why_unknown(init: str, tried: int) -> str:
    """Why the start is not known, in words, of an adapter of this init_lora_weights after so many seeds; "" for nothing to say."""
    if reason := next((reason for name, reason in ELSEWHERE.items() if init.startswith(name)), ""):
        return reason
    another = "another seed does, or it was retrained from another adapter, or training left nothing of it"
    return f"none of {tried:,} seeds draws an A like the released one: {another}" if tried else ""


def pissa(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank): s B A is the best approximation of W of this rank. float32."""
    U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def olora(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank): the first rows of R and columns of Q in W = Q R. float32."""
    Q, R = torch.linalg.qr(W.float())
    return R[:rank], Q[:, :rank]


FROM_WEIGHTS = {"pissa": pissa, "olora": olora}


def computed(init: str, model: Model[Any], factors: Tensors, scaling: dict[str, float]) -> Tensors:
    """Where these trained factors, {MODULE.lora_A (r, in), MODULE.lora_B (out, r)}, began, rounded as PEFT rounds to the format of W.

    Another library may have given a row of A and its column of B the other sign: they get that of the end. Raises BadInput
    where a module cannot have begun there.
    """
    before: Tensors = {}
    for module, s in scaling.items():
        W, A, B = weight(model, module), factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]
        fits = W.ndim == 2 and len(A) <= min(W.shape)
        A_0, B_0 = (t.to(W.dtype).float() for t in FROM_WEIGHTS[init](W, len(A), s)) if fits else (A * 0, B * 0)
        sign = torch.where((A * A_0).flatten(1).sum(1) + (B * B_0).flatten(1).sum(0) < 0, -1.0, 1.0)
        A_0, B_0 = (sign[:, None] * A_0, sign * B_0) if fits else (A_0, B_0)
        end, start = (torch.cat([a.flatten(), b.flatten()]) for a, b in ((A, B), (A_0, B_0)))
        if not float(end @ start) > float(end.norm() * start.norm()) / 2:  # NaN too: of a negative scaling
            raise BadInput(
                f"the factors of {module}, which are far from where {init} begins with these weights: this is another base "
                "model or start"
            )
        before[f"{module}.lora_A"], before[f"{module}.lora_B"] = A_0, B_0
    return before


def converted(model: Model[Any], factors: Tensors, modules: Iterable[str]) -> tuple[Tensors, Tensors] | None:
    """(factors at the end, factors at the start) where these hold both: A = [A_T; A_0], B = [B_T, -B_0]; else None.

    PEFT converts PiSSA, OLoRA and CorDA so (LoraModel.subtract_mutated_init). Of all three, B_0^T W is parallel to A_0, row by
    row.
    """
    ended: Tensors = {}
    before: Tensors = {}
    for module in modules:
        a, b, W = f"{module}.lora_A", f"{module}.lora_B", weight(model, module)
        A, B, r = factors[a], factors[b], len(factors[a]) // 2
        if W.ndim != 2 or len(A) % 2 or min(W.shape) < 3:  # in the plane, numbers may be parallel by chance
            return None
        (ended[a], ended[b]), (before[a], before[b]) = (A[:r], B[:, :r]), (A[r:], -B[:, r:])
        if not bool((torch.cosine_similarity(before[b].T @ W.float(), before[a], dim=1) > PARALLEL).all()):
            return None
    return ended, before


def weight(model: Model[Any], module: str) -> Tensor:
    """W of a module as a matrix (out, in) or a convolution's (out, in, k, k)."""
    return oriented(model, module, model.parameters[f"{module}.weight"])
