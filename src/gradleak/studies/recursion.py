"""How far closed forms go, untrained: the recursion from one picture's gradient, by model and by noise on the release."""

import time
from collections.abc import Iterator

import torch

from gradleak.attacks.recursion.recursive import Recursive
from gradleak.audit.metrics import psnr_db
from gradleak.modalities.networks import Architecture
from gradleak.observations.defenses import GaussianNoise
from gradleak.observations.model import Model
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings, Row, Size, Start, opening, shortage
from gradleak.studies.learned_victims import scores
from gradleak.victims.gradient import capture_gradient

SMALL = (
    *(("lenet", noise, 20) for noise in (0.0, 1e-4, 1e-3, 1e-2)),
    ("mlp", 0.0, 20),
    ("convnet", 0.0, 5),
    ("convnet64", 0.0, 5),
    ("resnet20", 0.0, 5),
)
SIZES: dict[Size, tuple[tuple[str, float, int], ...]] = {  # (model, standard deviation of the noise, pictures)
    "smoke": (("lenet", 0.0, 2), ("lenet", 1e-3, 1), ("mlp", 0.0, 1)),
    "small": SMALL,
    "paper": tuple((name, noise, 100) for name, noise, _ in SMALL),
}
FIRST = 2_000  # test row


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every model and noise; the findings so far."""
    rows = list[Row]()
    for name, noise, wanted in SIZES[size]:
        shape, classes = blueprint(data, size)
        pictures, architecture = unseen(data, FIRST, wanted, shape), Architecture(name, shape, classes)
        count = len(pictures.labels)
        on_step, recovered, seconds, status = start(f"{name}, noise {noise:g}"), list[torch.Tensor](), 0.0, ""
        for i in range(count):
            one, model = rows_of(pictures, i, 1), Model.of(architecture.build(seed + i), architecture)
            defenses = (GaussianNoise(noise),) if noise else ()
            observation, _ = capture_gradient(model, one, defenses=defenses, seed=seed + i)
            began = time.process_time()
            result = Recursive()(observation, generator=torch.Generator().manual_seed(seed))
            seconds += time.process_time() - began
            recovered.append(result.value)
            status = result.status.split(";")[0]
            on_step(i + 1, count, float(psnr_db(result.value, one.images)))
        each = psnr_db(torch.cat(recovered), pictures.images)
        rows.append(
            {
                "model": name,
                "noise": noise,
                **scores(torch.cat(recovered), pictures.images),
                "median_db": round(float(each.median()), 1),
                "least_db": round(float(each.min()), 1),
                "over_40_db": float((each > 40).double().mean()),
                "seconds": round(seconds / count, 2),
                "closed_form": status,
            }
        )
        parts = ", ".join(f"{r['model']} at noise {r['noise']:g}: {r['median_db']} dB" for r in rows)
        before = opening(data, size, shrunk(shape, size), shortage("unseen pictures", wanted, count))
        yield Findings(rows, f"Median PSNR: {parts}.").after(before)
