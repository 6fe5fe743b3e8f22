"""GIT trained on one kind of pictures and used on another: CIFAR-10 -> ImageNet pictures at the same size, -> faces; and
with fewer pairs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradleak.attacks.search.descend import OnStep
from gradleak.modalities.pictures import public_pool
from gradleak.studies.findings import Findings
from gradleak.studies.learned_victims import fit, found_for, prepare, scores

SIZES = {
    "quick": (300, 2, 40),
    "small": (10_000, 4, 1_000),
    "paper": (10_000, 30, 1_000),
}  # pairs, epochs, unseen pictures


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every kind of pictures, then for fewer pairs; the findings so far."""
    pairs, epochs, private = SIZES["quick" if data in ("embedded", "digits") else size]
    field, rows = prepare("lenet", data, seed, pairs, private), list[dict[str, Any]]()
    git, _ = fit(field, "git", {"hidden": 64}, pairs=pairs, epochs=epochs, seed=seed, on_step=start("git"))
    kinds = {"unseen, same kind": field.private}
    for beside in ("imagenet_sample", "orl_faces"):
        folder = Path(data).parent / beside
        if data not in ("embedded", "digits") and folder.is_dir():
            shape = field.model.architecture.input_shape
            kinds[beside] = public_pool(folder, "train", shape=shape, limit=private)
    mean = field.public.images.mean(0)
    for name, pictures in kinds.items():
        blind = scores(mean.expand_as(pictures.images), pictures.images)
        told = scores(found_for(git, field, pictures), pictures.images)
        rows.append({"pairs": pairs, "private": name, **told, "mean_image_mse": blind["mse"]})
        yield findings(rows)
    for fewer in (n for n in (pairs // 10, pairs // 100) if n >= 30):
        small = replace(
            field, public=replace(field.public, images=field.public.images[:fewer], labels=field.public.labels[:fewer])
        )
        more = epochs * 4
        made, _ = fit(
            small, "git", {"hidden": 64}, pairs=fewer, epochs=more, seed=seed, on_step=start(f"{fewer} pairs")
        )
        told = scores(found_for(made, field, field.private), field.private.images)
        blind = scores(mean.expand_as(field.private.images), field.private.images)
        rows.append({"pairs": fewer, "private": "unseen, same kind", **told, "mean_image_mse": blind["mse"]})
        yield findings(rows)


def findings(rows: list[dict[str, Any]]) -> Findings:
    """The table, and the errors in words."""
    parts = [
        f"{row['private']}, {row['pairs']:,} pairs: {row['mse']:.4f} (mean image {row['mean_image_mse']:.4f})"
        for row in rows
    ]
    return Findings(rows, "Mean squared error of GIT. " + "; ".join(parts) + ".")
