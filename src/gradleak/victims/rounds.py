"""A client that takes part in several rounds of federated training with the same private data; between them others move the model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.rounds import Rounds
from gradleak.victims.training import adam_steps

STEPS, RATE = 10, 1e-3  # of Adam on the others' data, from one round to the next
PICTURES, TEXTS = 64, 8  # in each of these steps

Play = Callable[[Model[Any], int], Observation[Any]]  # (global model, seed) -> what the client shares


def federated(model: Model[Any], others: Any, count: int, play: Play, *, seed: int = 0) -> Observation[Any]:
    """What a client shares in rounds 1 to `count`, as one observation. The global model of the first is `model`; that of each later one was trained on
    by `STEPS` steps of Adam on `others`, public data as its architecture is fed. Each round has a seed of its own, for noise and masks."""
    each = dict[int, Observation[Any]]()
    batches = drawn(model, others, torch.Generator().manual_seed(seed))
    for number in range(1, count + 1):
        each[number] = play(model, seed + 1_000 * (number - 1))
        if number < count:
            model = replace(model, parameters=adam_steps(model, (next(batches) for _ in range(STEPS)), RATE))
    return Rounds.of(each) if count > 1 else each[1]


def drawn(model: Model[Any], others: Any, generator: torch.Generator) -> Iterator[tuple[Any, Any]]:
    """Batches at random, as the model is fed with them, without end."""
    inputs, labels = model.architecture.feed(others, seed=0)
    count = PICTURES if isinstance(inputs, torch.Tensor) else TEXTS
    while True:
        rows = torch.randint(len(inputs), (count,), generator=generator)
        chosen = inputs[rows] if isinstance(inputs, torch.Tensor) else tuple(inputs[i] for i in rows.tolist())
        yield chosen, None if labels is None else labels[rows]
