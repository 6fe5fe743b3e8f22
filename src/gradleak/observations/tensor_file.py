"""Tensors on disk: safetensors, with JSON beside them in the file's header. Written whole or not at all, never unpickled."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradleak.errors import BadInput, parsed, shortened
from gradleak.observations.tensors import Tensors

PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how they begin
FORMATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
MOST = 100_000  # tensors in a file
LARGEST = 1e15  # a magnitude whose squares, and sums of them, are still float32 numbers


def write(tensors: Tensors, schema: str, about: dict[str, Any], path: Path, *, private: bool = False) -> None:
    """Write tensors and a header of plain data, under the name of a schema: gradleak/KIND/VERSION.

    private: only its owner may read the file.
    """
    header = {"schema": schema, "gradleak": msgspec.json.encode(about).decode()}
    write_with(header, tensors, path, private=private)


def write_with(header: dict[str, str], tensors: Tensors, path: Path, *, private: bool = False) -> None:
    """Write tensors under a header as it is: the whole file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        save_file(apart(tensors), unfinished, metadata=header)
        if private:
            unfinished.chmod(0o600)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def apart(tensors: Tensors) -> Tensors:
    """The tensors on the CPU, each with numbers of its own, as safetensors wants them: autograd gives some gradients as views of others."""
    kept: Tensors = {}
    seen = set[int]()
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        kept[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return kept


def read(path: Path, schema: str, *needed: str) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, header) as written; BadInput for a missing, damaged or foreign file, another schema, or one that lacks a
    needed tensor."""
    tensors, header = open_tensors(path)
    about = described(header, schema, path)
    for name in needed:
        if name not in tensors:
            raise BadInput(f"{path} lacks {name}: it is damaged.")
    return tensors, about


def described(header: dict[str, str], schema: str, path: Path) -> dict[str, Any]:
    """What `write` was given as `about`, out of a raw header; BadInput where it is of another schema, or is no object."""
    if header.get("schema") != schema:
        schema_given = shortened(header.get("schema", "no gradleak header"))
        raise BadInput(f"{path} is not a {schema.split('/')[1]} file of this version ({schema_given}, not {schema}).")
    about = parsed(header.get("gradleak", ""), f"{path} has a damaged header")
    if not isinstance(about, dict):
        raise BadInput(f"{path} has a damaged header: {type(about).__name__} in place of an object.")
    return about


def open_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Any safetensors file and its raw header; BadInput for a pickle, a truncated file, a number format that nothing here
    computes with, or entries that are NaN, infinite or so large that their squares would be."""
    with opened(path) as file:
        header = file.metadata() or {}
        if len(names := file.keys()) > MOST:
            raise BadInput(f"{path} holds {len(names):,} tensors: no model has so many.")
        tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        if tensor.dtype not in FORMATS:
            raise BadInput(f"{path}: tensor {shortened(name)} holds {tensor.dtype} numbers: convert them to float32.")
    check_numbers(tensors, path)
    return tensors, header


def check_numbers(tensors: Tensors, path: Path) -> None:
    """BadInput naming the first tensor with numbers that are NaN, infinite, or so large that nothing can be computed."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        largest = float(tensor.abs().max())
        if not math.isfinite(largest):
            raise BadInput(
                f"{path}: tensor {shortened(name)} has entries that are NaN or infinite: nothing can be learnt from it."
            )
        if largest > LARGEST:
            raise BadInput(
                f"{path}: tensor {shortened(name)} has entries of {largest:.0e}: nothing can be computed with them."
            )


def raw_header(path: Path) -> dict[str, str]:
    """The header alone; BadInput as `open_tensors`."""
    with opened(path) as file:
        header: dict[str, str] = file.metadata() or {}
    return header


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; BadInput for anything else."""
    if not path.is_file():
        raise BadInput(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        with path.open("rb") as raw:
            start = raw.read(2)
        if start in PICKLES:
            raise BadInput(
                f"{path} is a pickle (torch.save): it could run code, so it is not opened. "
                "Convert it with safetensors.torch.save_file."
            ) from error
        reason = shortened(str(error))
        raise BadInput(
            f"{path} is not a readable safetensors file ({reason}): truncated, or something else."
        ) from error


def floating(tensors: Tensors, path: Path) -> Tensors:
    """The tensors, in float32 at least; BadInput naming the first one that holds whole numbers."""
    if whole := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        kind = tensors[whole[0]].dtype
        raise BadInput(f"{path} is damaged: tensor {shortened(whole[0])} holds {kind} numbers, which are whole.")
    return {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors with PREFIX/ before their names."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def group(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under PREFIX/, with that taken off their names."""
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}
