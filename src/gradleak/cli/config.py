"""What files say in place of flags: the table [tool.gradleak.COMMAND] of pyproject.toml in the current folder, and --config FILE, which wins over
it; flags win over both. Keys are flags without the dashes (lr = 1e-2), tables are the parameters of attacks by their names.

A file never makes us import code or remove results: that is said on the command line alone.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec

from gradleak.cli import sources
from gradleak.cli.arguments import Flag, flags_of
from gradleak.errors import BadInput, near, shortened

PROJECT = Path("pyproject.toml")
CODE = ("attack", "attacks", "model")  # may name package.module:name
SPOKEN = ("config", "overwrite")  # on the command line alone
LARGEST = 2**20  # bytes


def said(name: str, kind: type, given: Sequence[str]) -> dict[str, Any]:
    """{argument: its value, or attack: {parameter: value}} of the command, as far as no flag says it. Raises BadInput for unknown keys, and for
    values that are none."""
    values: dict[str, Any] = {}
    if (path := value_of("--config", given)) is not None:
        values = understood(path, read(path), kind)
    if PROJECT.is_file():
        table: Any = read(PROJECT).get("tool", {}).get("gradleak", {})
        for word in name.split():
            table = table.get(word, {}) if isinstance(table, Mapping) else {}
        if not isinstance(table, Mapping):
            raise BadInput(f"{PROJECT}: [tool.gradleak.{name.replace(' ', '.')}] is no table of flags.")
        values = understood(PROJECT, table, kind) | values
    spoken = {flag.name for flag in flags_of(kind) for part in given if re.match(rf"{flag.written}(=|$)", part)}
    return {key: value for key, value in values.items() if key not in spoken}


def value_of(flag: str, given: Sequence[str]) -> Path | None:
    """The file that a flag names; None where it is not given, or without a value, which is told when flags are parsed."""
    for part, following in zip_longest(given, given[1:], fillvalue=""):
        if part == flag and following and not following.startswith("-"):
            return Path(following)
        if part.startswith(f"{flag}="):
            return Path(part.partition("=")[2])
    return None


def read(path: Path) -> Mapping[str, Any]:
    """A TOML file; BadInput where there is none."""
    try:
        if not path.is_file():
            raise BadInput(f"There is no file {shortened(str(path))}.")
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{shortened(str(path))} is too large for a file of flags.")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{shortened(str(path))} cannot be read as TOML: {shortened(str(error))}.") from error


def understood(path: Path, table: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The values of a table, of the types that the command has for them."""
    known = {flag.written.removeprefix("--"): flag for flag in flags_of(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        flag = known.get(key.replace("_", "-"))
        if flag is None and isinstance(value, Mapping) and key in sources.attack_names():
            values[key] = parameters(path, key, value)
        elif flag is None:
            raise BadInput(f"{path} says {shortened(key)!r}, and there is no such flag{near(key, known)}.")
        elif flag.name in SPOKEN:
            raise BadInput(f"{path} says {key!r}, which is said on the command line alone.")
        else:
            values[flag.name] = converted(path, key, value, flag)
    return values


def parameters(path: Path, attack: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of an attack."""
    known = {one.name.replace("_", "-"): one for one in sources.attack(attack).parameters}
    values = {}
    for key, value in table.items():
        if (one := known.get(key.replace("_", "-"))) is None:
            raise BadInput(
                f"{path} says {shortened(f'{attack}.{key}')!r}, and there is no such flag{near(key, known)}."
            )
        flag = Flag(one.name, one.kind, one.default, one.help, attack)
        values[one.name] = converted(path, f"{attack}.{key}", value, flag)
    return values


def converted(path: Path, key: str, value: Any, flag: Flag) -> Any:
    """A value as its flag has it."""
    if flag.name in CODE and any(":" in str(one) for one in (value if isinstance(value, list) else [value])):
        raise BadInput(
            f"{path} would import the code {shortened(str(value))}: name it on the command line, with {flag.written}."
        )
    try:
        return msgspec.convert(value, flag.parts[0], dec_hook=path_of)
    except (msgspec.ValidationError, TypeError) as error:
        raise BadInput(f"{path} says {key!r}, and its value is unusable ({shortened(str(error))}).") from error


def path_of(kind: type, value: Any) -> Any:
    """A path out of its text."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"Expected `{kind.__name__}`")
