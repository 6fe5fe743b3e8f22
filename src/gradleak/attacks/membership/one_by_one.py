"""What a function says of each sample as a batch of one, many samples at once: `vmap` over those of one shape."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.search.descend import OnStep

MOST_AT_ONCE = 32  # more samples at once are no faster
Function = Callable[[Any, Tensor | None], Tensor]


def one_by_one(
    function: Function, inputs: Any, labels: Tensor | None, on_step: OnStep | None = None, most: int = MOST_AT_ONCE
) -> Tensor:
    """(n, ...), function(batch of one, its labels (1, ...) or None) of each sample, in order.

    inputs: pictures (n, channel, height, width), or n sentences of token ids; most: so many at once. Where a model's control flow depends
    on its data, so that nothing can be done at once, one sample follows the other.
    """
    found, done, at_once = torch.empty(0), 0, True
    for rows in alike(inputs, most):
        x = inputs[rows] if isinstance(inputs, Tensor) else torch.tensor([inputs[i] for i in rows])
        given = (x,) if labels is None else (x, labels[rows])
        if at_once:
            try:
                values = vmap(lambda x, y=None: function(x[None], None if y is None else y[None]))(*given)
            except RuntimeError:  # torch's, of control flow that depends on data, and of memory
                at_once = False
        if not at_once:
            each = zip(*(part.unsqueeze(1) for part in given), strict=True)
            values = torch.stack([function(*one, *(() if labels is not None else (None,))) for one in each])
        found = found if done else values.new_empty(len(inputs), *values.shape[1:])
        found[rows] = values.detach()
        done += len(rows)
        if on_step is not None:
            on_step(done, len(inputs), 0.0)
    return found


def alike(inputs: Any, most: int) -> Iterator[list[int]]:
    """Rows of samples of one shape, so many together at most; the longest texts first, so that what does not fit fails at once."""
    lengths = [0 if isinstance(inputs, Tensor) else len(row) for row in inputs]
    for length in sorted(set(lengths), reverse=True):
        rows = [i for i, own in enumerate(lengths) if own == length]
        yield from (rows[first : first + most] for first in range(0, len(rows), most))
