"""A client that shares the gradient of one private batch."""

from dataclasses import replace

import torch
from torch import nn

from gradleak.errors import BadInput
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.observation import Gradient, Mode, Model


def capture_gradient(
    module: nn.Module,
    architecture: Architecture,
    private: Pictures,
    *,
    mode: Mode = "eval",
    precision: torch.dtype = torch.float32,
    reveal_labels: bool = False,
    reveal_buffers: bool = True,
    reveal_batch_size: bool = True,
) -> tuple[Gradient, Secret]:
    """The gradient of the mean cross entropy over `private`, and the secret behind it.

    The state is recorded before the forward pass, so that train mode's update of BatchNorm's buffers is not in it.
    precision: the number format of the release. Raises BadInput when the model cannot take these pictures.
    """
    model = Model.of(module, architecture, mode=mode)
    check_takes(model, private)
    blank = {name: torch.zeros_like(p) for name, p in model.parameters.items() if name not in model.frozen}
    full = Gradient(
        model=model,
        released=blank,
        batch_size=len(private.labels) if reveal_batch_size else None,
        labels=private.labels if reveal_labels else None,
        precision=str(precision).removeprefix("torch."),
    )
    released = {k: v.detach().to(precision).float() for k, v in full.simulate(private.images, private.labels).items()}
    seen = replace(full, released=released)
    if not reveal_buffers:
        seen = replace(seen, model=Model.of(module, architecture, mode=mode, reveal_buffers=False))
    return seen, Secret(private.images, private.labels, f"{private.source} {private.split}")


def check_takes(model: Model, pictures: Pictures) -> None:
    """BadInput when the size of the pictures, or their labels, are not what the model was built for."""
    shape, wanted = tuple(pictures.images.shape[1:]), model.architecture.input_shape
    if shape != wanted:
        sizes = f"{'x'.join(map(str, shape))}, the model takes {'x'.join(map(str, wanted))}"
        raise BadInput(f"The pictures are {sizes} (channel x height x width): choose other data, or resize them.")
    try:
        logits = model.logits({}, pictures.images)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"The model {model.architecture.name} fails on these pictures: {error}") from error
    if logits.shape != (len(pictures.images), model.architecture.classes):
        raise BadInput(f"The model returned {tuple(logits.shape)}, not (batch, {model.architecture.classes}) logits.")
    if int(pictures.labels.max()) >= model.architecture.classes:
        raise BadInput(
            f"Label {int(pictures.labels.max())} is beyond the model's {model.architecture.classes} classes."
        )
