"""The parameters of attacks as flags, each in a namespace of its own: `--dlg.restarts 5`. Training facts and search settings never
share a flag."""

import dataclasses
import re
from typing import Annotated, Any, get_type_hints

import tyro

from gradleak.attacks import ATTACKS
from gradleak.attacks.own import imported
from gradleak.attacks.parameters import check_names, parameters
from gradleak.errors import BadInput

OPTION = {"attack": "--attack", "audit": "--attacks"}


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


def with_own_imported(command: str, given: list[str]) -> list[str]:
    """The flags, with names in place of attacks as package.module:Class, which are imported and known from here on."""
    told, is_attack = [], False
    for part in (part for flag in given for part in (flag.split("=", 1) if flag.startswith("--attack") else [flag])):
        if part.startswith("-"):
            is_attack = part == OPTION.get(command)
        elif is_attack and ":" in part:
            part, kind = imported(part)
            if ATTACKS.setdefault(part, kind) is not kind:
                raise BadInput(f"There is an attack {part} already: give yours another name.")
        told.append(part)
    return told


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


def field_of(attack: str) -> str:
    """The name of an attack as an identifier."""
    return attack.replace("-", "_")
