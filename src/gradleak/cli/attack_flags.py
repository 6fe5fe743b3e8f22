"""The parameters of attacks as flags, each in a namespace of its own: `--dlg.restarts 5`. Training facts and search settings never
share a flag."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from gradleak.attacks import ATTACKS
from gradleak.cli.app import near
from gradleak.errors import BadInput, checked, shortened

OPTION = {"attack": "--attack", "audit": "--attacks"}
MOST = 1_000_000  # steps, trials, candidates, ...; no parameter is negative
FROM_ONE = ("restarts", "trials")  # without one there is no result
PLAIN = (str, int, float, bool, Path)


def selected(command: str, given: list[str]) -> list[str]:
    """The attacks whose parameters are flags: those named, all for a bare audit, none for other commands. Raises BadInput for
    an unknown one, and for the option without a name."""
    if command not in OPTION:
        return []
    parts = [part for flag in given for part in flag.split("=", 1)]
    if OPTION[command] not in parts:
        return list(ATTACKS) if command == "audit" else []
    names: list[str] = []
    for value in parts[parts.index(OPTION[command]) + 1 :]:
        if value.startswith("-") or (command == "attack" and names):
            break
        names.append(value)
    if not names:
        raise BadInput(f"{OPTION[command]} needs a name: one of {', '.join(ATTACKS)}.")
    check_names(names)
    return list(dict.fromkeys(names))


def check_names(names: list[str]) -> None:
    """BadInput for the first name that is no attack."""
    for name in names:
        if name not in ATTACKS:
            raise BadInput(f"Unknown attack {shortened(name)!r}{near(name, ATTACKS)} (`gradleak list` shows all).")


def parameters(attack: str) -> list[dataclasses.Field[Any]]:
    """The fields of an attack that are flags: plain values. What is made of public data, or is another attack, is none."""
    hints = get_type_hints(ATTACKS[attack])
    return [
        field
        for field in dataclasses.fields(ATTACKS[attack])
        if hints[field.name] in PLAIN or hints[field.name] in [kind | None for kind in PLAIN]
    ]


def settings(attack: str) -> type:
    """A dataclass of an attack's flags, with the sentences of its docstring as their help."""
    hints, texts = get_type_hints(ATTACKS[attack]), explained(ATTACKS[attack].__doc__ or "")
    fields: list[Any] = [
        (
            field.name,
            Annotated[hints[field.name], tyro.conf.arg(help=texts.get(field.name, ""))],
            dataclasses.field(default=field.default),
        )
        for field in parameters(attack)
    ]
    return dataclasses.make_dataclass(f"{ATTACKS[attack].__name__}Settings", fields, frozen=True, kw_only=True)


def explained(docstring: str) -> dict[str, str]:
    """{field: what its class says of it}: lines like "steps, step_size  signed Adam, in pixels", with what is indented below."""
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.splitlines():
        if start := re.fullmatch(r"\s*([a-z_]+(?:, [a-z_]+)*)(?:  +|: )(\S.*)", line):
            names = start[1].split(", ")
            texts |= dict.fromkeys(names, start[2])
        elif names and line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        else:
            names = []
    return texts


def extended(kind: type, attacks: list[str]) -> type:
    """The arguments of a command, with the settings of these attacks, each under its name."""
    fields: list[Any] = []
    for name in attacks:
        attack = settings(name)
        if dataclasses.fields(attack):
            fields.append((field_of(name), attack, dataclasses.field(default=attack())))
    if not fields:
        return kind
    attack = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), kw_only=True, frozen=True)
    attack.__doc__ = kind.__doc__
    return attack


def options(parsed: Any, attacks: list[str]) -> dict[str, dict[str, Any]]:
    """{attack: {parameter: value}} of the parsed flags."""
    return {name: dataclasses.asdict(getattr(parsed, field_of(name))) if parameters(name) else {} for name in attacks}


def built(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The attacks with these parameters; BadInput for what is no parameter of theirs, or of another type."""
    check_names(list(options))
    attacks = {}
    for name, values in options.items():
        known = {field.name for field in parameters(name)}
        if unknown := [key for key in values if key not in known]:
            raise BadInput(f"{name} has no parameter {shortened(unknown[0])!r}.")
        hints = get_type_hints(ATTACKS[name])
        converted = {
            key: value
            if isinstance(value, Path)
            else typed(value, hints[key], f"The parameter {key} of {name} is unusable", int(key in FROM_ONE))
            for key, value in values.items()
        }
        attacks[name] = ATTACKS[name](**converted)
    return attacks


def typed(value: Any, kind: Any, what: str, least: int) -> Any:
    """A plain value as the field's type, numbers within bounds; paths are written as text."""
    if kind in (Path, Path | None):
        text = checked(value, str | None, what)  # type: ignore[arg-type]
        return None if text is None else Path(text)
    number = checked(value, kind, what)
    if isinstance(number, int | float) and not least <= number <= MOST:
        raise BadInput(f"{what}: it lies between {least} and {MOST:,}, not at {number:,}.")
    return number


def field_of(attack: str) -> str:
    """The name of an attack as an identifier."""
    return attack.replace("-", "_")
