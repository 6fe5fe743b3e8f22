"""The search for the most likely pictures that every solver begins with, made once for those that begin at the same: in an audit the solver,
its control under the Gaussian and the prior alone, each on the release and on another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import fingerprint

KEPT = 2  # the release, and the other one


@dataclass(frozen=True)
class Search:
    """What was found, where the generator stood before (as `content`) and after it."""

    search: MapInversion
    about: Any
    before: Any
    found: list[Reconstruction]
    after: Tensor


_kept: list[Search] = []


def most_likely(
    search: MapInversion, observations: Sequence[PictureObservation], generator: torch.Generator
) -> list[Reconstruction]:
    """`search.many`; what was found last is found again where search, observations and generator are the same."""
    about, before = content(observations), content(generator.get_state())
    for one in _kept:
        if (one.search, one.about, one.before) == (search, about, before):
            generator.set_state(one.after)
            return one.found
    found = search.many(observations, generator=generator)
    _kept[:] = [Search(search, about, before, found, generator.get_state()), *_kept][:KEPT]
    return found


def content(value: Any) -> Any:
    """What a value holds, to be compared: tensors by their bits, modules by their layers."""
    if isinstance(value, Tensor):
        return fingerprint({"": value})
    if isinstance(value, nn.Module):
        return repr(value)
    if isinstance(value, dict):
        return {name: content(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [content(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), [content(getattr(value, field.name)) for field in fields(value)]
    return value
