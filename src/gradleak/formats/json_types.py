"""Does a JSON value have the shape of a TypedDict? What is read from files is checked with this before it is believed."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

from gradleak.errors import BadInput

WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}


def misfit(value: Any, expected: Any, place: str) -> str | None:
    """The first place where `value` is not of the type `expected`, as half a sentence; None when all of it fits."""
    kind, inner = get_origin(expected) or expected, get_args(expected)
    if is_typeddict(kind) and isinstance(value, dict):
        if missing := [key for key in kind.__annotations__ if key in kind.__required_keys__ and key not in value]:
            return f"{place or 'it'} lacks the key {missing[0]!r}"
        hints = get_type_hints(kind)
        parts = [(value[key], hint, f"{place}.{key}".lstrip(".")) for key, hint in hints.items() if key in value]
    elif kind is Mapping and isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return f"{place} should have text for its keys"
        parts = [(entry, inner[1], f"{place}.{key[:60]}") for key, entry in value.items()]
    elif kind in (list, Sequence) and isinstance(value, list):
        parts = [(entry, inner[0], f"{place}[{index}]") for index, entry in enumerate(value)]
    elif kind is tuple and isinstance(value, list) and len(value) == len(inner):
        parts = [(entry, inner[index], f"{place}[{index}]") for index, entry in enumerate(value)]
    else:
        return None if _is_plain(value, expected) else f"{place or 'it'} should be {_describe(expected)}"
    return next((wrong for part in parts if (wrong := misfit(*part))), None)


def read_json(path: Path) -> Any:
    """What a JSON file holds; BadInput when it is not there or not JSON."""
    if not path.is_file():
        raise BadInput(f"There is no file {path}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({error}).") from error


def _is_plain(value: Any, expected: Any) -> bool:
    """Whether `value` is of the type `expected`, which holds no other values (or is a union)."""
    kind, inner = get_origin(expected) or expected, get_args(expected)
    if kind is UnionType:
        return any(misfit(value, choice, "") is None for choice in inner)
    if kind is Literal:
        return value in inner
    if kind in (int, float):  # a whole number is a number too, but true is not, nor is one too large for a float
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max
    return kind is Any or (kind in WORDS and isinstance(value, kind))


def _describe(expected: Any) -> str:
    kind, inner = get_origin(expected) or expected, get_args(expected)
    if kind is UnionType:
        return " or ".join(_describe(choice) for choice in inner)
    if kind is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if kind is tuple:
        return f"a list of {len(inner)}"
    return WORDS.get(kind) or ("a list" if kind in (list, Sequence) else "an object")
