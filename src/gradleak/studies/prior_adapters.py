"""What the study of priors on adapters shares among its cells: a Gaussian of few and of many public pictures, adapters of unseen ones, and
where samplers begin.
"""

from dataclasses import replace
from functools import cache

import torch

from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.observation import PictureObservation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies import adapter_victims as victims
from gradleak.studies.data_sets import unseen
from gradleak.studies.study import Size

FIRST, RANK = 304, 8  # test row; those before were looked at
COUNTS: dict[Size, tuple[int, int]] = {"smoke": (1, 1), "small": (6, 12), "paper": (50, 100)}  # convnet, mlp1000
MANY: dict[Size, int] = {"smoke": 300, "small": 14_901, "paper": 44_901}  # public pictures behind the Gaussian
# Evaluations at each of six prior weights; of the sampler after it samples, levels, and evaluations at each.
EFFORT: dict[Size, tuple[int, int, int, int]] = {
    "smoke": (2, 2, 2, 2),
    "small": (60, 2, 10, 10),
    "paper": (60, 2, 20, 20),
}


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
def adapters(model: str, data: str, size: Size, seed: int, wrong: bool) -> tuple[Pictures, list[PictureObservation]]:
    """Unseen pictures, and adapters of one step on each of them; or on public pictures."""
    base, count = victims.prepare(model, data, size), COUNTS[size][model == "mlp1000"]
    private = unseen(base.source, FIRST, count, base.model.architecture.input_shape)
    private = replace(private, labels=private.labels % base.model.architecture.classes)
    shown = victims.batched(base.public if wrong else private, 1)[: len(private.labels)]
    return private, [victims.trained(victims.blank(base, RANK, seed=seed), one) for one in shown]


@cache
def begun(data: str, size: Size, seed: int, wrong: bool) -> list[Reconstruction]:
    """Where samplers begin: the most likely pictures under the Gaussian of many."""
    prior, (_, seen) = gaussian("convnet", data, size, "many"), adapters("convnet", data, size, seed, wrong)
    search = MapInversion(prior=prior, evaluations=EFFORT[size][0], pairs=victims.PAIRS[size] // 2)
    return search.many(seen, generator=torch.Generator().manual_seed(seed))
