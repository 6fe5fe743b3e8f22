"""Training images out of the change that T steps make to weights: how long does the linear regime last?

A network trained on public pictures is fine-tuned on two pictures that it has not seen, or eight, or sixteen; and, for
comparison, one whose first layer starts from tiny random weights, where the first step turns the features. Then the rank:
the change cut off after its largest singular values, layer by layer, and the change that LoRA of a rank makes. Controls: the
mean image, and the search with the true coefficients.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from gradleak.attacks.weights.ntk import NTK
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import public_pool
from gradleak.observations.model import Model, PictureModel
from gradleak.studies.data_sets import Shape, blueprint, shrunk, unseen
from gradleak.studies.extractions import extracted, judged, similarity
from gradleak.studies.findings import Findings
from gradleak.studies.plots import curve
from gradleak.studies.regimes import drift
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.fine_tuning import ALL, LowRank, Released, Truncated, fine_tuned
from gradleak.victims.training import prepare_model

STEPS = (1, 2, 5, 10, 20, 50, 100, 500, 1_000)
SWEPT: tuple[Released, ...] = (*map(Truncated, (1, 2)), *map(LowRank, (1, 8, 64, 256, 784)))
SIZES: dict[Size, tuple[int, tuple[int, ...], tuple[int, ...], tuple[Released, ...]]] = {
    "smoke": (1, (1,), (5,), (Truncated(1), LowRank(8))),
    "small": (4, STEPS, (1, 100), SWEPT),
    "paper": (20, STEPS, (1, 10, 100, 1_000), SWEPT),
}  # fine-tunings per setting, T, T of the rank sweep, what it releases
SEARCH: dict[Size, int] = {"smoke": 10, "small": 600, "paper": 1_500}
SLOW, FAST = 0.01, 0.1  # learning rates of the fine-tuning
TRAINED, TINY = "trained", "tiny random"
SERIES = ((TRAINED, 2, SLOW), (TRAINED, 2, FAST), (TINY, 2, FAST), (TRAINED, 8, FAST), (TRAINED, 16, FAST))
SPREAD = 1e-4  # standard deviation of a tiny first layer


@dataclass(frozen=True)
class Setting:
    """start: where the fine-tuning starts; images in it, its learning rate and steps; what is released; which pictures."""

    start: str
    images: int
    learning_rate: float
    steps: int
    released: Released = ALL
    repeat: int = 0


def settings(data: str, size: Size) -> Iterator[Setting]:
    """By the number of steps, then by rank."""
    repeats, all_steps, swept_steps, swept = SIZES[size]
    once = [Setting(*one, steps) for one in SERIES for steps in all_steps]
    once += [Setting(TRAINED, 2, FAST, steps, released) for steps in swept_steps for released in swept]
    for one in once:
        yield from (replace(one, repeat=k) for k in range(min(repeats, max(16, 2 * repeats) // one.images)))


def cell(setting: Setting, bench: Bench) -> Result:
    """One fine-tuning, and what is read from it, also with the true coefficients."""
    shape, classes = blueprint(bench.data, bench.size)
    batch = unseen(bench.data, setting.repeat * setting.images, setting.images, shape)
    model, mean = public_model(bench.data, shape, classes, bench.seed)
    model = tiny(model.architecture, bench.seed) if setting.start == TINY else model
    update, shares = fine_tuned(model, batch, setting.released, setting.learning_rate, setting.steps, bench.seed)
    attack = NTK(steps=SEARCH[bench.size], restarts=2)
    found, generator = extracted(attack, update, bench), torch.Generator().manual_seed(bench.seed)
    known = similarity(attack.knowing(update, batch.labels, shares, generator=generator), batch.images)
    result = judged(batch.images, found, {"mean_image": mean}, ssim_coefficients_known=known)
    return replace(result, facts=drift(update, batch) | result.facts, notes=(shrunk(shape, bench.size),))


@lru_cache(maxsize=2)
def public_model(data: str, shape: Shape, classes: int, seed: int) -> tuple[PictureModel, Tensor]:
    """A network trained on public pictures, and their mean."""
    architecture, public = Architecture("mlp", shape, classes), public_pool(data, "train", shape=shape, limit=2_000)
    module = prepare_model(architecture, seed=seed, train_on=public, epochs=3)
    return Model.of(module, architecture), public.images.mean(0, keepdim=True)


def tiny(architecture: Architecture, seed: int) -> PictureModel:
    """Random, with the first layer at N(0, 1e-4^2), as where the weights of Haim et al. (2022) start."""
    module = architecture.build(seed)
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Linear))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_(std=SPREAD, generator=generator)
    return Model.of(module, architecture)


def tell(table: Table) -> Findings:
    """SSIM after one step, and the number of steps at which it falls under a half."""
    parts, whole = [], Table(table.where(released=str(ALL)))
    for start, images, rate in SERIES:
        if series := whole.where(start=start, images=images, learning_rate=rate):
            fallen = [f"under 0.5 from {row['steps']} steps on" for row in series if row["ssim"] < 0.5]
            when = [*fallen, f"not under 0.5 within {series[-1]['steps']} steps"][0]
            after = f"{series[0]['ssim']:.3f} after {series[0]['steps']} step"
            parts.append(f"{start}, {images} images, learning rate {rate:g}: {after}, {when}")
    named = {"xlabel": "steps of fine-tuning", "ylabel": "SSIM (dashed: mean image)", "xscale": "log"}
    figure = curve(whole, "steps", "ssim", ("start", "images", "learning_rate"), "mean_image_ssim", **named)
    sentence = f"SSIM of images out of the change of all weights. {'; '.join(parts)}."
    return Findings(sentence, {"SSIM by steps": figure})


STUDY = Study(
    name="fine-tuned-weights",
    question="For how many steps of fine-tuning can the pictures be read from the change of the weights?",
    settings=settings,
    cell=cell,
    tell=tell,
    over=("repeat",),
)
