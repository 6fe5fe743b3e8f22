"""Text out of LoRA: gradients of the factors, and released adapters, by rank, length and steps."""

from collections.abc import Iterator

from gradleak.formats.secret_file import Secret
from gradleak.observations.observation import TextObservation
from gradleak.observations.training import Optimizer, Recipe
from gradleak.studies.findings import Findings, Row, Size, Start
from gradleak.studies.text_victims import BATCHES, Sources, Victim, cell, encoder, findings
from gradleak.victims.adapter import share_adapter

RATE = 1e-3
LENGTHS = {8: (3, 5), 12: (6, 9), 20: (11, 15), 40: (22, 32)}  # about so many tokens: texts of so many words
Setting = tuple[int, int, int | None, Optimizer]  # rank, about so many tokens, steps (None: the gradient), optimizer
FULL: tuple[Setting, ...] = (
    *((rank, length, None, "sgd") for rank in (8, 16, 32, 64) for length in LENGTHS),
    *((64, length, steps, "sgd") for steps in (1, 10) for length in LENGTHS),
    (16, 12, 10, "sgd"),
    (64, 20, 1, "adam"),
    (64, 20, 10, "adam"),
)
SIZES: dict[Size, tuple[Setting, ...]] = {
    "smoke": ((64, 20, None, "sgd"), (64, 20, 1, "sgd")),
    "small": FULL,
    "paper": FULL,
}


def adapter(rank: int, steps: int | None, optimizer: Optimizer, seed: int) -> Victim:
    """LoRA on query, key and value of every block: the gradient of its factors, or the adapter after some steps."""
    recipe = None if steps is None else Recipe(optimizer=optimizer, learning_rate=RATE, steps=steps)

    def share(seen: TextObservation, secret: Secret) -> TextObservation:
        architecture = seen.model.architecture
        blocks = range(architecture.config.num_hidden_layers)
        modules = [name for block in blocks for name in architecture.family.queries(block)]
        return share_adapter(seen.model, secret, modules=modules, rank=rank, recipe=recipe, seed=seed)

    return share


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every cell of the map; the findings so far."""
    source, rows = Sources.of(data).sentences, list[Row]()
    model = encoder(source, seed)
    for rank, length, steps, optimizer in SIZES[size]:
        shared = "gradient" if steps is None else f"{steps} steps of {optimizer}"
        row = cell(
            model,
            source,
            1,
            count=BATCHES[size],
            seed=seed,
            on_step=start(f"rank {rank}, {length} tokens, {shared}"),
            victim=adapter(rank, steps, optimizer, seed),
            words=LENGTHS[length],
        )
        rows.append({"rank": rank, "length": length, "shared": shared, **row})
        yield findings(rows, ("rank", "length", "shared"), data, size)
