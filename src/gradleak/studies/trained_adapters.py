"""Training images out of a converged LoRA adapter: compose W0 + s B A, and extract as from any trained weights.

The adapter is trained and saved by the PEFT library on a network that has learnt nothing yet, rank after rank, beside the
training of all weights; two images, then ten. What the images' gradients G should add up to is asked in three ways: the
composed weights W0 + s B A, the change s B A (the base model is known), and s B (A - A0) (PEFT's random start of A is known
too, as to anybody who knows the seed). Controls: the mean image, and the extraction from an adapter of other images.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from gradleak.attacks.weights.kkt import KKT
from gradleak.modalities.pictures import Pictures
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.trained_weights import Weights
from gradleak.observations.training import Recipe
from gradleak.studies.extractions import extracted, judged, mean_image, owners, two_class_source, untrained
from gradleak.studies.findings import Findings, stands_in
from gradleak.studies.plots import curve
from gradleak.studies.regimes import in_factors, training
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.adapter import fine_tune
from gradleak.victims.weights import FullBatch, publish_weights

RANKS = (1, 2, 4, 8, 16, 32, 64)
STEPS: dict[Size, tuple[int, int]] = {"smoke": (60, 40), "small": (2_000, 600), "paper": (20_000, 1_500)}
RATE = 0.3


@dataclass(frozen=True)
class Setting:
    """rank: "full" for the training of all weights; left_hand_side: what the images' gradients should add up to."""

    images: int
    rank: int | str
    left_hand_side: str


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Adapters by rank, then all weights."""
    for images in (2,) if size == "smoke" else (2, 10):
        for rank in (2,) if size == "smoke" else RANKS:
            yield from (Setting(images, rank, side) for side in ("W0 + BA", "BA", "B(A - A0)"))
        yield from (Setting(images, "full", side) for side in ("W", "W - W0"))


def cell(setting: Setting, bench: Bench) -> Result:
    """Extract from the adapter of the private pictures, and from one of others."""
    source, (steps, search) = two_class_source(bench.data), STEPS[bench.size]
    views, unexplained = sides(source, setting.images, setting.rank, steps, bench.seed)
    others, _ = sides(source, setting.images, setting.rank, steps, bench.seed, owner=1)
    attack, seen = KKT(steps=search, first_layer=True), views[setting.left_hand_side]
    found, wrong = (extracted(attack, one, bench) for one in (seen, others[setting.left_hand_side]))
    private, mean = owners(source, setting.images)[0], mean_image(source, setting.images)
    result = judged(private.images, found, {"mean_image": mean, "another_adapter": wrong.value})
    facts = {**training(seen, private), "factors_truth_residual": unexplained, **result.facts}
    return replace(result, facts=facts, notes=(stands_in(source, bench.data),))


@lru_cache(maxsize=2)
def sides(
    source: str, images: int, rank: int | str, steps: int, seed: int, owner: int = 0
) -> tuple[dict[str, PictureObservation], float | None]:
    """Left-hand sides by name, of an owner's adapter, or of the training of all weights; and `in_factors`."""
    pictures = owners(source, images)[owner]
    if isinstance(rank, str):
        recipe = FullBatch(learning_rate=RATE, epochs=steps)
        seen, _ = publish_weights(untrained(pictures, seed), pictures, recipe, reveal_initial=True)
        return {"W": replace(seen, release=Weights()), "W - W0": seen}, None
    adapter, first = (adapted(pictures, rank, many, seed) for many in (steps, 1))
    # The first step moves B alone, which is zero before it: what it leaves of A is where A started.
    A = {name: tensor for name, tensor in first.adapter.start.items() if name.endswith("lora_A")}
    began = replace(adapter, release=replace(adapter.adapter, start={**adapter.adapter.start, **A}))
    seen, start = composed(adapter), Weights(initial=composed(began).released)
    views = {"W0 + BA": replace(seen, release=Weights()), "BA": seen, "B(A - A0)": replace(seen, release=start)}
    return views, in_factors(adapter, began, seen, pictures)


def adapted(pictures: Pictures, rank: int, steps: int, seed: int) -> PictureObservation:
    """What PEFT saves after so many full steps of gradient descent."""
    recipe, model = Recipe(learning_rate=RATE, steps=steps), untrained(pictures, seed, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        return fine_tune(model, pictures, rank=rank, recipe=recipe, out=Path(folder), seed=seed)[0]


def composed(adapter: PictureObservation) -> PictureObservation:
    """W0 + s B A as trained weights in float64, whose biases were not trained, with W0 known."""
    exact = adapter.to(torch.float64)
    base, weights = exact.model.parameters, exact.after() or {}
    model = replace(exact.model, parameters={**base, **weights}, frozen=tuple(k for k in base if k not in weights))
    release = Weights(initial={name: base[name] for name in weights})
    return Observation(model=model, release=release, released=weights, batch_size=adapter.batch_size)


def tell(table: Table) -> Findings:
    """Mean SSIM by rank."""
    blind = f"(mean image {table.rows[-1]['mean_image_ssim']:.2f})"
    parts = [f"{r['images']} images, rank {r['rank']}, {r['left_hand_side']}: {r['ssim']:.2f}" for r in table.rows]
    by_rank = Table(table.where(rank=lambda rank: rank != "full"))
    named = {"xlabel": "rank of the adapter", "ylabel": "SSIM (dashed: mean image)", "xscale": "log"}
    figure = curve(by_rank, "rank", "ssim", ("images", "left_hand_side"), "mean_image_ssim", **named)
    sentence = f"Mean SSIM of images out of composed adapters {blind}. {'; '.join(parts)}."
    return Findings(sentence, {"SSIM by rank": figure})


STUDY = Study(
    name="trained-adapters",
    question="Can training images be read from a LoRA adapter that was trained to the end, as from trained weights?",
    settings=settings,
    cell=cell,
    tell=tell,
    together=lambda setting: (setting.images, setting.rank),
)
