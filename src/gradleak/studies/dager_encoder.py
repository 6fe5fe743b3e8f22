"""DAGER's table for encoders: batches of 1, 2, 4 and 8 reviews through a pretrained encoder with a fresh classifier."""

from collections.abc import Callable, Iterator
from typing import Any

from gradleak.attacks.search.descend import OnStep
from gradleak.studies.findings import Findings
from gradleak.studies.text_victims import BATCHES, Sources, cell, encoder, findings


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every data set and batch size; the findings so far."""
    sources, rows = Sources.of(data).folders, list[dict[str, Any]]()
    quick = "embedded" in sources
    count = BATCHES["quick" if quick else size]
    models = {name: encoder(folder, seed) for name, folder in sources.items()}
    for batch in (1, 2) if quick else (1, 2, 4, 8):
        for name, folder in sources.items():
            rows.append(
                cell(models[name], folder, batch, count=count, seed=seed, on_step=start(f"{name}, batch {batch}"))
            )
            yield findings(rows, ("data", "batch"))
    for batch in () if quick else (1, 2, 4):  # the length on which the speed of others was measured
        name, folder = next(iter(sources.items()))
        told = start(f"{name}, batch {batch}, 12 to 15 words")
        row = cell(models[name], folder, batch, count=count, seed=seed, on_step=told, words=(12, 15))
        rows.append({**row, "data": f"{row['data']}, 12 to 15 words"})
        yield findings(rows, ("data", "batch"))
