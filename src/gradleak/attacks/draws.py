"""What PEFT draws when it begins an adapter, again: on the CPU, from torch's Mersenne twister, module by module in the order of
`named_modules`, A and B as nn.Linear or nn.Conv2d does, and A anew (peft 0.21, tuners/lora/layer.py, `update_layer`)."""

from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.init import kaiming_uniform_, normal_

from gradleak.modalities.networks import ImageTransformer
from gradleak.observations.adapter import Adapter
from gradleak.observations.layers import is_linear
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors

FAR = 2**20  # words before the adapter beyond which no new head is tried, and fewer seeds side by side

Factors = dict[str, tuple[Tensor, int]]  # {module: (A at the end, float32 on the CPU; count of B's numbers)}, as drawn


def draw(seed: int, skipped: int, factors: Factors, gaussian: bool) -> Iterator[Tensor]:
    """A of each module as PEFT draws it after this seed and so many words of its stream, bit for bit; float32."""
    generator = torch.Generator().manual_seed(seed)
    torch.empty(skipped).uniform_(generator=generator)
    for shape, numbers_of_B in ((A.shape, n) for A, n in factors.values()):
        torch.empty(shape.numel() + numbers_of_B).uniform_(generator=generator)  # as the layers draw themselves
        A = torch.empty(shape)
        yield normal_(A, 0, 1 / len(A), generator) if gaussian else kaiming_uniform_(A, sqrt(5), generator=generator)


def embedded_before(release: Adapter, model: Model[Any]) -> int:
    """Words that PEFT draws for embeddings with LoRA which come before all other modules: A and B normally, and B anew."""
    words, sizes = 0, {name.removesuffix(".weight"): (name, rank) for name, rank in release.embedded.items()}
    for module, _ in model.module.named_modules():
        if module in release.scaling:
            break
        if module in sizes:
            name, rank = sizes[module]
            numbers, width = model.parameters[name].shape
            words += sum(n + 16 * (n % 16 > 0) for n in (rank * numbers, rank * width, rank * width))
    return words


def drawn_before(model: Model[Any]) -> dict[int, str]:
    """{words of the stream used before the adapter: what for}: nothing; of classifiers, a new head too.

    transformers draws a head's weights normally and no biases; of other networks the last linear layer may be new, as
    nn.Linear draws it. Heads of more than `FAR` numbers are left out.
    """
    network = model.module.network if isinstance(model.module, ImageTransformer) else model.module
    layers = {name: layer for name, layer in network.named_modules() if is_linear(layer)}
    if prefix := getattr(network, "base_model_prefix", ""):
        sizes = [layer.weight.numel() for name, layer in layers.items() if not name.startswith(f"{prefix}.")]
        head = sum(n + 16 * (n % 16 > 0) for n in sizes)  # torch draws the last 16 normal numbers again
    else:
        head = sum(p.numel() for layer in list(layers.values())[-1:] for p in layer.parameters())
    tried = model.architecture.classes > 1 and 0 < head <= FAR
    return {0: "", head: "a new classification head"} if tried else {0: ""}


def first_word(factors: Factors) -> int:
    """Words that PEFT draws before it draws the first A anew."""
    return next(A.numel() + numbers_of_B for A, numbers_of_B in factors.values())


def rounded(drawn: Tensors, model: Model[Any], zero: Tensors) -> Tensors:
    """{MODULE.lora_A: as drawn, MODULE.lora_B: zero} in the shapes of `zero`; PEFT keeps A in the format of the layer's weight."""
    start = {f"{m}.lora_A": A.to(model.parameters[f"{m}.weight"].dtype) for m, A in drawn.items()}
    return {name: start.get(name, tensor).to(tensor) for name, tensor in zero.items()}
