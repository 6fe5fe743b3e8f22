"""What the attacker must not see. Only victims (who keep it) and the audit (which opens it) import this file."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Secret:
    """The private training data behind an observation.

    images  (batch, channel, height, width) float32 in [0, 1]
    labels  (batch,) int64
    source  where they came from, e.g. "embedded test 0 1 2"; printed in reports that are scored
    """

    images: Tensor
    labels: Tensor
    source: str = ""


@dataclass(frozen=True)
class TextSecret:
    """The private texts behind an observation.

    texts   as they were
    tokens  as the model was fed with them, special tokens and masks included
    labels  (batch,) int64; (batch, longest) of a masked language model: the tokens under the masks, else -100; or None where
            the task has none
    source  where they came from
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    labels: Tensor | None = None
    source: str = ""
