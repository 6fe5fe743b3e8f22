"""Scores of reconstructions: pure functions, one number per sample, pictures in pixel space [0, 1]."""

from gradleak.audit.metrics.controls import mean_image, nearest_public
from gradleak.audit.metrics.matching import identification, match, pairwise_mse
from gradleak.audit.metrics.pictures import lpips, lpips_from, mse, psnr_db, ssim

__all__ = [
    "identification",
    "lpips",
    "lpips_from",
    "match",
    "mean_image",
    "mse",
    "nearest_public",
    "pairwise_mse",
    "psnr_db",
    "ssim",
]
