"""How gradleak says no: two errors, each with one sentence that a user can act on (the command line prints it and exits with
2), and the check that what is read from a file has the shape that it should have."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
LONGEST = 300  # characters of a reason that are shown
LARGEST = 2**28  # bytes of JSON that are read


class BadInput(ValueError):
    """Something given to gradleak cannot be used as it is: the sentence says what and what would help."""


class NotObserved(BadInput):
    """An attack needs something this observation does not reveal: the sentence names the field and the reason."""


def checked(value: Any, kind: type[T], what: str) -> T:
    """Plain JSON data as `kind`; BadInput with the place where it does not fit. what: the beginning of the sentence."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise BadInput(f"{what} ({shortened(str(error))}).") from error
    except UnicodeError as error:
        raise BadInput(f"{what} (it holds half a surrogate pair).") from error
    except RecursionError as error:
        raise BadInput(f"{what} (it is nested too deeply).") from error


def parsed(text: str | bytes, what: str) -> Any:
    """Strict JSON; BadInput for anything else, NaN and bottomless nesting included."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BadInput(f"{what} ({shortened(str(error))}).") from error
    except RecursionError as error:
        raise BadInput(f"{what} (it is nested too deeply).") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds; BadInput when it is not there, too large or not JSON."""
    try:
        if not path.is_file():
            raise BadInput(f"There is no file {shortened(str(path))}.")
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{path} is too large for what it should hold ({path.stat().st_size:,} bytes).")
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"Cannot read {shortened(str(path))}: {error}.") from error
    return parsed(text.removeprefix(b"\xef\xbb\xbf"), f"{path} is not JSON")


def shortened(text: str) -> str:
    """One printable line of at most a few hundred characters: what a file says is not trusted on a terminal."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def near(name: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" when something similar is known."""
    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.4)
    return f": did you mean {' or '.join(close)}?" if close else ""
