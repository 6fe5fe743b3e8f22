"""What does a prior of pictures add to a noisy gradient? LeNet, white noise of a tenth of the gradient's norm and as large as it, solvers
times priors, with controls of equal evaluations: single unseen pictures, labels known.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks import ATTACKS
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.start import Given
from gradleak.audit import metrics
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.defenses import RelativeNoise
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.named import load_prior
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.gradient import capture_gradient

FIRST = 8_000  # test row
DENOISER = "GRADLEAK_DENOISER"  # names the folder of one that `gradleak train denoiser` has made
PUBLIC: dict[Size, int] = {"smoke": 200, "small": 10_000, "paper": 50_000}  # pictures behind the Gaussian
COUNTS: dict[Size, tuple[int, int]] = {
    "smoke": (2, 1),
    "small": (12, 4),
    "paper": (100, 100),
}  # of MAP and DAPS, of the others
# The same number of evaluations of the objective for each, after those of the search under the Gaussian.
EFFORT: dict[Size, dict[str, dict[str, int]]] = {
    "smoke": {"daps": {"samples": 2, "levels": 2, "evaluations": 2}}
    | dict.fromkeys(("red-diff", "sds", "dps"), {"steps": 4}),
    "small": {"daps": {"samples": 2, "levels": 10, "evaluations": 10}}
    | dict.fromkeys(("red-diff", "sds", "dps"), {"steps": 200}),
    "paper": {"daps": {"samples": 4, "levels": 16, "evaluations": 16}}
    | dict.fromkeys(("red-diff", "sds", "dps"), {"steps": 1_024}),
}
SOLVERS = ("red-diff", "sds", "dps")


@dataclass(frozen=True)
class Setting:
    """noise: its norm over that of the gradient. knows: the level of noise is told, found (by what a search leaves), or taken for none.
    release: right, wrong (of another picture), or none (the prior alone)."""

    noise: float
    attack: str
    prior: str
    knows: str = "told"
    release: str = "right"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """What the noise's level is worth, then the sampler under each prior, then its controls, then the other solvers."""
    learned = [
        prior for prior, there in (("trained here", DENOISER in os.environ), ("ffdnet", size != "smoke")) if there
    ]
    for noise in (1.0, 0.1):
        yield from (Setting(noise, "map-inversion", "gaussian", knows) for knows in ("told", "found", "none"))
        yield from (Setting(noise, "daps", prior) for prior in ("gaussian", *learned))
        for prior in learned[:1] or ["gaussian"]:
            yield from (Setting(noise, "daps", prior, release=release) for release in ("wrong", "none"))
            yield from (Setting(noise, solver, prior) for solver in SOLVERS)


@cache
def gaussian(data: str, size: Size) -> tuple[GaussianPrior, Pictures]:
    """Of public pictures, and the first hundred of them."""
    shape, _ = blueprint(data, size)
    public = public_pool(data, "train", shape=shape, limit=PUBLIC[size])
    return replace(GaussianPrior.fit(public.images, remainder=0.003), pictures=None), rows_of(public, 0, 100)


@cache
def begun(data: str, size: Size, seed: int, noise: float, knows: str, release: str, count: int) -> tuple[Any, ...]:
    """The private pictures, their gradients as the attacker takes them, and the most likely pictures under the Gaussian."""
    (shape, classes), (prior, public) = blueprint(data, size), gaussian(data, size)
    architecture = Architecture("lenet", shape, classes)
    model, private = Model.of(architecture.build(seed), architecture), unseen(data, FIRST, count, shape)
    seen: list[PictureObservation] = []
    for i in range(len(private.labels)):
        one = rows_of(public if release == "wrong" else private, i, 1)
        made, _ = capture_gradient(model, one, defenses=(RelativeNoise(noise),), seed=seed + i)
        defenses = {"told": made.defenses, "found": None, "none": ()}[knows]
        seen.append(replace(made, labels=one.labels, defenses=defenses))
    search = MapInversion(prior=prior, pairs=0, evaluations=2 if size == "smoke" else 50)
    return private, seen, search.many(seen, generator=torch.Generator().manual_seed(seed))


