"""What `gradleak demo` captures: name of the victim, its settings, and the attacks that it is shown with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradleak.formats.secret_file import Secret
from gradleak.observations.observation import Observation
from gradleak.victims.play import CaptureAdapter, CaptureGradient, Start

DEMO: dict[str, tuple[Callable[[Path, int, Start], tuple[Observation[Any], Secret]], tuple[str, ...]]] = {
    "adapter": (CaptureAdapter(model="convnet", target_modules="all"), ("map-inversion",)),
    "gradient": (CaptureGradient(), ("dlg", "idlg", "inverting-gradients")),
}
