"""What a function says of each sample as a batch of one, many samples at once: `vmap` over those of one shape."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.search.descend import OnStep

MOST_AT_ONCE = 32  # more samples at once are no faster, and take more memory
Function = Callable[[Any, Tensor | None], Tensor]


def one_by_one(function: Function, inputs: Any, labels: Tensor | None, on_step: OnStep | None = None) -> Tensor:
    """(n, ...), function(batch of one, its labels (1, ...) or None) of each sample, in order.

    inputs: pictures (n, channel, height, width), or n sentences of token ids. Where a model's control flow depends on its data, so that
    nothing can be done at once, one sample follows the other.
    """
    found: Tensor | None = None
    done, at_once = 0, True
    for rows in alike(inputs):
        x = inputs[rows] if isinstance(inputs, Tensor) else torch.tensor([inputs[i] for i in rows])
        y = None if labels is None else labels[rows]
        if at_once:
            try:
                values = vmap(
                    lambda x, y: function(x[None], None if y is None else y[None]), (0, None if y is None else 0)
                )(x, y)
            except RuntimeError:
                at_once = False
        if not at_once:
            values = torch.stack(
                [function(x[i : i + 1], None if y is None else y[i : i + 1]) for i in range(len(rows))]
            )
        found = values.new_empty(len(inputs), *values.shape[1:]) if found is None else found
        found[rows] = values.detach()
        done += len(rows)
        if on_step is not None:
            on_step(done, len(inputs), 0.0)
    assert found is not None, "no samples"
    return found


def alike(inputs: Any) -> Iterator[list[int]]:
    """Rows of samples of one shape, at most `MOST_AT_ONCE` together; the longest texts first, so that what does not fit fails at once."""
    lengths = [0 if isinstance(inputs, Tensor) else len(row) for row in inputs]
    for length in sorted(set(lengths), reverse=True):
        rows = [i for i, own in enumerate(lengths) if own == length]
        yield from (rows[first : first + MOST_AT_ONCE] for first in range(0, len(rows), MOST_AT_ONCE))
