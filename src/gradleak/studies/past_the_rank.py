"""Text out of LoRA factors that have fewer directions than the text has tokens: how much is still likely?"""

from collections.abc import Iterator

from gradleak.attacks.past_the_rank import PastTheRank
from gradleak.studies.findings import Findings, Row, Size, Start
from gradleak.studies.lora_text import Setting, adapter
from gradleak.studies.text_victims import BATCHES, Sources, cell, encoder, findings

WORDS = {12: (10, 11), 20: (16, 18), 36: (28, 32)}  # about so many tokens, above the rank: texts of so many words
FULL: tuple[Setting, ...] = ((16, 20, None, "sgd"), (16, 20, 10, "sgd"), (8, 12, None, "sgd"), (16, 36, None, "sgd"))
SIZES: dict[Size, tuple[tuple[Setting, ...], PastTheRank]] = {
    "smoke": (FULL[2:3], PastTheRank(sweeps=1, choices=5)),
    "small": (FULL, PastTheRank()),
    "paper": (FULL, PastTheRank()),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every setting; the findings so far. Texts with no more tokens than the rank are refused and count as 0."""
    source, rows, (settings, attack) = Sources.of(data).sentences, list[Row](), SIZES[size]
    model = encoder(source, seed)
    for rank, length, steps, optimizer in settings:
        shared = "gradient" if steps is None else f"{steps} steps of {optimizer}"
        row = cell(
            model,
            source,
            1,
            count=BATCHES[size],
            seed=seed,
            on_step=start(f"rank {rank}, {length} tokens, {shared}"),
            attack=attack,
            victim=adapter(rank, steps, optimizer, seed),
            words=WORDS[length],
        )
        rows.append({"rank": rank, "length": length, "shared": shared, **row})
        yield findings(rows, ("rank", "length", "shared"), data, size)
