"""The victim's model: freshly initialised, loaded from a file, or trained here on public pictures and cached."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.formats.observation_file import load_state, load_tensors
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations import tensor_file
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors, fingerprint

SCHEMA = "gradleak/victim/1"


def cache_folder() -> Path:
    """Where trained victims are kept: $GRADLEAK_CACHE, or ~/.cache/gradleak."""
    return Path(os.environ.get("GRADLEAK_CACHE", Path.home() / ".cache" / "gradleak"))


def prepare_model(
    architecture: Architecture,
    *,
    seed: int = 0,
    weights: Path | None = None,
    train_on: Pictures | None = None,
    epochs: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """A model initialised from `seed`, then loaded from a safetensors file, then trained for `epochs`, if asked to."""
    module = architecture.build(seed)
    if weights is not None:
        load_state(module, load_tensors(weights))
    if train_on is None or not epochs:
        return module
    start = fingerprint(module.state_dict())  # of the initial state: another version of the architecture trains anew
    key = f"{architecture}|{seed}|{start}|{train_on.source}|{train_on.split}|{len(train_on.labels)}|{epochs}"
    cached = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    if cached.is_file():
        try:
            load_state(module, load_tensors(cached))
            return module
        except BadInput:  # damaged: trained anew, and written over
            pass
    train(module, train_on, epochs=epochs, seed=seed, on_step=on_step)
    tensor_file.write(module.state_dict(), SCHEMA, {}, cached)
    return module


def train(
    module: nn.Module,
    pictures: Pictures,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Adam on the cross entropy, in place, over shuffled batches; the module is left in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(module.parameters(), lr=learning_rate)
    module.train()
    for epoch in range(epochs):
        loss = torch.zeros(())
        order = torch.randperm(len(pictures.labels), generator=generator)
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            loss = F.cross_entropy(module(pictures.images[rows]), pictures.labels[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if on_step is not None:
            on_step(epoch + 1, epochs, float(loss.detach()))
    module.eval()


def adam_steps(model: Model[Any], batches: Iterable[tuple[Any, Tensor | None]], rate: float) -> Tensors:
    """The parameters of any model after one Adam step on each of these batches (inputs, labels)."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.parameters.items()}
    optimiser = torch.optim.Adam(list(leaves.values()), lr=rate)
    for inputs, labels in batches:
        optimiser.zero_grad()
        model.loss(leaves, inputs, labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {name: p.detach() for name, p in leaves.items()}