def cell(setting: Setting, bench: Bench) -> Result:
    """Noisy gradients of unseen pictures, one at a time."""
    prior, public = gaussian(bench.data, bench.size)
    where = (bench.data, bench.size, bench.seed, setting.noise, setting.knows, setting.release.replace("none", "right"))
    private, seen, starts = begun(*where, COUNTS[bench.size][0])
    count = COUNTS[bench.size][setting.attack in SOLVERS]
    found = starts[:count]
    if setting.attack != "map-inversion":
        text = f"diffusion:{os.environ[DENOISER]}" if setting.prior == "trained here" else setting.prior
        given = {"gaussian": prior, "prior": None if text == "gaussian" else load_prior(text, prior.shape)}
        attack = ATTACKS[setting.attack](**given, blind=setting.release == "none", **EFFORT[bench.size][setting.attack])
        draw = torch.Generator().manual_seed(bench.seed)
        pairs = zip(seen[:count], found, strict=True)
        found = [replace(attack, start=Given(start))(o, generator=draw) for o, start in pairs]
    rows = scored(found, starts[:count], private.images[:count], prior, public)
    return Result(samples=rows, notes=(shrunk(prior.shape, bench.size),))


def scored(
    found: Sequence[Reconstruction],
    likeliest: Sequence[Reconstruction],
    truth: torch.Tensor,
    prior: GaussianPrior,
    public: Pictures,
) -> list[dict[str, Any]]:
    """One row per picture: what it is compared with besides is the most likely picture under the Gaussian, and how far samples are apart."""
    images, map_ = (torch.cat([f.value for f in some]) for some in (found, likeliest))
    rows = compared(images, truth, prior.mean.float(), public.images)
    gained, ssim = metrics.psnr_db(images, truth) - metrics.psnr_db(map_, truth), metrics.ssim(images, truth)
    better = ssim > metrics.ssim(map_, truth)
    perceived = metrics.lpips(images, truth)
    for i, (row, one) in enumerate(zip(rows, found, strict=True)):
        row |= {"gain_over_map_db": float(gained[i]), "better_ssim_than_map": bool(better[i])}
        row |= {"lpips": float(perceived[i])} if perceived is not None else {}
        row |= {"spread": float(one.spread.square().mean().sqrt())} if one.spread is not None else {}
    return rows


def tell(table: Table) -> Findings:
    """The best under each noise, against the Gaussian; PSNR as bars."""
    said = []
    for noise in sorted({row["noise"] for row in table.rows}):
        right = [row for row in table.where(noise=noise) if row["release"] == "right" and row["knows"] == "told"]
        known = [row for row in right if row.get("psnr_db") is not None]
        control = next((row for row in known if (row["attack"], row["prior"]) == ("map-inversion", "gaussian")), None)
        if control is not None:
            best = max(known, key=lambda row: row["psnr_db"])
            said.append(
                f"noise {noise:g}: {control['psnr_db']:.1f} dB under a Gaussian, {best['psnr_db']:.1f} dB at best "
                f"({best['attack']}, {best['prior']})"
            )
    shown = [row for row in table.rows if row.get("psnr_db") is not None]
    figure, [axes] = panels(width=7, height=1 + 0.25 * len(shown))
    if shown:
        bars(
            axes,
            shown,
            lambda r: f"{r['noise']:g}: {r['attack']}, {r['prior']}, {r['knows']}, {r['release']}",
            "psnr_db",
        )
    axes.set(xlabel="PSNR (dB)")
    return Findings(f"{'; '.join(said) or 'Nothing yet'}.", {"Priors on noisy gradients": figure})


def denoiser(setting: Setting) -> tuple[Any, ...]:
    """The attack, and the folder of the denoiser where it is that."""
    files = [Path(os.environ[DENOISER])] if setting.prior == "trained here" else []
    return (ATTACKS[setting.attack], load_prior, *files)


STUDY = Study(
    name="priors-on-gradients",
    question="What do priors of pictures add to a gradient with noise, and what do they invent?",
    settings=settings,
    cell=cell,
    together=lambda setting: "all",
    tell=tell,
    depends=denoiser,
)
