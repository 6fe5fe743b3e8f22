"""What the study of priors on gradients shares among its cells: a Gaussian of public pictures, gradients of LeNet with noise, and the most
likely pictures under the one, given the others.
"""

from dataclasses import replace
from functools import cache

import torch

from gradleak.attacks.map_inversion import MapInversion
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.defenses import RelativeNoise
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies.data_sets import blueprint, rows_of, unseen
from gradleak.studies.prior_comparisons import Begun
from gradleak.studies.study import Size
from gradleak.victims.gradient import capture_gradient

FIRST = 8_000  # test row
PUBLIC: dict[Size, int] = {"smoke": 200, "small": 10_000, "paper": 50_000}  # pictures behind the Gaussian
HELD = 500  # of them that are kept as pictures, for decoys, wrong releases and what GUIDE is trained on


@cache
def gaussian(data: str, size: Size) -> tuple[GaussianPrior, Pictures]:
    """Of public pictures, and the first of them."""
    shape, _ = blueprint(data, size)
    public = public_pool(data, "train", shape=shape, limit=PUBLIC[size])
    return replace(GaussianPrior.fit(public.images, remainder=0.003), pictures=None), rows_of(public, 0, HELD)


def search(prior: GaussianPrior, size: Size) -> MapInversion:
    """That for the most likely pictures under the Gaussian."""
    return MapInversion(prior=prior, pairs=0, evaluations=2 if size == "smoke" else 50)


@cache
def begun(data: str, size: Size, seed: int, noise: float, knows: str, release: str, count: int) -> Begun:
    """Computed once for all that begins there."""
    (shape, classes), (prior, public) = blueprint(data, size), gaussian(data, size)
    architecture = Architecture("lenet", shape, classes)
    model, private = Model.of(architecture.build(seed), architecture), unseen(data, FIRST, count, shape)
    seen: list[PictureObservation] = []
    for i in range(len(private.labels)):
        one = rows_of(public if release == "wrong" else private, i, 1)
        made, _ = capture_gradient(model, one, defenses=(RelativeNoise(noise),), seed=seed + i)
        defenses = {"told": made.defenses, "found": None, "none": ()}[knows]
        seen.append(replace(made, labels=one.labels, defenses=defenses))
    found = search(prior, size).many(seen, generator=torch.Generator().manual_seed(seed))
    return Begun(private, seen, found)
