"""How far closed forms go, untrained: the recursion from one picture's gradient, by model and by noise on the release."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from gradleak.attacks.recursion.recursive import Recursive
from gradleak.audit.metrics import match
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import public_pool
from gradleak.observations.defenses import GaussianNoise
from gradleak.observations.model import Model
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings, shortage
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.gradient import capture_gradient

FIRST = 2_000  # test row


@dataclass(frozen=True)
class Setting:
    """noise: its standard deviation. batch: pictures behind one gradient; of several the labels are known."""

    model: str
    noise: float
    pictures: int
    batch: int = 1


def settings(data: str, size: Size) -> Iterator[Setting]:
    """LeNet under noise, then other models."""
    if size == "smoke":
        yield from (Setting("lenet", 0.0, 2), Setting("lenet", 1e-3, 1), Setting("mlp", 0.0, 1))
        return
    many = 100 if size == "paper" else 20
    yield from (Setting("lenet", noise, many) for noise in (0.0, 1e-4, 1e-3, 1e-2))
    yield Setting("mlp", 0.0, many)
    yield from (Setting(name, 0.0, max(many // 4, many - 95)) for name in ("convnet", "convnet64", "resnet20"))
    yield Setting("resnet20-4", 0.0, 8)
    yield from (Setting(name, 0.0, 8, batch=8) for name in ("convnet", "convnet64"))


def cell(setting: Setting, bench: Bench) -> Result:
    """One gradient after another, a fresh model each."""
    shape, classes = blueprint(bench.data, bench.size)
    pictures, architecture = (
        unseen(bench.data, FIRST, setting.pictures, shape),
        Architecture(setting.model, shape, classes),
    )
    recovered, closed = list[torch.Tensor](), ""
    for i in range(0, len(pictures.labels), setting.batch):
        private = rows_of(pictures, i, setting.batch)
        model = Model.of(architecture.build(bench.seed + i), architecture)
        noise = (GaussianNoise(setting.noise),) if setting.noise else ()
        observation, _ = capture_gradient(model, private, defenses=noise, seed=bench.seed + i)
        known = observation if setting.batch == 1 else replace(observation, labels=private.labels)
        found = Recursive()(known, generator=torch.Generator().manual_seed(bench.seed))
        recovered.append(found.value[match(found.value, private.images)])
        closed = found.status.split(";")[0]
        bench.on_step(i + setting.batch, len(pictures.labels), found.residual)
    decoys = public_pool(bench.data, "train", shape=shape, limit=99).images if setting.batch > 1 else None
    notes = shrunk(shape, bench.size), shortage("unseen pictures", setting.pictures, len(recovered))
    return Result({"closed_form": closed}, compared(torch.cat(recovered), pictures.images, decoys=decoys), notes=notes)


def tell(table: Table) -> Findings:
    """Medians."""
    parts = []
    for row in table.rows:
        each = sorted(table.sampled("psnr_db", model=row["model"], noise=row["noise"], batch=row["batch"]))
        of = f", batches of {row['batch']}" if row["batch"] > 1 else ""
        parts.append(f"{row['model']} at noise {row['noise']:g}{of}: {each[len(each) // 2]:.1f} dB")
    return Findings(f"Median PSNR: {', '.join(parts)}.")


STUDY = Study(
    name="closed-form",
    question="How much of a picture do closed forms read from its gradient, without any training?",
    settings=settings,
    cell=cell,
    tell=tell,
)
