"""Text out of LoRA: gradients of the factors, and released adapters, by rank, length and steps."""

from collections.abc import Callable, Iterator
from typing import Any

from gradleak.attacks.search.descend import OnStep
from gradleak.observations.training import Optimizer, Recipe
from gradleak.studies.findings import Findings
from gradleak.studies.text_victims import BATCHES, Sources, Victim, cell, encoder, findings
from gradleak.victims.text import share_adapter

RATE = 1e-3
LENGTHS = {8: (3, 5), 12: (6, 9), 20: (11, 15), 40: (22, 32)}  # about so many tokens: texts of so many words


def adapter(rank: int, steps: int | None, optimizer: Optimizer, seed: int) -> Victim:
    """LoRA on query, key and value of every block: the gradient of its factors, or the adapter after some steps."""
    recipe = None if steps is None else Recipe(optimizer=optimizer, learning_rate=RATE, steps=steps)

    def share(seen: Any, secret: Any) -> Any:
        family, config = seen.model.architecture.family, seen.model.architecture.config
        modules = [name for block in range(config.num_hidden_layers) for name in family.queries(block)]
        return share_adapter(seen.model, secret, modules=modules, rank=rank, recipe=recipe, seed=seed)

    return share


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every cell of the map; the findings so far."""
    sources, rows = Sources.of(data).folders, list[dict[str, Any]]()
    quick = "embedded" in sources
    count = BATCHES["quick" if quick else size]
    folder = sources.get("sst2", next(iter(sources.values())))
    model = encoder(folder, seed)
    settings: list[tuple[int, int, int | None, Optimizer]] = [
        (rank, length, None, "sgd") for rank in (8, 16, 32, 64) for length in LENGTHS
    ]
    settings += [(64, length, steps, "sgd") for steps in (1, 10) for length in LENGTHS]
    settings += [(16, 12, 10, "sgd"), (64, 20, 1, "adam"), (64, 20, 10, "adam")]
    for rank, length, steps, optimizer in settings[:1] if quick else settings:
        shared = "gradient" if steps is None else f"{steps} steps of {optimizer}"
        row = cell(
            model,
            folder,
            1,
            count=count,
            seed=seed,
            on_step=start(f"rank {rank}, {length} tokens, {shared}"),
            victim=adapter(rank, steps, optimizer, seed),
            words=None if quick else LENGTHS[length],
        )
        rows.append({"rank": rank, "length": length, "shared": shared, **row})
        yield findings(rows, ("rank", "length", "shared"))
