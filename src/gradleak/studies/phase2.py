"""Phase 2: from a released adapter back to its training pictures, with controls, and when that ends.

Per model: (a) the adapter decoded into a gradient (ridge), which is inverted; (b) the adapter matched directly; (c) the
same from a better start, (a)'s result or a regression; activation patterns for the ReLU network; controls: B A taken
for a gradient, another victim's adapter, the mean image; for the transformer also the whole gradient, matched in the
same way. Then batches, steps, optimisers; then rank against batch size, beside what is identifiable at all.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from gradleak.attacks.activation_patterns.activation_patterns import ActivationPatterns
from gradleak.attacks.decoders.pairs import as_observation
from gradleak.attacks.decoders.ridge import Ridge
from gradleak.attacks.labels import known_or_recovered
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.audit.bound import identifiability
from gradleak.errors import NotObserved
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Adapter, product
from gradleak.observations.training import Recipe
from gradleak.studies.findings import Findings, plot
from gradleak.studies.lora_victims import ONE_STEP, Base, blank, full_gradient, prepare, scores, trained

Start = Callable[[str], OnStep]
RANKS, BATCHES, FEW, PAIRS = (2, 4, 8, 16), (1, 2, 4), 4, 1_000
# pictures for (convnet, vit, mlp1000), for the ablations, per cell of the map; evaluations per prior weight
SIZES = {"quick": (4, 2, 4, 2, 1, 20), "small": (16, 16, 50, 4, 2, 60), "paper": (200, 50, 200, 20, 10, 150)}
VICTIMS = (("convnet", 8), ("vit", 16), ("mlp1000", 8))


def run(data: str, size: str, *, seed: int, device: str, start: Start) -> Iterator[Findings]:
    """Yields after every attack; the findings so far."""
    *counts, ablation, per_cell, evaluations = SIZES["quick" if data in ("embedded", "digits") else size]
    rows: list[dict[str, Any]] = []
    bases = {}
    for (name, rank), count in zip(VICTIMS, counts, strict=True):
        bases[name] = base = prepare(name, data, count, start)
        for row in one_step(base, name, rank, evaluations, seed, start):
            rows.append(row)
            yield findings(rows)
    base = bases["convnet"]
    for recipe, known in (
        *[(Recipe(learning_rate=0.01, steps=steps), True) for steps in (2, 5, 10)],
        (ONE_STEP, False),
        (Recipe(optimizer="adam", learning_rate=1e-3, steps=1), False),
    ):
        rows.append(recipes(base, recipe, known, ablation, evaluations, seed))
        yield findings(rows)
    for batch in BATCHES:
        for rank in RANKS:
            rows.append(cell(base, rank, batch, per_cell, evaluations, seed, start))
            yield findings(rows)


def one_step(base: Base, name: str, rank: int, evaluations: int, seed: int, start: Start) -> Iterator[dict[str, Any]]:
    """The attacks and controls on adapters of one picture after one SGD step."""
    private = base.private
    adapters = [
        trained(blank(base, rank, seed=seed), private.images[i : i + 1], private.labels[i : i + 1])
        for i in range(len(private.labels))
    ]
    empty = [not any(bool(t.any()) for t in adapter.released.values()) for adapter in adapters]
    decoder = Ridge.fit(
        blank(base, rank, seed=seed),
        base.public.images[:PAIRS],
        base.public.labels[:PAIRS],
        generator=torch.Generator().manual_seed(seed),
    )
    plain, learned = (MapInversion(prior=base.prior, evaluations=evaluations, pairs=n) for n in (0, 1_000))
    wrong = [trained(a, base.public.images[i : i + 1], base.public.labels[i : i + 1]) for i, a in enumerate(adapters)]
    few = len(adapters) if name == "convnet" else FEW  # the others take up to half a minute a picture
    runs: dict[str, tuple[Any, Sequence[PictureObservation]]] = {
        "(a) decoded, then inverted": (plain, [labelled(decoder(a), a) for a in adapters[:few]]),
        "(b) adapter matched": (plain, adapters[:few]),
        "(c) adapter matched, start (a)": (replace(plain, start=Decoded(decoder, plain)), adapters[:few]),
        "(c) adapter matched, learned start": (learned, adapters if name == "vit" else adapters[:few]),
        "control: another's adapter": (learned, wrong[:few]),
        "control: B A as gradient": (plain, [labelled(raw(a), a) for a in adapters[:few]]),
    }
    if name == "vit":
        whole = [
            full_gradient(base, private.images[i : i + 1], private.labels[i : i + 1]) for i in range(len(adapters))
        ]
        runs["full gradient, learned start"] = (learned, [labelled(g, a) for g, a in zip(whole, adapters, strict=True)])
    if name == "mlp1000":
        runs["activation patterns"] = (ActivationPatterns(prior=base.prior), adapters)
        runs["control: another's adapter"] = (ActivationPatterns(prior=base.prior), wrong[:few])
    for label, (attack, seen) in runs.items():
        found, seconds = attacked(base, attack, seen, seed, start(f"{name}: {label}"))
        truth = [private.images[i : i + 1] for i in range(len(seen))]
        about = {"victim": name, "attack": label, "rank": rank, "batch": 1, "steps": 1, "optimizer": "sgd"}
        yield {**about, "empty": sum(empty), **scores(base, found, truth), "seconds": round(seconds / len(seen), 2)}


@dataclass(frozen=True)
class Decoded:
    """As a start: the adapter decoded, and the gradient inverted."""

    decoder: Ridge
    attack: MapInversion

    def __call__(self, observation: PictureObservation, *, generator: torch.Generator) -> Reconstruction:
        assert isinstance(observation, Adapter)
        return self.attack(labelled(self.decoder(observation), observation), generator=generator)


def attacked(
    base: Base, attack: Any, seen: Sequence[PictureObservation], seed: int, on_step: OnStep | None = None
) -> tuple[list[Tensor], float]:
    """The pictures, one batch per observation, the mean image where an attack refuses; and CPU seconds."""
    began, generator = time.process_time(), torch.Generator().manual_seed(seed)
    mean = base.public.images.mean(0, keepdim=True)
    if isinstance(attack, MapInversion) and all(known(o) for o in seen):
        found = [o.images for o in attack.many(seen, generator=generator, on_step=on_step)]
        return [torch.where(i.isfinite().all(), i, mean) for i in found], time.process_time() - began
    found = []
    for observation in seen:
        try:
            images = attack(observation, generator=generator, on_step=on_step).images
        except NotObserved:
            images = mean.expand(observation.batch_size or 1, -1, -1, -1)
        found.append(images)
    return found, time.process_time() - began


def known(observation: PictureObservation) -> bool:
    """Whether its scale is known, so that it can be attacked beside others."""
    return not isinstance(observation, Adapter) or observation.recipe is not None


def labelled(gradient: PictureObservation, adapter: Adapter) -> PictureObservation:
    """The gradient with the label that the adapter's last layer tells, where it does."""
    try:
        return replace(gradient, labels=known_or_recovered(adapter))
    except NotObserved:
        return gradient


