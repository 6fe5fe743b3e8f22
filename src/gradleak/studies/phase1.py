"""Phase 1: how much of the gradient a decoder brings back from an adapter. The cosine to the true gradient on held-out
pictures, by rank, batch size, steps, number of public pairs and distance of the public pictures; the decoders are fitted
on adapters of one picture and one step.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from matplotlib.figure import Figure

from gradleak.attacks.decoders.mlp import MLP
from gradleak.attacks.decoders.ridge import PseudoInverse, Ridge
from gradleak.attacks.decoders.unet import UNet
from gradleak.errors import BadInput
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.distances import cosine
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe
from gradleak.report.record import Plot
from gradleak.studies.data_sets import beside, rows_of
from gradleak.studies.findings import Findings, Row, Size, Start, plot, rectangular
from gradleak.studies.lora_victims import Base, before, blank, full_gradient, prepare, trained
from gradleak.studies.phase2 import raw

Decoder = Callable[[PictureObservation], PictureObservation]
FIRST_RANK = 8  # of the rows that are not about ranks


@dataclass(frozen=True, kw_only=True)
class Effort:
    """held_out, pairs: pictures; the ranks, batch sizes, steps and numbers of pairs that are compared; the decoders that are
    trained by gradient descent."""

    held_out: int
    pairs: int
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32)
    batches: tuple[int, ...] = (2, 4)
    steps: tuple[int, ...] = (2, 5, 10, 50)
    fewer: tuple[int, ...] = (250, 500, 1_000)
    descent: tuple[str, ...] = ("mlp", "unet")


SIZES: dict[Size, Effort] = {
    "smoke": Effort(held_out=2, pairs=60, ranks=(4, 8), batches=(2,), steps=(2,), fewer=(30,), descent=()),
    "small": Effort(held_out=60, pairs=1_800),
    "paper": Effort(held_out=500, pairs=2_000),
}


def plain_ridge(blank: PictureObservation, public: Pictures, generator: torch.Generator) -> Decoder:
    """Ridge regression with one second moment a layer, and without the softmax equations."""
    return Ridge.fit(blank, public.images, public.labels, generator=generator, groups=1, softmax=False)


FITS: dict[str, Callable[[PictureObservation, Pictures, torch.Generator], Decoder]] = {
    "B A as gradient": lambda a, p, g: raw,
    "pseudo-inverse": lambda a, p, g: PseudoInverse(),
    "plain ridge": plain_ridge,
    "ridge": lambda a, p, g: Ridge.fit(a, p.images, p.labels, generator=g),
    "mlp": lambda a, p, g: MLP.fit(a, p.images, p.labels, generator=g),
    "unet": lambda a, p, g: UNet.fit(a, p.images, p.labels, generator=g),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every decoder that was fitted and measured; the findings so far."""
    effort = SIZES[size]
    base = prepare("vit", data, effort.held_out, size, start)
    rows, opening = list[Row](), before(data, size, [base])

    def measure(
        name: str, public: Pictures, kind: str, rank: int = FIRST_RANK, private: Pictures | None = None
    ) -> Decoder:
        generator, chosen = torch.Generator().manual_seed(seed), rows_of(public, 0, effort.pairs)
        began = time.process_time()
        decoder = FITS[name](blank(base, rank, seed=seed), chosen, generator)
        seconds = round(time.process_time() - began, 1)
        about = {"decoder": name, "rank": rank, "batch": 1, "steps": 1, "pairs": len(chosen.labels), "public": kind}
        rows.append(
            {**about, **fidelity(base, decoder, rank, 1, 1, seed, private or base.private), "fit_seconds": seconds}
        )
        return decoder

    pairs = min(effort.pairs, len(base.public.labels))
    for rank in effort.ranks:
        for name in ("B A as gradient", "pseudo-inverse", "plain ridge", "ridge"):
            decoder = measure(name, base.public, "same", rank)
            yield findings(rows).after(opening)
        about: Row = {"decoder": "ridge", "rank": rank, "batch": 1, "steps": 1, "pairs": pairs, "public": "same"}
        for batch in effort.batches:
            rows.append({**about, "batch": batch, **fidelity(base, decoder, rank, batch, 1, seed, base.private)})
        if rank == FIRST_RANK:
            for steps in effort.steps:
                rows.append({**about, "steps": steps, **fidelity(base, decoder, rank, 1, steps, seed, base.private)})
            rows += [{**about, **row} for row in by_layer(base, decoder, seed)]
        yield findings(rows).after(opening)
    for count in effort.fewer:
        if count < pairs:
            measure("ridge", rows_of(base.public, 0, count), "same")
            yield findings(rows).after(opening)
    for kind, public, private in proxies(base, data, effort.held_out):
        measure("ridge", public, kind, private=private)
        measure("plain ridge", public, kind, private=private)
        yield findings(rows).after(opening)
    for name in effort.descent:
        measure(name, base.public, "same")
        yield findings(rows).after(opening)


