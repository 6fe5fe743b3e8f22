"""How good are training images out of a change of weights of rank r, made by N images? A map, with a predicted threshold.

Two releases. A converged adapter (PEFT on every layer, W0 + B A composed, the base model known), read by KKT; and a small
change of all weights (one step from public weights), cut to rank r layer by layer, read with frozen features. Of its first
layer, d_in x d_out, rank r leaves r (d_in + d_out) numbers, and N images have N d_in: by counting, r* = N d_in / (d_in + d_out)
is what they need. Controls: the mean image, and how well what was found matches as many other images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.weights.kkt import KKT
from gradleak.attacks.weights.ntk import NTK
from gradleak.modalities.pictures import load
from gradleak.studies.data_sets import rows_of, shape_of
from gradleak.studies.extractions import extracted, judged, mean_image, owners, similarity, two_class_source
from gradleak.studies.findings import Findings, stands_in
from gradleak.studies.fine_tuned_weights import FAST, public_model
from gradleak.studies.plots import heat_map, panels
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.studies.trained_adapters import adapted, composed
from gradleak.victims.fine_tuning import Truncated, fine_tuned

ADAPTER, CHANGE = "converged adapter, BA", "one step, cut to rank r"
# the highest rank and number of images, steps of the adapter's training, of both searches
SIZES: dict[Size, tuple[int, int, int, int]] = {
    "smoke": (2, 2, 60, 30),
    "small": (16, 16, 1_500, 400),
    "paper": (64, 64, 20_000, 1_500),
}


@dataclass(frozen=True)
class Setting:
    """One field of a map."""

    released: str
    images: int
    rank: int


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Both maps: every rank and number of images is twice the one before."""
    ranks, counts = ([2**k for k in range(most.bit_length())] for most in SIZES[size][:2])
    yield from (Setting(name, n, rank) for name in (ADAPTER, CHANGE) for n in counts[1:] for rank in ranks)


def cell(setting: Setting, bench: Bench) -> Result:
    """One release, and what is read from it."""
    source, count, (*_, steps, search) = two_class_source(bench.data), setting.images, SIZES[bench.size]
    if setting.released == ADAPTER:
        (private, others), mean = owners(source, count), mean_image(source, count)
        seen = composed(adapted(private, setting.rank, steps, bench.seed))
        found = extracted(KKT(steps=search, first_layer=True), seen, bench)
    else:
        both = load(source, "test", indices=range(2 * count))
        private, others = rows_of(both, 0, count), rows_of(both, count, count)
        model, mean = public_model(source, shape_of(both), max(len(both.classes), 2), bench.seed)
        seen, _ = fine_tuned(model, private, Truncated(setting.rank), FAST, 1, bench.seed)
        found = extracted(NTK(steps=search, restarts=2), seen, bench)
    width = next(len(tensor) for tensor in seen.released.values() if tensor.dim() == 2)
    result = compared(found, private.images, others.images, mean, width)
    return replace(result, notes=(stands_in(source, bench.data),))


def compared(found: Reconstruction, truth: Tensor, others: Tensor, mean: Tensor, width: int) -> Result:
    """`judged`, with other images as a further control, and the predicted threshold. width: of the first layer."""
    result = judged(truth, found, {"mean_image": mean}, other_images_ssim=similarity(found.value, others))
    into = truth[0].numel()
    return replace(result, facts={"predicted_threshold": len(truth) * into / (into + width), **result.facts})


def drawn(rows: Sequence[Row]) -> Figure:
    """One map per release; the line is the predicted threshold."""
    releases = list(dict.fromkeys(row["released"] for row in rows))
    figure, axes = panels(len(releases))
    for one, name in zip(axes, releases, strict=True):
        own = [row for row in rows if row["released"] == name]
        heat_map(one, own, "rank", "images", "ssim")
        ranks = sorted({row["rank"] for row in own})
        thresholds = [r for _, r in sorted({(row["images"], row["predicted_threshold"]) for row in own})]
        ticks = np.log2([ranks[0] / 2, *ranks, ranks[-1] * 2])
        places = np.interp(np.log2(thresholds), ticks, np.arange(len(ticks)) - 1)
        one.plot(places, range(len(places)), "r--", label="predicted threshold")
        one.set(title=f"{name}: SSIM", xlim=(-0.5, len(ranks) - 0.5))
        one.images[0].set_clim(0, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    return figure


def tell(table: Table) -> Findings:
    """Mean SSIM on both sides of the predicted threshold."""
    parts = []
    for name in dict.fromkeys(row["released"] for row in table.rows):
        sides: dict[bool, list[float]] = {True: [], False: []}
        for row in table.where(released=name):
            sides[row["rank"] < row["predicted_threshold"]].append(row["ssim"])
        low, high = (f"{sum(side) / len(side):.2f}" if side else "not measured" for side in sides.values())
        parts.append(f"{name}: {low} below the predicted threshold, {high} from it on")
    return Findings(f"Mean SSIM. {'; '.join(parts)}.", {"Rank against number of images": drawn(table.rows)})


STUDY = Study(
    name="rank-against-samples",
    question="How many training images does a change of weights give away, depending on its rank?",
    settings=settings,
    cell=cell,
    tell=tell,
)
