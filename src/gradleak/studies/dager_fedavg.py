"""DAGER on the update of a client of federated averaging: several local steps and mini-batches."""

from collections.abc import Callable, Iterator
from typing import Any

from gradleak.attacks.search.descend import OnStep
from gradleak.studies.dager_decoder import WORDS
from gradleak.studies.findings import Findings
from gradleak.studies.text_victims import BATCHES, Sources, Victim, cell, findings, small
from gradleak.victims.text import share_text_update


def client(steps: int, size: int, rate: float) -> Victim:
    """Plain SGD over the texts in chunks of `size`."""
    return lambda seen, secret: share_text_update(
        seen, secret, learning_rate=rate, local_steps=steps, local_batch_size=size
    )


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every setting; the findings so far."""
    sources, rows = Sources.of(data).folders, list[dict[str, Any]]()
    quick = "embedded" in sources
    count = BATCHES["quick" if quick else size]
    folder = next(iter(sources.values()))
    width = 64 if quick else 384
    model = small("gpt2", folder, "classification", seed=seed, width=width, steps=5 if quick else 60)
    for batch, steps, chunk in ((2, 1, 2), (2, 4, 1)) if quick else ((4, 1, 4), (4, 4, 4), (4, 8, 2), (16, 8, 4)):
        for rate in (1e-4, 1e-3, 1e-2):
            told = start(f"batch {batch}, {steps} steps of {chunk}, rate {rate:g}")
            victim, words = client(steps, chunk, rate), None if quick else WORDS
            row = cell(model, folder, batch, count=count, seed=seed, on_step=told, victim=victim, words=words)
            rows.append({"steps": steps, "local_batch": chunk, "rate": rate, **row})
            yield findings(rows, ("batch", "steps", "local_batch", "rate"))
