"""Training images out of trained weights (Haim et al. 2022, arXiv:2206.07758): two images, twenty, and at paper size five hundred.

MNIST odd against even, CIFAR-10 vehicles against animals, the first of each class. Every extraction stands beside the mean
image, the extraction from a model trained on other pictures, and the pictures that that other model was trained on.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gradleak.attacks.weights.kkt import KKT
from gradleak.attacks.weights.kkt_search import KKTSearch
from gradleak.observations.trained_weights import Weights
from gradleak.studies.extractions import RECOVERED, extracted, judged, mean_image, owners, two_class_source, untrained
from gradleak.studies.findings import Findings, stands_in
from gradleak.studies.plots import bars, panels
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.weights import FullBatch, publish_weights

DECAYS = {"plain": 0.0, "weight decay": 1e-3}
SIZES: dict[Size, tuple[tuple[int, int, int, int], ...]] = {  # images, epochs, trials or none, steps of each
    "smoke": ((2, 200, 0, 30),),
    "small": ((2, 20_000, 0, 1_500), (20, 20_000, 6, 1_000)),
    "paper": ((2, 20_000, 0, 1_500), (20, 20_000, 6, 1_000), (500, 1_000_000, 40, 50_000)),
}
CONTROLS = ("mean_image", "another_model", "its_training_images")


@dataclass(frozen=True)
class Setting:
    """trials: of the search over settings, 0 for one extraction with the defaults; steps: of each."""

    images: int
    training: str
    epochs: int
    trials: int
    steps: int


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Without weight decay and with it."""
    yield from (Setting(images, name, *effort) for images, *effort in SIZES[size] for name in DECAYS)


def cell(setting: Setting, bench: Bench) -> Result:
    """Train a model on the private pictures and one on others, on the CPU, and extract from both."""
    source, decay, seen, began = two_class_source(bench.data), DECAYS[setting.training], [], time.process_time()
    private, others = owners(source, setting.images)
    for seed, pictures in enumerate((private, others), bench.seed):
        recipe = FullBatch(epochs=setting.epochs, weight_decay=decay)
        seen.append(publish_weights(untrained(pictures, seed), pictures, recipe, on_step=bench.on_step)[0])
    trained = time.process_time()
    # Without decay, later layers keep what they started from, which is not small.
    effort: dict[str, Any] = {"steps": setting.steps, "first_layer": not decay}
    attack = KKTSearch(trials=setting.trials, **effort) if setting.trials else KKT(**effort)
    found = extracted(attack, seen[0], bench)
    cost = {"training_seconds": trained - began, "extraction_seconds": time.process_time() - trained}
    images = mean_image(source, setting.images), extracted(attack, seen[1], bench).value, others.images
    result = judged(private.images, found, dict(zip(CONTROLS, images, strict=True)))
    facts = vars(seen[0].expect(Weights).stationarity) | {"candidates": len(found.value)} | result.facts
    return replace(result, facts=facts, notes=(stands_in(source, bench.data),), cost=cost)


def tell(table: Table) -> Findings:
    """Counts beside the controls' counts."""
    parts = []
    for row in table.rows:
        about = {"images": row["images"], "training": row["training"]}
        hits = (f"{name.replace('_', ' ')} {sum(table.sampled(f'{name}_recovered', **about))}" for name in CONTROLS)
        parts.append(
            f"{row['images']} images, {row['training']}: {sum(table.sampled('recovered', **about))} of {row['samples']} "
            f"({sum(table.sampled('recovered_closer_than_controls', **about))} of them closer than any control; "
            f"mean SSIM {row['ssim']:.2f}; {', '.join(hits)})"
        )
    figure, [axes] = panels(width=6)
    names = ("ssim", *(f"{name}_ssim" for name in CONTROLS))
    bars(axes, table.rows, lambda row: f"{row['images']} images, {row['training']}", *names)
    axes.set(xlabel="mean SSIM of the nearest image")
    sentence = f"Training images recovered from weights with SSIM above {RECOVERED}. {'; '.join(parts)}."
    return Findings(sentence, {"SSIM beside the controls": figure})


STUDY = Study(
    name="trained-weights",
    question="How many training images can be read from the weights of a network that was trained to the end on few of them?",
    settings=settings,
    cell=cell,
    tell=tell,
    anywhere=True,
)
