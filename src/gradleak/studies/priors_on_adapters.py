"""What does a prior of pictures add to an adapter of one step? The convnet at rank 8 by searches, the perceptron by its activation patterns:
few and many public pictures behind the Gaussian, learned priors, with controls of equal evaluations on unseen pictures.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks import ATTACKS
from gradleak.attacks.search.start import Given
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.observation import PictureObservation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.named import load_prior
from gradleak.studies import adapter_victims as victims
from gradleak.studies.data_sets import unseen
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.priors_on_gradients import DENOISER
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

FIRST = 304  # test row; those before were looked at
COUNTS: dict[Size, tuple[int, int]] = {"smoke": (1, 1), "small": (6, 12), "paper": (50, 100)}  # convnet, mlp1000
PUBLIC: dict[Size, int] = {"smoke": 300, "small": 20_000, "paper": 45_000}  # public pictures where they are many
# Evaluations at each of the six prior weights of a search, 1e-2 to 1e-7; samples, levels and evaluations at each of the sampler after it.
EFFORT: dict[Size, tuple[int, int, int, int]] = {
    "smoke": (2, 2, 2, 2),
    "small": (60, 2, 10, 12),
    "paper": (60, 2, 20, 20),
}
RANK, LEAST = 8, 1e-9


@dataclass(frozen=True)
class Setting:
    """public: pictures behind the Gaussian, few (as many as decide a study of adapters) or many. effort: plain; long, with the evaluations of
    the sampler besides; deep, the plain number of evaluations spread over prior weights down to 1e-9. release: right, wrong (another
    picture's), or none (the prior alone)."""

    model: str
    attack: str
    prior: str = "gaussian"
    public: str = "many"
    effort: str = "plain"
    release: str = "right"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """The Gaussian first, then what is sampled after it, and controls."""
    for public in ("few", "many"):
        yield from (Setting("convnet", "map-inversion", public=public, effort=e) for e in ("plain", "deep", "long"))
        yield Setting("mlp1000", "activation-patterns", public=public)
    there = (("trained here", DENOISER in os.environ), ("ffdnet", size != "smoke"))
    for prior in ("gaussian", *(prior for prior, is_there in there if is_there)):
        yield Setting("convnet", "daps", prior)
    yield Setting("convnet", "red-diff", "trained here" if DENOISER in os.environ else "gaussian")
    yield from (Setting("convnet", "daps", release=release) for release in ("none", "wrong"))
    yield Setting("mlp1000", "activation-patterns", release="wrong")


@cache
def gaussian(model: str, data: str, size: Size, public: str) -> GaussianPrior | None:
    """Of pictures that neither trained the model nor are decoys."""
    base = victims.prepare(model, data, size)
    if public == "few":
        return base.prior
    used = victims.TRAINING + victims.DECOYS
    limit, shape = used + PUBLIC[size], base.model.architecture.input_shape
    return GaussianPrior.of_public(public_pool(base.source, "train", shape=shape, limit=limit).images[used:])


@cache
def adapters(model: str, data: str, size: Size, seed: int, release: str) -> tuple[Pictures, list[PictureObservation]]:
    """Private pictures, and the adapters of one step each, of theirs or of public pictures."""
    base = victims.prepare(model, data, size)
    private = unseen(base.source, FIRST, COUNTS[size][model == "mlp1000"], base.model.architecture.input_shape)
    private = replace(private, labels=private.labels % base.model.architecture.classes)
    shown = base.public if release == "wrong" else private
    blank = victims.blank(base, RANK, seed=seed)
    return private, [victims.trained(blank, one) for one in victims.batched(shown, 1)[: len(private.labels)]]


def searched(setting: Setting, bench: Bench) -> Any:
    """The search under the Gaussian with this effort."""
    plain, *sampler = EFFORT[bench.size]
    more = sampler[0] * sampler[1] * sampler[2] / 6 if setting.effort == "long" else 0
    deep = (
        {"evaluations": plain * 6 // 8, "least": LEAST}
        if setting.effort == "deep"
        else {"evaluations": int(plain + more)}
    )
    prior = gaussian(setting.model, bench.data, bench.size, setting.public)
    return ATTACKS["map-inversion"](prior=prior, pairs=victims.PAIRS[bench.size] // 2, **deep)


def cell(setting: Setting, bench: Bench) -> Result:
    """An attack on adapters of one unseen picture each; a sampler begins where the search ends."""
    base = victims.prepare(setting.model, bench.data, bench.size)
    private, seen = adapters(
        setting.model, bench.data, bench.size, bench.seed, setting.release.replace("none", "right")
    )
    truth, wanted = victims.batched(private, 1), COUNTS[bench.size][setting.model == "mlp1000"]
    prior = gaussian(setting.model, bench.data, bench.size, setting.public)
    if setting.attack == "activation-patterns":
        return victims.attacked(base, ATTACKS[setting.attack](prior=prior), seen, truth, bench, wanted)
    search = searched(setting, bench)
    if setting.attack == "map-inversion":
        return victims.attacked(base, search, seen, truth, bench, wanted)
    text = f"diffusion:{os.environ[DENOISER]}" if setting.prior == "trained here" else setting.prior
    _, samples, levels, evaluations = EFFORT[bench.size]
    own: dict[str, Any] = {"samples": samples, "levels": levels, "evaluations": evaluations}
    own = own if setting.attack == "daps" else {"steps": samples * levels * evaluations}
    known = None if text == "gaussian" else load_prior(text, base.model.architecture.input_shape)
    sampler = ATTACKS[setting.attack](prior=known, gaussian=prior, blind=setting.release == "none", **own)

    def after(observation: PictureObservation, *, generator: torch.Generator, on_step: Any = None) -> Any:
        begun = search(observation, generator=generator)
        return replace(sampler, start=Given(begun))(observation, generator=generator, on_step=on_step)

    return victims.attacked(base, after, seen, truth, bench, wanted)


def tell(table: Table) -> Findings:
    """The best of each model beside the search under the Gaussian of few pictures."""
    said, right = [], [row for row in table.rows if row["release"] == "right" and row.get("psnr_db") is not None]
    for model in dict.fromkeys(row["model"] for row in right):
        rows = [row for row in right if row["model"] == model]
        best = max(rows, key=lambda row: row["psnr_db"])
        plain = next((row for row in rows if row["public"] == "few" and row["effort"] == "plain"), best)
        about = ", ".join(str(best[name]) for name in ("attack", "prior", "public", "effort"))
        said.append(
            f"{model}: {plain['psnr_db']:.1f} dB with few public pictures, {best['psnr_db']:.1f} dB at best ({about})"
        )
    figure, [axes] = panels(width=7, height=1 + 0.25 * len(table.rows))
    if right:
        bars(
            axes,
            right,
            lambda row: ", ".join(f"{row[n]}" for n in ("model", "attack", "prior", "public", "effort")),
            "psnr_db",
        )
    axes.set(xlabel="PSNR (dB)")
    return Findings(f"{'; '.join(said) or 'Nothing yet'}.", {"Priors on adapters": figure})


def used(setting: Setting) -> tuple[Any, ...]:
    """The attacks, and the folder of the denoiser where it is that."""
    files = [Path(os.environ[DENOISER])] if setting.prior == "trained here" else []
    return (ATTACKS[setting.attack], ATTACKS["map-inversion"], load_prior, *files)


STUDY = Study(
    name="priors-on-adapters",
    question="What do priors of pictures add to an adapter of one step, and what do more public pictures?",
    settings=settings,
    cell=cell,
    together=lambda setting: setting.model,
    tell=tell,
    beside=("mnist",),
    depends=used,
)
