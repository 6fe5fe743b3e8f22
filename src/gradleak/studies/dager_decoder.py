"""Decoders: GPT-2 and Llama architectures, small and trained here, as classifiers and as causal language models."""

from collections.abc import Iterator

from gradleak.modalities.language_models import Task
from gradleak.studies.findings import Findings, Row, Size, Start
from gradleak.studies.text_victims import BATCHES, Sources, cell, findings, small
from gradleak.victims.small_language import Kind

WORDS = (6, 14)  # of a text: then sixteen texts have fewer tokens than the width
DECODER: dict[Size, tuple[int, int]] = {
    "smoke": (64, 5),
    "small": (384, 60),
    "paper": (384, 60),
}  # width, steps of training
BATCH_SIZES: dict[Size, tuple[int, ...]] = {"smoke": (1, 2), "small": (1, 2, 4, 8, 16), "paper": (1, 2, 4, 8, 16)}
KINDS: tuple[Kind, ...] = ("gpt2", "llama")
TASKS: tuple[Task, ...] = ("classification", "causal-lm")


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every architecture, task and batch size; the findings so far."""
    source, rows, (width, steps) = Sources.of(data).first, list[Row](), DECODER[size]
    for kind in KINDS:
        for task in TASKS:
            model = small(kind, source, task, seed=seed, width=width, steps=steps)
            for batch in BATCH_SIZES[size]:
                on_step = start(f"{kind}, {task}, batch {batch}")
                row = cell(model, source, batch, count=BATCHES[size], seed=seed, on_step=on_step, words=WORDS)
                rows.append({**row, "width": width})
                yield findings(rows, ("model", "task", "batch"), data, size)
