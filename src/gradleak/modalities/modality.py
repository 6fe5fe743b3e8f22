"""What a kind of private data has to provide. pictures.py and texts.py do; a third kind is a file beside them.

A *blueprint* is the public part of a model of that kind: how it is built, what it is fed with, how its outputs meet the
labels. `observations.Model` holds it beside the parameters and asks it whatever differs from kind to kind.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

Tokens = tuple[tuple[int, ...], ...]  # a batch of sentences, each of token ids
Inputs = (
    Tensor | Tokens
)  # a batch as the model takes it: pictures (n, channel, height, width) in [0, 1], or n sentences
Fact = dict[str, str | bool]  # one row of the threat-model table: item, revealed, detail


class Blueprint(Protocol):
    """The public part of a model."""

    modality: ClassVar[str]  # the name of the kind of data, a key of `audit.scoring.SCORING`
    secret: ClassVar[str]  # what the private inputs are called in a threat model

    @property
    def name(self) -> str:
        """For reports, and to build the model again."""

    @property
    def classes(self) -> int:
        """Number of labels that an input may have; 1 where the task has no labels of its own."""

    def arguments(self, inputs: Any, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module is called with for these inputs, on the device of `like`."""

    def logits(self, output: Any) -> Tensor:
        """The module's output as logits, classes last."""

    def compared(self, logits: Tensor, inputs: Any, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(logits, targets) as the loss takes them: one row per thing that is predicted."""

    def feed(self, data: Any, *, seed: int = 0) -> tuple[Any, Tensor | None]:
        """(inputs, labels) as a victim would train on these data; BadInput when they do not fit. The seed chooses masks."""

    def original(self, inputs: Any, labels: Tensor | None) -> Any:
        """The private inputs behind what the model was fed with: without masks."""

    def blank(self, count: int) -> Any:
        """What somebody returns who knows nothing: grey pictures, empty sentences."""

    def probe(self) -> tuple[Any, Tensor | None]:
        """(inputs, labels) that mean nothing, to see whether a model works."""

    def show(self, inputs: Any) -> list[str]:
        """One string per input for a report: a PNG as a data URI, or text."""

    def facts(self, labels: Tensor | None) -> list[Fact]:
        """Rows of the threat model: the architecture and whatever else of this kind is public."""

    def labels_detail(self) -> str:
        """What an attacker knows of labels that were not revealed."""


def fact(item: str, revealed: bool, detail: str) -> Fact:
    """One row of the threat model."""
    return {"item": item, "revealed": revealed, "detail": detail}


def by(shape: Sequence[int]) -> str:
    """A shape in words: 3x32x32."""
    return "x".join(map(str, shape)) or "scalar"
