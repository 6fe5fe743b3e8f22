"""Phase 1: how much of the gradient a decoder brings back from an adapter. The cosine to the true gradient on held-out
pictures, by rank, batch size, steps, number of public pairs and distance of the public pictures; the decoders are fitted
on adapters of one picture and one step.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from gradleak.attacks.decoders.mlp import MLP
from gradleak.attacks.decoders.ridge import PseudoInverse, Ridge
from gradleak.attacks.decoders.unet import UNet
from gradleak.attacks.search.descend import OnStep
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.distances import cosine
from gradleak.observations.releases import Adapter
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe
from gradleak.studies.findings import Findings, plot
from gradleak.studies.lora_victims import Base, blank, full_gradient, prepare, trained
from gradleak.studies.phase2 import raw

Start = Callable[[str], OnStep]
RANKS, BATCHES, STEPS, PAIRS = (2, 4, 8, 16, 32), (1, 2, 4), (2, 5, 10, 50), (250, 500, 1_000)
# held-out pictures, public pairs, whether the trained decoders are fitted too
SIZES = {"quick": (8, 250, False), "small": (60, 1_800, True), "paper": (500, 2_000, True)}


def plain_ridge(blank: Adapter, public: Pictures, generator: torch.Generator) -> Any:
    """Ridge regression with one second moment a layer, and without the softmax equations."""
    return Ridge.fit(blank, public.images, public.labels, generator=generator, groups=1, softmax=False)


FITS: dict[str, Callable[[Adapter, Pictures, torch.Generator], Any]] = {
    "B A as gradient": lambda a, p, g: lambda adapter: raw(adapter),
    "pseudo-inverse": lambda a, p, g: PseudoInverse(),
    "plain ridge": plain_ridge,
    "ridge": lambda a, p, g: Ridge.fit(a, p.images, p.labels, generator=g),
    "mlp": lambda a, p, g: MLP.fit(a, p.images, p.labels, generator=g),
    "unet": lambda a, p, g: UNet.fit(a, p.images, p.labels, generator=g),
}


def run(data: str, size: str, *, seed: int, device: str, start: Start) -> Iterator[Findings]:
    """Yields after every decoder that was fitted and measured; the findings so far."""
    held_out, pairs, with_trained = SIZES["quick" if data in ("embedded", "digits") else size]
    base = prepare("vit", data, held_out, start)
    rows: list[dict[str, Any]] = []

    def measure(decoder: str, public: Pictures, told: str, rank: int = 8, private: Pictures = base.private) -> Any:
        generator = torch.Generator().manual_seed(seed)
        chosen = replace(public, images=public.images[:pairs], labels=public.labels[:pairs])
        began = time.process_time()
        fitted = FITS[decoder](blank(base, rank, seed=seed), chosen, generator)
        seconds = round(time.process_time() - began, 1)
        about = {"decoder": decoder, "rank": rank, "batch": 1, "steps": 1, "pairs": len(chosen.labels), "public": told}
        rows.append({**about, **fidelity(base, fitted, rank, 1, 1, seed, private), "fit_seconds": seconds})
        return fitted

    for rank in RANKS:
        for decoder in ("B A as gradient", "pseudo-inverse", "plain ridge", "ridge"):
            fitted = measure(decoder, base.public, "same", rank)
            yield findings(rows)
        for batch in BATCHES[1:]:
            about = {"decoder": "ridge", "rank": rank, "batch": batch, "steps": 1, "pairs": pairs, "public": "same"}
            rows.append({**about, **fidelity(base, fitted, rank, batch, 1, seed, base.private)})
        if rank == 8:
            for steps in STEPS:
                about = {"decoder": "ridge", "rank": 8, "batch": 1, "steps": steps, "pairs": pairs, "public": "same"}
                rows.append({**about, **fidelity(base, fitted, 8, 1, steps, seed, base.private)})
            rows += by_layer(base, fitted, seed, pairs)
        yield findings(rows)
    for count in PAIRS:
        few = replace(base.public, images=base.public.images[:count], labels=base.public.labels[:count])
        if count < pairs:
            measure("ridge", few, "same")
            yield findings(rows)
    for told, public, private in proxies(base, data, held_out):
        measure("ridge", public, told, private=private)
        measure("plain ridge", public, told, private=private)
        yield findings(rows)
    for decoder in ("mlp", "unet") if with_trained else ():
        measure(decoder, base.public, "same")
        yield findings(rows)


def fidelity(
    base: Base, decoder: Any, rank: int, batch: int, steps: int, seed: int, private: Pictures
) -> dict[str, Any]:
    """Mean cosine to the gradient at the start of training: of the whole, and mean over layers but the last."""
    whole, layers = [], []
    for i in range(len(private.labels) // batch if steps == 1 else min(len(private.labels), 20)):
        images, labels = (t[i * batch : (i + 1) * batch] for t in (private.images, private.labels))
        recipe = Recipe(learning_rate=0.01, steps=steps)
        decoded = decoder(trained(blank(base, rank, recipe, batch=batch, seed=seed), images, labels)).released
        true = full_gradient(base, images, labels).released
        whole.append(similarity(decoded, true))
        layers.append([similarity({k: decoded[k]}, {k: true[k]}) for k in list(true)[:-1]])
    mean = torch.tensor(layers).mean()
    return {"cosine": round(sum(whole) / len(whole), 4), "cosine_layers": round(float(mean), 4), "tested": len(whole)}


def similarity(a: Tensors, b: Tensors) -> float:
    """<a, b> / (|a| |b|)."""
    return 1 - float(cosine(a, {name: b[name] for name in a}))


def by_layer(base: Base, decoder: Any, seed: int, pairs: int) -> list[dict[str, Any]]:
    """One row per kind of layer, mean over blocks and pictures, at rank 8."""
    found: dict[str, list[float]] = {}
    for image, label in list(zip(base.private.images.split(1), base.private.labels.split(1), strict=True))[:20]:  # type: ignore[no-untyped-call]
        decoded = decoder(trained(blank(base, 8, seed=seed), image, label)).released
        true = full_gradient(base, image, label).released
        for name in true:
            kind = name.removesuffix(".weight").rpartition(".")[2]
            found.setdefault(kind, []).append(similarity({name: decoded[name]}, {name: true[name]}))
    about = {"decoder": "ridge", "rank": 8, "batch": 1, "steps": 1, "pairs": pairs, "public": "same"}
    return [{**about, "layer": k, "cosine": round(sum(v) / len(v), 4), "tested": len(v)} for k, v in found.items()]


def proxies(base: Base, data: str, held_out: int) -> Iterator[tuple[str, Pictures, Pictures]]:
    """(description, public, private) where the two are of different kinds: the data sets beside `data`, if there."""
    shape = base.model.architecture.input_shape
    beside = Path(data).parent
    if (beside / "imagenet_sample").is_dir():
        public = public_pool(beside / "imagenet_sample", "train", shape=shape, limit=2_000)
        yield "imagenet_sample -> same", replace(public, labels=public.labels % 10), base.private
    if (beside / "orl_faces").is_dir():
        faces = load(beside / "orl_faces", "train", limit=held_out, resize=shape[1:])
        private = replace(faces, images=faces.images.expand(-1, shape[0], -1, -1), labels=faces.labels % 10)
        yield "same -> orl_faces", base.public, private


def findings(rows: list[dict[str, Any]]) -> Findings:
    """The table, the curves by rank and by steps, and the ridge decoder in words."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [{key: row.get(key) for key in columns} for row in rows]
    own = [row for row in rows if row["decoder"] == "ridge" and "fit_seconds" in row and row["public"] == "same"]
    best = {row["rank"]: row["cosine"] for row in reversed(own)}
    words = ", ".join(f"{value:.3f} at r = {rank}" for rank, value in sorted(best.items()))
    sentence = f"Cosine of the gradient decoded by ridge to the true one, one picture, one step: {words}."
    return Findings(table, sentence, [curves(rows)] if len(best) > 1 else [])


def curves(rows: list[dict[str, Any]]) -> Any:
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
    left.set_xticks(RANKS, map(str, RANKS))
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
