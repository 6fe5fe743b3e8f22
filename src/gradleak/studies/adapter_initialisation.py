"""Where an adapter starts: what do the *initial* factors give away, before any training (PEFT's init_lora_weights)?

LoRA-GA (Wang et al. 2024, arXiv:2407.05000) starts from singular vectors of the gradient of a private batch. Of one picture, the
gradient of a first linear layer is delta x^T: its only right singular vector is the picture. The other starts are random, or computed
from the public base model (PiSSA, OLoRA): equal for every private picture.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.audit import metrics
from gradleak.modalities.pictures import Pictures
from gradleak.observations.training import Recipe
from gradleak.studies.adapter_victims import Base, batched, prepare
from gradleak.studies.findings import Findings
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.adapter import Init, fine_tune

MODEL, LAYER, RANK = "mlp1000", "2", 8  # LAYER is the model's first linear layer, after Normalise and Flatten
PICTURES: dict[Size, int] = {"smoke": 3, "small": 10, "paper": 50}


@dataclass(frozen=True)
class Setting:
    """start: as PEFT names it."""

    start: str
    pictures: int


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Every start."""
    yield from (Setting(start, PICTURES[size]) for start in ("default", "gaussian", "pissa", "olora", "lora_ga"))


def cell(setting: Setting, bench: Bench) -> Result:
    """One start for one private picture after another, beside that for one more."""
    base, samples = prepare(MODEL, bench.data, bench.size), list[Row]()
    *private, last = batched(base.private(setting.pictures + 1), 1)
    other = initial(base, last, setting.start, bench.seed)
    for i, one in enumerate(private):
        A = initial(base, one, setting.start, bench.seed)
        samples.append({"same_for_another_picture": torch.equal(A, other), **read(base, A, one.images)})
        bench.on_step(i + 1, len(private), samples[-1]["cosine_to_picture"])
    return Result({}, samples, notes=base.notes(bench, setting.pictures, len(private)))


def initial(base: Base, one: Pictures, start: str, seed: int) -> Tensor:
    """lora_A (rank, pixels) of the first layer as PEFT initialises it for this private picture."""
    init, recipe, names = cast(Init, start == "default" or start), Recipe(learning_rate=1.0, steps=1), (LAYER,)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        adapter, _ = fine_tune(
            base.model, one, rank=RANK, out=out, recipe=recipe, target_modules=names, seed=seed, init=init
        )
    # With B = 0 the released A is the initial one: one step does not move it.
    return adapter.adapter.start[f"{LAYER}.lora_A"]


def read(base: Base, A: Tensor, truth: Tensor) -> Row:
    """The best |cosine| of a row of A with the private picture as the layer sees it, whether that is above all decoys', and the scores
    of that row taken for the picture, its sign and scale fitted to the range of pictures (background 0, ink 1)."""
    mean, std = (base.model.module.get_buffer(f"0.{name}").flatten() for name in ("mean", "std"))
    lineup = F.normalize(((torch.cat([truth, base.decoys]) - mean) / std).flatten(1), dim=1)
    best, which = (lineup @ F.normalize(A.flatten(1), dim=1).T).abs().max(1)  # (1 + decoys,) over the rows of A
    vector = A[int(which[0])]
    # Most pixels are background: it is where the values crowd, the ink lies on the far side of it.
    vector = vector * (1.0 if vector.mean() > vector.median() else -1.0)
    picture = ((vector - vector.median()) / (vector.max() - vector.median())).clamp(0, 1).view_as(truth)
    [row] = compared(picture, truth, metrics.mean_image(base.public.images))
    return {"cosine_to_picture": float(best[0]), "identified": bool((best[1:] < best[0]).all()), **row}


def tell(table: Table) -> Findings:
    """Which starts give something away."""
    leaks = [row for row in table.rows if row["same_for_another_picture"] < 1]
    names = ", ".join(f"{row['start']} (top-1 of 100: {row['identified']:.0%})" for row in leaks) or "none yet"
    return Findings(f"Starts that depend on the private picture: {names}.")


STUDY = Study(
    name="adapter-initialisation",
    question="Does an adapter give private pictures away before it has been trained, by where its training starts?",
    settings=settings,
    cell=cell,
    tell=tell,
    beside=("mnist",),
)
