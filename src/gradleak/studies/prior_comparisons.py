"""What the studies of priors on gradients and on adapters share: solvers of equal effort, each picture beside the most likely one under the
Gaussian, and what a learned prior is ahead of the same solver under the Gaussian.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks import ATTACKS
from gradleak.attacks.diffusion.guide import Guide
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit import metrics
from gradleak.audit.intervals import mean
from gradleak.modalities.pictures import Pictures
from gradleak.observations.observation import PictureObservation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies.findings import Findings
from gradleak.studies.learned_priors import prior_of
from gradleak.studies.plots import bars, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Row, Size
from gradleak.studies.table import Table

# Samples, levels, and evaluations at each: as many gradients in all as the other solvers have, after those of the search under the Gaussian.
EFFORT: dict[Size, tuple[int, int, int]] = {"smoke": (2, 2, 2), "small": (2, 10, 10), "paper": (4, 16, 16)}
# Pairs that GUIDE is trained on, and steps.
PAIRS: dict[Size, tuple[int, int]] = {"smoke": (4, 2), "small": (40, 300), "paper": (300, 2_000)}


@dataclass(frozen=True)
class Begun:
    """Private pictures, their releases as the attacker takes them, and the most likely pictures under the Gaussian, where all begin."""

    private: Pictures
    seen: list[PictureObservation]
    likeliest: list[Reconstruction]

    def __call__(self, observation: PictureObservation, *, generator: torch.Generator) -> Reconstruction:
        """`Start`: what was found for this one of `seen`."""
        return self.likeliest[next(i for i, one in enumerate(self.seen) if one is observation)]


def solver(name: str, under: str, size: Size, start: Begun, gaussian: GaussianPrior | None, *, blind: bool) -> Any:
    """The solver of this name under the prior of this name, ready to run from `start`; blind: without the release."""
    samples, levels, evaluations = EFFORT[size]
    effort = {"levels": samples * levels, "evaluations": evaluations}
    effort |= {"levels": levels, "samples": samples} if name == "daps" else {}
    effort = {"steps": samples * levels * evaluations} if name == "dps" else effort
    shape = start.seen[0].model.architecture.input_shape
    prior = None if under == "gaussian" else prior_of(under, shape)
    return ATTACKS[name](gaussian=gaussian, prior=prior, start=start, blind=blind, **effort)


def guide(after: MapInversion, public: Pictures, size: Size) -> Guide:
    """GUIDE after this search, tried on these pictures."""
    pairs, steps = PAIRS[size]
    return Guide(after=after, pairs=pairs, steps=steps, samples=4 * EFFORT[size][0], public=public)


def rows_of(found: Sequence[Reconstruction], start: Begun, blind: Tensor, decoys: Tensor) -> list[Row]:
    """`compared`, and what each picture has over the most likely one under the Gaussian."""
    images, likeliest = (torch.cat([one.value for one in some]) for some in (found, start.likeliest))
    truth = start.private.images
    perceived = metrics.lpips(images, truth)
    gain, ssim = (score(images, truth) - score(likeliest, truth) for score in (metrics.psnr_db, metrics.ssim))
    rows = compared(images, truth, blind, decoys)
    for i, (row, one) in enumerate(zip(rows, found, strict=True)):
        row |= {"gain_over_map_db": float(gain[i]), "better_ssim_than_map": bool(ssim[i] > 0)}
        row |= {} if perceived is None else {"lpips": float(perceived[i])}
        row |= {} if one.spread is None else {"spread": float(one.spread.square().mean().sqrt())}
    return rows


def ahead(table: Table, names: Sequence[str], control: Row, **about: Any) -> str:
    """By how much, picture by picture, a row of the table with these names is ahead of its control: "+0.52 dB (0.08 to 0.96), better on 6 of 6";
    nothing where they are not of the same pictures."""
    ours, theirs = ({name: about[name] for name in names} | more for more in ({}, control))
    pairs = [table.sampled("psnr_db", **some) for some in (ours, theirs)]
    if not pairs[0] or len(pairs[0]) != len(pairs[1]):
        return ""
    apart = [a - b for a, b in zip(*pairs, strict=True)]
    reach = mean(apart)
    within = "" if reach is None else f" ({reach[0]:+.2f} to {reach[1]:+.2f})"
    return f"{sum(apart) / len(apart):+.2f} dB{within}, better on {sum(a > 0 for a in apart)} of {len(apart)}"


def learned_over_gaussian(table: Table, names: Sequence[str], **about: Any) -> list[str]:
    """What each learned prior is ahead of the same solver under the Gaussian, and GUIDE of the search, in rows like these."""
    said = []
    for row in table.where(release="right", **about):
        same = "map-inversion" if row["attack"] == "guide" else row["attack"]
        gain = ahead(table, names, {"attack": same, "prior": "gaussian"}, **row) if row["prior"] != "gaussian" else ""
        if gain:
            which = ", ".join(f"{row[name]}" for name in names if name != "release")
            said.append(f"{which}: {gain}, against {same} under the Gaussian")
    return said


def drawn(said: Sequence[str], table: Table, names: Sequence[str], title: str) -> Findings:
    """A sentence, and PSNR as bars."""
    shown = [row for row in table.rows if row.get("psnr_db") is not None]
    figure, [axes] = panels(width=7, height=1 + 0.25 * len(shown))
    if shown:
        bars(axes, shown, lambda row: ", ".join(f"{row[name]}" for name in names), "psnr_db")
    axes.set(xlabel="PSNR (dB)")
    return Findings(f"{'; '.join(said) or 'Nothing yet'}.", {title: figure})
