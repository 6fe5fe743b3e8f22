"""Training images out of trained weights (Haim et al. 2022): two images, twenty, and with --size paper five hundred.

MNIST odd against even, CIFAR-10 vehicles against animals, the first of each class. Every extraction stands beside the mean
image, the extraction from a model trained on other pictures, and the pictures that that other model was trained on.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.weights.kkt import KKT
from gradleak.attacks.weights.kkt_search import KKTSearch, correlation
from gradleak.audit.metrics import ssim
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Weights
from gradleak.report.record import Plot
from gradleak.studies.data_sets import shape_of
from gradleak.studies.findings import Findings, Row, Size, Start, name_of, opening, plot, rectangular
from gradleak.victims.weights import FullBatch, first_of_each, publish_weights

PLAIN, DECAYED = "plain", "weight decay"
DECAYS = {PLAIN: 0.0, DECAYED: 1e-3}
SIZES: dict[Size, tuple[tuple[int, int, int, int], ...]] = {  # pictures per class, epochs, trials or none, steps of KKT
    "smoke": ((1, 200, 0, 30),),
    "small": ((1, 20_000, 0, 1_500), (10, 20_000, 6, 1_000)),
    "paper": ((1, 20_000, 0, 1_500), (10, 20_000, 6, 1_000), (250, 1_000_000, 40, 50_000)),
}
RECOVERED = 0.4  # SSIM above which Haim et al. count an image


def run(data: str, size: Size, *, seed: int, device: str, start: Start) -> Iterator[Findings]:
    """Yields after every extraction; the findings so far. device: where extractions run; training is on the CPU."""
    rows, plots = list[Row](), list[Plot]()
    source = two_class_source(data)
    for per_class, epochs, trials, steps in SIZES[size]:
        both = first_of_each(source, "train", 2 * per_class)
        private, others = halves(both)
        architecture = Architecture("homogeneous1000", shape_of(both), 2)
        for name, decay in DECAYS.items():
            recipe = FullBatch(epochs=epochs, weight_decay=decay)
            row: Row = {"data": name_of(source), "images": 2 * per_class, "training": name, "epochs": epochs}
            began = time.perf_counter()
            try:
                seen = trained(architecture, private, recipe, seed, start(f"{2 * per_class}, {name}"))
                blind = trained(architecture, others, recipe, seed + 1, start("another model"))
            except BadInput as reason:
                rows.append({**row, "note": str(reason)})
                yield Findings(rectangular(rows), sentence(rows), plots).after(opening(data, size, used=source))
                continue
            training = time.perf_counter() - began
            first = decay == 0  # later layers then keep what they started from, which is not small
            search = KKTSearch(trials=trials, steps=steps, first_layer=first)
            attack = search if trials else KKT(steps=steps, first_layer=first)
            began = time.perf_counter()
            extraction = extracted(attack, seen, seed, start("extraction"), device)
            seconds = time.perf_counter() - began
            wrong = extracted(attack, blind, seed, start("from another model"), device)
            candidates = {
                "": extraction.value,
                "mean_image_": both.images.mean(0, keepdim=True) if per_class > 10 else mean_of(source, per_class),
                "another_model_": wrong.value,
                "its_training_images_": others.images,
            }
            truth = private.images
            similar = {key: ssim(nearest(images, truth), truth) for key, images in candidates.items()}
            scored = {key: scores(values) for key, values in similar.items()}
            own, *controls = similar.values()
            above = (own > RECOVERED) & (own > torch.stack(controls).max(0).values)
            done = seen.expect(Weights).stationarity
            row |= {
                "loss": None if done is None else done.loss,
                "kkt_residual": None if done is None else done.kkt_residual,
                "residual": extraction.residual,
                "candidates": len(extraction.value),
                "over_0.4_and_controls": int(above.sum()),
                **{f"{key}{what}": value for key, values in scored.items() for what, value in values.items()},
                "training_seconds": training,
                "extraction_seconds": seconds,
                "note": diverged(extraction),
            }
            rows.append(row)
            plots.append(plot(f"{2 * per_class} images, {name}: truth and nearest", sheet(extraction.value, truth)))
            yield Findings(rectangular(rows), sentence(rows), plots).after(opening(data, size, used=source))


def two_class_source(data: str) -> str:
    """Where the pictures of two classes come from: digits for the embedded ones, which are of ten photographs."""
    return "digits" if data == "embedded" else data


def trained(
    architecture: Architecture, pictures: Pictures, recipe: FullBatch, seed: int, on_step: OnStep
) -> PictureObservation:
    """What the owner of these pictures publishes."""
    model = Model.of(architecture.build(seed).double(), architecture)
    seen, _ = publish_weights(model, pictures, recipe, on_step=on_step)
    return seen


def extracted(attack: Any, seen: PictureObservation, seed: int, on_step: OnStep, device: str = "cpu") -> Reconstruction:
    """One extraction, its images on the CPU."""
    where, generator = torch.device(device), torch.Generator().manual_seed(seed)
    found: Reconstruction = attack(seen.to(where), generator=generator, on_step=on_step)
    return replace(found, value=found.value.cpu())


def diverged(extraction: Reconstruction) -> str:
    """A note that the search did not end in finite numbers, or nothing."""
    return extraction.outcome.value if extraction.outcome is Outcome.DIVERGED else ""


def halves(both: Pictures) -> tuple[Pictures, Pictures]:
    """The first half of each class, and the second."""
    n = len(both.labels) // 4
    first = torch.cat([torch.arange(n), torch.arange(2 * n, 3 * n)])
    drawn = [
        Pictures(both.images[r], both.labels[r], both.classes, both.source, both.split) for r in (first, first + n)
    ]
    return drawn[0], drawn[1]


def mean_of(source: str, per_class: int) -> Tensor:
    """The mean of pictures that neither model saw: (1, channel, height, width)."""
    more = first_of_each(source, "train", 2 * per_class + 40)
    per_model = len(more.labels) // 2
    unseen = torch.cat([torch.arange(2 * per_class, per_model), torch.arange(per_model + 2 * per_class, 2 * per_model)])
    return more.images[unseen].mean(0, keepdim=True)


def nearest(images: Tensor, truth: Tensor) -> Tensor:
    """For every truth the image with the highest normalised cross-correlation: (n, channel, height, width)."""
    return images[correlation(truth, images).argmax(1)]


def scores(similar: Tensor) -> dict[str, float]:
    """As published, of the SSIM (n,) of every truth's nearest image: those above 0.4, DSSIM of the best ten; and the mean."""
    best = similar.sort(descending=True).values[:10]
    return {
        "over_0.4": int((similar > RECOVERED).sum()),
        "mean_ssim": float(similar.mean()),
        "dssim_best_10": float((0.5 - best / 2).mean()),
    }


def sheet(images: Tensor, truth: Tensor) -> Figure:
    """The truths in one row, what is nearest to each below, best first; at most twenty."""
    closest = nearest(images, truth)
    order = ssim(closest, truth).argsort(descending=True)[:20]
    figure = Figure(figsize=(len(order), 2))
    for row, pictures in enumerate((truth, closest)):
        for column, picture in enumerate(pictures[order]):
            axes = figure.add_subplot(2, len(order), row * len(order) + column + 1)
            axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
    return figure


def sentence(rows: list[Row]) -> str:
    """Counts beside the controls' counts."""
    parts = [
        f"{row['images']} images, {row['training']}: "
        + (
            f"{row['over_0.4']} ({row['over_0.4_and_controls']} of them closer "
            f"than any control; mean SSIM {row['mean_ssim']:.2f}; mean image {row['mean_image_over_0.4']}, another model "
            f"{row['another_model_over_0.4']}, its training images {row['its_training_images_over_0.4']})"
            if not row["note"]
            else row["note"].rstrip(".")
        )
        for row in rows
    ]
    return f"Training images recovered from weights with SSIM above {RECOVERED}. " + "; ".join(parts) + "."
