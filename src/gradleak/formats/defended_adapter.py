"""The folder of a PEFT adapter whose factors were defended, and what stands beside it: of which file it was made, and how."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from gradleak.errors import BadInput, checked, read_json
from gradleak.formats.adapter_files import CONFIG, WEIGHTS
from gradleak.observations import tensor_file
from gradleak.observations.defense_names import Chosen
from gradleak.observations.defenses import Defense, defended
from gradleak.observations.truncation import TruncatedRank, truncated

TOLD = "defended.json"


class Told(msgspec.Struct, frozen=True, kw_only=True, rename={"with_": "with"}):
    """What was done: the hash of the file it began with ("" where that was not kept), the defenses as flags, the seed."""

    of: str = ""
    with_: tuple[str, ...]
    seed: int = 0

    def write(self, folder: Path) -> None:
        """defended.json."""
        (folder / TOLD).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def chosen_of(path: Path) -> Chosen:
    """What stands beside the adapter in a folder; no defenses where nothing does. BadInput for what does not say it."""
    file = path / TOLD
    if not path.is_dir() or not file.is_file():
        return Chosen(())
    return Chosen.of(checked(read_json(file), Told, f"{file} does not say how the adapter was defended").with_)


def defend_folder(path: Path, defenses: tuple[Defense, ...], generator: torch.Generator, out: Path) -> Path:
    """Write the adapter of a folder with its factors defended, everything else in it as it is, to `out`, which may be the same folder; the
    file of weights that was read."""
    file, config = path / WEIGHTS, path / CONFIG
    if not file.is_file() or not config.is_file():
        raise BadInput(f"{path} is no folder with {CONFIG} and {WEIGHTS}: other adapters are not written.")
    tensors, header = tensor_file.open_tensors(file)
    formats: dict[str, Any] = {name: tensor.dtype for name, tensor in tensors.items()}
    factors = {name: t.float() for name, t in tensors.items() if ".lora_A" in name or ".lora_B" in name}
    for defense in defenses:
        if isinstance(defense, TruncatedRank):
            factors = all_truncated(factors, defense.rank)
        else:
            factors = defended(factors, (defense,), generator)
    out.mkdir(parents=True, exist_ok=True)
    if out != path:
        shutil.copyfile(config, out / CONFIG)
    shared = {name: factors.get(name, tensor).to(formats[name]).contiguous() for name, tensor in tensors.items()}
    tensor_file.write_with(header, shared, out / WEIGHTS)
    return file


def all_truncated(factors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Every pair of factors by `truncated`; BadInput where a factor has no other."""
    shared = dict(factors)
    for name, A in factors.items():
        if ".lora_A" not in name:
            continue
        other = name.replace(".lora_A", ".lora_B")
        if other not in factors:
            raise BadInput(f"The adapter has {name} and no {other}: there is no product to truncate.")
        shared[name], shared[other] = truncated(A, factors[other], rank)
    return shared
