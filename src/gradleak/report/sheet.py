"""One picture of a whole audit: truth, what each attack recovered, and the controls, side by side."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from gradleak.report.record import Numbers, Record, Result

MOST_ROWS = 8


def save_sheet(record: Record, path: Path) -> None:
    """A PNG with one row per private image of the last observation (the first eight); nothing is written when no pictures
    were scored."""
    rows = [row for row in record["results"] if row["scores"] and row.get("media") == "image/png"]
    if not rows:
        return
    from matplotlib.figure import Figure  # a third of a second, on every command that writes no picture
    from PIL import Image

    last = rows[-1]
    scored: list[Result] = [row for row in rows if row["observation"] == last["observation"]]
    metric, described = next(iter(last["scores"])), record.get("metrics", {})
    unit = described[metric]["unit"] if metric in described else ""
    labels = {name: control["label"] for name, control in record.get("controls", {}).items()}
    columns: list[tuple[str, Sequence[str], Numbers | None]] = [("Truth", last["shown"]["truth"], None)]
    columns += [(row["attack"], row["shown"]["reconstruction"], row["scores"].get(metric)) for row in scored]
    columns += [
        (labels.get(name, name), last["shown"][name], scores.get(metric)) for name, scores in last["controls"].items()
    ]
    count = min(len(columns[0][1]), MOST_ROWS)
    figure = Figure(figsize=(1.6 * len(columns), 1.9 * count), layout="constrained")
    grid = figure.subplots(count, len(columns), squeeze=False)
    for column, (name, pictures, values) in enumerate(columns):
        for row in range(count):
            axes = grid[row, column]
            picture = Image.open(io.BytesIO(base64.b64decode(pictures[row].partition(",")[2])))
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=name if row == 0 else "")
            axes.title.set_fontsize(8)
            if values is not None and values[row] is not None:
                axes.set_xlabel(f"{values[row]:.1f} {unit}".rstrip(), fontsize=8)
    figure.savefig(path, dpi=130)
