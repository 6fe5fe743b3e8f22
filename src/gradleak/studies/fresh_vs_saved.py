"""Fresh against saved gradients: which difference between the two really costs the decibels?

A gradient that is inverted where it was computed ("fresh") is usually recovered better than one that was written to a
file and attacked later ("saved"). A file can differ in five ways, and every combination is a row of the table:

    victim mode     train | eval       how the victim's BatchNorm normalised
    attacker mode   train | eval       how the attacker believes it did
    state           before | after     BatchNorm's buffers saved before or after the forward pass
    buffers         known | unknown    shipped with the file, or replaced by BatchNorm's initial values
    precision       float32 | float16  of the file

Combinations that hand the attacker the same tensors by construction (train mode never reads the buffers, eval mode
never writes them) share one run. Same images, same starts, same attack (Inverting Gradients, labels known) throughout.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from matplotlib.figure import Figure
from torch import nn

from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.audit import metrics
from gradleak.modalities.networks import Architecture, Normalise
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import PictureObservation
from gradleak.report.record import Plot
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings, Row, Size, Start, interval, opening, plot, shortage
from gradleak.victims.gradient import capture_gradient

SIZES: dict[Size, list[tuple[str, int, int]]] = {  # model, images, steps
    "smoke": [(f"{__name__}:little", 1, 3)],
    "small": [("convnet64", 3, 60), ("resnet32-10", 1, 25)],
    "paper": [("convnet64", 20, 1_000), ("resnet32-10", 20, 1_000)],
}
FIRST_IMAGE = 2_000  # rows of the test split that no default was tuned on


def little(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The smallest network with BatchNorm."""
    channels, height, width = shape
    convolution = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
    features = 8 * -(-height // 2) * -(-width // 2)  # a stride of 2, rounding up
    return nn.Sequential(
        Normalise(channels), convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(features, classes)
    )


@dataclass(frozen=True)
class Cell:
    """One combination of the five factors."""

    victim_mode: Mode
    attacker_mode: Mode
    state: str
    buffers: str
    precision: str

    def run(self) -> tuple[str, str, str, str]:
        """What the attacker gets in the end: two cells with the same answer are the same run."""
        if self.attacker_mode == "train":
            buffers = "not read"
        elif self.buffers == "unknown":
            buffers = "initial"
        else:
            buffers = self.state if self.victim_mode == "train" else "before"
        return self.victim_mode, self.attacker_mode, buffers, self.precision


CELLS = [
    Cell(*combination)  # type: ignore[arg-type]
    for combination in itertools.product(
        ("train", "eval"), ("train", "eval"), ("before", "after"), ("known", "unknown"), ("float32", "float16")
    )
]


def run(data: str, size: Size, *, seed: int, device: str, start: Start) -> Iterator[Findings]:
    """Yields after every image; the findings so far. device: where attacks run."""
    shape, classes = blueprint(data, size)
    rows, where, notes = list[Row](), torch.device(device), [shrunk(shape, size)]
    for name, wanted, steps in SIZES[size]:
        private = unseen(data, FIRST_IMAGE, wanted, shape)
        images = len(private.labels)
        notes.append(shortage(f"images for {name}", wanted, images))
        public = public_pool(data, "train", shape=shape, limit=512, seed=seed)
        architecture = Architecture(name, shape, classes)
        victim, attack = primed(architecture, public, seed), InvertingGradients(steps=steps)
        measured: dict[tuple[str, ...], list[dict[str, float]]] = {}
        for image in range(images):
            one = rows_of(private, image, 1)
            blind = metrics.mean_image(public.images).expand_as(one.images)
            for key, observation, error in runs(victim, architecture, one):
                on_step = start(f"{name}, image {image + 1}/{images}, {' '.join(key)}")
                generator = torch.Generator().manual_seed(seed + image)
                recovered = attack(observation.to(where), generator=generator, on_step=on_step).value
                score = {
                    "psnr_db": float(metrics.psnr_db(recovered, one.images)),
                    "ssim": float(metrics.ssim(recovered, one.images)),
                    "mean_image_psnr_db": float(metrics.psnr_db(blind, one.images)),
                    "replay_error": error,
                }
                measured.setdefault(key, []).append(score)
            yield findings([*rows, *table(name, measured)]).after(opening(data, size, *notes))
        rows += table(name, measured)


def primed(architecture: Architecture, public: Pictures, seed: int) -> nn.Module:
    """An untrained victim whose BatchNorm buffers have left their initial values: four batches of public pictures seen."""
    module = architecture.build(seed).train()
    with torch.no_grad():
        for batch in public.images[:64].chunk(4):
            module(batch)
    return module


def runs(
    victim: nn.Module, architecture: Architecture, private: Pictures
) -> Iterator[tuple[tuple[str, str, str, str], PictureObservation, float]]:
    """Every distinct run: its key, the observation as the attacker believes it, the replay error of the true image."""
    after = copy.deepcopy(victim).train()
    with torch.no_grad():
        after(private.images)  # what a forward pass in train mode leaves behind
    states = {"before": victim, "after": after, "initial": architecture.build(0)}
    for victim_mode, attacker_mode, buffers, precision in dict.fromkeys(cell.run() for cell in CELLS):
        model = Model.of(victim, architecture, mode="train" if victim_mode == "train" else "eval")
        taken, _ = capture_gradient(model, private, precision=getattr(torch, precision), reveal_labels=True)
        state = Model.of(states.get(buffers, victim), architecture).buffers
        believed = model.assume(mode="train" if attacker_mode == "train" else "eval", buffers=state)
        observation = replace(taken, model=believed)
        error = observation.residual(private.images, private.labels)
        yield (victim_mode, attacker_mode, buffers, precision), observation, error


def table(model: str, measured: dict[tuple[str, ...], list[dict[str, float]]]) -> list[Row]:
    """One flat row per cell: means over the images, and the loss against the fresh gradient of the same victim."""
    rows = []
    for cell in CELLS:
        scores = measured[cell.run()]
        fresh = measured[Cell(cell.victim_mode, cell.victim_mode, "before", "known", "float32").run()]
        loss = [f["psnr_db"] - s["psnr_db"] for f, s in zip(fresh, scores, strict=True)]
        row: Row = {"model": model, **asdict(cell), "images": len(scores)}
        for name in ("psnr_db", "ssim", "mean_image_psnr_db", "replay_error"):
            row[name] = round(sum(s[name] for s in scores) / len(scores), 4)
        row["psnr_db_interval"] = _rounded(interval([s["psnr_db"] for s in scores]))
        row["loss_db"] = _rounded(sum(loss) / len(loss))
        row["loss_db_interval"] = _rounded(interval(loss))
        rows.append(row)
    return rows


def findings(rows: list[Row]) -> Findings:
    """The table, its plot, and the cost of each factor alone in words."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        costs = ", ".join(f"{name} {loss:+.1f} dB" for name, loss in single_factors(rows, model).items())
        parts.append(f"{model}: {costs}")
    return Findings(
        rows, "Change against the fresh gradient when one thing differs. " + "; ".join(parts) + ".", [bars(rows)]
    )


def single_factors(rows: list[Row], model: str) -> dict[str, float]:
    """PSNR against the fresh gradient when one factor alone goes wrong, in dB (negative: worse)."""
    eval_known = {"victim_mode": "eval", "attacker_mode": "eval", "state": "before", "buffers": "known"}
    changes = {
        "file in float16": eval_known | {"precision": "float16"},
        "buffers unknown (eval)": eval_known | {"buffers": "unknown"},
        "taken in eval, attacked in train": eval_known | {"attacker_mode": "train"},
        "taken in train, attacked in eval": eval_known | {"victim_mode": "train"},
        "the same with the buffers after": eval_known | {"victim_mode": "train", "state": "after"},
    }
    return {
        name: -next(
            row["loss_db"]
            for row in rows
            if row["model"] == model and ({"precision": "float32"} | cell).items() <= row.items()
        )
        for name, cell in changes.items()
    }


def bars(rows: list[Row]) -> Plot:
    """Mean PSNR of every distinct run, with its interval, and the mean image as a line."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9, 3.6 * len(models)), layout="constrained")
    for axes, model in zip(figure.subplots(len(models), 1, squeeze=False)[:, 0], models, strict=True):
        distinct: dict[tuple[str, str, str, str], Row] = {}
        for row in rows:
            if row["model"] == model:
                cell = Cell(*(row[name] for name in ("victim_mode", "attacker_mode", "state", "buffers", "precision")))
                distinct.setdefault(cell.run(), row)
        names = [f"taken in {v}, attacked in {a}, buffers {b}, {p}" for v, a, b, p in distinct]
        colours = ["tab:green" if v == a and b in ("not read", "before") else "tab:red" for v, a, b, _ in distinct]
        chosen = list(distinct.values())
        errors = [row["psnr_db_interval"] or 0 for row in chosen]
        axes.barh(names, [row["psnr_db"] for row in chosen], xerr=errors, color=colours)
        axes.axvline(chosen[0]["mean_image_psnr_db"], color="black", linestyle="--", label="mean image")
        axes.set(title=f"{model}, {chosen[0]['images']} images", xlabel="PSNR in dB, with 95 % interval")
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()
        axes.legend(loc="lower right", fontsize=7)
    return plot("Fresh against saved gradients", figure)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
