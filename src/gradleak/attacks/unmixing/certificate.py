"""Which pictures of a gallery an adapter was trained on, with an exact p-value each. It needs neither A_0 nor a seed.

The rows of B_T, from B_0 = 0, span A_0 x_i over the training inputs, and A_T - A_0 has its columns there. With P the projector on
what is orthogonal to them,

    P A_T = P A_0 = C        C x_i = 0 for every training input.

For any other input x, C x is Gaussian with the deviation of A_0's numbers times the distance of x from the span of the inputs.
"""

import torch
from torch import Tensor

from gradleak.attacks.unmixing.span import adapted_first_layer, samples, span_of
from gradleak.errors import NotObserved
from gradleak.observations.observation import PictureObservation

ZERO = 1e-2  # of a candidate's length: C x of a training input is rounding


def certificate(observation: PictureObservation, candidates: Tensor) -> Tensor:
    """p-values (n,) of pictures (n, channel, height, width) in [0, 1]: how often a picture that took no part looks as much
    as if it did, by chi^2 with r - N degrees of freedom.

    The span is known where A_0 is. Else that of the candidates which C takes to zero stands in, each without itself.
    NotObserved where B did not start at zero, or there are r samples or more.
    """
    observation = observation.to(torch.float64)
    release = observation.adapter
    network, module = adapted_first_layer(observation, release)
    ended = release.ended(observation.released)
    A, B = ended[f"{module}.lora_A"], ended[f"{module}.lora_B"]
    r, q = len(A), samples(observation, B)
    if bool(release.start[f"{module}.lora_B"].any()) or not 0 < q < r:
        raise NotObserved(f"The certificate needs an adapter from B = 0 with more rows ({r}) than samples ({q}).")
    C = torch.linalg.svd(B, full_matrices=False)[2][q:] @ A  # (r - q, in)
    x = network.inputs(candidates.to(A))
    deviation = C.norm() / ((r - q) * (C.shape[1] - q)) ** 0.5
    left = (x @ C.T).norm(dim=1) / deviation
    distance = x.norm(dim=1)
    if release.origin != "unknown":
        basis = span_of(observation).basis
        outside = (x - (x @ basis.T) @ basis).norm(dim=1)
        # A member is in the span, at no distance to measure by: it keeps its length.
        distance = torch.where(outside > ZERO * distance, outside, distance)
    else:
        members = (left < ZERO * distance).nonzero()[:, 0]
        members = members[left[members].argsort()[:q]]
        if len(members):
            basis = torch.linalg.qr(x[members].T)[0]
            outside = (x - (x @ basis) @ basis.T).norm(dim=1)
            distance = torch.where(outside > ZERO * distance, outside, distance)
    p: Tensor = torch.special.gammainc(torch.full_like(left, (r - q) / 2), (left / distance).square() / 2)
    return p
