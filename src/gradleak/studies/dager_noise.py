"""What defenses cost DAGER: Gaussian noise, pruning to the largest entries, and half precision."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from gradleak.attacks.search.descend import OnStep
from gradleak.formats.secret_file import TextSecret
from gradleak.observations.defenses import GaussianNoise, TopK
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import flatten
from gradleak.studies.findings import Findings
from gradleak.studies.text_victims import BATCHES, Sources, Victim, cell, encoder, findings


def noise(relative: float, seed: int) -> Victim:
    """White noise with `relative` times the norm of the release."""

    def share(seen: TextObservation, secret: TextSecret) -> TextObservation:
        flat = flatten(seen.released)
        std = relative * float(flat.norm()) / len(flat) ** 0.5
        return _through(GaussianNoise(std), seen, seed)

    return share


def largest(share_of: float, seed: int) -> Victim:
    """Only this share of the entries."""
    return lambda seen, secret: _through(TopK(share_of), seen, seed)


def _through(defense: GaussianNoise | TopK, seen: TextObservation, seed: int) -> TextObservation:
    stacked = {name: tensor[None] for name, tensor in seen.released.items()}
    shared = defense.apply(stacked, torch.Generator().manual_seed(seed))
    return replace(seen, released={name: tensor[0] for name, tensor in shared.items()})


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every defense and batch size; the findings so far."""
    sources, rows = Sources.of(data).folders, list[dict[str, Any]]()
    quick = "embedded" in sources
    count = BATCHES["quick" if quick else size]
    folder = next(iter(sources.values()))
    model = encoder(folder, seed)
    settings: list[tuple[str, Victim | None, torch.dtype]] = [("none", None, torch.float32)]
    settings += [(f"noise {s:g}", noise(s, seed), torch.float32) for s in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    settings += [(f"largest {s:.0%}", largest(s, seed), torch.float32) for s in (0.5, 0.1)]
    settings += [("float16", None, torch.float16), ("bfloat16", None, torch.bfloat16)]
    for batch in (1,) if quick else (1, 2):
        for name, victim, precision in settings:
            told = start(f"{name}, batch {batch}")
            row = cell(model, folder, batch, count=count, seed=seed, on_step=told, victim=victim, precision=precision)
            rows.append({"defense": name, **row})
            yield findings(rows, ("defense", "batch"))
