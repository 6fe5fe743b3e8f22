"""How far closed forms go, untrained: the recursion from one picture's gradient, by model and by noise on the release."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from gradleak.attacks.recursion.recursive import Recursive
from gradleak.attacks.search.descend import OnStep
from gradleak.audit.metrics import psnr_db
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.defenses import GaussianNoise
from gradleak.studies.findings import Findings
from gradleak.studies.learned_victims import scores
from gradleak.victims.gradient import capture_gradient

# (model, standard deviation of the noise, pictures)
SIZES = {
    "quick": (("lenet", 0.0, 2), ("lenet", 1e-3, 1), ("mlp", 0.0, 1)),
    "small": (
        *(("lenet", noise, 20) for noise in (0.0, 1e-4, 1e-3, 1e-2)),
        ("mlp", 0.0, 20),
        ("convnet", 0.0, 5),
        ("convnet64", 0.0, 5),
        ("resnet20", 0.0, 5),
    ),
}
SIZES["paper"] = tuple((name, noise, 100) for name, noise, _ in SIZES["small"])
FIRST = 2_000  # test row


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every model and noise; the findings so far."""
    few, rows = data in ("embedded", "digits"), list[dict[str, Any]]()
    for name, noise, count in SIZES["quick" if few else size]:
        first = 0 if few else FIRST
        pictures = load(data, "test", indices=range(first, first + count))
        channel, height, width = pictures.images.shape[1:]
        architecture = Architecture(name, (channel, height, width), max(len(pictures.classes), 2))
        on_step, found, seconds, status = start(f"{name}, noise {noise:g}"), list[torch.Tensor](), list[float](), ""
        for i in range(count):
            one = replace(pictures, images=pictures.images[i : i + 1], labels=pictures.labels[i : i + 1])
            observation, _ = capture_gradient(architecture.build(seed + i), architecture, one)
            if noise:
                draw = torch.Generator().manual_seed(seed + i)
                released = {k: g[None] for k, g in observation.released.items()}
                noised = GaussianNoise(noise).apply(released, draw)
                observation = replace(observation, released={k: g[0] for k, g in noised.items()})
            began = time.process_time()
            result = Recursive()(observation, generator=torch.Generator().manual_seed(seed))
            seconds.append(time.process_time() - began)
            found.append(result.images)
            status = result.status.split(";")[0]
            on_step(i + 1, count, float(psnr_db(result.images, one.images)))
        each = psnr_db(torch.cat(found), pictures.images)
        row = {"model": name, "noise": noise, **scores(torch.cat(found), pictures.images)}
        told = {"median_db": round(float(each.median()), 1), "least_db": round(float(each.min()), 1)}
        share = {"over_40_db": float((each > 40).double().mean()), "seconds": round(sum(seconds) / count, 2)}
        rows.append({**row, **told, **share, "closed_form": status})
        parts = [f"{r['model']} at noise {r['noise']:g}: {r['median_db']} dB" for r in rows]
        yield Findings(rows, f"Median PSNR: {', '.join(parts)}.")
