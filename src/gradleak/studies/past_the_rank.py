"""Text out of LoRA factors that have fewer directions than the text has tokens: how much is still likely?"""

from collections.abc import Callable, Iterator
from typing import Any

from gradleak.attacks.past_the_rank import PastTheRank
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.training import Optimizer
from gradleak.studies.findings import Findings
from gradleak.studies.lora_text import adapter
from gradleak.studies.text_victims import BATCHES, Sources, cell, encoder, findings

WORDS = {12: (10, 11), 20: (16, 18), 36: (28, 32)}  # about so many tokens, above the rank: texts of so many words
SETTINGS: tuple[tuple[int, int, int | None, Optimizer], ...] = (  # rank, tokens, steps (None: the gradient), optimizer
    (16, 20, None, "sgd"),
    (16, 20, 10, "sgd"),
    (8, 12, None, "sgd"),
    (16, 36, None, "sgd"),
)


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every setting; the findings so far. Texts with no more tokens than the rank are refused and count as 0."""
    sources, rows = Sources.of(data).folders, list[dict[str, Any]]()
    quick = "embedded" in sources
    folder = sources.get("sst2", next(iter(sources.values())))
    model = encoder(folder, seed)
    for rank, length, steps, optimizer in SETTINGS[2:3] if quick else SETTINGS:
        shared = "gradient" if steps is None else f"{steps} steps of {optimizer}"
        row = cell(
            model,
            folder,
            1,
            count=BATCHES["quick" if quick else size],
            seed=seed,
            on_step=start(f"rank {rank}, {length} tokens, {shared}"),
            attack=PastTheRank(sweeps=1, choices=5) if quick else PastTheRank(),
            victim=adapter(rank, steps, optimizer, seed),
            words=None if quick else WORDS[length],
        )
        rows.append({"rank": rank, "length": length, "shared": shared, **row})
        yield findings(rows, ("rank", "length", "shared"))
