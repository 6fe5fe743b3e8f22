"""GIT trained on one kind of pictures and used on another: CIFAR-10 -> ImageNet pictures at the same size, -> faces; and
with fewer pairs."""

from collections.abc import Iterator
from dataclasses import replace

from gradleak.modalities.pictures import public_pool
from gradleak.studies.data_sets import beside, rows_of
from gradleak.studies.findings import Findings, Row, Size, Start, opening
from gradleak.studies.learned_victims import GIT, fit, found_for, prepare, scores

# pairs, epochs, unseen pictures
SIZES: dict[Size, tuple[int, int, int]] = {
    "smoke": (100, 3, 20),
    "small": (10_000, 4, 1_000),
    "paper": (10_000, 30, 1_000),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every kind of pictures, then for fewer pairs; the findings so far."""
    pairs, epochs, private = SIZES[size]
    field, rows = prepare("lenet", data, size, seed, pairs, private), list[Row]()
    before = opening(data, size, *field.notes(size, pairs, private))
    git, _ = fit(field, "git", GIT[size], pairs=pairs, epochs=epochs, seed=seed, on_step=start("git"))
    kinds = {"unseen, same kind": field.private}
    for name in ("imagenet_sample", "orl_faces"):
        if (folder := beside(data, name)) is not None:
            kinds[name] = public_pool(folder, "train", shape=field.model.architecture.input_shape, limit=private)
    mean = field.public.images.mean(0)
    for name, pictures in kinds.items():
        blind = scores(mean.expand_as(pictures.images), pictures.images)
        measured = scores(found_for(git, field, pictures), pictures.images)
        rows.append({"pairs": pairs, "private": name, **measured, "mean_image_mse": blind["mse"]})
        yield findings(rows).after(before)
    for fewer in (n for n in (pairs // 10, pairs // 100) if n >= 30):
        few, on_step = replace(field, public=rows_of(field.public, 0, fewer)), start(f"{fewer} pairs")
        generator, _ = fit(few, "git", GIT[size], pairs=fewer, epochs=4 * epochs, seed=seed, on_step=on_step)
        measured = scores(found_for(generator, field, field.private), field.private.images)
        blind = scores(mean.expand_as(field.private.images), field.private.images)
        rows.append({"pairs": fewer, "private": "unseen, same kind", **measured, "mean_image_mse": blind["mse"]})
        yield findings(rows).after(before)


def findings(rows: list[Row]) -> Findings:
    """The table, and the errors in words."""
    parts = [
        f"{row['private']}, {row['pairs']:,} pairs: {row['mse']:.4f} (mean image {row['mean_image_mse']:.4f})"
        for row in rows
    ]
    return Findings(rows, "Mean squared error of GIT. " + "; ".join(parts) + ".")
