"""How close is a reconstructed picture to the true one? One number per picture, in pixel space [0, 1].

Every function takes two batches (n, channel, height, width) in the same order (see `matching.match`) and returns (n,)
in float64. Nothing is clamped or rescaled first. A reconstruction with NaN pixels scores NaN.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.errors import BadInput

PSNR_CAP_DB = 200.0  # identical pictures would give infinity, which JSON cannot hold; float32 noise is near 150 dB

LPIPS_FILE = "GRADLEAK_LPIPS"  # names a file
_LPIPS_SHIFT = (-0.030, -0.088, -0.188)  # Zhang et al. 2018: ImageNet statistics for pixels in [-1, 1]
_LPIPS_SCALE = (0.458, 0.448, 0.450)
_ALEXNET = (  # (index in torchvision's alexnet().features, kernel, stride, padding, max-pool before it)
    (0, 11, 4, 2, False),
    (3, 5, 1, 2, True),
    (6, 3, 1, 1, True),
    (8, 3, 1, 1, False),
    (10, 3, 1, 1, False),
)
_ALEXNET_WIDTHS = (3, 64, 192, 384, 256, 256)


def mse(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error per picture, in squared pixel units. (n, ...), (n, ...) -> (n,)."""
    _check(reconstruction, truth)
    return (reconstruction.double() - truth.double()).square().flatten(1).mean(1)


def psnr_db(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture: -10 log10(MSE) decibels for pixels in [0, 1], at most `PSNR_CAP_DB`."""
    return -10 * mse(reconstruction, truth).clamp_min(10 ** (-PSNR_CAP_DB / 10)).log10()


def ssim(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity per picture, at most 1 (Wang et al. 2004, equation 13), averaged over the channels.

    Gaussian window of standard deviation 1.5 and 11x11 pixels, only where it lies inside the picture. On pictures
    smaller than that the same Gaussian is cut to the largest odd window that fits: 7x7 for 8x8 digits.
    """
    # Written out because scikit-image, with which this agrees, refuses pictures under 11x11, and torchmetrics also
    # averages windows that hang over the border of the picture.
    _check(reconstruction, truth)
    channel = truth.shape[1]
    radius = min(5, (min(truth.shape[-2:]) - 1) // 2)
    bell = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=truth.device).double() / 1.5).square())
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(channel, 1, -1, -1)

    def blur(image: Tensor) -> Tensor:  # (n, c, h, w) -> (n, c, h - 2 radius, w - 2 radius)
        return F.conv2d(image, window, groups=channel)

    x, y = reconstruction.double(), truth.double()
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


def lpips(reconstruction: Tensor, truth: Tensor) -> Tensor | None:
    """Learned perceptual distance per picture (Zhang et al. 2018, equation 1, AlexNet); 0 is identical, lower is closer.

    The weights come from the file that the environment variable GRADLEAK_LPIPS names; None when it is unset. Grey pictures
    are repeated to three channels, and pictures with a side under 64 pixels are enlarged (bilinear) until it has 64.
    Raises `BadInput` as `lpips_weights` does.
    """
    path = os.environ.get(LPIPS_FILE)
    if not path:
        return None
    weights = lpips_weights(Path(path))
    _check(reconstruction, truth)
    with torch.no_grad():
        pairs = zip(_alexnet(reconstruction, weights), _alexnet(truth, weights), strict=True)
        layers = [
            ((a - b).square() * weights[f"lin{k}.weight"].to(a)).sum(1).mean((1, 2)) for k, (a, b) in enumerate(pairs)
        ]
    return torch.stack(layers).sum(0).double()


@contextmanager
def lpips_from(file: Path | None) -> Iterator[None]:
    """Inside, `lpips` is measured with the weights in this file, or else in the one that GRADLEAK_LPIPS names: `BadInput` at once where
    that does not fit, and not when something has been found."""
    named = os.environ.get(LPIPS_FILE, "")
    chosen = named if file is None else str(file)
    if chosen:
        lpips_weights(Path(chosen))
    os.environ[LPIPS_FILE] = chosen
    try:
        yield
    finally:
        os.environ[LPIPS_FILE] = named


def _alexnet(images: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """(n, 1 or 3, h, w) in [0, 1] -> five activations (n, c, h', w'), each of unit length along the channels."""
    shift, scale = (images.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (_LPIPS_SHIFT, _LPIPS_SCALE))
    x = images.float()
    if (short := min(x.shape[-2:])) < 64:
        size = [round(side * 64 / short) for side in x.shape[-2:]]
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    x = (2 * x - 1 - shift) / scale  # grey becomes three channels here, by broadcasting
    activations = []
    for n, _, stride, padding, pool in _ALEXNET:
        if pool:
            x = F.max_pool2d(x, 3, 2)
        weight, bias = weights[f"features.{n}.weight"].to(x), weights[f"features.{n}.bias"].to(x)
        x = F.conv2d(x, weight, bias, stride, padding).relu()
        activations.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return activations


def lpips_weights(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file: `features.N.weight` and `features.N.bias` as in torchvision's alexnet, or `net.slice1.N.weight` as in the
    package lpips, and for k = 0..4 one head `lin<k>.….weight` with a non-negative number per channel; anything else in it is ignored.

    Raises `BadInput` when the file does not exist or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} is no readable safetensors file with the weights of LPIPS: {error}") from error
    weights = {}
    for k, (n, kernel, *_) in enumerate(_ALEXNET):
        before, width = _ALEXNET_WIDTHS[k : k + 2]
        for new, pattern, shape in (
            (f"features.{n}.weight", rf"(features|net\.slice{k + 1})\.{n}\.weight", (width, before, kernel, kernel)),
            (f"features.{n}.bias", rf"(features|net\.slice{k + 1})\.{n}\.bias", (width,)),
            (f"lin{k}.weight", rf"lin{k}\.(.*\.)?weight", (1, width, 1, 1)),
        ):
            old = next((name for name in stored if re.fullmatch(pattern, name)), None)
            if old is None or tuple(stored[old].shape) != shape:
                misfit = "is missing" if old is None else f"has shape {tuple(stored[old].shape)}"
                raise BadInput(
                    f"{path} does not hold the weights of LPIPS for AlexNet: {new} {misfit}, expected {shape}."
                )
            weights[new] = stored[old]
    return weights


def _check(reconstruction: Tensor, truth: Tensor) -> None:
    if reconstruction.shape != truth.shape or truth.ndim != 4:
        raise BadInput(
            "Reconstruction and truth must both be (n, channel, height, width) and agree, not "
            f"{tuple(reconstruction.shape)} and {tuple(truth.shape)}."
        )
