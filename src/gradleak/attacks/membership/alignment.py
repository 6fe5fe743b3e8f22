"""Alignment: does training move the parameters where this sample wanted them to go?

For one step of SGD, theta_0 - theta_T is a sum of the members' gradients, and its product with one of them holds |g|^2 (the linear
statistic of Leemann, Pawelczyk and Kasneci, NeurIPS 2023, arXiv:2306.07273, for gradients). Layer by layer, since one would drown another.

Differs   the gradient is taken half way between theta_0 and theta_T, where that is known: then the sum over layers is the fall of the
          loss, up to the third order (the midpoint rule)
"""

import torch
from torch import Tensor

from gradleak.attacks.membership.evidence import Evidence


def alignment(seen: Evidence) -> Tensor:
    """Sum over tensors of <grad l(x), theta_0 - theta_T>, in deviations of those that took no part."""
    parts = zip(torch.split(seen.gradients, seen.layers, 1), torch.split(seen.descent, seen.layers), strict=True)
    layers = torch.stack([(gradients @ moved).double() for gradients, moved in parts])
    fresh = layers[:, seen.reference]
    deviation = fresh.std(dim=1, keepdim=True)
    return ((layers - fresh.mean(dim=1, keepdim=True)) / deviation.clamp_min(1e-30)).sum(0)
