"""Which pictures or texts of a gallery an adapter was trained on, with an exact p-value each. It needs neither A_0 nor a seed.

The rows of B_T, from B_0 = 0, span A_0 x_i over the training inputs, and A_T - A_0 has its columns there. With P the projector on
what is orthogonal to them,

    P A_T = P A_0 = C        C x_i = 0 for every training input.

For any other input x, C x is Gaussian with the deviation of A_0's numbers times the distance of x from the span of the inputs. A
picture is one input. A text is one for every token in its place, read by query, key and value, each with a C of its own; a member has
C x = 0 at every place, so that its p-value is the largest of its places.
"""

from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.membership.first_inputs import FirstInputs, first_inputs
from gradleak.attacks.unmixing.span import divided, samples, span_of
from gradleak.errors import NotObserved
from gradleak.observations.observation import Observation

ZERO = 1e-2  # of an input's length: C x of a training input is rounding


def certificate(observation: Observation[Any], candidates: Any) -> Tensor:
    """p-values (n,) of pictures (n, channel, height, width) in [0, 1], or of n texts as token ids: how often one that took no part looks
    as much as if it did, by chi^2 with r - N degrees of freedom for each module.

    That a text is a member says of every token that some training text has it in its place. The span is known where A_0 is. Else that
    of the candidates which C takes to zero stands in. NotObserved where B did not start at zero, where Adam divided its numbers, or
    where there are r inputs or more.
    """
    observation = observation.to(torch.float64)
    release = observation.adapter
    first = first_inputs(observation, candidates)
    ended, x = release.ended(observation.released), first.rows
    square, freedom, most = x.new_zeros(len(x)), 0, 0
    for module in first.modules:
        A, B = ended[f"{module}.lora_A"], ended[f"{module}.lora_B"]
        r, q = len(A), samples(observation, B)
        if release.gradient or bool(release.start[f"{module}.lora_B"].any()) or divided(release, B) or not 0 < q < r:
            raise NotObserved(
                f"The certificate needs an adapter trained by SGD from B = 0, with more rows than samples: {q} of {r} are in use."
            )
        C = torch.linalg.svd(B, full_matrices=False)[2][q:] @ A  # (r - q, in)
        deviation = C.norm() / ((r - q) * (C.shape[1] - q)) ** 0.5
        square, freedom, most = square + (x @ C.T / deviation).square().sum(1), freedom + r - q, max(most, q)
    left = square.sqrt()
    distance = from_span(observation, candidates, first, left / freedom**0.5, most)
    p = torch.special.gammainc(torch.full_like(left, freedom / 2), (left / distance).square() / 2)
    return first.most(p)


def from_span(observation: Observation[Any], candidates: Any, first: FirstInputs, left: Tensor, most: int) -> Tensor:
    """How far each input is from those of the training; a member, which is at no distance to measure by, keeps its length."""
    x, length = first.rows, first.rows.norm(dim=1)
    if observation.adapter.origin != "unknown" and isinstance(candidates, Tensor):
        basis = span_of(observation).basis
    else:
        members = (left < ZERO * length).nonzero()[:, 0]
        basis = x[:0]
        for row in x[members[left[members].argsort()]]:
            outside = row - (row @ basis.T) @ basis
            if len(basis) < most and outside.norm() > ZERO * row.norm():
                basis = torch.cat([basis, outside[None] / outside.norm()])
    outside = (x - (x @ basis.T) @ basis).norm(dim=1)
    return torch.where(outside > ZERO * length, outside, length)
