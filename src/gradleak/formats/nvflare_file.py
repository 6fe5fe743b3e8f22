"""What clients and servers of NVIDIA FLARE exchange, in a file: a DXO, an FLModel or a Shareable as `to_file` and fobs.dumpf write them,
or the same as JSON, {"kind": ..., "data": {name: list}, "meta": {...}}.

FOBS is msgpack with the names of types in it, in sections that begin with a marker and a size. Here only arrays, lists and words are
made of it: no class that a file names is imported, nothing is unpickled, and the library itself is not needed.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load

from gradleak.errors import BadInput, read_json, shortened
from gradleak.observations import tensor_file
from gradleak.observations.given import as_tensor

Kind = Literal["WEIGHTS", "WEIGHT_DIFF"]
TYPE, CONTENT = "__fobs_type__", "__fobs_data__"
MAIN, TEXT, LAST = 100, 101, 103  # markers of sections: the object; a long text, long bytes, a file that it refers to
HEADER, IDENTITY = 10, 16  # bytes: marker, what it is of, size; the number by which a section is referred to
LARGEST = 2**36  # bytes of a file
KINDS: dict[str, Kind] = {"WEIGHTS": "WEIGHTS", "WEIGHT_DIFF": "WEIGHT_DIFF", "FULL": "WEIGHTS", "DIFF": "WEIGHT_DIFF"}


@dataclass(frozen=True)
class Exchanged:
    """What was exchanged.

    kind  weights, or their difference after - before
    data  {name: array}
    meta  what is said besides, as NUM_STEPS_CURRENT_ROUND and current_round
    """

    kind: Kind
    data: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)


def is_exchanged(path: Path) -> bool:
    """Whether a file begins as fobs does, or is JSON."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(HEADER + 64)
    return (TYPE.encode() in start and not start[8:].startswith(b"{")) or path.suffix == ".json"


def read_exchanged(path: Path) -> Exchanged:
    """What a file holds. BadInput for one that is damaged, pickled, encrypted, or of another kind than weights and their difference."""
    if path.suffix == ".json":
        value = read_json(path)
        if isinstance(value, dict) and value and all(isinstance(one, list | float) for one in value.values()):
            value = {"data": value}  # {name: numbers}, of somebody's own
    else:
        try:
            if path.stat().st_size > LARGEST:
                raise BadInput(f"{path} is larger than any model.")
            value = _object(path.read_bytes(), path)
        except (OSError, RecursionError, msgspec.DecodeError, UnicodeError) as error:
            raise BadInput(f"{path} cannot be read as a file of NVIDIA FLARE: {shortened(str(error))}.") from error
    said = exchanged(value, str(path))
    tensors = {name: as_tensor(array, name) for name, array in said.data.items()}
    tensor_file.check_numbers({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}, path)
    return Exchanged(said.kind, tensors, said.meta)


def exchanged(value: Any, where: str) -> Exchanged:
    """The weights in what is exchanged, whatever is around them: a DXO, an FLModel, a Shareable, or a learnable model; as objects of the
    library, or as dictionaries. BadInput where there are none."""
    fields = vars(value) if not isinstance(value, Mapping) and hasattr(value, "__dict__") else value
    if not isinstance(fields, Mapping):
        raise BadInput(f"{where} is a {type(value).__name__}, and no DXO, FLModel or Shareable.")
    if isinstance(inner := fields.get("DXO"), Mapping):
        said, about = exchanged(inner, where), fields.get("__headers__", {})
        # Of an aggregated model, meta holds the round before: the header is that of the message.
        return Exchanged(said.kind, said.data, {**said.meta, **about} if isinstance(about, Mapping) else said.meta)
    kind = next((fields[key] for key in ("data_kind", "kind", "params_type") if fields.get(key)), None)
    data = next((fields[key] for key in ("data", "params", "model_weights") if fields.get(key)), None)
    meta: Any = next((fields[key] for key in ("meta", "model_meta") if fields.get(key)), {})
    known = KINDS.get(str(getattr(kind, "value", kind or "WEIGHTS")))
    if known is None:
        raise BadInput(f"{where} holds {shortened(str(kind))[:60]}: what is read are WEIGHTS and WEIGHT_DIFF.")
    if not isinstance(data, Mapping) or not data or not isinstance(meta, Mapping):
        raise BadInput(f"{where} holds no weights by their names.")
    return Exchanged(known, {str(name): _array(a, str(name), where) for name, a in data.items()}, dict(meta))


def _array(value: Any, name: str, where: str) -> Any:
    """Numbers, in lists where they come from JSON."""
    if not isinstance(value, list | float | int):
        return value
    try:
        return np.array(value, dtype=np.float64).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{where} holds no array of numbers as {shortened(name)[:60]}.") from error


def _object(raw: bytes, path: Path) -> Any:
    """The object in a file, with what it refers to in its place."""
    if raw[:1] != bytes([MAIN]):  # the oldest versions wrote no sections
        return _plain(msgspec.msgpack.decode(raw), {}, path)
    sections, at = list[tuple[int, bytes]](), 0
    while at < len(raw):
        size = int.from_bytes(raw[at + 2 : at + HEADER], "big")
        marker, body = raw[at], raw[at + HEADER : at + HEADER + size]
        if len(body) < size or not MAIN <= marker <= LAST or not size:
            raise BadInput(f"{path} is cut off, or damaged.")
        sections, at = [*sections, (marker, body)], at + HEADER + size
    (_, main), *others = sections
    beside = {b[:IDENTITY].hex(): b[IDENTITY:].decode() if m == TEXT else b[IDENTITY:] for m, b in others}
    return _plain(msgspec.msgpack.decode(main), beside, path)


def _plain(value: Any, beside: Mapping[str, Any], path: Path) -> Any:
    """Dictionaries, lists, words, numbers and arrays; of other types what they are made of."""
    if isinstance(value, list):
        return [_plain(one, beside, path) for one in value]
    if not isinstance(value, dict):
        return value
    if TYPE not in value:
        return {name: _plain(one, beside, path) for name, one in value.items()}
    kind, content = str(value[TYPE]).rpartition(".")[2], _plain(value.get(CONTENT), beside, path)
    if kind == "DatumRef" and isinstance(content, dict):
        about = content.get("data", content)
        number = str(about.get("datum_id") if isinstance(about, dict) else "").replace("-", "")
        if number not in beside:
            raise BadInput(f"{path} is cut off: a part that it refers to is missing.")
        return beside[number]
    if kind in ("ndarray", "Tensor"):
        return _numbers(content["data"] if isinstance(content, dict) and "data" in content else content, kind, path)
    if kind == "DXO" and isinstance(content, list) and len(content) == 3:
        return {"data_kind": content[0], "meta": content[1], "data": content[2]}
    if kind == "FLModel" and isinstance(content, list) and len(content) > 1:
        return {"params_type": content[0], "params": content[1], "meta": content[-1]}
    if kind == "OrderedDict" and isinstance(content, list):
        return dict(cast(Any, content))
    if kind == "CKKSVector":
        raise BadInput(f"{path} holds encrypted numbers: nothing is read of them.")
    return content


def _numbers(content: Any, kind: str, path: Path) -> Any:
    """The array in bytes that numpy or safetensors has written."""
    try:
        if kind == "ndarray":
            return np.load(io.BytesIO(content), allow_pickle=False)
        return load(content)["t"]
    except (TypeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise BadInput(
            f"{path} holds an array that neither numpy nor safetensors has written; others could run code, and are not opened."
        ) from error
