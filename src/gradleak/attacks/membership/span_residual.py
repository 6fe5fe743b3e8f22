"""Span residual: the change of lora_A has its rows in the span of what the first adapted layer was fed with (`unmixing/span.py`, 1)."""

import torch
from torch import Tensor

from gradleak.attacks.membership.evidence import Evidence
from gradleak.attacks.membership.first_inputs import first_inputs
from gradleak.attacks.unmixing.span import divided, rank
from gradleak.errors import NotObserved
from gradleak.observations.tensors import rounding


def span_residual(seen: Evidence) -> Tensor:
    """-max over a candidate's inputs of their share outside the span of A_T - A_0; about 0 for members.

    NotObserved where A_0 is not known, where Adam divided every number, and where the rows do not leave the span a boundary.
    """
    observation = seen.observation
    release = observation.adapter
    first = first_inputs(observation, seen.inputs)
    names = [f"{module}.lora_A" for module in first.modules]
    if release.gradient or release.origin == "unknown" or any(name not in observation.released for name in names):
        raise NotObserved("The inputs lie in the span of A_T - A_0, and A_0 is not known.")
    if any(divided(release, observation.released[f"{module}.lora_B"]) for module in first.modules):
        raise NotObserved("All numbers of lora_B are of one size, as Adam leaves them: no span is left.")
    change = torch.cat([observation.released[name].flatten(1) for name in names]).double()
    steps = 1 if release.recipe is None else release.recipe.steps
    ends = torch.cat([release.ended(observation.released)[name].flatten(1) for name in names]).double()
    noise = float((steps**0.5 * rounding(ends, torch.float32)).square().mean().sqrt())
    _, S, V = torch.linalg.svd(change, full_matrices=False)
    N = rank(S, noise, change)
    if not 0 < N < len(S):
        raise NotObserved(f"The {len(S)} rows of the change are a full span, or none: it has no boundary.")
    x, basis = first.rows, V[:N]
    return -first.most((x - (x @ basis.T) @ basis).norm(dim=1) / x.norm(dim=1))
