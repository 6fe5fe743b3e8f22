"""How fast are training to stationarity and the extraction from weights? One thread, per CPU-second, random numbers as data.

    python benchmarks/trained_weights.py

784-1000-1000-1, as Haim et al. (2022); rates depend on the sizes alone.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from dataclasses import replace

import torch

from gradleak.attacks.weights.kkt import Settings, search
from gradleak.modalities.networks import Architecture
from gradleak.observations.fully_connected import FullyConnected, Target
from gradleak.victims.weights import FullBatch, train

ARCHITECTURE = Architecture("homogeneous1000", (1, 28, 28), 2)


def network(dtype: torch.dtype) -> FullyConnected:
    """Freshly initialised, with a first layer of ordinary size: that of a trained one."""
    module = ARCHITECTURE.build(0)
    made = FullyConnected.of(module, {k: p.detach() for k, p in module.named_parameters()}, ARCHITECTURE.input_shape)
    return replace(made, weights=(300 * made.weights[0], *made.weights[1:])).to(dtype)


def extraction_rate(candidates: int, dtype: torch.dtype, steps: int) -> float:
    """Iterations of the joint search per CPU-second."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, candidates, 784, generator=generator).to(dtype)
    y = torch.arange(candidates)[None] % 2
    settings = Settings(steps, 0.01, 0.01, 0.0, 100.0)
    search(network(dtype), Target(), x, y, None, replace(settings, steps=1), generator)
    began = time.process_time()
    search(network(dtype), Target(), x, y, None, settings, generator)
    return steps / (time.process_time() - began)


def training_rate(images: int, epochs: int) -> float:
    """Epochs per CPU-second, float64."""
    x, labels = torch.randn(images, 784, generator=torch.Generator().manual_seed(0)).double(), torch.arange(images) % 2
    began = time.process_time()
    train(network(torch.float64), x, labels, FullBatch(learning_rate=1e-3, epochs=epochs))
    return epochs / (time.process_time() - began)


def main() -> None:
    """Print the three rates, float64 and float32."""
    torch.set_num_threads(1)
    print(f"training, 10 images: {training_rate(10, 1_000):.0f} epochs per CPU-second")
    for candidates, steps in ((20, 200), (1_000, 12)):
        for dtype in (torch.float64, torch.float32):
            rate = extraction_rate(candidates, dtype, steps)
            print(f"extraction, {candidates} candidates, {dtype}: {rate:.3g} iterations per CPU-second")


if __name__ == "__main__":
    main()