def raw(adapter: Adapter) -> PictureObservation:
    """B A taken for the gradient, as if nothing had to be decoded."""
    factors = {name: adapter.start[name] + change for name, change in adapter.released.items()}
    own = {**adapter.start, **factors}
    made = {f"{m}.weight": -product(own[f"{m}.lora_A"], own[f"{m}.lora_B"]) for m in adapter.scaling}
    return as_observation(adapter, made)


def recipes(base: Base, recipe: Recipe, told: bool, count: int, evaluations: int, seed: int) -> dict[str, Any]:
    """More steps, or a recipe that the attacker is not told."""
    private, attack = base.private, MapInversion(prior=base.prior, evaluations=evaluations, pairs=500)
    seen = []
    for i in range(min(count, len(private.labels))):
        made = trained(blank(base, 8, recipe, seed=seed), private.images[i : i + 1], private.labels[i : i + 1])
        # A is released as it ended; the attacker takes it for where it began.
        seen.append(made if told else replace(made, recipe=None))
    found, seconds = attacked(base, attack, seen, seed)
    truth = [private.images[i : i + 1] for i in range(len(seen))]
    about = {"victim": "convnet", "attack": "recipe known" if told else "recipe unknown", "rank": 8, "batch": 1}
    about |= {"steps": recipe.steps, "optimizer": recipe.optimizer, "empty": 0}
    return {**about, **scores(base, found, truth), "seconds": round(seconds / len(seen), 2)}


