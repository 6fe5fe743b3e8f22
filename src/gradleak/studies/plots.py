"""Figures of one style, as PNG and PDF: lines with intervals, bars, maps. Colours that colour-blind readers tell apart."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradleak.studies.study import Row
from gradleak.studies.table import Table

if TYPE_CHECKING:  # processes that compute cells draw nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"
LONGEST = 60  # characters of a label


def panels(count: int = 1, width: float = 4.5, height: float = 3.2, columns: int = 3) -> "tuple[Figure, list[Axes]]":
    """A figure with so many axes, at most `columns` beside each other."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    for one in axes[:count]:
        one.set_prop_cycle(color=COLOURS)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes[:count]


def lines(
    axes: "Axes", rows: Iterable[Row], x: str, y: str, by: Sequence[str] = (), control: str | None = None
) -> None:
    """`y` against `x`, with its interval where it has one, a line for each value of the columns `by`; dashed the control's column."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get(y) is not None:
            groups.setdefault(tuple(row[name] for name in by), []).append(row)
    for number, (key, series) in enumerate(groups.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        xs, ys = [row[x] for row in series], [row[y] for row in series]
        label = ", ".join(map(str, key)) or None
        axes.plot(xs, ys, marker=marker, markersize=4, linewidth=1.2, color=colour, label=label)
        if all(row.get(f"{y}_low") is not None for row in series):
            low, high = ([row[f"{y}_{end}"] for row in series] for end in ("low", "high"))
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        if control is not None:
            blind: list[float] = [row[control] if row.get(control) is not None else np.nan for row in series]
            axes.plot(xs, blind, "--", color=colour, linewidth=0.8)
    if by and groups:
        axes.legend(fontsize=7, frameon=False)


def bars(axes: "Axes", rows: Sequence[Row], label: Callable[[Row], str], *values: str) -> None:
    """A horizontal bar per row and column of values, with its interval where it has one."""
    height = 0.8 / len(values)
    for number, value in enumerate(values):
        places = [i + height * (number - (len(values) - 1) / 2) for i in range(len(rows))]
        widths = [row.get(value) or 0.0 for row in rows]
        ends = [(row.get(f"{value}_low"), row.get(f"{value}_high")) for row in rows]
        errors = [
            [0.0 if low is None else max(w - low, 0.0) for w, (low, _) in zip(widths, ends, strict=True)],
            [0.0 if high is None else max(high - w, 0.0) for w, (_, high) in zip(widths, ends, strict=True)],
        ]
        axes.barh(places, widths, height, xerr=errors, label=value, color=COLOURS[number % len(COLOURS)], capsize=2)
    axes.set_yticks(range(len(rows)), [label(row)[-LONGEST:] for row in rows], fontsize=7)
    axes.invert_yaxis()
    if len(values) > 1:
        axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(values))


def heat_map(axes: "Axes", rows: Sequence[Row], x: str, y: str, value: str, digits: int = 2) -> None:
    """`value` by two columns, written into its field."""
    across, up = (sorted({row[name] for row in rows}) for name in (x, y))
    grid = np.full((len(up), len(across)), np.nan)
    for row in rows:
        if row.get(value) is not None:
            grid[up.index(row[y]), across.index(row[x])] = row[value]
    image = axes.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
    axes.set(xlabel=x, ylabel=y, title=value)
    axes.set_xticks(range(len(across)), map(str, across))
    axes.set_yticks(range(len(up)), map(str, up))
    middle = np.nanmean(grid) if np.isfinite(grid).any() else 0.0
    for (line, place), number in np.ndenumerate(grid):
        if np.isfinite(number):
            ink = "white" if number < middle else "black"
            axes.text(place, line, f"{number:.{digits}f}", ha="center", va="center", color=ink, fontsize=8)
    axes.figure.colorbar(image, ax=axes)


def curve(table: Table, x: str, y: str, by: Sequence[str] = (), control: str | None = None, **labels: Any) -> "Figure":
    """One panel of `lines` over a whole table. labels: of the axes, as matplotlib takes them (xlabel, xscale, ...)."""
    figure, [axes] = panels(width=6)
    lines(axes, table.rows, x, y, by, control)
    axes.set(**({"xlabel": x, "ylabel": y} | labels))
    return figure


def in_words(title: str, figure: "Figure") -> str:
    """What a figure shows, for those who do not see it: its title, what stands against what, and the names of its lines or bars."""
    said = [title]
    for axes in figure.axes:
        ends = [text for text in (axes.get_ylabel(), axes.get_xlabel()) if text]
        legend = axes.get_legend()
        names = [text.get_text() for text in legend.get_texts()] if legend is not None else []
        parts = [axes.get_title(), " against ".join(ends), f"for {', '.join(names)}" if names else ""]
        said.append(" ".join(part for part in parts if part))
    return f"{'; '.join(dict.fromkeys(part for part in said if part))}. The numbers stand in the table."


def png(figure: "Figure") -> bytes:
    """For screens."""
    return saved(figure, "png", dpi=150)


def pdf(figure: "Figure") -> bytes:
    """For papers: lines and letters stay lines and letters; the same figure gives the same bytes."""
    return saved(figure, "pdf", metadata={"CreationDate": None})


def saved(figure: "Figure", kind: str, **options: Any) -> bytes:
    """The figure as a file of that kind."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, bbox_inches="tight", **options)
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """A PNG for a record."""
    return "data:image/png;base64," + base64.b64encode(image).decode()
