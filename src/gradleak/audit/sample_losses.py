"""The loss of each sample by itself, and how fast it falls along what was released; a batch at a time."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors

MOST_LOGITS = 2**24  # at once, 64 MiB
MOST_SAMPLES = 256
LEFT_OUT = -100  # a target that no loss is taken of


def losses(model: Model[Any], inputs: Any, labels: Tensor | None, on_step: OnStep | None = None) -> Tensor:
    """The cross entropy of each sample, (n,) float64 in nats; of a text the sum over its tokens."""

    def batch(x: Any, y: Tensor | None) -> Tensor:
        with torch.no_grad():
            return _each(model, {}, x, y)

    return _batched(batch, model, inputs, labels, on_step)


def alignments(
    model: Model[Any], towards: Tensors, inputs: Any, labels: Tensor | None, on_step: OnStep | None = None
) -> Tensor:
    """<gradient of the sample's loss, towards>, (n,) float64, by one forward-mode derivative per batch.

    towards: {parameter: a released gradient, or what training subtracted}: training follows the gradients of its samples.
    """
    here = {name: model.parameters[name] for name in towards}

    def batch(x: Any, y: Tensor | None) -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            # torch's own: its first forward-mode derivative calls torch.jit.script
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                derivative: Tensor = jvp(lambda p: _each(model, p, x, y), (here,), (towards,))[1]
            except NotImplementedError as error:
                raise BadInput(
                    "An operation of this model has no forward-mode derivative: score by the loss instead."
                ) from error
            return derivative

    return _batched(batch, model, inputs, labels, on_step)


def _each(model: Model[Any], parameters: Tensors, inputs: Any, labels: Tensor | None) -> Tensor:
    """(n,), one loss per sample."""
    logits, targets = model.architecture.compared(model.logits(parameters, inputs), inputs, labels)
    rows = F.cross_entropy(logits, targets, reduction="none", ignore_index=LEFT_OUT)
    return rows.view(len(inputs), -1).sum(1)


def _batched(
    batch: Callable[[Any, Tensor | None], Tensor],
    model: Model[Any],
    inputs: Any,
    labels: Tensor | None,
    on_step: OnStep | None,
) -> Tensor:
    """Of all samples; in their own order."""
    found = torch.zeros(len(inputs), dtype=torch.float64)
    for done, rows in chunks(model, inputs):
        values = batch(_rows(inputs, rows), None if labels is None else labels[rows]).double().cpu()
        found[rows] = values
        if on_step is not None:
            on_step(done, len(inputs), float(values.mean()))
    if not bool(found.isfinite().all()):
        raise BadInput("The loss of a sample is NaN or infinite: the model gives no numbers for it.")
    return found


def chunks(model: Model[Any], inputs: Any) -> Iterator[tuple[int, list[int]]]:
    """(how many are done with these, rows of one batch), the longest texts first, so that a batch that does not fit fails at once."""
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    with torch.no_grad():
        one = model.logits({}, _rows(inputs, order[:1])).numel()
    size = max(1, min(MOST_SAMPLES, MOST_LOGITS // max(one, 1)))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield start + len(rows), rows


def _rows(inputs: Any, rows: list[int]) -> Any:
    return inputs[rows] if isinstance(inputs, Tensor) else tuple(inputs[i] for i in rows)
