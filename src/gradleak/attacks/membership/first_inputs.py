"""What candidates feed to the first adapted layers: pictures one vector, texts one for each token in its place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.unmixing.span import adapted_first_layer
from gradleak.errors import NotObserved
from gradleak.observations.layers import layer_inputs
from gradleak.observations.observation import Observation
from gradleak.observations.transformer import layout_of


@dataclass(frozen=True)
class FirstInputs:
    """modules  adapted layers that read the same input, which training does not move
    rows     (m, width) float64, those of all candidates
    owner    (m,) whose they are, 0 to n - 1
    """

    modules: tuple[str, ...]
    rows: Tensor
    owner: Tensor

    def most(self, values: Tensor) -> Tensor:
        """(n,) the largest of the values (m,) of each candidate."""
        count = int(self.owner.max()) + 1
        return values.new_full((count,), -torch.inf).scatter_reduce(0, self.owner, values, "amax")


def first_inputs(observation: Observation[Any], candidates: Any) -> FirstInputs:
    """Of pictures (n, channel, height, width), or n sentences; NotObserved where the layers that see them first are not adapted."""
    release, model = observation.adapter, observation.model
    if isinstance(candidates, Tensor):
        network, module = adapted_first_layer(observation, release)
        return FirstInputs((module,), network.inputs(candidates).double(), torch.arange(len(candidates)))
    modules = tuple(name for name in layout_of(model).queries(0) if name in release.scaling)
    if not modules:
        raise NotObserved(
            "The adapter changes none of the layers that see the words: the first block's query, key and value."
        )
    unheard = 1 if model.architecture.task == "causal-lm" else 0  # nothing is predicted from the last token
    rows = [layer_inputs(model, modules[:1], torch.tensor([ids]))[modules[0]][0].double() for ids in candidates]
    rows = [row[: max(len(row) - unheard, 1)] for row in rows]
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))
    return FirstInputs(modules, torch.cat(rows), owner)
