"""The loss of each sample by itself, and how fast it falls along what was released; many samples at once."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from gradleak.attacks.membership.one_by_one import MOST_AT_ONCE, Function, one_by_one
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput
from gradleak.modalities.language_models import NO_TARGET
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors

MOST_LOGITS = 2**24  # at once, 64 MiB


def losses(model: Model[Any], inputs: Any, labels: Tensor | None, on_step: OnStep | None = None) -> Tensor:
    """The cross entropy of each sample, (n,) float64 in nats; of a text the sum over its tokens."""
    return finite(of_each(lambda x, y: loss(model, {}, x, y), model, inputs, labels, on_step))


def alignments(
    model: Model[Any], towards: Tensors, inputs: Any, labels: Tensor | None, on_step: OnStep | None = None
) -> Tensor:
    """<gradient of the sample's loss, towards>, (n,) float64, by one forward-mode derivative each.

    towards: {parameter: a released gradient, or what training subtracted}: training follows the gradients of its samples.
    """
    here = {name: model.parameters[name] for name in towards}

    def slope(x: Any, y: Tensor | None) -> Tensor:
        derivative: Tensor = jvp(lambda parameters: loss(model, parameters, x, y), (here,), (towards,))[1]
        return derivative

    with warnings.catch_warnings():
        # torch's own: its first forward-mode derivative calls torch.jit.script
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return finite(of_each(slope, model, inputs, labels, on_step))
        except NotImplementedError as error:
            raise BadInput(
                "An operation of this model has no forward-mode derivative: score by the loss instead."
            ) from error


@torch.no_grad()
def of_each(
    function: Function, model: Model[Any], inputs: Any, labels: Tensor | None, on_step: OnStep | None = None
) -> Tensor:
    """(n,) float64, the function of each sample, of so many at once as `MOST_LOGITS` allows."""
    longest = max(range(len(inputs)), key=lambda i: len(inputs[i]))
    logits = model.logits({}, inputs[longest : longest + 1]).numel()
    most = max(1, min(MOST_AT_ONCE, MOST_LOGITS // max(logits, 1)))
    return one_by_one(function, inputs, labels, on_step, most).double().cpu()


def loss(model: Model[Any], parameters: Tensors, inputs: Any, labels: Tensor | None) -> Tensor:
    """The cross entropy of a batch, summed over all targets."""
    logits, targets = model.architecture.compared(model.logits(parameters, inputs), inputs, labels)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=NO_TARGET)


def finite(found: Tensor) -> Tensor:
    """These; BadInput where one is no finite number."""
    if not bool(found.isfinite().all()):
        raise BadInput("The loss of a sample is NaN or infinite: the model gives no numbers for it.")
    return found
