"""Tensors on disk: safetensors, with JSON beside them in the file's header. Written whole or not at all, never unpickled."""

import os
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradleak.errors import BadInput, parsed, shortened
from gradleak.observations.tensors import Tensors


def write(tensors: Tensors, schema: str, about: dict[str, Any], path: Path, *, private: bool = False) -> None:
    """Write tensors and a header of plain data, under the name of a schema: gradleak/KIND/VERSION.

    private: only its owner may read the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    header = {"schema": schema, "gradleak": msgspec.json.encode(about).decode()}
    try:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, unfinished, metadata=header
        )
        if private:
            unfinished.chmod(0o600)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path, schema: str, *needed: str) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, header) as written; BadInput for a missing, damaged or foreign file, another schema, or one that lacks a
    needed tensor."""
    tensors, header = open_tensors(path)
    if header.get("schema") != schema:
        found = shortened(header.get("schema", "no gradleak header"))
        raise BadInput(f"{path} is not a {schema.split('/')[1]} file of this version ({found}, not {schema}).")
    for name in needed:
        if name not in tensors:
            raise BadInput(f"{path} lacks {name}: it is damaged.")
    about = parsed(header.get("gradleak", ""), f"{path} has a damaged header")
    if not isinstance(about, dict):
        raise BadInput(f"{path} has a damaged header: {type(about).__name__} in place of an object.")
    return tensors, about


def open_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Any safetensors file and its raw header; BadInput for a pickle, a truncated file, or entries that are not finite."""
    if not path.is_file():
        raise BadInput(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        with path.open("rb") as raw:
            start = raw.read(2)
        if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise BadInput(
                f"{path} is a pickle (torch.save): it could run code, so it is not opened. "
                "Convert it with safetensors.torch.save_file."
            ) from error
        raise BadInput(f"{path} is not a readable safetensors file ({error}): truncated, or something else.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadInput(
                f"{path}: tensor {name} has entries that are NaN or infinite: nothing can be learnt from it."
            )
    return tensors, header


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors with PREFIX/ before their names."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def group(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under PREFIX/, with that taken off their names."""
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}
