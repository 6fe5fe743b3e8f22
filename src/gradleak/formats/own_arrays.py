"""Arrays in files of somebody's own, whatever wrote them: safetensors, .npz and .npy of numpy, parquet, what NVIDIA FLARE exchanges, JSON.
Nothing is unpickled."""

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gradleak.errors import BadInput, shortened
from gradleak.formats.nvflare_file import is_exchanged, read_exchanged
from gradleak.observations import tensor_file

Kind = Literal["npz", "npy", "parquet", "exchanged", "safetensors"]
LARGEST = 2**36  # bytes of an archive's arrays


def kind_of(path: Path) -> Kind:
    """By how the file begins; whatever is nothing else is taken for safetensors, which says no with a sentence."""
    if not path.is_file():
        return "safetensors"
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"PAR1"):
        return "parquet"
    if is_exchanged(path):
        return "exchanged"
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if members and all(member.filename.endswith(".npy") for member in members):
            if len(members) > tensor_file.MOST or sum(member.file_size for member in members) > LARGEST:
                raise BadInput(f"{path} holds more numbers than a model has.")
            return "npz"
    return "safetensors"


def load_arrays(path: Path) -> dict[str, Any]:
    """{name: array}; the names are those of the file, for a bare array "0". A folder stands for its model.safetensors.

    A parquet file has a row for each array, with the columns name and values (and shape, where it is not flat), or a column for
    each array. Raises BadInput for a damaged file, a pickle, and numbers that are NaN, infinite or too large.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    kind = kind_of(path)
    if kind == "safetensors":
        return dict(tensor_file.open_tensors(path)[0])
    if kind == "exchanged":
        return read_exchanged(path).data
    try:
        arrays = from_parquet(path) if kind == "parquet" else from_numpy(path)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"{path} cannot be read as {kind} of plain numbers: {shortened(str(error))}. Pickled arrays are not opened."
        ) from error
    tensor_file.check_numbers({name: a for name, a in arrays.items() if a.is_floating_point()}, path)
    return arrays


def from_numpy(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of .npz or .npy."""
    loaded = np.load(path, allow_pickle=False)
    arrays = {"0": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    return {name: torch.from_numpy(np.array(a, dtype=a.dtype.newbyteorder("="))) for name, a in arrays.items()}


def from_parquet(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a table."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    columns = table.column_names
    if "name" in columns and "values" in columns:
        rows = table.to_pylist()
        return {
            row["name"]: torch.tensor(row["values"]).reshape(row.get("shape") or (len(row["values"]),)) for row in rows
        }
    whole = (
        {name: np.asarray(table[name].combine_chunks().flatten()) for name in columns} if table.num_rows == 1 else {}
    )
    return {name: torch.from_numpy(np.array(values)) for name, values in whole.items()} or {
        name: torch.from_numpy(np.array(table[name])) for name in columns
    }
