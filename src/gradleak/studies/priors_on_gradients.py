"""What does a prior of pictures add to a noisy gradient? LeNet, white noise of a tenth of the gradient's norm and as large as it, solvers
times priors, with controls of equal evaluations: single unseen pictures, labels known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradleak.attacks import ATTACKS
from gradleak.studies.data_sets import shrunk
from gradleak.studies.findings import Findings
from gradleak.studies.learned_priors import behind, learned
from gradleak.studies.prior_comparisons import drawn, guide, learned_over_gaussian, rows_of, solver
from gradleak.studies.prior_victims import begun, gaussian, search
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
        for name in SOLVERS:
            yield from (Setting(noise, name, prior) for prior in dict.fromkeys((first, "gaussian")))
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
    found = start.likeliest
    draw = torch.Generator().manual_seed(bench.seed)
    if setting.attack == "guide":
        found = guide(search(prior, bench.size), public, bench.size).many(start.seen, generator=draw)
    elif setting.attack != "map-inversion":
        blind = setting.release == "none"
        ready = solver(setting.attack, setting.prior, bench.size, start, prior, blind=blind)
        found = ready.many(start.seen, generator=draw)
    rows = rows_of(found, start, prior.mean.float(), public.images[:DECOYS])
    return Result(samples=rows, notes=(shrunk(prior.shape, bench.size),))


def tell(table: Table) -> Findings:
    """What each prior is ahead of the same solver under the Gaussian, picture by picture; PSNR as bars."""
    return drawn(learned_over_gaussian(table, NAMES, knows="told"), table, NAMES, "Priors on noisy gradients")


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
