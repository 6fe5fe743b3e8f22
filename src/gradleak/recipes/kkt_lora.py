"""Training images out of a converged LoRA adapter: compose W0 + s B A, and extract as from any trained weights.

The adapter is trained and saved by the PEFT library on a network that has learnt nothing yet, rank after rank, beside the
training of all weights; two images, then ten.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradleak.attacks.kkt import KKT
from gradleak.data import Pictures
from gradleak.lora import Recipe
from gradleak.metrics import ssim
from gradleak.models import Architecture
from gradleak.optimise import OnStep
from gradleak.recipes.findings import Findings
from gradleak.recipes.kkt import halves, mean_of, nearest, scores, trained
from gradleak.trained_weights import Weights
from gradleak.victims.lora import fine_tune
from gradleak.victims.trained import FullBatch, first_of_each, stationarity

RANKS = (1, 2, 4, 8, 16, 32, 64)
SIZES = {  # pictures per class, ranks, steps of training, steps of the extraction
    "quick": ((1,), (2,), 60, 40),
    "small": ((1, 5), RANKS, 3_000, 1_000),
    "paper": ((1, 5), RANKS, 20_000, 1_500),
}
RATE = 0.1


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every rank; the findings so far."""
    source, size = ("digits", "quick") if data in ("embedded", "digits") else (data, size)
    counts, ranks, steps, search = SIZES[size]
    rows = list[dict[str, Any]]()
    for per_class in counts:
        both = first_of_each(source, "train", 2 * per_class)
        private, _ = halves(both)
        mean = mean_of(source, per_class)
        shape = (both.images.shape[1], both.images.shape[2], both.images.shape[3])
        architecture = Architecture("homogeneous1000", shape, 2)
        for rank in (*ranks, None):
            if rank is None:
                recipe = FullBatch(learning_rate=RATE, epochs=steps)
                seen = trained(architecture, private, recipe, seed, device, start("all weights"))
            else:
                seen = composed(architecture.build(seed), architecture, private, rank, steps, seed)
            on_step = start(f"{2 * per_class} images, rank {rank or 'full'}")
            attack = KKT(steps=search, first_layer=True)
            found = attack(seen, generator=torch.Generator().manual_seed(seed), on_step=on_step)
            done = seen.stationarity
            blind = ssim(nearest(mean, private.images), private.images)
            rows.append(
                {
                    "images": 2 * per_class,
                    "rank": rank or "full",
                    "loss": None if done is None else done.loss,
                    "kkt_residual": None if done is None else done.kkt_residual,
                    "residual": found.residual,
                    **scores(found.images, private.images),
                    "mean_image_ssim": float(blind.mean()),
                }
            )
            yield Findings(rows, sentence(rows))


def composed(
    module: nn.Module, architecture: Architecture, private: Pictures, rank: int, steps: int, seed: int
) -> Weights:
    """W0 + s B A of an adapter that PEFT trained and saved, as the weights of a trained network in float64."""
    recipe = Recipe(optimizer="sgd", learning_rate=RATE, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        adapter, _ = fine_tune(module, architecture, private, rank=rank, recipe=recipe, out=Path(folder), seed=seed)
    factors = {
        name: tensor + adapter.released[name] if name in adapter.released else tensor
        for name, tensor in adapter.start.items()
    }
    parameters = {**adapter.model.parameters, **adapter.merged(factors)}
    parameters = {name: tensor.double() for name, tensor in parameters.items()}
    seen = Weights(
        model=replace(adapter.model.to(torch.float64), parameters=parameters),
        released=parameters,
        batch_size=len(private.labels),
        precision="float64",
    )
    network = seen.network()
    x = network.inputs(private.images)
    return replace(seen, stationarity=stationarity(network, x, private.labels, steps, 0.0))


def sentence(rows: list[dict[str, Any]]) -> str:
    """Mean SSIM by rank."""
    parts = [f"{row['images']} images, rank {row['rank']}: {row['mean_ssim']:.2f}" for row in rows]
    blind = f"mean image {rows[-1]['mean_image_ssim']:.2f}"
    return f"Mean SSIM of images out of composed adapters ({blind}). " + "; ".join(parts) + "."
