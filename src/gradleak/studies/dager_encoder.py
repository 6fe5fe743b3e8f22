"""DAGER's table for encoders: batches of 1, 2, 4 and 8 reviews through a pretrained encoder with a fresh classifier."""

from collections.abc import Iterator

from gradleak.studies.findings import Findings, Row, Size, Start
from gradleak.studies.text_victims import BATCHES, Sources, cell, encoder, findings

# batch sizes; those of texts of 12 to 15 words, on which the speed of others was measured
SIZES: dict[Size, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "smoke": ((1, 2), ()),
    "small": ((1, 2, 4, 8), (1, 2, 4)),
    "paper": ((1, 2, 4, 8), (1, 2, 4)),
}
WORDS = (12, 15)


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every data set and batch size; the findings so far."""
    sources, rows, (batches, of_words) = Sources.of(data), list[Row](), SIZES[size]
    models = {name: encoder(folder, seed) for name, folder in sources.folders.items()}
    for batch in batches:
        for name, folder in sources.folders.items():
            on_step = start(f"{name}, batch {batch}")
            rows.append(cell(models[name], folder, batch, count=BATCHES[size], seed=seed, on_step=on_step))
            yield findings(rows, ("data", "batch"), data, size)
    for batch in of_words:
        name, folder = next(iter(sources.folders.items()))
        on_step = start(f"{name}, batch {batch}, {WORDS[0]} to {WORDS[1]} words")
        row = cell(models[name], folder, batch, count=BATCHES[size], seed=seed, on_step=on_step, words=WORDS)
        rows.append({**row, "data": f"{row['data']}, {WORDS[0]} to {WORDS[1]} words"})
        yield findings(rows, ("data", "batch"), data, size)