def fidelity(base: Base, decoder: Decoder, rank: int, batch: int, steps: int, seed: int, private: Pictures) -> Row:
    """Mean cosine to the gradient at the start of training: of the whole, and mean over layers but the last.

    Where training diverges, its reason as `note`.
    """
    whole, layers = [], []
    for i in range(len(private.labels) // batch if steps == 1 else min(len(private.labels), 20)):
        some = rows_of(private, i * batch, batch)
        recipe = Recipe(learning_rate=0.01, steps=steps)
        try:
            adapter = trained(blank(base, rank, recipe, batch=batch, seed=seed), some.images, some.labels)
        except BadInput as reason:
            return {"cosine": None, "cosine_layers": None, "tested": i, "note": str(reason)}
        decoded, true = decoder(adapter).released, full_gradient(base, some.images, some.labels).released
        whole.append(similarity(decoded, true))
        layers.append([similarity({k: decoded[k]}, {k: true[k]}) for k in list(true)[:-1]])
    mean = torch.tensor(layers).mean()
    return {"cosine": round(sum(whole) / len(whole), 4), "cosine_layers": round(float(mean), 4), "tested": len(whole)}


def similarity(a: Tensors, b: Tensors) -> float:
    """<a, b> / (|a| |b|)."""
    return 1 - float(cosine(a, {name: b[name] for name in a}))


def by_layer(base: Base, decoder: Decoder, seed: int) -> list[Row]:
    """One row per kind of layer, mean over blocks and pictures, at the first rank."""
    cosines: dict[str, list[float]] = {}
    for one in base.batches(1, 20):
        decoded = decoder(trained(blank(base, FIRST_RANK, seed=seed), one.images, one.labels)).released
        true = full_gradient(base, one.images, one.labels).released
        for name in true:
            kind = name.removesuffix(".weight").rpartition(".")[2]
            cosines.setdefault(kind, []).append(similarity({name: decoded[name]}, {name: true[name]}))
    return [{"layer": k, "cosine": round(sum(v) / len(v), 4), "tested": len(v)} for k, v in cosines.items()]


def proxies(base: Base, data: str, held_out: int) -> Iterator[tuple[str, Pictures, Pictures]]:
    """(description, public, private) where the two are of different kinds: the data sets beside `data`, if there."""
    shape = base.model.architecture.input_shape
    if (folder := beside(data, "imagenet_sample")) is not None:
        public = public_pool(folder, "train", shape=shape, limit=2_000)
        yield "imagenet_sample -> same", replace(public, labels=public.labels % 10), base.private
    if (folder := beside(data, "orl_faces")) is not None:
        faces = load(folder, "train", limit=held_out, resize=shape[1:])
        private = replace(faces, images=faces.images.expand(-1, shape[0], -1, -1), labels=faces.labels % 10)
        yield "same -> orl_faces", base.public, private


def findings(rows: list[Row]) -> Findings:
    """The table, the curves by rank and by steps, and the ridge decoder in words."""
    ridge = [row for row in rows if row["decoder"] == "ridge" and "fit_seconds" in row and row["public"] == "same"]
    best = {row["rank"]: row["cosine"] for row in reversed(ridge) if row["cosine"] is not None}
    words = ", ".join(f"{value:.3f} at r = {rank}" for rank, value in sorted(best.items()))
    sentence = f"Cosine of the gradient decoded by ridge to the true one, one picture, one step: {words}."
    return Findings(rectangular(rows), sentence, [curves(rows)] if len(best) > 1 else [])


def curves(rows: list[Row]) -> Plot:
    """The cosine by rank for every decoder, and by steps for ridge."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for decoder in FITS:
        points = {
            row["rank"]: row["cosine"]
            for row in reversed(rows)
            if (row["decoder"], row["batch"], row["steps"], row["public"]) == (decoder, 1, 1, "same")
            and "layer" not in row
        }
        left.plot(sorted(points), [points[rank] for rank in sorted(points)], marker="o", label=decoder)
    left.set(xscale="log", xlabel="rank", ylabel="cosine to the true gradient", title="one picture, one step")
    ranks = sorted({row["rank"] for row in rows})
    left.set_xticks(ranks, map(str, ranks))
    left.minorticks_off()
    left.legend(fontsize=7)
    steps = {
        row["steps"]: row["cosine"]
        for row in reversed(rows)
        if (row["decoder"], row["rank"], row["batch"], row["public"]) == ("ridge", 8, 1, "same") and "layer" not in row
    }
    right.plot(sorted(steps), [steps[step] for step in sorted(steps)], marker="o")
    right.set(xscale="log", xlabel="steps", title="ridge, rank 8, several steps")
    return plot("How much of the gradient comes back", figure)
