"""How reconstructed pictures are scored: matched by mean squared error, in pixels in [0, 1]."""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.audit import metrics
from gradleak.audit.scoring.scoring import Candidates, Control, Metric, Scores, Scoring, check_labels
from gradleak.errors import BadInput
from gradleak.modalities.pictures import UNLABELLED, Pictures, public_pool, sampled
from gradleak.observations.model import PictureModel

DECOYS = 99  # identification among 100: the truth and 99 public pictures
CLEAR_LEAD_DB = 3.0  # an image is recognisable when it is identified, with half the squared error of any blind control,
WHOLE_DB = 20.0  # and recovered when besides the root of its mean squared error is at most a tenth of a pixel's range
SAME = 1e-3  # distance of two pictures, over all pixels, below which they are one
SMALL = 16  # pixels of the copies by which two sources are told apart
LIMIT = 2_000  # public pictures that controls and decoys are made of
# As many as priors are fitted to: seconds to decode, and seconds to multiply (pixels x pixels for each).
MOST, PRODUCTS = 25_000, 5e10


def public(source: str, split: str, model: PictureModel, limit: int = LIMIT) -> Pictures:
    """What everybody may know, in the shape that the model takes."""
    return public_pool(source, split, shape=model.architecture.input_shape, limit=limit)


def split(pool: Pictures) -> tuple[Pictures, Pictures]:
    """The first pictures are decoys."""
    parts = (slice(None, DECOYS), slice(DECOYS, None))
    decoys, rest = (replace(pool, images=pool.images[part], labels=pool.labels[part]) for part in parts)
    return decoys, rest


def wider(pool: Pictures, model: PictureModel, secret: Tensor | None) -> Pictures:
    """The pictures without decoys, and as many more of their source as are decoded and fitted in seconds: those that are no secret."""
    rest, shape = split(pool)[1], model.architecture.input_shape
    most = min(MOST, int(PRODUCTS / math.prod(shape) ** 2))
    if pool.drawn is None or most <= len(pool.labels):
        return rest
    more, *_ = sampled(pool.source, pool.split, shape=shape, limit=most, seed=pool.drawn, first=len(pool.labels))
    if secret is not None:
        fresh = ~(torch.cdist(more.images.flatten(1), secret.flatten(1)) < SAME).any(dim=1)
        more = replace(more, images=more.images[fresh], labels=more.labels[fresh])
    return replace(rest, images=torch.cat([rest.images, more.images]), labels=torch.cat([rest.labels, more.labels]))


def sample(model: PictureModel, pool: Pictures, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random public pictures, with labels that the model has."""
    rows = torch.randperm(len(pool.labels), generator=torch.Generator().manual_seed(seed))[:count]
    return pool.images[rows], pool.labels[rows] % model.architecture.classes


def check(images: Any, model: PictureModel) -> None:
    """BadInput for texts, and for pictures of another size."""
    if not isinstance(images, Tensor):
        raise BadInput("The secret holds texts, and the observed model takes pictures: it is of another observation.")
    if tuple(images.shape[1:]) != tuple(model.architecture.input_shape):
        raise BadInput(
            f"The secret's images are {tuple(images.shape[1:])}, the model's {model.architecture.input_shape}."
        )


def match(model: PictureModel, images: Tensor, truth: Tensor) -> tuple[Tensor, list[int]]:
    """The best assignment; grey stands for pictures that an attack did not return."""
    missing = max(len(truth) - len(images), 0)
    padded = torch.cat([images, images.new_full((missing, *truth.shape[1:]), 0.5)])
    chosen = metrics.match(padded, truth)
    return padded[chosen], [int(i) if int(i) < len(images) else -1 for i in chosen]


def rank(matched: Tensor, truth: Tensor, decoys: Pictures) -> Tensor:
    """1 where the true picture is the nearest of all."""
    return metrics.identification(matched, truth, decoys.images)


def recovered(scores: Scores, leads: list[float]) -> list[bool]:
    """Recognisable, and close to the truth."""
    return [part and psnr >= WHOLE_DB for part, psnr in zip(partly(scores, leads), scores["psnr_db"], strict=True)]


def partly(scores: Scores, leads: list[float]) -> list[bool]:
    """Recognisable: identified, and clearly ahead of every blind control."""
    ranks = scores["identification_rank"]
    return [rank == 1 and lead >= CLEAR_LEAD_DB for rank, lead in zip(ranks, leads, strict=True)]


def is_public(images: Tensor, pool: Pictures, model: PictureModel) -> list[bool]:
    """Which private pictures are in the public pool."""
    near: list[bool] = (torch.cdist(images.flatten(1), pool.images.flatten(1)) < SAME).any(dim=1).tolist()
    return near


def candidates(source: str, split: str, model: PictureModel, limit: int, seed: int) -> Candidates:
    """Random pictures of a source, in the shape that the model takes."""
    architecture = model.architecture
    pool, rows, of = sampled(source, split, shape=architecture.input_shape, limit=limit, seed=seed)
    labelled = pool.classes != UNLABELLED
    check_labels(pool.labels, architecture.classes, source)
    return Candidates(pool.images, pool.labels, rows, labelled, pool.classes if labelled else None, 0, of)


def features(images: Tensor, model: PictureModel) -> Any:
    """Pixels of a small copy, and what a look at one tells: brightness, contrast, sharpness."""
    small = F.adaptive_avg_pool2d(images, (min(SMALL, images.shape[2]), min(SMALL, images.shape[3]))).flatten(1)
    edges = [images.diff(dim=axis).abs().flatten(1).mean(1) for axis in (2, 3)]
    return torch.cat([small, torch.stack([images.flatten(1).mean(1), images.flatten(1).std(1), *edges], 1)], 1).numpy()


PICTURES = Scoring(
    media="image/png",
    metrics=(
        Metric(
            *("psnr_db", "PSNR", "dB", "higher", 2, lambda model, images, truth: metrics.psnr_db(images, truth)),
            "peak signal-to-noise ratio, in decibels (dB): how small the error of the pixels is. 10 dB more is a tenth of the squared "
            "error. At 20 dB pixels are off by a tenth of their range, at 40 dB by a hundredth.",
        ),
        Metric(
            *("ssim", "SSIM", "", "higher", 3, lambda model, images, truth: metrics.ssim(images, truth)),
            "structural similarity: how alike brightness, contrast and structure of small windows are. 1 is the same image, 0 is unrelated.",
        ),
        Metric(
            *("lpips", "LPIPS", "", "lower", 3, lambda model, images, truth: metrics.lpips(images, truth)),
            "distance of two images as a trained network sees them. 0 is the same image.",
        ),
    ),
    controls=(
        Control(
            *("mean_image", "Mean image", True),
            lambda model, truth, pool: metrics.mean_image(pool.images).expand_as(truth),
            "the average of public images: what somebody returns who has seen nothing.",
        ),
        Control(
            *("nearest_public", "Nearest public", False),
            lambda model, truth, pool: metrics.nearest_public(truth, pool.images),
            "the public image that is most like the truth.",
        ),
    ),
    public=public,
    split=split,
    wider=wider,
    sample=sample,
    check=check,
    match=match,
    rank=rank,
    recovered=recovered,
    partly=partly,
    is_public=is_public,
    candidates=candidates,
    keys=lambda images: [image.mul(255).round().to(torch.uint8).numpy().tobytes() for image in images],
    features=features,
)
