"""What the study of priors on weights shares among its cells: candidates that KKT draws out of the weights of two owners, and cleaning."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.weights.kkt import KKT
from gradleak.attacks.weights.row_space import Span, span_of
from gradleak.modalities.pictures import Pictures
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.observation import PictureObservation
from gradleak.observations.trained_weights import Weights
from gradleak.priors.prior import Denoiser
from gradleak.studies.extractions import extracted, owners, two_class_source, untrained
from gradleak.studies.study import Bench, Size
from gradleak.victims.weights import FullBatch, publish_weights

IMAGES: dict[Size, int] = {"smoke": 2, "small": 20, "paper": 20}
EFFORT: dict[Size, tuple[int, int]] = {
    "smoke": (200, 30),
    "small": (20_000, 1_000),
    "paper": (20_000, 4_000),
}  # epochs, steps
DECAY = 1e-3
NOISIEST, CLEANEST, LEVELS = 0.3, 0.02, 12  # of the cleaning in the span, in pixel units


@dataclass(frozen=True)
class Extraction:
    """What one model was trained on, what KKT found in it, and where its training pictures lie."""

    private: Pictures
    found: Reconstruction
    network: FullyConnected
    span: Span | None


@cache
def published(data: str, size: Size, seed: int, owner: int) -> tuple[Pictures, PictureObservation]:
    """What the first or the second owner has, and the weights of a network that was trained on it to the end."""
    private = owners(two_class_source(data), IMAGES[size], "test")[owner]
    recipe = FullBatch(epochs=EFFORT[size][0], weight_decay=DECAY)
    return private, publish_weights(untrained(private, seed + owner), private, recipe)[0]


@cache
def extraction(data: str, size: Size, seed: int, owner: int, candidates: int) -> Extraction:
    """Of the model that the first or the second owner has published: test pictures, which no prior was trained on. candidates: a picture."""
    private, seen = published(data, size, seed, owner)
    attack = KKT(steps=EFFORT[size][1], double=False, candidates=candidates)
    found = extracted(attack, seen, Bench(data=data, size=size, seed=seed))
    learned = seen.expect(Weights).learned(seen.model, seen.released)
    return Extraction(private, found, learned, span_of(learned))


def noise_in(images: Tensor) -> Tensor:
    """The deviation of white noise in pictures (n, channel, height, width): (n,). Of the diagonal details of the finest Haar wavelets, the
    median size over 0.6745 (Donoho and Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage", section 5)."""
    a, b, c, d = (
        images[..., i::2, j::2][..., : images.shape[-2] // 2, : images.shape[-1] // 2] for i in (0, 1) for j in (0, 1)
    )
    details: Tensor = (a - b - c + d) / 2
    return details.abs().flatten(1).median(1).values / 0.6745


def denoised(images: Tensor, prior: Denoiser) -> Tensor:
    """D(x, s), s the noise that each picture shows."""
    return prior.denoise(images, noise_in(images).clamp_min(1e-3)).clamp(0, 1)


def cleaned_in_span(images: Tensor, prior: Denoiser, network: FullyConnected, span: Span | None) -> Tensor:
    """Denoised and put back into the span of the training pictures, which the weights tell, again and again at falling levels of noise
    (plug-and-play; Venkatakrishnan et al. 2013)."""
    x, (channel, height, width) = images, images.shape[1:]
    for level in range(LEVELS):
        sigma = NOISIEST * (CLEANEST / NOISIEST) ** (level / (LEVELS - 1))
        x = prior.denoise(x, torch.full((len(x),), sigma))
        if span is not None:
            inside = span.project(network.inputs(x.to(span.origin)))
            x = network.images(inside, (channel, height, width)).to(images)
    return x.clamp(0, 1)
