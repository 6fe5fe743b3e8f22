"""What defenses cost DAGER: Gaussian noise, pruning to the largest entries, and half precision."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from gradleak.formats.secret_file import Secret
from gradleak.observations.defenses import Defense, GaussianNoise, TopK, defended
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import flatten
from gradleak.studies.findings import Findings, Row, Size, Start
from gradleak.studies.text_victims import BATCHES, Sources, Victim, cell, encoder, findings

BATCH_SIZES: dict[Size, tuple[int, ...]] = {"smoke": (1,), "small": (1, 2), "paper": (1, 2)}


def noise(relative: float, seed: int) -> Victim:
    """White noise with `relative` times the norm of the release."""

    def share(seen: TextObservation, secret: Secret) -> TextObservation:
        flat = flatten(seen.released)
        return through(GaussianNoise(relative * float(flat.norm()) / len(flat) ** 0.5), seen, seed)

    return share


def largest(share_of: float, seed: int) -> Victim:
    """Only this share of the entries."""
    return lambda seen, secret: through(TopK(share_of), seen, seed)


def through(defense: Defense, seen: TextObservation, seed: int) -> TextObservation:
    """The release after the defense, which the attacker knows of."""
    released = defended(seen.released, [defense], torch.Generator().manual_seed(seed))
    return replace(seen, released=released, defenses=(defense,))


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every defense and batch size; the findings so far."""
    source, rows = Sources.of(data).first, list[Row]()
    model = encoder(source, seed)
    settings: list[tuple[str, Victim | None, torch.dtype]] = [("none", None, torch.float32)]
    settings += [(f"noise {s:g}", noise(s, seed), torch.float32) for s in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    settings += [(f"largest {s:.0%}", largest(s, seed), torch.float32) for s in (0.5, 0.1)]
    settings += [("float16", None, torch.float16), ("bfloat16", None, torch.bfloat16)]
    for batch in BATCH_SIZES[size]:
        for name, victim, precision in settings:
            row = cell(
                model,
                source,
                batch,
                count=BATCHES[size],
                seed=seed,
                on_step=start(f"{name}, batch {batch}"),
                victim=victim,
                precision=precision,
            )
            rows.append({"defense": name, **row})
            yield findings(rows, ("defense", "batch"), data, size)
