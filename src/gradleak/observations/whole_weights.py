"""What was trained as a whole beside an adapter, as an update of its own: heads, biases, layers that stand in no low rank."""

from dataclasses import replace
from typing import Any

from gradleak.observations.adapter import UNKNOWN, Adapter
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Update


def whole_weights(observation: Observation[Any]) -> Observation[Any] | None:
    """The changes of the weights beside an adapter, from the model as it was when training began; None where there are none.

    An exact gradient for one step of SGD, as of any update. In several steps the factors moved too, which its `simulate` leaves out.
    """
    release = observation.release
    if len(observation.alone()) > 1 or not isinstance(release, Adapter) or not release.changed or release.gradient:
        return None
    model = observation.model
    return replace(
        observation,
        model=replace(model, parameters={**model.parameters, **release.merged(model, {})}),
        release=Update(recipe=release.recipe or UNKNOWN),
        released=release.changed,
    )
