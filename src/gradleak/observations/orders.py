"""The course of a training: the learning rate of each step, and which samples each step takes."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradleak.errors import BadInput

Schedule = Literal["linear", "cosine"]
Shuffler = Literal["loader", "global", "accelerate"]
SHUFFLERS: tuple[Shuffler, ...] = ("loader", "global", "accelerate")
SEEDS = (42, 0, 1, 1234, 123, 2, 3, 1337, 2024, 2025, 2026)  # that people give, the Trainer's default first


def scheduled(
    kind: Schedule, rate: float, steps: int, *, warmup: int = 0, planned: int | None = None
) -> tuple[float, ...]:
    """The learning rates of the first steps of a schedule of transformers: up from 0 in `warmup` steps, then down to 0 at the last of
    those that were planned, in a line or as half a cosine.

    BadInput where no step is left that changes anything.
    """
    total = planned or steps
    if not 0 <= warmup <= total or steps > total:
        raise BadInput(f"A schedule of {total} steps has no {warmup} steps of warm-up, or its first {steps} steps.")

    def share(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = (step - warmup) / max(total - warmup, 1)
        return 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2

    rates = tuple(rate * share(step) for step in range(steps))
    if not any(rates):
        raise BadInput(f"In a {kind} schedule with {warmup} steps of warm-up, the first {steps} steps have the rate 0.")
    return rates


def batches(count: int, size: int | None, shuffle: tuple[Shuffler, int] | None) -> Iterator[Sequence[int]]:
    """The rows of each step, without end: in their order, starting over at the end; or shuffled in each epoch.

    loader      DataLoader(shuffle=True, generator=torch.Generator().manual_seed(seed))
    global      DataLoader(shuffle=True) after torch.manual_seed(seed)
    accelerate  its SeedableRandomSampler, as the Trainer of transformers uses it: a generator of seed + epoch each time
    """
    chunk, epoch, generator = size or count, 0, torch.Generator()
    state = generator.manual_seed(shuffle[1] if shuffle else 0).get_state()
    while True:
        if shuffle is None:
            order = list(range(count))
        elif shuffle[0] == "loader":
            order = list(loader(count, generator))
        elif shuffle[0] == "global":
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                order, state = list(loader(count, None)), torch.get_rng_state()
        else:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle[1] + epoch)).tolist()
        yield from (order[first : first + chunk] for first in range(0, count, chunk))
        epoch += 1


def loader(count: int, generator: torch.Generator | None) -> Iterator[int]:
    """The rows in the order in which torch's DataLoader gives them."""
    rows: Any = range(count)
    return (int(row) for row in DataLoader(rows, batch_size=None, shuffle=True, generator=generator))


def taken(values: Any, rows: Sequence[int]) -> Any:
    """These rows of a tensor, or of a sequence of texts."""
    first = rows[0] if len(rows) else 0
    if list(rows) == list(range(first, first + len(rows))):
        return values[first : first + len(rows)]
    return values[torch.tensor(rows)] if isinstance(values, Tensor) else tuple(values[row] for row in rows)
