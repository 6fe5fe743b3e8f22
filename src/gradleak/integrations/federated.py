"""What clients of federated training send, whatever library carries it: two states of a model, and how a client got from one to the
other, by the usual names of its configuration."""

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from gradleak.errors import BadInput, checked
from gradleak.formats.observation_file import load_state
from gradleak.modalities.losses import Loss
from gradleak.observations.given import fitted
from gradleak.observations.model import Mode, Model
from gradleak.observations.training import Optimizer, Recipe


def known_before(before: Any, module: nn.Module, architecture: Any, mode: Mode, criterion: Loss) -> Model[Any]:
    """The model at a state: {name: array}, or arrays in the order of its state_dict. module: the network; its numbers do not matter."""
    network = copy.deepcopy(module).cpu()
    state, _ = fitted(before, dict(network.state_dict(keep_vars=True)), network)
    told = any(name in state for name, _ in network.named_buffers())
    load_state(network, state, partial=not told)
    return Model.of(network, architecture, mode=mode, criterion=criterion)


def recipe_of(told: Mapping[str, Any], samples: int | None) -> Recipe:
    """How a client trained, by the usual names of its configuration; BadInput where the learning rate is missing, or a value is none."""
    known = {name.replace("_", "-"): value for name, value in told.items()}

    def number(*names: str) -> float | None:
        value = next((known[name] for name in names if known.get(name) is not None), None)
        what = f"The configuration's {names[0]} is no number"
        return None if value is None else checked(value, float, what)

    rate, size, epochs = number("lr", "learning-rate"), number("batch-size"), number("local-epochs")
    if rate is None:
        raise BadInput(
            'How the client trained is not known: no message says "lr". Give it: told={"lr": ..., "optimizer": "sgd", "local-epochs": '
            '1, "batch-size": ...}.'
        )
    whole = samples is None or size is None or size >= samples
    per_epoch = 1 if whole else math.ceil((samples or 1) / (size or 1))
    steps = number("local-steps") or (epochs or 1) * per_epoch
    return Recipe(
        optimizer=checked(known.get("optimizer", "sgd"), Optimizer, "The configuration's optimizer is not known"),  # type: ignore[arg-type]
        learning_rate=rate,
        steps=int(steps),
        batch_size=None if whole and samples is not None else None if size is None else int(size),
        weight_decay=number("weight-decay"),
        proximal=number("proximal-mu") or 0.0,
        clip=number("clip"),
    )
