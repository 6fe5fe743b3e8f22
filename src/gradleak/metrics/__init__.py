"""Scores of reconstructions: pure functions, one number per sample, pictures in pixel space [0, 1]."""

from gradleak.metrics.baselines import mean_image, nearest_public
from gradleak.metrics.image import lpips, mse, psnr_db, ssim
from gradleak.metrics.matching import identification, match, pairwise_mse

__all__ = [
    "identification",
    "lpips",
    "match",
    "mean_image",
    "mse",
    "nearest_public",
    "pairwise_mse",
    "psnr_db",
    "ssim",
]
