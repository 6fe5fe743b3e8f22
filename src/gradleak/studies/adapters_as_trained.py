"""Which adapters give their pictures back when they are trained as people train them: for many steps, on several pictures?

Known: the folder of PEFT's LoRA and the base model, no recipe, seed or number. Controls: mean image, another adapter."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gradleak.attacks.activation_patterns.activation_patterns import ActivationPatterns
from gradleak.attacks.adam_epsilon import AdamEpsilon
from gradleak.attacks.adam_unmixing.adam_unmixing import AdamUnmixing
from gradleak.attacks.unmixing.unmixing import Unmixing
from gradleak.audit import metrics
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import Recipe
from gradleak.studies.adapter_victims import of_a_stranger
from gradleak.studies.data_sets import beside, blueprint, rows_of, unseen
from gradleak.studies.findings import Findings, shortage, stands_in
from gradleak.studies.plots import bars, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table, columns
from gradleak.victims.training import prepare_model

SGD, SLOW = (Recipe(learning_rate=rate, steps=200) for rate in (1e-2, 1e-3))
SEED, DECOYS, FIRST, SETS = 42, 99, 400, {"smoke": 1, "small": 3, "paper": 10}  # test rows before FIRST were looked at
LEAST = {"smoke": 1, "small": 10, "paper": 50}  # pictures of a row


@dataclass(frozen=True)
class Setting:
    """The usual. base: untrained, or trained on public pictures for five epochs."""

    base: str = "untrained"
    pictures: int = 8
    rank: int = 16
    recipe: Recipe = SGD
    precision: str = "float32"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """One thing after another differs from the usual."""
    usual = Setting() if size != "smoke" else Setting(pictures=4, rank=8, recipe=replace(SGD, steps=50))
    adam = replace(SLOW, optimizer="adamw")
    yield from (usual, replace(usual, recipe=adam), replace(usual, pictures=1, recipe=replace(adam, steps=20)))
    if size == "smoke":
        return
    yield from (replace(usual, pictures=n, rank=r) for n, r in ((2, 16), (4, 16), (8, 8), (16, 32), (16, 16)))
    recipes = [replace(SGD, steps=n) for n in (1, 5, 50, 500)] + [replace(SGD, batch_size=n) for n in (1, 2, 4)]
    recipes += [replace(SLOW, learning_rate=1e-1), SLOW, replace(SLOW, optimizer="momentum")]
    yield from (replace(usual, recipe=recipe) for recipe in recipes)
    yield from (replace(usual, precision=precision) for precision in ("bfloat16", "float16"))
    for n, steps in ((1, 1), (1, 2), (1, 5), (1, 200), (2, 2), (4, 2), (8, 2)):
        yield replace(usual, pictures=n, recipe=replace(adam, steps=steps))
    yield replace(usual, pictures=1, recipe=replace(adam, steps=20), precision="bfloat16")
    yield from (replace(usual, base="trained", recipe=replace(SGD, learning_rate=rate)) for rate in (1e-2, 1e-1))


@lru_cache(maxsize=2)
def prepared(base: str, data: str, size: Size, seed: int) -> tuple[PictureModel, Pictures]:
    """The base model, and public pictures: decoys first."""
    architecture = Architecture("mlp1000", blueprint(data, size)[0], 2)
    public = public_pool(data, "train", shape=architecture.input_shape, limit=2_000)
    public, epochs = replace(public, labels=public.labels % 2), 5 if base == "trained" else 0
    return Model.of(prepare_model(architecture, seed=seed, train_on=public, epochs=epochs), architecture), public


def cell(setting: Setting, bench: Bench) -> Result:
    """Each set of pictures, and another as its control."""
    source, count = str(beside(bench.data, "mnist") or "digits"), setting.pictures
    model, public = prepared(setting.base, source, bench.size, bench.seed)
    wanted = 2 * max(SETS[bench.size] * count, LEAST[bench.size])
    held = unseen(source, FIRST, wanted, model.architecture.input_shape)
    private = replace(held, labels=held.labels % 2)
    mean, samples = public.images[DECOYS:].mean(0, keepdim=True), list[Row]()
    for first in range(0, len(private.labels) - 2 * count + 1, 2 * count):
        own, others = (rows_of(private, at, count) for at in (first, first + count))
        (found, seen), (other, _) = (attacked(model, some, setting, mean) for some in (own, others))
        matched, blind = (images[metrics.match(images, own.images)] for images in (found, other))
        told = {"seed_found": seen.adapter.seed == SEED, "counted": seen.batch_size == count}
        rows = compared(matched, own.images, mean, public.images[:DECOYS])
        psnr = metrics.psnr_db(blind, own.images).tolist()
        samples += [row | told | {"another_adapter_psnr_db": p} for row, p in zip(rows, psnr, strict=True)]
    notes = stands_in(source, bench.data), shortage("unseen pictures", wanted, len(private.labels))
    return Result({}, samples, notes=notes)


def attacked(model: PictureModel, own: Pictures, setting: Setting, mean: Tensor) -> tuple[Tensor, PictureObservation]:
    """What comes back of an adapter's folder, padded by the mean image, and what was observed."""
    seen, found = of_a_stranger(model, own, setting.rank, setting.recipe, setting.precision, SEED), mean[:0]
    for attack in (ActivationPatterns(), AdamEpsilon(), AdamUnmixing(), Unmixing()):  # the last one that reads it
        with suppress(NotObserved):
            found = attack(seen, generator=torch.Generator().manual_seed(0)).value
    return torch.cat([found, mean.expand(len(own.labels), *mean.shape[1:])]), seen


def tell(table: Table) -> Findings:
    """Shares of pictures that were identified, row by row."""

    def about(row: Row) -> str:
        return ", ".join(f"{k} {row[k]}" for k, usual in columns(Setting()).items() if row[k] != usual) or "the usual"

    said = "; ".join(f"{about(row)}: {row['identified']:.0%}, {row['psnr_db']:.1f} dB" for row in table.rows)
    figure, [axes] = panels(width=7, height=1 + 0.3 * len(table.rows))
    bars(axes, table.rows, about, "identified", "seed_found")
    axes.set(xlabel="share of pictures identified among 100; of adapters whose seed was found", xlim=(0, 1.05))
    return Findings(f"Pictures identified among 100. {said}.", {"What comes back": figure})


STUDY = Study(
    name="adapters-as-trained",
    question="Do hundreds of steps on many pictures keep an adapter from giving them back?",
    settings=settings,
    cell=cell,
    tell=tell,
    beside=("mnist",),
)
