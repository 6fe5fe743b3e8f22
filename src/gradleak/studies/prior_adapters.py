"""What the study of priors on adapters shares among its cells: a Gaussian of few and of many public pictures, adapters of unseen ones, and
where samplers begin.
"""

from dataclasses import replace
from functools import cache
from math import prod

import torch

from gradleak.attacks.map_inversion import MapInversion
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import Recipe
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies import adapter_victims as victims
from gradleak.studies.data_sets import rows_of, unseen
from gradleak.studies.prior_comparisons import EFFORT, PAIRS, Begun
from gradleak.studies.study import Size

FIRST, RANK = 304, 8  # test row; those before were looked at
RECIPES = {"one step": victims.ONE_STEP, "4 of AdamW": Recipe(optimizer="adamw", learning_rate=0.01, steps=4)}
MANY: dict[Size, int] = {"smoke": 300, "small": 14_901, "paper": 44_901}  # public pictures behind the Gaussian
EVALUATIONS: dict[Size, int] = {"smoke": 2, "small": 60, "paper": 60}  # of the search, at each of six prior weights


def count(model: str, training: str, size: Size) -> int:
    """Pictures, the same in every row of a model and a training: differences are paired."""
    costly = model == "vit" or training != "one step"
    return {"smoke": 1, "small": 6 if costly else 12, "paper": 100}[size]


@cache
def gaussian(model: str, data: str, size: Size, public: str) -> GaussianPrior | None:
    """Of pictures that neither trained the model nor are decoys."""
    base, used = victims.prepare(model, data, size), victims.TRAINING + victims.DECOYS
    if public == "few":
        return base.prior
    shape = base.model.architecture.input_shape
    pool = public_pool(base.source, "train", shape=shape, limit=used + MANY[size])
    return GaussianPrior.of_public(pool.images[used:]) or base.prior


@cache
def adapters(
    model: str, training: str, data: str, size: Size, seed: int, wrong: bool
) -> tuple[Pictures, list[PictureObservation]]:
    """Unseen pictures, and adapters of each of them, labels known; or of public pictures."""
    base = victims.prepare(model, data, size)
    private = unseen(base.source, FIRST, count(model, training, size), base.model.architecture.input_shape)
    private = replace(private, labels=private.labels % base.model.architecture.classes)
    shown = victims.batched(base.public if wrong else private, 1)[: len(private.labels)]
    blank = victims.blank(base, RANK, RECIPES[training], seed=seed)
    return private, [replace(victims.trained(blank, one), labels=one.labels) for one in shown]


def search(prior: GaussianPrior | None, size: Size, effort: str = "plain") -> MapInversion:
    """That for the most likely pictures under the Gaussian. effort: plain; deep, as many evaluations spread over prior weights down to 1e-9; long,
    with those of the solvers besides."""
    plain = MapInversion(prior=prior, evaluations=EVALUATIONS[size], pairs=victims.PAIRS[size] // 2)
    weights = len(plain.weights())
    if effort == "deep":
        return replace(plain, evaluations=plain.evaluations * weights // (weights + 2), least=1e-9)
    return plain if effort == "plain" else replace(plain, evaluations=plain.evaluations + prod(EFFORT[size]) // weights)


@cache
def begun(model: str, training: str, data: str, size: Size, seed: int, wrong: bool) -> Begun:
    """Where samplers begin: the most likely pictures under the Gaussian of many."""
    private, seen = adapters(model, training, data, size, seed, wrong)
    found = search(gaussian(model, data, size, "many"), size).many(seen, generator=torch.Generator().manual_seed(seed))
    return Begun(private, seen, found)


def fresh(model: str, data: str, size: Size) -> Pictures:
    """Public pictures that nothing else has seen, for GUIDE to be tried on."""
    base, (pairs, _) = victims.prepare(model, data, size), PAIRS[size]
    used, shape = victims.TRAINING + victims.DECOYS + MANY[size], base.model.architecture.input_shape
    pool = public_pool(base.source, "train", shape=shape, limit=used + pairs)
    return rows_of(pool, len(pool.labels) - pairs, pairs)
