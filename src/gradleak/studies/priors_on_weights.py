"""Are training pictures clearer that were drawn out of weights (KKT), once a prior of pictures has cleaned them? Test pictures as private ones. Denoised once, and
denoised again and again in the span that the weights tell, under a Gaussian and under learned priors; the same cleaning of what was drawn
out of another owner's weights, which must not look like these pictures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from gradleak.attacks.weights.kkt import KKT
from gradleak.modalities.pictures import public_pool
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.prior import Denoiser
from gradleak.studies.data_sets import shape_of
from gradleak.studies.extractions import RECOVERED, judged, mean_image, two_class_source
from gradleak.studies.findings import Findings, stands_in
from gradleak.studies.learned_priors import behind, learned, prior_of
from gradleak.studies.plots import bars, panels
from gradleak.studies.prior_candidates import IMAGES, Extraction, cleaned_in_span, denoised, extraction, published
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

PUBLIC: dict[Size, int] = {"smoke": 100, "small": 5_000, "paper": 20_000}  # pictures behind the Gaussian
CONTROLS = ("mean_image", "another_model")
NAMES = ("cleaning", "prior", "kept", "candidates")


@dataclass(frozen=True)
class Setting:
    """cleaning: none, denoised (once, at the noise that each candidate shows), in the span (again and again); kept: beside the candidates as
    they were, or alone; candidates: a training picture. Twice as many without cleaning are the control of those that are kept beside."""

    cleaning: str
    prior: str = "none"
    kept: str = "alone"
    candidates: int = 2


def settings(data: str, size: Size) -> Iterator[Setting]:
    """As they are, then cleaned."""
    yield from (Setting("none", candidates=count) for count in ((2, 4) if size == "smoke" else (2, 4, 8, 16)))
    colour = two_class_source(data) == data and size != "smoke"
    for prior in ("gaussian", *learned(ffdnet=colour)):
        yield from (Setting(cleaning, prior) for cleaning in ("denoised", "in the span"))
        yield from (Setting("in the span", prior, "beside", count) for count in ((2,) if size == "smoke" else (2, 4)))


def cleaned(setting: Setting, one: Extraction, prior: Denoiser | None) -> torch.Tensor:
    """The candidates after this cleaning."""
    images: torch.Tensor = one.found.value
    if prior is None:
        return images
    clean = (
        denoised(images, prior)
        if setting.cleaning == "denoised"
        else cleaned_in_span(images, prior, one.network, one.span)
    )
    return torch.cat([images, clean]) if setting.kept == "beside" else clean


def cleaner(setting: Setting, bench: Bench) -> Denoiser | None:
    """The denoiser of that name."""
    if setting.prior == "none":
        return None
    source = two_class_source(bench.data)
    shape = shape_of(published(bench.data, bench.size, bench.seed, 0)[0])
    if setting.prior == "gaussian":
        pool = public_pool(source, "train", shape=shape, limit=PUBLIC[bench.size])
        return GaussianPrior.fit(pool.images)
    return cast(Denoiser, prior_of(setting.prior, shape))


def cell(setting: Setting, bench: Bench) -> Result:
    """What is nearest to each training picture among the candidates of its model, and among those of another."""
    prior, source = cleaner(setting, bench), two_class_source(bench.data)
    own, other = (extraction(bench.data, bench.size, bench.seed, owner, setting.candidates) for owner in (0, 1))
    images = mean_image(source, IMAGES[bench.size]), cleaned(setting, other, prior)
    found = replace(own.found, value=cleaned(setting, own, prior))
    result = judged(own.private.images, found, dict(zip(CONTROLS, images, strict=True)))
    return replace(result, notes=(stands_in(source, bench.data),))


def tell(table: Table) -> Findings:
    """Counts beside the controls' counts."""
    said = []
    for row in table.rows:
        about = {name: row[name] for name in NAMES}
        hits = (f"{name.replace('_', ' ')} {sum(table.sampled(f'{name}_recovered', **about))}" for name in CONTROLS)
        counted = f"{sum(table.sampled('recovered', **about))} of {row['samples']} ({', '.join(hits)})"
        said.append(f"{', '.join(str(row[name]) for name in NAMES)} candidates a picture: {counted}")
    figure, [axes] = panels(width=7, height=1 + 0.25 * len(table.rows))
    bars(
        axes,
        table.rows,
        lambda row: ", ".join(str(row[name]) for name in NAMES),
        "ssim",
        *(f"{n}_ssim" for n in CONTROLS),
    )
    axes.set(xlabel="mean SSIM of the nearest candidate")
    sentence = f"Training pictures above an SSIM of {RECOVERED}. {'; '.join(said)}."
    return Findings(sentence, {"Candidates, cleaned": figure})


def used(setting: Setting) -> tuple[Any, ...]:
    """What draws the candidates, and the folder of the denoiser where it is that."""
    return (KKT, *behind(setting.prior))


STUDY = Study(
    name="priors-on-weights",
    question="Does a prior of pictures make training pictures clearer that were drawn out of a network's weights?",
    settings=settings,
    cell=cell,
    together=lambda setting: "all",
    tell=tell,
    depends=used,
)
