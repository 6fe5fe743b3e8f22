"""How many samples a gradient was taken of, where nobody says: the rank of a layer's gradient.

Sees      Gradient, or an Update of one step, of a network with linear layers that see one row per sample
Recovers  the number of samples, while it is below the ranks that these layers can have
Solves    dL/dW = sum_n delta_n x_n^T has a rank of at most the number of samples, and that rank in general position
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.observations.layers import calls
from gradleak.observations.observation import Observation

LARGEST = 2**22  # numbers of a gradient whose rank is asked: singular values of more take minutes


def with_batch_counted(observation: Observation[Any]) -> Observation[Any]:
    """The observation with the number of its samples; 1 where no layer tells it. Raises BadInput where there are so many samples
    that the ranks are full."""
    if reason := observation.release.inexact():
        raise BadInput(f"Nothing tells of how many samples this is, since {reason}: say it with --batch-size.")
    counted = batch_size(observation)
    if counted is None:
        return replace(observation, batch_size=1)
    count, most = counted
    if count >= most:
        raise BadInput(
            f"The gradient is of {count} or more samples, and its ranks tell no more: say how many with --batch-size."
        )
    return replace(observation, batch_size=count)


def batch_size(observation: Observation[Any]) -> tuple[int, int] | None:
    """(the largest rank of a layer's gradient, the rank from which on it tells nothing); None where no layer sees one row per sample."""
    model, architecture = observation.model, observation.model.architecture
    if not isinstance(architecture, Architecture):
        return None
    grey = torch.full((2, *architecture.input_shape), 0.5).to(next(iter(model.parameters.values())))
    try:
        rows = {call.name for call in calls(model, grey) if isinstance(call.layer, nn.Linear) and call.input.ndim == 2}
        sizes = {
            name: model.parameters[f"{name}.weight"].numel() for name in rows if f"{name}.weight" in model.parameters
        }
        sketches = observation.sketches([name for name in sorted(sizes) if sizes[name] <= LARGEST])
    except NotObserved:
        return None
    counted = []
    for sketch in sketches:
        gradient = sketch.measured.double()
        values = torch.linalg.svdvals(gradient)
        # White noise has singular values up to (sqrt(rows) + sqrt(columns)) times its deviation; sums in float32 leave 1e-6.
        noise = 0.0 if sketch.noise is None else float(sketch.noise.max()) * sum(n**0.5 for n in gradient.shape)
        count = int((values > max(3 * noise, 1e-5 * float(values[0]))).sum())
        if count:
            full = min(gradient.shape) - (len(gradient) == architecture.classes)  # p - y adds up to zero
            counted.append((count, full))
    return max(counted, key=lambda pair: (pair[0] < pair[1], pair[0]), default=None)
