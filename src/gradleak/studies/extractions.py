"""What studies of weights share: pictures of two classes for two owners, an extraction, and what it is compared with."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.weights.kkt_search import correlation
from gradleak.audit.metrics import ssim
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.studies.data_sets import shape_of
from gradleak.studies.plots import panels, png
from gradleak.studies.samples import per_sample
from gradleak.studies.study import Bench, Result
from gradleak.victims.weights import first_of_each

RECOVERED = 0.4  # SSIM above which Haim et al. count an image


def two_class_source(data: str) -> str:
    """Where the pictures of two classes come from: digits for the embedded ones, which are of ten photographs."""
    return "digits" if data == "embedded" else data


def owners(source: str, images: int, split: str = "train") -> tuple[Pictures, Pictures]:
    """So many pictures for each of two owners, half of them of each class."""
    both = first_of_each(source, split, images)
    first = torch.arange(2 * images).reshape(2, 2, -1)[:, 0].flatten()
    one, other = (replace(both, images=both.images[r], labels=both.labels[r]) for r in (first, first + images // 2))
    return one, other


def untrained(pictures: Pictures, seed: int, precision: torch.dtype = torch.float64) -> PictureModel:
    """The network that learns the two classes, before it has learnt anything."""
    architecture = Architecture("homogeneous1000", shape_of(pictures), 2)
    return Model.of(architecture.build(seed).to(precision), architecture)


def mean_image(source: str, images: int) -> Tensor:
    """The mean (1, channel, height, width) of 40 pictures of each class that neither of two owners of so many has."""
    classes = first_of_each(source, "train", images + 40).images.chunk(2)
    return torch.cat([own[images:] for own in classes]).mean(0, keepdim=True)


def extracted(attack: Any, seen: PictureObservation, bench: Bench) -> Reconstruction:
    """One extraction on the device, its images on the CPU. BadInput when it diverges."""
    generator = torch.Generator().manual_seed(bench.seed)
    found: Reconstruction = attack(seen.to(torch.device(bench.device)), generator=generator, on_step=bench.on_step)
    if found.outcome is Outcome.DIVERGED:
        raise BadInput(found.outcome.value)
    return replace(found, value=found.value.cpu())


def nearest(images: Tensor, truth: Tensor) -> Tensor:
    """For every truth the image with the highest normalised cross-correlation: (n, channel, height, width)."""
    return images[correlation(truth, images).argmax(1)]


def similarity(images: Tensor, truth: Tensor) -> Tensor:
    """SSIM (n,) of every truth's nearest image."""
    return ssim(nearest(images, truth), truth)


def judged(truth: Tensor, found: Reconstruction, controls: dict[str, Tensor], **columns: Tensor) -> Result:
    """SSIM of what is nearest to every truth beside that of the controls' images, as published: those above 0.4, and DSSIM
    of the best ten. columns: of the samples besides."""
    similar = {"": similarity(found.value, truth)} | {f"{k}_": similarity(v, truth) for k, v in controls.items()}
    own, *others = similar.values()
    closer = (own > RECOVERED) & (own > torch.stack(others).max(0).values)
    samples = {f"{name}ssim": values for name, values in similar.items()}
    samples |= {f"{name}recovered": values > RECOVERED for name, values in similar.items()}
    best = {name: float(values.sort(descending=True).values[:10].mean()) for name, values in similar.items()}
    return Result(
        facts={"residual": found.residual} | {f"{name}dssim_best_10": (1 - value) / 2 for name, value in best.items()},
        samples=per_sample(**samples, recovered_closer_than_controls=closer, **columns),
        pictures={"sheet": sheet(found.value, truth)},
    )


def sheet(images: Tensor, truth: Tensor) -> bytes:
    """PNG: the truths in one row, what is nearest to each below, best first; at most twenty."""
    order = similarity(images, truth).argsort(descending=True)[:20]
    figure, axes = panels(2 * len(order), 1, 1, columns=len(order))
    for one, picture in zip(axes, torch.cat([truth[order], nearest(images, truth[order])]), strict=True):
        one.imshow(picture.clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        one.set_axis_off()
    return png(figure)
