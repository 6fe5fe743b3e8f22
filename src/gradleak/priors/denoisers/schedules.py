"""A diffusion model as a denoiser, by the scheduler that it was trained with. The network sees x_t = alpha_t x with
sigma_t / alpha_t = s, where x is the picture with white noise of level s, both in the units of the network.

    variance-preserving (Ho et al. 2020)   alpha_t^2 + sigma_t^2 = 1; predicts the noise, the picture, or v (Salimans and Ho 2022)
    EDM (Karras et al. 2022, table 1)      scaled inputs and outputs around c_skip x, time ln(s) / 4
    flow matching (Lipman et al. 2023)     alpha_t = 1 - t, sigma_t = t; predicts noise - picture
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradleak.errors import BadInput, shortened
from gradleak.priors.files import diffusers

Network = Callable[[Tensor, Tensor], Tensor]  # x_t (batch, ...), time (batch,) -> what it predicts
Clean = Callable[
    [Network, Tensor, Tensor], Tensor
]  # network, x (batch, channel, height, width), s (batch,) -> E[picture | x]

PRESERVING = (
    *(
        "DDPM",
        "DDIM",
        "PNDM",
        "LMSDiscrete",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "DEISMultistep",
    ),
    *("DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete", "UniPCMultistep"),
)
EDM = ("EDMEuler", "EDMDPMSolverMultistep")
FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")


def schedule(config: Mapping[str, Any]) -> Clean:
    """By a scheduler_config.json. Raises BadInput for a scheduler or a prediction that is not known."""
    name = shortened(str(config.get("_class_name")))
    kind, predicts = name.removesuffix("Scheduler"), config.get("prediction_type", "epsilon")
    if kind in FLOW:
        return flow(int(config.get("num_train_timesteps", 1000)))
    if kind not in PRESERVING + EDM:
        known = ", ".join(f"{one}Scheduler" for one in ("DDPM", "DDIM", *EDM, *FLOW))
        raise BadInput(
            f"The scheduler {name} is not known here: known are {known} and those that share a schedule with them."
        )
    if predicts not in ("epsilon", "v_prediction") + (("sample",) if kind in PRESERVING else ()):
        raise BadInput(f"{name} with predictions of type {shortened(repr(predicts))} is not known here.")
    if kind in EDM:
        return edm(float(config.get("sigma_data", 0.5)), 1 if predicts == "epsilon" else -1)
    try:
        alphas = getattr(diffusers(), name).from_config(dict(config)).alphas_cumprod
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise BadInput(f"The settings of {name} do not make a scheduler ({shortened(str(error))}).") from error
    return preserving(alphas, predicts)


def preserving(alphas_cumprod: Tensor, predicts: str) -> Clean:
    """alphas_cumprod (steps,) falls. Between two steps, time is interpolated in the logarithm of s."""
    kept = alphas_cumprod.double().clamp(1e-12, 1 - 1e-12)
    levels = ((1 - kept) / kept).sqrt().log().numpy()  # ln s of each step

    def clean(network: Network, x: Tensor, s: Tensor) -> Tensor:
        time = np.interp(s.log().double().cpu().numpy(), levels, np.arange(len(levels)))
        alpha = over(1 / (1 + s**2).sqrt())
        said = network(alpha * x, torch.from_numpy(time).to(x))
        if predicts == "epsilon":
            return x - over(s) * said
        return said if predicts == "sample" else alpha**2 * x - alpha * over(s) * said

    return clean


def edm(sigma_data: float, sign: int) -> Clean:
    """sign: +1, or -1 where the network predicts v."""

    def clean(network: Network, x: Tensor, s: Tensor) -> Tensor:
        total = over(s**2 + sigma_data**2)
        said = network(x / total.sqrt(), s.log() / 4)
        return sigma_data**2 / total * x + sign * over(s) * sigma_data / total.sqrt() * said

    return clean


def flow(steps: int) -> Clean:
    """steps: time 1 as the network counts it."""

    def clean(network: Network, x: Tensor, s: Tensor) -> Tensor:
        t = s / (1 + s)
        seen = x / over(1 + s)
        return seen - over(t) * network(seen, t * steps)

    return clean


def over(values: Tensor) -> Tensor:
    """(batch,) -> (batch, 1, 1, 1)."""
    return values[:, None, None, None]
