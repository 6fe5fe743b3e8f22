"""Fitted decoders on disk: their kind, and the identity of what they were fitted to, in the header."""

from pathlib import Path

import msgspec

from gradleak.errors import BadInput, checked, shortened
from gradleak.observations import tensor_file
from gradleak.observations.tensor_file import group as group
from gradleak.observations.tensors import Tensors

SCHEMA = "gradleak/decoder/1"


class About(msgspec.Struct, frozen=True):
    """The header of a decoder."""

    kind: str
    fitted: str


def write(path: Path, kind: str, fitted: str, tensors: Tensors) -> None:
    """Write a decoder's tensors, its kind and the identity of the adapter that it was fitted to."""
    tensor_file.write(tensors, SCHEMA, {"kind": kind, "fitted": fitted}, path)


def read(path: Path, kind: str, *needed: str) -> tuple[str, Tensors]:
    """(identity, tensors) as written; BadInput for a missing, damaged or foreign file, or another kind of decoder."""
    tensors, plain = tensor_file.read(path, SCHEMA)
    about = checked(plain, About, f"{path} is damaged")
    if about.kind != kind:
        raise BadInput(f"{path} holds a decoder of the kind {shortened(about.kind)}, not {kind}.")
    if missing := [name for name in needed if name not in tensors]:
        raise BadInput(f"{path} lacks {missing[0]}: it is damaged.")
    return about.fitted, tensors
