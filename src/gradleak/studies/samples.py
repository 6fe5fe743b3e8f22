"""Samples of studies of pictures: one row of scores per private picture."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradleak.audit import metrics
from gradleak.studies.study import Row


def compared(images: Tensor, true: Tensor, blind: Tensor | None = None, decoys: Tensor | None = None) -> list[Row]:
    """(n, channel, height, width) in matched order -> n rows: mse, psnr_db, ssim.

    blind: a picture of somebody who saw nothing, whose scores stand beside; decoys: the rank of the truth among them.
    """
    columns: dict[str, Any] = scores(images, true)
    if blind is not None:
        columns |= {f"mean_image_{name}": values for name, values in scores(blind.expand_as(true), true).items()}
        columns["better_than_mean"] = columns["psnr_db"] > columns["mean_image_psnr_db"]
    if decoys is not None:
        columns["identified"] = metrics.identification(images, true, decoys) == 1
    return per_sample(**columns)


def scores(images: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Each (n,)."""
    mse = (images - true).square().flatten(1).mean(1)
    return {"mse": mse, "psnr_db": metrics.psnr_db(images, true), "ssim": metrics.ssim(images, true)}


def per_sample(**columns: Tensor | Sequence[Any]) -> list[Row]:
    """Columns of equal length as rows."""
    lists = {name: c.tolist() if isinstance(c, Tensor) else list(c) for name, c in columns.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
