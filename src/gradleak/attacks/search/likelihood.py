"""How likely a release is, were the secret this: numbers told up to normal noise, whose level is known or told by what a search leaves.

-2 log p(released | x) = sum_l ||simulate(x)_l - released_l||^2 / tau_l^2 = sum_l e_l / v_l, l over the released tensors, with the relative
error e_l = ||simulate(x)_l - released_l||^2 / ||released_l||^2 and the relative variance v_l = tau_l^2 / ||released_l||^2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors

LEAST_LEFT = 0.1  # of the numbers, that the noise is told by, whatever a picture may have taken up


def sizes(released: Tensors) -> Tensor:
    """||released_l||^2 of each tensor (L,); of one that is zero throughout, that of all of the release."""
    own = torch.stack([tensor.square().sum() for tensor in released.values()])
    return torch.where(own > 1e-12 * own.sum(), own, own.sum()).clamp_min(torch.finfo(own.dtype).tiny)


def errors(simulated: Tensors, released: Tensors, size: Tensor | None = None) -> Tensor:
    """e_l of each tensor (L,); of a release that is a variant of another, with that one's sizes."""
    apart = torch.stack([(simulated[name] - released[name]).square().sum() for name in released])
    relative: Tensor = apart / (sizes(released) if size is None else size)
    return relative


def relative_variance(observation: PictureObservation) -> Tensor:
    """v_l of the noise that the observation tells: (L,); zero where it tells none."""
    noise, released = observation.noise(), observation.released
    deviation = [noise.get(name, tensor.new_zeros(())).to(tensor) for name, tensor in released.items()]
    return torch.stack(deviation).square() / sizes(released)


def estimated_variance(
    simulate: Callable[[Tensor, Tensor], Tensors], images: Tensor, y: Tensor, released: Tensors, taken_up: Tensor
) -> Tensor:
    """v_l (L,) of white noise, all of which is what is left at these pictures: tau^2 = ||simulate(x) - released||^2 / (M - taken_up).

    M: how many numbers were released; taken_up: how many the pictures were fitted to. Under a prior N(0, I) of z it is ||z||^2 at the
    most likely z: the fixed point of MacKay's evidence approximation (Bayesian Interpolation, 1992, equations 4.8 and 4.9).
    """
    with torch.no_grad():
        left = errors(simulate(images, y), released) * sizes(released)
    count = sum(tensor.numel() for tensor in released.values())
    return left.sum() / (count - taken_up).clamp_min(LEAST_LEFT * count) / sizes(released)
