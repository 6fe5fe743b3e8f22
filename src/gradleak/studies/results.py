"""The folder of a study: one small file per finished cell, written by rename, its pictures beside it.

study.json says whose results these are. cells/ID.json and cells/ID-name.png are the truth; tables, plots and the report are made
of them again at any time.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from gradleak.errors import BadInput, shortened
from gradleak.studies.study import Done, path_in

SCHEMA = "gradleak/study/1"
DECODER = msgspec.json.Decoder(Done)


class Owner(msgspec.Struct, kw_only=True):
    """study.json."""

    schema: str
    study: str
    data: str
    size: str


class Results:
    """Finished cells on disk."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        """Open the folder of a study, or make it. BadInput where it holds anything else."""
        self.folder, self.cells = folder, folder / "cells"
        said = folder / "study.json"
        if said.is_file():
            try:
                found = msgspec.json.decode(said.read_bytes(), type=Owner)
            except msgspec.DecodeError as error:
                raise BadInput(f"{said} is damaged ({shortened(str(error))}).") from error
            if found != owner:
                raise BadInput(
                    f"{folder} holds results of the study {shortened(found.study)} on {shortened(found.data)}, "
                    f"{shortened(found.size)} size ({shortened(found.schema)}): choose another --out."
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"{folder} holds other results already: choose another --out.")
        self.cells.mkdir(parents=True, exist_ok=True)
        if not said.is_file():
            write(said, msgspec.json.encode(owner))

    def finished(self, among: Iterable[str] | None = None) -> dict[str, Done]:
        """{id: cell} of those on disk, or of these among them; a damaged file is none."""
        wanted = None if among is None else set(among)
        found = {}
        with os.scandir(self.cells) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".json")]
        for name in names:
            cell = name.removesuffix(".json")
            if wanted is None or cell in wanted:
                try:
                    with open(self.cells / name, "rb") as file:
                        found[cell] = DECODER.decode(file.read())
                except msgspec.MsgspecError:
                    continue
        return found

    def keep(self, done: Done) -> None:
        """Write a cell, its pictures first: what has a file is whole."""
        for name, picture in done.pictures.items():
            write(path_in(self.cells, name, done.id), picture)
        write(self.cells / f"{done.id}.json", msgspec.json.encode(msgspec.structs.replace(done, pictures={})))


def write(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
