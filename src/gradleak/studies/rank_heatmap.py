"""How good are training images out of a change of weights of rank r, made by N images? A map, with a predicted threshold.

Two releases. A converged adapter (PEFT on every layer, W0 + B A composed, the base model known), read by KKT; and a small
change of all weights (one step from public weights), cut to rank r layer by layer, read with frozen features. Of its first
layer, d_in x d_out, rank r leaves r (d_in + d_out) numbers, and N images have N d_in: by counting, r* = N d_in / (d_in + d_out)
is what they need. Controls: the mean image, and how well what was found matches as many other images.
"""

from collections.abc import Iterator, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from gradleak.attacks.weights.kkt import KKT
from gradleak.attacks.weights.ntk import NTK
from gradleak.audit.metrics import ssim
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.model import Model
from gradleak.report.record import Plot
from gradleak.studies.data_sets import rows_of, shape_of
from gradleak.studies.findings import Findings, Row, Size, Start, opening, plot, rectangular
from gradleak.studies.fine_tuning import Truncated, fine_tuned
from gradleak.studies.kkt import diverged, extracted, halves, mean_of, nearest, two_class_source
from gradleak.studies.kkt_lora import adapted, beginning_at, composed
from gradleak.studies.ntk import FAST
from gradleak.victims.training import prepare_model
from gradleak.victims.weights import first_of_each

ADAPTER, CHANGE = "converged adapter, BA", "one step, cut to rank r"
# ranks, numbers of images, steps of the adapter's training, of KKT, of the search with frozen features
SIZES: dict[Size, tuple[tuple[int, ...], tuple[int, ...], int, int, int]] = {
    "smoke": ((1, 2), (2,), 60, 30, 30),
    "small": ((1, 2, 4, 8, 16), (2, 4, 8, 16), 1_500, 400, 400),
    "paper": ((1, 2, 4, 8, 16, 32, 64), (2, 4, 8, 16, 32, 64), 20_000, 1_500, 1_500),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every cell; the findings so far."""
    source, (ranks, counts, training, kkt, ntk) = two_class_source(data), SIZES[size]
    rows = list[Row]()
    parts = (
        adapters(source, ranks, counts, training, KKT(steps=kkt, first_layer=True), seed, start),
        changes(source, ranks, counts, NTK(steps=ntk, restarts=2), seed, start),
    )
    for part in parts:
        for row in part:
            rows.append(row)
            findings = Findings(rectangular(rows), sentence(rows), [drawn(rows, ranks, counts)])
            yield findings.after(opening(data, size, used=source))


def adapters(
    source: str, ranks: Sequence[int], counts: Sequence[int], steps: int, attack: KKT, seed: int, start: Start
) -> Iterator[Row]:
    """The cells of converged adapters."""
    for count in counts:
        private, others = halves(first_of_each(source, "train", count))
        architecture, mean = Architecture("homogeneous1000", shape_of(private), 2), mean_of(source, count // 2)
        for rank in ranks:
            on_step = start(f"adapter, {count} images, rank {rank}")
            try:
                adapter = adapted(architecture, private, rank, steps, seed)
            except BadInput as reason:
                yield {"released": ADAPTER, "images": count, "rank": rank, "note": str(reason)}
                continue
            seen = composed(adapter)
            base = {name: adapter.model.parameters[name].double() for name in seen.released}
            extraction, out = extracted(attack, beginning_at(seen, base), seed, on_step), len(next(iter(base.values())))
            row = cell(ADAPTER, rank, count, out, extraction.value, private.images, others.images, mean)
            yield {**row, "note": diverged(extraction)}


def changes(
    source: str, ranks: Sequence[int], counts: Sequence[int], attack: NTK, seed: int, start: Start
) -> Iterator[Row]:
    """The cells of small changes."""
    private = load(source, "test", indices=range(2 * max(counts)))
    architecture = Architecture("mlp", shape_of(private), max(len(private.classes), 2))
    public = public_pool(source, "train", shape=architecture.input_shape, limit=2_000)
    module = prepare_model(architecture, seed=seed, train_on=public, epochs=3, on_step=start("the model before"))
    model, mean = Model.of(module, architecture), public.images.mean(0, keepdim=True)
    for count in counts:
        batch, others = rows_of(private, 0, count), rows_of(private, count, count)
        for rank in ranks:
            on_step = start(f"change, {count} images, rank {rank}")
            try:
                update, _ = fine_tuned(model, batch, Truncated(rank), FAST, 1, seed)
            except BadInput as reason:
                yield {"released": CHANGE, "images": count, "rank": rank, "note": str(reason)}
                continue
            extraction = extracted(attack, update, seed, on_step)
            out = next(len(tensor) for tensor in update.released.values() if tensor.dim() == 2)
            row = cell(CHANGE, rank, count, out, extraction.value, batch.images, others.images, mean)
            yield {**row, "note": diverged(extraction)}


def cell(
    name: str, rank: int, count: int, out: int, recovered: Tensor, truth: Tensor, others: Tensor, mean: Tensor
) -> Row:
    """One row: mean SSIM of every truth's nearest image, and the controls'. out: the first layer's width."""
    into = truth[0].numel()
    pairs = {"ssim": (recovered, truth), "mean_image_ssim": (mean, truth), "other_images_ssim": (recovered, others)}
    scored = {key: float(ssim(nearest(images, true), true).mean()) for key, (images, true) in pairs.items()}
    threshold = count * into / (into + out)
    return {"released": name, "images": count, "rank": rank, "predicted_threshold": threshold, **scored}


def drawn(rows: list[Row], ranks: Sequence[int], counts: Sequence[int]) -> Plot:
    """One map per release; the line is the predicted threshold."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), (ADAPTER, CHANGE), strict=True):
        of_release = [row for row in rows if row["released"] == name and not row.get("note")]
        grid = torch.full((len(counts), len(ranks)), torch.nan)
        for row in of_release:
            at = counts.index(row["images"]), ranks.index(row["rank"])
            grid[at] = row["ssim"]
            ink = "white" if row["ssim"] < 0.6 else "black"
            axes.text(at[1], at[0] + 0.25, f"{row['ssim']:.2f}", ha="center", va="center", color=ink)
        image = axes.imshow(grid.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        thresholds = {row["images"]: row["predicted_threshold"] for row in of_release}
        # Both axes are logarithmic: every cell doubles.
        places = [torch.tensor(r / ranks[0]).log2().item() for r in thresholds.values()]
        axes.plot(places, [counts.index(n) for n in thresholds], "r--", label="predicted threshold")
        axes.set(title=name, xlabel="rank", ylabel="images", xlim=(-0.5, len(ranks) - 0.5))
        axes.set_xticks(range(len(ranks)), map(str, ranks))
        axes.set_yticks(range(len(counts)), map(str, counts))
        figure.colorbar(image, ax=axes, label="SSIM")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    return plot("Rank against number of images", figure)


def sentence(rows: list[Row]) -> str:
    """Mean SSIM on both sides of the predicted threshold."""
    parts = []
    for name in dict.fromkeys(row["released"] for row in rows):
        of_release = [row for row in rows if row["released"] == name and not row.get("note")]
        sides = [
            [row["ssim"] for row in of_release if (row["rank"] < row["predicted_threshold"]) == low]
            for low in (True, False)
        ]
        low, high = (f"{sum(side) / len(side):.2f}" if side else "not measured" for side in sides)
        parts.append(f"{name}: {low} below the predicted threshold, {high} from it on")
    return "Mean SSIM. " + "; ".join(parts) + "."
