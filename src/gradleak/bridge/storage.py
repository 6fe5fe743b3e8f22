"""Fitted decoders on disk: safetensors, with the kind of decoder and its identity in the header. Never unpickled."""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradleak.errors import BadInput
from gradleak.observations import check_finite
from gradleak.tensors import Tensors

SCHEMA = "gradleak/decoder/1"


def write(path: Path, kind: str, fitted: str, tensors: Tensors) -> None:
    """Write a decoder's tensors, its kind and the identity of the adapter that it was fitted to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    header = {"schema": SCHEMA, "kind": kind, "fitted": fitted}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, unfinished, metadata=header)
    os.replace(unfinished, path)


def read(path: Path, kind: str, *needed: str) -> tuple[str, Tensors]:
    """(identity, tensors) as written; BadInput for a missing, damaged or foreign file, or another kind of decoder."""
    if not path.is_file():
        raise BadInput(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise BadInput(f"{path} is not a readable safetensors file ({error}): truncated, or something else.") from error
    if header.get("schema") != SCHEMA or "fitted" not in header:
        raise BadInput(f"{path} holds no decoder of this version ({header.get('schema', 'no gradleak header')}).")
    if header.get("kind") != kind:
        raise BadInput(f"{path} holds a decoder of the kind {header.get('kind')}, not {kind}.")
    if missing := [name for name in needed if name not in tensors]:
        raise BadInput(f"{path} lacks {missing[0]}: it is damaged.")
    check_finite(tensors)
    return header["fitted"], tensors


def group(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under PREFIX/, with that taken off their names."""
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}
