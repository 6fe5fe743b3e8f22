"""DAGER on the update of a client of federated averaging: several local steps and mini-batches."""

from collections.abc import Iterator

from gradleak.observations.training import Recipe
from gradleak.studies.dager_decoder import DECODER, WORDS
from gradleak.studies.findings import Findings, Row, Size, Start
from gradleak.studies.text_victims import BATCHES, Sources, Victim, cell, findings, small
from gradleak.victims.gradient import share_update

FULL = ((4, 1, 4), (4, 4, 4), (4, 8, 2), (16, 8, 4))  # texts, local steps, texts per step
SIZES: dict[Size, tuple[tuple[int, int, int], ...]] = {"smoke": ((2, 1, 2), (2, 4, 1)), "small": FULL, "paper": FULL}
RATES = (1e-4, 1e-3, 1e-2)


def client(recipe: Recipe) -> Victim:
    """Sends its update."""
    return lambda seen, secret: share_update(seen, secret, recipe)


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every setting; the findings so far."""
    source, rows, (width, training) = Sources.of(data).first, list[Row](), DECODER[size]
    model = small("gpt2", source, "classification", seed=seed, width=width, steps=training)
    for batch, steps, chunk in SIZES[size]:
        for rate in RATES:
            recipe = Recipe(learning_rate=rate, steps=steps, batch_size=chunk)
            row = cell(
                model,
                source,
                batch,
                count=BATCHES[size],
                seed=seed,
                on_step=start(f"batch {batch}, {recipe}"),
                victim=client(recipe),
                words=WORDS,
            )
            rows.append({"steps": steps, "local_batch": chunk, "rate": rate, **row})
            yield findings(rows, ("batch", "steps", "local_batch", "rate"), data, size)
