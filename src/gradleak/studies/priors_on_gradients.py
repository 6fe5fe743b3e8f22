"""What does a prior of pictures add to a noisy gradient? LeNet, white noise of a tenth of the gradient's norm and as large as it, solvers
times priors, with controls of equal evaluations: single unseen pictures, labels known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradleak.attacks import ATTACKS
from gradleak.audit import metrics
from gradleak.audit.intervals import mean
from gradleak.studies.data_sets import shrunk
from gradleak.studies.findings import Findings
from gradleak.studies.learned_priors import behind, learned
from gradleak.studies.plots import bars, panels
from gradleak.studies.prior_victims import attack_of, begun, gaussian
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

# Pictures, the same in every row: differences are paired.
COUNTS: dict[Size, int] = {"smoke": 2, "small": 6, "paper": 100}
DECOYS = 100
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
    """Under each noise the solvers under each prior, then what the level of noise is worth, and controls."""
    priors = learned(ffdnet=size != "smoke")
    first = priors[0] if priors else "gaussian"
    for noise in (1.0,) if size == "smoke" else (1.0, 0.1):
        yield Setting(noise, "map-inversion", "gaussian")
        yield from (Setting(noise, "daps", prior) for prior in (*priors, "gaussian"))
        for solver in SOLVERS:
            yield from (Setting(noise, solver, prior) for prior in dict.fromkeys((first, "gaussian")))
        yield Setting(noise, "guide", "public pairs")
    for noise in () if size == "smoke" else (1.0, 0.1):
        yield from (
            Setting(noise, attack, prior, "found") for attack, prior in (("map-inversion", "gaussian"), ("daps", first))
        )
        yield from (Setting(noise, "daps", first, release=release) for release in ("none", "wrong"))
        yield Setting(noise, "map-inversion", "gaussian", "none")


def cell(setting: Setting, bench: Bench) -> Result:
    """Noisy gradients of unseen pictures, side by side, beside the most likely pictures under the Gaussian."""
    prior, public = gaussian(bench.data, bench.size)
    where = (bench.data, bench.size, bench.seed, setting.noise, setting.knows, setting.release.replace("none", "right"))
    start = begun(*where, COUNTS[bench.size])
    found, truth = start.likeliest, start.private.images
    if setting.attack != "map-inversion":
        attack = attack_of(
            setting.attack, setting.prior, bench.size, start, prior, public, blind=setting.release == "none"
        )
        found = attack.many(start.seen, generator=torch.Generator().manual_seed(bench.seed))
    images, likeliest = (torch.cat([one.value for one in some]) for some in (found, start.likeliest))
    perceived = metrics.lpips(images, truth)
    gain, ssim = (score(images, truth) - score(likeliest, truth) for score in (metrics.psnr_db, metrics.ssim))
    rows = compared(images, truth, prior.mean.float(), public.images[:DECOYS])
    for i, (row, one) in enumerate(zip(rows, found, strict=True)):
        row |= {"gain_over_map_db": float(gain[i]), "better_ssim_than_map": bool(ssim[i] > 0)}
        row |= {} if perceived is None else {"lpips": float(perceived[i])}
        row |= {} if one.spread is None else {"spread": float(one.spread.square().mean().sqrt())}
    return Result(samples=rows, notes=(shrunk(prior.shape, bench.size),))


def tell(table: Table) -> Findings:
    """What each prior is ahead of the same solver under the Gaussian, picture by picture; PSNR as bars."""
    said = []
    for row in table.rows:
        if row["prior"] == "gaussian" or (row["knows"], row["release"]) != ("told", "right"):
            continue
        with_prior = {name: row[name] for name in NAMES}
        same = "map-inversion" if row["attack"] == "guide" else row["attack"]
        pairs = [
            table.sampled("psnr_db", **some)
            for some in (with_prior, with_prior | {"attack": same, "prior": "gaussian"})
        ]
        if not pairs[0] or len(pairs[0]) != len(pairs[1]):
            continue
        ahead = [a - b for a, b in zip(*pairs, strict=True)]
        reach = mean(ahead)
        within = "" if reach is None else f" ({reach[0]:+.2f} to {reach[1]:+.2f})"
        said.append(
            f"noise {row['noise']:g}, {row['attack']}, {row['prior']}: {sum(ahead) / len(ahead):+.2f} dB{within} on {same} under the "
            f"Gaussian, better on {sum(a > 0 for a in ahead)} of {len(ahead)}"
        )
    shown = [row for row in table.rows if row.get("psnr_db") is not None]
    figure, [axes] = panels(width=7, height=1 + 0.25 * len(shown))
    if shown:
        bars(axes, shown, lambda row: ", ".join(f"{row[name]}" for name in NAMES), "psnr_db")
    axes.set(xlabel="PSNR (dB)")
    return Findings(f"{'; '.join(said) or 'Nothing yet'}.", {"Priors on noisy gradients": figure})


def denoiser(setting: Setting) -> tuple[Any, ...]:
    """The attack, and the folder of the denoiser where it is that."""
    return (ATTACKS[setting.attack], *behind(setting.prior))


STUDY = Study(
    name="priors-on-gradients",
    question="What do priors of pictures add to a gradient with noise, and what do they invent?",
    settings=settings,
    cell=cell,
    together=lambda setting: "all",
    tell=tell,
    depends=denoiser,
)
