"""Attacks of one's own, without a copy of gradleak: by import path, or from an installed package that offers them.

A package offers attacks under the entry point `gradleak.attacks`; in its pyproject.toml:

    [project.entry-points."gradleak.attacks"]
    plain-matching = "my_attacks:PlainMatching"
"""

import dataclasses
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from gradleak.errors import BadInput, shortened
from gradleak.modalities.own_code import named

GROUP = "gradleak.attacks"


def installed(known: Mapping[str, type]) -> dict[str, type]:
    """{name: attack} of installed packages. One that cannot be imported, or that takes the name of another, is left out and told."""
    found: dict[str, type] = {}
    for point in metadata.entry_points(group=GROUP):
        try:
            if point.name in known:
                raise BadInput("there is an attack of this name already")
            found[point.name] = checked_attack(point.load(), point.value)
        except Exception as error:  # noqa: BLE001 - another's package must not stop an audit
            print(
                f"gradleak: the attack {shortened(point.name)} of {shortened(point.value)} is left out: {shortened(str(error))}",
                file=sys.stderr,
            )
    return found


def imported(place: str) -> tuple[str, type]:
    """(name, attack) of package.module:Class; the name is the class's, in words with hyphens. Raises BadInput."""
    kind = named(place, "the attack")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", place.rpartition(":")[2]).lower(), checked_attack(kind, place)


def checked_attack(kind: Any, place: str) -> type:
    """The class itself; BadInput where it lacks what every attack has (see `Attack`)."""
    lacking = [name for name in ("sees", "modality", "__call__") if not hasattr(kind, name)]
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind) or lacking:
        reason = f"has no {lacking[0]}" if lacking else "is no dataclass"
        raise BadInput(f"{shortened(place)} is no attack: it {reason} (docs/adding_an_attack.md shows one).")
    return kind
