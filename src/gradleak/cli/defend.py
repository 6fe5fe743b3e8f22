"""What `defend` does: a release that is at hand, defended, in a folder of its own, to be audited like the first."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from gradleak.cli import flags
from gradleak.cli.folders import fresh_folder
from gradleak.cli.inputs import TOLD, Told, file_hash, is_of_adapter
from gradleak.errors import BadInput
from gradleak.formats.adapter_files import CONFIG, WEIGHTS, located_adapter
from gradleak.formats.observation_file import has_provenance, load_observation, save_observation
from gradleak.observations import tensor_file
from gradleak.observations.defense_names import Chosen
from gradleak.observations.defenses import Defense, TruncatedRank, defended


def defend(args: flags.Defend) -> None:
    """Write the defended release, and beside it what was done."""
    out, path, chosen = fresh_folder(args.out), args.release, Chosen.of(args.with_)
    if not chosen.defenses:
        raise BadInput("Say with what: --with top-k:0.1, --with noise:0.01, ... (see `gradleak list`).")
    for text, defense in zip(args.with_, chosen.defenses, strict=False):
        if type(defense).training is not Defense.training or type(defense).bound is not Defense.bound:
            raise BadInput(f"{text} is done where the private data are: `gradleak capture` does it, a release cannot.")
    generator = torch.Generator().manual_seed(args.seed)
    if is_of_adapter(path):
        source = adapter(located_adapter(path), chosen.defenses, generator, out)
        now = f"gradleak audit {out} --base ..."
    else:
        source = observation(path, chosen, generator, out)
        now = f"gradleak audit {out / 'observation.safetensors'} ..."
    told = Told(of=file_hash(source), with_=args.with_, seed=args.seed)
    (out / TOLD).write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n")
    print(f"{out}: {', '.join(map(str, chosen.defenses))}\nNow: {now}")


def observation(path: Path, chosen: Chosen, generator: torch.Generator, out: Path) -> Path:
    """observation.safetensors with the defenses in its header, behind those that it had."""
    if not path.is_file() or not has_provenance(path):
        raise BadInput(f"{path} is neither an observation of `gradleak capture` nor an adapter: capture it first.")
    if any(isinstance(defense, TruncatedRank) for defense in chosen.defenses):
        raise BadInput("svd truncates the product of an adapter's factors, and this is no adapter's folder.")
    seen = load_observation(path)
    before = seen.defenses
    known = None if before is None or chosen.known is None else (*before, *chosen.known)
    released = defended(seen.released, chosen.defenses, generator)
    out.mkdir(parents=True, exist_ok=True)
    save_observation(replace(seen, released=released, defenses=known), out / "observation.safetensors")
    return path


def adapter(path: Path, defenses: tuple[Defense, ...], generator: torch.Generator, out: Path) -> Path:
    """The folder of a PEFT adapter with its factors defended; everything else in it as it is."""
    file, config = path / WEIGHTS, path / CONFIG
    if not file.is_file() or not config.is_file():
        raise BadInput(f"{path} is no folder with {CONFIG} and {WEIGHTS}: other adapters are not written.")
    tensors, header = tensor_file.open_tensors(file)
    formats: dict[str, Any] = {name: tensor.dtype for name, tensor in tensors.items()}
    factors = {name: t.float() for name, t in tensors.items() if ".lora_A" in name or ".lora_B" in name}
    for defense in defenses:
        whole = isinstance(defense, TruncatedRank)
        factors = truncated(factors, defense.rank) if whole else defended(factors, (defense,), generator)  # type: ignore[attr-defined]
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, out / CONFIG)
    shared = {name: factors.get(name, tensor).to(formats[name]).contiguous() for name, tensor in tensors.items()}
    tensor_file.write_with(header, shared, out / WEIGHTS)
    return file


def truncated(factors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Factors whose products are the best approximations of rank `rank` of those products (Eckart and Young 1936): A holds orthonormal rows,
    B all sizes, and what is left of the old rank is zero. BadInput where they have no such rank."""
    shared = dict(factors)
    for name, A in factors.items():
        if ".lora_A" not in name:
            continue
        other = name.replace(".lora_A", ".lora_B")
        if other not in factors:
            raise BadInput(f"The adapter has {name} and no {other}: there is no product to truncate.")
        B = factors[other]
        if not rank < len(A):
            raise BadInput(f"svd:{rank} leaves an adapter of rank {len(A)} as it is: give a smaller rank.")
        U, s, V = torch.linalg.svd(B.flatten(1).double() @ A.flatten(1).double(), full_matrices=False)
        new_A, new_B = torch.zeros_like(A.flatten(1)), torch.zeros_like(B.flatten(1))
        new_A[:rank], new_B[:, :rank] = V[:rank].float(), (U[:, :rank] * s[:rank]).float()
        shared[name], shared[other] = new_A.view_as(A), new_B.view_as(B)
    return shared
