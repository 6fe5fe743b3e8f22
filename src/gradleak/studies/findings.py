"""What a recipe has found so far: it yields one of these after every piece of work, so that nothing finished is lost."""

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from gradleak.report.record import Plot, Result


@dataclass(frozen=True)
class Findings:
    """table: flat rows, one per setting; sentence: what they say, in words; results: examples with pictures."""

    table: list[dict[str, Any]]
    sentence: str
    plots: list[Plot] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)


def plot(title: str, figure: Figure) -> Plot:
    """A finished figure as a PNG data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return {"title": title, "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean (Student's t); None below two values."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    return float(t.ppf(0.975, n - 1) * deviation / n**0.5)
