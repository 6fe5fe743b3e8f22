"""Decoders: GPT-2 and Llama architectures, small and trained here, as classifiers and as causal language models."""

from collections.abc import Callable, Iterator
from typing import Any

from gradleak.attacks.search.descend import OnStep
from gradleak.modalities.language_models import Task
from gradleak.studies.findings import Findings
from gradleak.studies.text_victims import BATCHES, Sources, cell, findings, small
from gradleak.victims.small_language import Kind

WORDS = (6, 14)  # of a text: then sixteen texts have fewer tokens than the width
KINDS: tuple[Kind, ...] = ("gpt2", "llama")
TASKS: tuple[Task, ...] = ("classification", "causal-lm")


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every architecture, task and batch size; the findings so far."""
    sources, rows = Sources.of(data).folders, list[dict[str, Any]]()
    quick = "embedded" in sources
    count = BATCHES["quick" if quick else size]
    folder = next(iter(sources.values()))
    for kind in KINDS:
        for task in TASKS:
            width, steps = (64, 5) if quick else (384, 60)
            model = small(kind, folder, task, seed=seed, width=width, steps=steps)
            for batch in (1, 2) if quick else (1, 2, 4, 8, 16):
                told = start(f"{kind}, {task}, batch {batch}")
                words = None if quick else WORDS
                row = cell(model, folder, batch, count=count, seed=seed, on_step=told, words=words)
                rows.append({**row, "width": width})
                yield findings(rows, ("model", "task", "batch"))
