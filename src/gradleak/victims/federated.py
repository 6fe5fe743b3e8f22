"""A client of federated averaging: it trains on its private data and shares the change of its parameters."""

from dataclasses import replace

import torch

from gradleak.errors import BadInput
from gradleak.formats.secret_file import Secret
from gradleak.observations.observation import Gradient, Model, Update


def share_update(
    gradient: Gradient, secret: Secret, model: Model, *, learning_rate: float, local_steps: int, local_batch_size: int
) -> Update:
    """What the client of `gradient` would have shared after `local_steps` steps of SGD in chunks of `local_batch_size`.

    model: the client's own, with its buffers. Everything that `gradient` withholds stays withheld. Raises BadInput
    when the training diverges.
    """
    fields = {name: getattr(gradient, name) for name in ("model", "released", "batch_size", "labels", "precision")}
    blank = Update(**fields, learning_rate=learning_rate, local_steps=local_steps, local_batch_size=local_batch_size)
    released = replace(blank, model=model).simulate(secret.images, secret.labels)
    precision = getattr(torch, gradient.precision)
    if not all(bool(tensor.isfinite().all()) for tensor in released.values()):
        raise BadInput(f"Local training diverged at learning rate {learning_rate:g}: choose a smaller one.")
    return replace(blank, released={k: v.detach().to(precision).float() for k, v in released.items()})
