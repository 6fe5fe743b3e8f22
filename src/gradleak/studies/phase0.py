"""Phase 0: were the adapter decoded perfectly, what would the gradient give? The whole gradient of the adapted weights at
the start of a LoRA fine-tuning, inverted; the same when it is known to a cosine of .99 ... .80 only (the transfer curve:
what a decoder's fidelity is worth); batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.token_span import TokenSpan
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import flatten
from gradleak.report.record import Plot
from gradleak.studies.findings import Findings, Row, Size, Start, name_of, plot
from gradleak.studies.lora_victims import Base, before, full_gradient, prepare, scores
from gradleak.studies.phase2 import attacked

COSINES, BATCHES = (1.0, 0.99, 0.95, 0.9, 0.85, 0.8), (1, 2, 4, 8, 16)
SEARCH, SPAN = "map-inversion", "token-span"
ATTACKS = (("mlp1000", SEARCH), ("convnet", SEARCH), ("vit", SEARCH), ("vit", SPAN))


@dataclass(frozen=True, kw_only=True)
class Effort:
    """pictures for each of ATTACKS, for the curve; batches of each size; of the search: evaluations per prior weight, and public
    pictures that its start is learnt from; cosines of the curve; batch sizes."""

    pictures: tuple[int, int, int, int]
    curve: int
    batches: int
    evaluations: int
    pairs: int = 1_000
    cosines: tuple[float, ...] = COSINES
    batch_sizes: tuple[int, ...] = BATCHES


SIZES: dict[Size, Effort] = {
    "smoke": Effort(
        pictures=(1, 1, 0, 1), curve=1, batches=1, evaluations=3, pairs=40, cosines=(1.0, 0.9), batch_sizes=(1, 2)
    ),
    "small": Effort(pictures=(8, 12, 4, 4), curve=6, batches=1, evaluations=60),
    "paper": Effort(pictures=(50, 50, 20, 20), curve=20, batches=5, evaluations=150),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every attack; the findings so far."""
    effort, most = SIZES[size], max(*SIZES[size].pictures, SIZES[size].curve, *SIZES[size].batch_sizes)
    rows: list[Row] = []
    bases = dict[str, Base]()

    def attack(victim: str, name: str) -> TokenSpan | MapInversion:
        search = MapInversion(prior=bases[victim].prior, evaluations=effort.evaluations, pairs=effort.pairs)
        return TokenSpan() if name == SPAN else search

    for (victim, name), count in zip(ATTACKS, effort.pictures, strict=True):
        if victim not in bases:
            bases[victim] = prepare(victim, data, most, size, start)
        if count:
            rows.append(measured(bases[victim], name, attack(victim, name), count, 1.0, 1, seed, start))
            yield findings(rows).after(before(data, size, bases.values()))
    for value in effort.cosines:
        for victim, name in (("convnet", SEARCH), ("vit", SPAN)):
            row = measured(bases[victim], name, attack(victim, name), effort.curve, value, 1, seed, start)
            rows.append({**row, "curve": True})
        yield findings(rows).after(before(data, size, bases.values()))
    base = bases["convnet"]
    for batch in effort.batch_sizes:
        if batch * effort.batches <= len(base.private.labels):
            row = measured(base, SEARCH, attack("convnet", SEARCH), effort.batches, 1.0, batch, seed, start)
            rows.append({**row, "attack": f"{SEARCH}, labels known"})
            yield findings(rows).after(before(data, size, bases.values()))


def measured(base: Base, name: str, attack: Any, count: int, value: float, batch: int, seed: int, start: Start) -> Row:
    """One row: `count` batches, whose gradients are known to the cosine `value`."""
    generator = torch.Generator().manual_seed(seed)
    private = base.batches(batch, count)
    # The label is taken as known here: the question is what the gradient says of the picture.
    seen = [
        replace(perturbed(full_gradient(base, p.images, p.labels), value, generator), labels=p.labels) for p in private
    ]
    victim, source = base.model.architecture.name, name_of(base.private.source)
    images, seconds = attacked(base, attack, seen, seed, start(f"{victim}, cosine {value}, batch {batch}"))
    about = {"victim": victim, "data": source, "attack": name, "cosine": value, "batch": batch}
    return {**about, **scores(base, images, [p.images for p in private]), "seconds": round(seconds / len(seen), 2)}


def perturbed(gradient: PictureObservation, cosine: float, generator: torch.Generator) -> PictureObservation:
    """The gradient plus Gaussian noise orthogonal to it, so that their cosine is exactly this, and its length the same."""
    true = flatten(gradient.released)
    noise = torch.randn(true.shape, generator=generator)
    noise = noise - (noise @ true) / (true @ true) * true
    mixed = cosine * true + (1 - cosine**2) ** 0.5 * true.norm() / noise.norm() * noise
    names = sorted(gradient.released)  # the order of flatten
    parts = mixed.split([gradient.released[name].numel() for name in names])
    shaped = {name: part.view_as(gradient.released[name]) for name, part in zip(names, parts, strict=True)}
    return replace(gradient, released=shaped)


def findings(rows: list[Row]) -> Findings:
    """The table, the transfer curve, and what the perfect gradient gives in words."""
    table = [{key: value for key, value in row.items() if key != "curve"} for row in rows]
    parts = [
        f"{row['victim']}, {row['attack']}: {row['psnr_db']} dB (mean image {row['mean_image_psnr_db']})"
        for row in rows
        if row["cosine"] == 1 and row["batch"] == 1 and "curve" not in row
    ]
    plots = [transfer(rows)] if any("curve" in row for row in rows) else []
    return Findings(table, "From the perfect gradient: " + "; ".join(dict.fromkeys(parts)) + ".", plots)


def transfer(rows: list[Row]) -> Plot:
    """PSNR against the cosine at which the gradient is known, and against the batch size."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("convnet", "vit"):
        series = [row for row in rows if "curve" in row and row["victim"] == name]
        label = f"{name}, {series[0]['attack']}"
        left.plot([row["cosine"] for row in series], [row["psnr_db"] for row in series], marker="o", label=label)
        left.axhline(series[0]["mean_image_psnr_db"], linestyle="--", color="black")
    left.set(xlabel="cosine to the true gradient", ylabel="PSNR in dB", title="transfer curve (dashed: mean image)")
    left.legend(fontsize=7)
    batches = [row for row in rows if "labels known" in row["attack"]]
    right.plot([row["batch"] for row in batches], [row["psnr_db"] for row in batches], marker="o")
    right.plot(
        [row["batch"] for row in batches], [row["mean_image_psnr_db"] for row in batches], linestyle="--", color="black"
    )
    right.set(xlabel="batch size", title="convnet, perfect gradient")
    return plot("What a perfect gradient gives, and one that is not", figure)
