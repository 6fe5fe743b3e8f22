"""The rounds of a federated run on disk, as the integrations and `gradleak capture --rounds` write them: RUN/round-N/observation.safetensors of
one client, RUN/round-N/CLIENT/observation.safetensors of several."""

import re
from pathlib import Path

from gradleak.errors import BadInput, shortened

FILE = "observation.safetensors"
ROUND = re.compile(r"round-(\d{1,9})")


def is_run(folder: Path) -> bool:
    """Whether a folder holds such rounds."""
    return folder.is_dir() and any(True for _ in files_of(folder))


def files_of(folder: Path) -> list[tuple[str, int, Path]]:
    """(client, round, file) of each, by the rounds' numbers; the client is "" where rounds are of one."""
    found = []
    for path in folder.iterdir():
        if path.is_dir() and (named := ROUND.fullmatch(path.name)):
            for file in (path / FILE, *path.glob(f"*/{FILE}")):
                if file.is_file():
                    found.append((file.parent.name if file.parent != path else "", int(named[1]), file))
    return sorted(found, key=lambda one: one[:2])


def rounds_in(folder: Path, client: str | None = None) -> dict[int, Path]:
    """{round: file} of one client; BadInput where there are several and none is named, or the one that is named is none of them."""
    found = files_of(folder)
    clients = list(dict.fromkeys(name for name, _, _ in found))
    if client is None and len(clients) > 1:
        some = ", ".join(map(shortened, clients[:5])) + (", ..." if len(clients) > 5 else "")
        raise BadInput(f"{folder} holds rounds of {len(clients)} clients: name one with --client ({some}).")
    if client is not None and client not in clients:
        raise BadInput(f"{folder} holds no round of a client {shortened(client)!r}.")
    return {number: file for name, number, file in found if name == (clients[0] if client is None else client)}


def number_of(file: Path) -> int | None:
    """The round that a file is of, by the folder that it lies in or the one above; None where neither says so."""
    named = [match for parent in list(file.absolute().parents)[:2] if (match := ROUND.fullmatch(parent.name))]
    return int(named[0][1]) if named else None
