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
from gradleak.errors import BadInput, NotObserved
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Adapter, product
from gradleak.observations.training import Recipe
from gradleak.report.record import Plot
from gradleak.studies.data_sets import rows_of
from gradleak.studies.findings import Findings, Row, Size, Start, name_of, plot, rectangular
from gradleak.studies.lora_victims import ONE_STEP, Base, before, blank, full_gradient, prepare, scores, trained

FEW, PAIRS = 4, 1_000
RANK = {"convnet": 8, "vit": 16, "mlp1000": 8}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """pictures for each model, for the ablations, batches per cell of the map; evaluations per prior weight; the public
    pictures that decoders and starts learn from; steps of the ablations; ranks and batch sizes of the map."""

    pictures: dict[str, int]
    ablation: int
    per_cell: int
    evaluations: int
    pairs: int = PAIRS
    steps: tuple[int, ...] = (2, 5, 10)
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    batches: tuple[int, ...] = (1, 2, 4)


SIZES: dict[Size, Effort] = {
    "smoke": Effort(
        pictures={"convnet": 1}, ablation=1, per_cell=1, evaluations=3, pairs=60, steps=(2,), ranks=(8,), batches=(1,)
    ),
    "small": Effort(pictures={"convnet": 16, "vit": 16, "mlp1000": 50}, ablation=4, per_cell=2, evaluations=60),
    "paper": Effort(pictures={"convnet": 200, "vit": 50, "mlp1000": 200}, ablation=20, per_cell=10, evaluations=150),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every attack; the findings so far."""
    effort = SIZES[size]
    rows: list[Row] = []
    bases = dict[str, Base]()
    for name, count in effort.pictures.items():
        bases[name] = base = prepare(name, data, count, size, start)
        for row in one_step(base, name, RANK[name], effort, seed, start):
            rows.append(row)
            yield findings(rows).after(before(data, size, bases.values()))
    base = bases["convnet"]
    for recipe, known in (
        *[(Recipe(learning_rate=0.01, steps=steps), True) for steps in effort.steps],
        (ONE_STEP, False),
        (Recipe(optimizer="adam", learning_rate=1e-3, steps=1), False),
    ):
        rows.append(recipes(base, recipe, known, effort.ablation, effort.evaluations, seed, effort.pairs // 2))
        yield findings(rows).after(before(data, size, bases.values()))
    for batch in effort.batches:
        for rank in effort.ranks:
            rows.append(cell(base, rank, batch, effort.per_cell, effort.evaluations, seed, start, effort.pairs // 2))
            yield findings(rows).after(before(data, size, bases.values()))


def one_step(base: Base, name: str, rank: int, effort: Effort, seed: int, start: Start) -> Iterator[Row]:
    """The attacks and controls on adapters of one picture after one SGD step."""
    private, public = base.batches(1, len(base.private.labels)), rows_of(base.public, 0, effort.pairs)
    adapters = [trained(blank(base, rank, seed=seed), one.images, one.labels) for one in private]
    empty = [not any(bool(t.any()) for t in adapter.released.values()) for adapter in adapters]
    generator = torch.Generator().manual_seed(seed)
    decoder = Ridge.fit(blank(base, rank, seed=seed), public.images, public.labels, generator=generator)
    plain, learned = (
        MapInversion(prior=base.prior, evaluations=effort.evaluations, pairs=n) for n in (0, effort.pairs)
    )
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
        whole = [full_gradient(base, one.images, one.labels) for one in private]
        runs["full gradient, learned start"] = (learned, [labelled(g, a) for g, a in zip(whole, adapters, strict=True)])
    if name == "mlp1000":
        runs["activation patterns"] = (ActivationPatterns(prior=base.prior), adapters)
        runs["control: another's adapter"] = (ActivationPatterns(prior=base.prior), wrong[:few])
    for label, (attack, seen) in runs.items():
        images, seconds = attacked(base, attack, seen, seed, start(f"{name}: {label}"))
        truth = [one.images for one in private[: len(seen)]]
        about = {"victim": name, "data": name_of(base.private.source), "attack": label, "rank": rank, "batch": 1}
        about |= {"steps": 1, "optimizer": "sgd", "empty": sum(empty)}
        yield {**about, **scores(base, images, truth), "seconds": round(seconds / len(seen), 2)}


@dataclass(frozen=True)
class Decoded:
    """As a start: the adapter decoded, and the gradient inverted."""

    decoder: Ridge
    attack: MapInversion

    def __call__(self, observation: PictureObservation, *, generator: torch.Generator) -> Reconstruction:
        return self.attack(labelled(self.decoder(observation), observation), generator=generator)


def attacked(
    base: Base, attack: Any, seen: Sequence[PictureObservation], seed: int, on_step: OnStep | None = None
) -> tuple[list[Tensor], float]:
    """The pictures, one batch per observation, the mean image where an attack refuses; and CPU seconds."""
    began, generator = time.process_time(), torch.Generator().manual_seed(seed)
    mean = base.public.images.mean(0, keepdim=True)
    if isinstance(attack, MapInversion) and all(scale_known(o) for o in seen):
        images = [o.value for o in attack.many(seen, generator=generator, on_step=on_step)]
        return [torch.where(i.isfinite().all(), i, mean) for i in images], time.process_time() - began
    images = []
    for observation in seen:
        try:
            images.append(attack(observation, generator=generator, on_step=on_step).value)
        except NotObserved:
            images.append(mean.expand(observation.batch_size or 1, -1, -1, -1))
    return images, time.process_time() - began


def scale_known(observation: PictureObservation) -> bool:
    """Whether it can be attacked beside others."""
    return not isinstance(observation.release, Adapter) or observation.release.recipe is not None


def labelled(gradient: PictureObservation, adapter: PictureObservation) -> PictureObservation:
    """The gradient with the label that the adapter's last layer tells, where it does."""
    try:
        return replace(gradient, labels=known_or_recovered(adapter))
    except NotObserved:
        return gradient


def raw(adapter: PictureObservation) -> PictureObservation:
    """B A taken for the gradient, as if nothing had to be decoded."""
    start, scaling = adapter.adapter.start, adapter.adapter.scaling
    factors = {**start, **{name: start[name] + change for name, change in adapter.released.items()}}
    weights = {f"{m}.weight": -product(factors[f"{m}.lora_A"], factors[f"{m}.lora_B"]) for m in scaling}
    return as_observation(adapter, weights)


def recipes(base: Base, recipe: Recipe, known: bool, count: int, evaluations: int, seed: int, pairs: int) -> Row:
    """More steps, or a recipe that the attacker does not know; where training diverges, its reason as `note`."""
    private, attack = base.batches(1, count), MapInversion(prior=base.prior, evaluations=evaluations, pairs=pairs)
    about: Row = {"victim": "convnet", "data": name_of(base.private.source)}
    about |= {"attack": "recipe known" if known else "recipe unknown", "rank": 8, "batch": 1}
    about |= {"steps": recipe.steps, "optimizer": recipe.optimizer, "empty": 0}
    try:
        seen = [trained(blank(base, 8, recipe, seed=seed), one.images, one.labels) for one in private]
    except BadInput as reason:
        return {**about, "note": str(reason)}
    if not known:  # A is released as it ended; the attacker takes it for where it began
        seen = [replace(adapter, release=replace(adapter.adapter, recipe=None)) for adapter in seen]
    images, seconds = attacked(base, attack, seen, seed)
    return {**about, **scores(base, images, [one.images for one in private]), "seconds": round(seconds / len(seen), 2)}


def cell(
    base: Base, rank: int, batch: int, count: int, evaluations: int, seed: int, start: Start, pairs: int = PAIRS // 2
) -> Row:
    """One cell of the map: rank against batch size, labels known, and what is identifiable at noise 1e-3."""
    attack = MapInversion(prior=base.prior, evaluations=evaluations, pairs=pairs)
    private = base.batches(batch, count)
    seen = [
        replace(trained(blank(base, rank, batch=batch, seed=seed), some.images, some.labels), labels=some.labels)
        for some in private
    ]
    images, seconds = attacked(base, attack, seen, seed, start(f"rank {rank}, batch {batch}"))
    about = {"victim": "convnet", "data": name_of(base.private.source), "attack": "map", "rank": rank, "batch": batch}
    about |= {"steps": 1, "optimizer": "sgd", "empty": 0}
    row = {**about, **scores(base, images, [some.images for some in private]), "seconds": round(seconds / len(seen), 2)}
    if batch <= 2:
        known = identifiability(seen[0], private[0].images, private[0].labels)
        level = known.noise_levels.index(1e-3)
        row |= {"determined": known.determined[level], "explained": round(known.explained[level], 3)}
    return row


def findings(rows: list[Row]) -> Findings:
    """The table, both maps, and the best attack per model in words."""
    parts = []
    for name in RANK:
        victim_rows = [row for row in rows if row["victim"] == name and row["attack"][0] in "(a"]
        if victim_rows:
            best = max(victim_rows, key=lambda row: row["psnr_db"])
            parts.append(
                f"{name}, rank {best['rank']}: {best['attack']} {best['psnr_db']} dB against {best['mean_image_psnr_db']} "
                f"dB of the mean image, better on {best['beats_mean_psnr']:.0%}, top-1 of 100 {best['top1_of_100']:.0%}"
            )
    sentence = "From the adapter of one step alone. " + "; ".join(parts) + "."
    return Findings(rectangular(rows), sentence, [maps(rows)] if any(row["attack"] == "map" for row in rows) else [])


def maps(rows: list[Row]) -> Plot:
    """Rank against batch size: decibels above the mean image, and the share of the pixels' variance that is determined."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    cells = [row for row in rows if row["attack"] == "map"]
    ranks, batches = (sorted({row[key] for row in cells}) for key in ("rank", "batch"))
    panels: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("PSNR above the mean image, dB", lambda row: row["psnr_db"] - row["mean_image_psnr_db"]),
        ("variance explained at noise 1e-3", lambda row: row.get("explained", float("nan"))),
    )
    for axes, (title, value) in zip(figure.subplots(1, 2), panels, strict=True):
        grid = torch.full((len(batches), len(ranks)), torch.nan)
        for row in cells:
            grid[batches.index(row["batch"]), ranks.index(row["rank"])] = value(row)
        image = axes.imshow(grid.numpy(), cmap="viridis", aspect="auto")
        axes.set(title=title, xlabel="rank", ylabel="batch size")
        axes.set_xticks(range(len(ranks)), map(str, ranks))
        axes.set_yticks(range(len(batches)), map(str, batches))
        for y in range(len(batches)):
            for x in range(len(ranks)):
                axes.text(x, y, f"{float(grid[y, x]):.2g}", ha="center", va="center", color="white")
        figure.colorbar(image, ax=axes)
    return plot("When a convnet's adapter gives its pictures away", figure)
