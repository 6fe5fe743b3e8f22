"""Where an adapter starts: what the *initial* factors give away, before any training (PEFT's init_lora_weights).

LoRA-GA (Wang et al. 2024, arXiv:2407.05000) starts from singular vectors of the gradient of a private batch. Of one
picture, the gradient of a first linear layer is delta x^T: its only right singular vector is the picture. The other
starts are random, or computed from the public base model (PiSSA, OLoRA): equal for every private picture.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from gradleak.audit import metrics
from gradleak.formats.observation_file import load_tensors
from gradleak.observations.training import Recipe
from gradleak.studies.data_sets import rows_of
from gradleak.studies.findings import Findings, Row, Size, Start, opening, shortage
from gradleak.studies.lora_victims import Base, prepare
from gradleak.victims.adapter import Init, fine_tune

STARTS: tuple[Init, ...] = (True, "gaussian", "pissa", "olora", "lora_ga")
MODEL, FIRST, RANK = "mlp1000", "2", 8  # FIRST is the model's first linear layer, after Normalise and Flatten
SIZES: dict[Size, int] = {"smoke": 3, "small": 10, "paper": 50}  # private pictures


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every start; the findings so far."""
    wanted = SIZES[size]
    base, rows = prepare(MODEL, data, wanted + 1, size, start), list[Row]()
    count = len(base.private.labels) - 1  # one more, whose start they are compared with
    before = opening(data, size, shortage("private pictures", wanted, count), used=base.private.source)
    for init in STARTS:
        on_step = start(f"start {init}")
        cosines, ranks, psnr_db, same = list[float](), list[int](), list[float](), 0
        other = initial(base, count, init, seed)
        for i in range(count):
            A = initial(base, i, init, seed)
            same += int(torch.equal(A, other))
            cosine, rank, psnr = read(base, A, i)
            cosines.append(cosine)
            ranks.append(rank)
            psnr_db.append(psnr)
            on_step(i + 1, count, cosine)
        blind = metrics.mean_image(base.public.images).expand_as(base.private.images[:count])
        rows.append(
            {
                "start": "default" if init is True else init,
                "pictures": count,
                "same_for_another_picture": round(same / count, 3),
                "cosine_to_picture": round(sum(cosines) / count, 4),
                "top1_of_100": round(sum(rank == 1 for rank in ranks) / count, 3),
                "psnr_db": round(sum(psnr_db) / count, 2),
                "mean_image_psnr_db": round(float(metrics.psnr_db(blind, base.private.images[:count]).mean()), 2),
            }
        )
        leak = [row for row in rows if row["same_for_another_picture"] < 1]
        names = ", ".join(f"{row['start']} (top-1 of 100: {row['top1_of_100']:.0%})" for row in leak) or "none yet"
        yield Findings(rows, f"{before}Starts that depend on the private picture: {names}.")


def initial(base: Base, row: int, init: Init, seed: int) -> torch.Tensor:
    """lora_A (rank, pixels) of the first layer as PEFT initialises it for this private picture."""
    one, recipe = rows_of(base.private, row, 1), Recipe(learning_rate=1.0, steps=1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        fine_tune(base.model, one, rank=RANK, out=out, recipe=recipe, target_modules=(FIRST,), seed=seed, init=init)
        # With B = 0 the released A is the initial one: one step does not move it.
        saved = out / ("initial" if (out / "initial").is_dir() else "adapter") / "adapter_model.safetensors"
        return next(tensor for name, tensor in load_tensors(saved).items() if "lora_A" in name)


def read(base: Base, A: torch.Tensor, row: int) -> tuple[float, int, float]:
    """The best |cosine| of a row of A with the private picture as the layer sees it, its rank among decoys, and the PSNR
    of that row taken for the picture, its sign and scale fitted to the range of pictures (background 0, ink 1)."""
    mean, std = (base.model.module.get_buffer(f"0.{name}").flatten() for name in ("mean", "std"))
    truth = base.private.images[row : row + 1]
    lineup = F.normalize(((torch.cat([truth, base.decoys]) - mean) / std).flatten(1), dim=1)
    along = (lineup @ F.normalize(A.flatten(1), dim=1).T).abs()  # (1 + decoys, rank)
    best, which = along.max(1)
    vector = A[int(which[0])]
    # Most pixels are background: it is where the values crowd, the ink lies on the far side of it.
    vector = vector * (1.0 if vector.mean() > vector.median() else -1.0)
    picture = ((vector - vector.median()) / (vector.max() - vector.median())).clamp(0, 1).view_as(truth)
    return float(best[0]), 1 + int((best[1:] >= best[0]).sum()), float(metrics.psnr_db(picture, truth))