def cell(base: Base, rank: int, batch: int, count: int, evaluations: int, seed: int, start: Start) -> dict[str, Any]:
    """One cell of the map: rank against batch size, labels known, and what is identifiable at noise 1e-3."""
    attack = MapInversion(prior=base.prior, evaluations=evaluations, pairs=500)
    chunks = [
        (base.private.images[i * batch : (i + 1) * batch], base.private.labels[i * batch : (i + 1) * batch])
        for i in range(min(count, len(base.private.labels) // batch))
    ]
    seen = [replace(trained(blank(base, rank, batch=batch, seed=seed), x, y), labels=y) for x, y in chunks]
    found, seconds = attacked(base, attack, seen, seed, start(f"rank {rank}, batch {batch}"))
    about = {"victim": "convnet", "attack": "map", "rank": rank, "batch": batch, "steps": 1, "optimizer": "sgd"}
    row = {**about, "empty": 0, **scores(base, found, [x for x, _ in chunks]), "seconds": round(seconds / len(seen), 2)}
    if batch <= 2:
        told = identifiability(seen[0], *chunks[0])
        level = told.noise_levels.index(1e-3)
        row |= {"determined": told.determined[level], "explained": round(told.explained[level], 3)}
    return row


def findings(rows: list[dict[str, Any]]) -> Findings:
    """The table, both maps, and the best attack per model in words."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [{key: row.get(key) for key in columns} for row in rows]
    parts = []
    for name, _ in VICTIMS:
        own = [row for row in rows if row["victim"] == name and row["attack"][0] in "(a"]
        if own:
            best = max(own, key=lambda row: row["psnr_db"])
            parts.append(
                f"{name}, rank {best['rank']}: {best['attack']} {best['psnr_db']} dB against {best['mean_image_psnr_db']} "
                f"dB of the mean image, better on {best['beats_mean_psnr']:.0%}, top-1 of 100 {best['top1_of_100']:.0%}"
            )
    sentence = "From the adapter of one step alone. " + "; ".join(parts) + "."
    return Findings(table, sentence, [maps(rows)] if any(row["attack"] == "map" for row in rows) else [])


def maps(rows: list[dict[str, Any]]) -> Any:
    """Rank against batch size: decibels above the mean image, and the share of the pixels' variance that is determined."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    cells = [row for row in rows if row["attack"] == "map"]
    panels: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("PSNR above the mean image, dB", lambda row: row["psnr_db"] - row["mean_image_psnr_db"]),
        ("variance explained at noise 1e-3", lambda row: row.get("explained", float("nan"))),
    )
    for axes, (title, value) in zip(figure.subplots(1, 2), panels, strict=True):
        grid = torch.full((len(BATCHES), len(RANKS)), torch.nan)
        for row in cells:
            grid[BATCHES.index(row["batch"]), RANKS.index(row["rank"])] = value(row)
        image = axes.imshow(grid.numpy(), cmap="viridis", aspect="auto")
        axes.set(title=title, xlabel="rank", ylabel="batch size")
        axes.set_xticks(range(len(RANKS)), map(str, RANKS))
        axes.set_yticks(range(len(BATCHES)), map(str, BATCHES))
        for y in range(len(BATCHES)):
            for x in range(len(RANKS)):
                axes.text(x, y, f"{float(grid[y, x]):.2g}", ha="center", va="center", color="white")
        figure.colorbar(image, ax=axes)
    return plot("When a convnet's adapter gives its pictures away", figure)
