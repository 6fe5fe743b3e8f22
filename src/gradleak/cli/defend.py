"""What `defend` does: a release that is at hand, defended, in a folder of its own, to be audited like the first."""

from dataclasses import replace
from pathlib import Path

import torch

from gradleak.cli import flags
from gradleak.cli.folders import fresh_folder
from gradleak.cli.inputs import file_hash, is_of_adapter
from gradleak.errors import BadInput
from gradleak.formats.adapter_files import located_adapter
from gradleak.formats.defended_adapter import Told, defend_folder
from gradleak.formats.observation_file import has_provenance, load_observation, save_observation
from gradleak.observations.defense_names import Chosen
from gradleak.observations.defenses import Defense, defended
from gradleak.observations.truncation import TruncatedRank


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
        source = defend_folder(located_adapter(path), chosen.defenses, generator, out)
        now = f"gradleak audit {out} --base ..."
    else:
        source = observation(path, chosen, generator, out)
        now = f"gradleak audit {out / 'observation.safetensors'} ..."
    Told(of=file_hash(source), with_=args.with_, seed=args.seed).write(out)
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
