"""A truncated adapter, read at the start of its training: what SVD truncation of the product B A leaves of both factors.

Sees      an Adapter behind `svd:RANK` (`observations/truncation.py`), the directions of whose product were kept
Recovers  the seed that drew A at the start, where nobody gives that, and the factors as far as the product tells them: then all attacks on
          adapters apply
Solves    `untruncated`; the seed as that of a merged adapter (`attacks/merged.py`): kept directions lie in the rows of A
Misses    the directions that were cut off; what `attacks/merged.py` misses
"""

from dataclasses import replace
from typing import Any

import torch

from gradleak.attacks.merged import recover_merged_seed
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors
from gradleak.observations.truncation import TruncatedRank, untruncated


def with_truncation_undone(
    observation: Observation[Any], *, seeds: range | None = None, on_step: OnStep | None = None
) -> Observation[Any]:
    """The observation with its factors as they were beside the start that is known, or that one of these seeds drew (the usual ones within 10
    CPU-seconds); as it is where there is none, or nothing was truncated."""
    if not is_truncated(observation):
        return observation
    adapter, ended = observation.adapter, observation.adapter.ended(observation.released)
    start, origin, seed = adapter.start, adapter.origin, adapter.seed
    if origin == "unknown":
        seconds = 10.0 if seeds is None else None
        found = recover_merged_seed(as_merged(observation, ended), seeds=seeds, on_step=on_step, seconds=seconds)
        if found is None or any(found.start[name].shape != tensor.shape for name, tensor in ended.items()):
            return observation
        start, origin, seed = found.start, "recovered", found.seed
    factors: Tensors = {}
    for module in adapter.scaling:
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        factors[a], factors[b] = untruncated(ended[a], ended[b], start[a])
    nothing = {name: torch.zeros_like(tensor) for name, tensor in factors.items()}
    release, changes = replace(adapter, start=factors).begun(nothing, start, origin, seed)
    return replace(observation, release=release, released=changes)


def is_truncated(observation: Observation[Any]) -> bool:
    """Whether the attacker knows that the product of an adapter's factors was truncated, of one that began at B = 0."""
    release = observation.release
    if not isinstance(release, Adapter) or release.gradient or release.unmerged:
        return False
    began = not any(bool(t.any()) for name, t in release.start.items() if name.endswith("lora_B"))
    return began and any(isinstance(defense, TruncatedRank) for defense in observation.defenses or ())


def as_merged(observation: Observation[Any], ended: Tensors) -> Observation[Any]:
    """The observation as if its products had been read off merged weights: the rows of A that are left, and the columns of B."""
    kept: Tensors = {}
    for module in observation.adapter.scaling:
        A, B = ended[f"{module}.lora_A"], ended[f"{module}.lora_B"]
        rows = A.flatten(1).any(1)
        kept |= {f"{module}.lora_A": A[rows], f"{module}.lora_B": B[:, rows]}
    start = {name: t if name.endswith("lora_A") else torch.zeros_like(t) for name, t in kept.items()}
    release = replace(observation.adapter, start=start, unmerged=dict.fromkeys(observation.adapter.scaling, 0.0))
    return replace(observation, release=release, released={n: t for n, t in kept.items() if n.endswith("lora_B")})
