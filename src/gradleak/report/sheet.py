"""One picture of a whole audit: truth, what each attack recovered, and the controls, side by side."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from gradleak.report.record import Numbers, Result

CONTROLS = ("mean_image", "nearest_public", "wrong_observation")
MOST_ROWS = 8


def save_sheet(results: list[Result], path: Path) -> None:
    """A PNG with one row per private image (the first eight); nothing is written when no result was scored."""
    scored = [row for row in results if row["scores"]]
    if not scored:
        return
    columns: list[tuple[str, Sequence[str], Numbers | None]] = [("truth", scored[0]["pictures"]["truth"], None)]
    columns += [(row["attack"], row["pictures"]["reconstruction"], row["scores"]["psnr_db"]) for row in scored]
    last = scored[-1]
    columns += [(name, last["pictures"][name], last["controls"][name]["psnr_db"]) for name in CONTROLS]
    rows = min(len(columns[0][1]), MOST_ROWS)
    figure = Figure(figsize=(1.6 * len(columns), 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures, psnr_db) in enumerate(columns):
        for row in range(rows):
            axes = grid[row, column]
            picture = Image.open(io.BytesIO(base64.b64decode(pictures[row].partition(",")[2])))
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=name.replace("_", " ") if row == 0 else "")
            axes.title.set_fontsize(8)
            if psnr_db is not None:
                axes.set_xlabel(f"{psnr_db[row]:.1f} dB", fontsize=8)
    figure.savefig(path, dpi=130)
