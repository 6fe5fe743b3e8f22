"""What the study of priors on gradients shares among its cells: a Gaussian of public pictures, gradients of LeNet with noise, and the most
likely pictures under the one, given the others.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from gradleak.attacks import ATTACKS
from gradleak.attacks.diffusion.guide import Guide
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.defenses import RelativeNoise
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies.data_sets import blueprint, rows_of, unseen
from gradleak.studies.learned_priors import prior_of
from gradleak.studies.study import Size
from gradleak.victims.gradient import capture_gradient

FIRST = 8_000  # test row
# Samples, levels, and evaluations at each: as many gradients in all as the other solvers have, after those of the search under the Gaussian.
EFFORT: dict[Size, tuple[int, int, int]] = {"smoke": (2, 2, 2), "small": (2, 10, 10), "paper": (4, 16, 16)}
# Pairs that GUIDE is trained on, and steps.
PAIRS: dict[Size, tuple[int, int]] = {"smoke": (4, 2), "small": (40, 300), "paper": (300, 2_000)}
PUBLIC: dict[Size, int] = {"smoke": 200, "small": 10_000, "paper": 50_000}  # pictures behind the Gaussian
HELD = 500  # of them that are kept as pictures, for decoys, wrong releases and what GUIDE is trained on


@cache
def gaussian(data: str, size: Size) -> tuple[GaussianPrior, Pictures]:
    """Of public pictures, and the first of them."""
    shape, _ = blueprint(data, size)
    public = public_pool(data, "train", shape=shape, limit=PUBLIC[size])
    return replace(GaussianPrior.fit(public.images, remainder=0.003), pictures=None), rows_of(public, 0, HELD)


@dataclass(frozen=True)
class Begun:
    """Private pictures, their gradients as the attacker takes them, and the most likely pictures under the Gaussian, where all begin."""

    private: Pictures
    seen: list[PictureObservation]
    likeliest: list[Reconstruction]

    def __call__(self, observation: PictureObservation, *, generator: torch.Generator) -> Reconstruction:
        """`Start`: what was found for this one of `seen`."""
        return self.likeliest[next(i for i, one in enumerate(self.seen) if one is observation)]


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


def attack_of(
    name: str, under: str, size: Size, start: Begun, prior: GaussianPrior, public: Pictures, *, blind: bool
) -> Any:
    """The attack of this name under the prior of this name, ready to run from `start`; blind: without the release."""
    samples, levels, evaluations = EFFORT[size]
    if name == "guide":
        pairs, steps = PAIRS[size]
        return Guide(after=search(prior, size), pairs=pairs, steps=steps, samples=4 * samples, public=public)
    given = {"gaussian": prior, "prior": None if under == "gaussian" else prior_of(under, prior.shape)}
    effort: dict[str, int] = {"samples": samples, "levels": levels, "evaluations": evaluations}
    effort = effort if name == "daps" else {"steps": samples * levels * evaluations}
    return ATTACKS[name](**given, start=start, blind=blind, **effort)
