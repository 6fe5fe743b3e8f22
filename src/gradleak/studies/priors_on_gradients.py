"""What does a prior of pictures add to a noisy gradient? LeNet, white noise of a tenth of the gradient's norm and as large as it, solvers
times priors, with controls of equal evaluations: single unseen pictures, labels known.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks import ATTACKS
from gradleak.attacks.search.start import Given
from gradleak.audit import metrics
from gradleak.priors.named import load_prior
from gradleak.studies.data_sets import shrunk
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.prior_victims import begun, gaussian
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

DENOISER = "GRADLEAK_DENOISER"  # names the folder of one that `gradleak train denoiser` has made
# Pictures of MAP and DAPS, and of the others.
COUNTS: dict[Size, tuple[int, int]] = {"smoke": (2, 1), "small": (6, 4), "paper": (100, 100)}
# Samples, levels, and evaluations at each: as many gradients in all as the other solvers have, after those of the search under the Gaussian.
EFFORT: dict[Size, tuple[int, int, int]] = {"smoke": (2, 2, 2), "small": (2, 10, 10), "paper": (4, 16, 16)}
NAMES = ("noise", "attack", "prior", "knows", "release")
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
    """The sampler under each prior first, then what the level of noise is worth, the other solvers, and controls."""
    there = (("trained here", DENOISER in os.environ), ("ffdnet", size != "smoke"))
    learned = [prior for prior, is_there in there if is_there]
    first = learned[0] if learned else "gaussian"
    for noise in (1.0,) if size == "smoke" else (1.0, 0.1):
        yield Setting(noise, "map-inversion", "gaussian")
        yield from (Setting(noise, "daps", prior) for prior in (*learned, "gaussian"))
        yield from (Setting(noise, solver, first) for solver in SOLVERS)
    for noise in () if size == "smoke" else (1.0, 0.1):
        yield from (Setting(noise, "map-inversion", "gaussian", knows) for knows in ("found", "none"))
        yield from (Setting(noise, "daps", first, release=release) for release in ("none", "wrong"))


def cell(setting: Setting, bench: Bench) -> Result:
    """Noisy gradients of unseen pictures, one at a time, beside the most likely pictures under the Gaussian."""
    prior, public = gaussian(bench.data, bench.size)
    where = (bench.data, bench.size, bench.seed, setting.noise, setting.knows, setting.release.replace("none", "right"))
    private, seen, starts = begun(*where, COUNTS[bench.size][0])
    count = COUNTS[bench.size][setting.attack in SOLVERS]
    found = starts[:count]
    if setting.attack != "map-inversion":
        text = f"diffusion:{os.environ[DENOISER]}" if setting.prior == "trained here" else setting.prior
        given = {"gaussian": prior, "prior": None if text == "gaussian" else load_prior(text, prior.shape)}
        samples, levels, evaluations = EFFORT[bench.size]
        effort: dict[str, int] = {"samples": samples, "levels": levels, "evaluations": evaluations}
        effort = effort if setting.attack == "daps" else {"steps": samples * levels * evaluations}
        attack = ATTACKS[setting.attack](**given, blind=setting.release == "none", **effort)
        draw = torch.Generator().manual_seed(bench.seed)
        pairs = zip(seen[:count], found, strict=True)
        found = [replace(attack, start=Given(start))(o, generator=draw) for o, start in pairs]
    images, likeliest = (torch.cat([one.value for one in some[:count]]) for some in (found, starts))
    truth, perceived = private.images[:count], metrics.lpips(images, private.images[:count])
    gain, ssim = (score(images, truth) - score(likeliest, truth) for score in (metrics.psnr_db, metrics.ssim))
    rows = compared(images, truth, prior.mean.float(), public.images)
    for i, (row, one) in enumerate(zip(rows, found, strict=True)):
        row |= {"gain_over_map_db": float(gain[i]), "better_ssim_than_map": bool(ssim[i] > 0)}
        row |= {} if perceived is None else {"lpips": float(perceived[i])}
        row |= {} if one.spread is None else {"spread": float(one.spread.square().mean().sqrt())}
    return Result(samples=rows, notes=(shrunk(prior.shape, bench.size),))


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
        bars(axes, shown, lambda row: ", ".join(f"{row[name]}" for name in NAMES), "psnr_db")
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
