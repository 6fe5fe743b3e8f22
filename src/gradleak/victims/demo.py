"""What `gradleak demo` captures: name of the victim, its settings, and the attacks that it is shown with. A minute has to do: efforts are
smaller than usual."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradleak.formats.secret_file import Secret
from gradleak.observations.observation import Observation
from gradleak.victims.play import CaptureAdapter, CaptureGradient, Start

TYPED = 42  # the seed of most fine-tunings


def fine_tuning(out: Path, seed: int, start: Start) -> tuple[Observation[Any], Secret]:
    """Four pictures, two hundred steps."""
    adapted = CaptureAdapter(model="mlp", epochs=0, rank=16, lr=1e-3, steps=200, indices=tuple(range(4)))
    return adapted(out, TYPED, start)


# The parameters of each attack that are not its usual ones.
Shown = Mapping[str, Mapping[str, Any]]
DEMO: dict[str, tuple[Callable[[Path, int, Start], tuple[Observation[Any], Secret]], Shown]] = {
    "adapter": (
        CaptureAdapter(model="convnet", target_modules="all", epochs=1, reveal_labels=True),
        {"map-inversion": {"evaluations": 30}},
    ),
    "fine-tuning": (fine_tuning, {"unmixing": {"searches": 4, "polish": 2}}),
    "gradient": (CaptureGradient(), {"recursive": {}}),
}
