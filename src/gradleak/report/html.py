"""The report: one HTML page, a pure function of the record.

The page is one file without scripts or outside resources, and its content security policy forbids both. Every string
of the record is untrusted (a recovered text may be a web page): Jinja2 escapes all of them. A picture that is not an
embedded PNG is left out, and a note stands in its place, so that one bad picture does not cost the reader the rest.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, TypeVar

from jinja2 import Environment, StrictUndefined, Template

from gradleak.report.record import Labels, Numbers, Record, Result, Scores, Texts

T = TypeVar("T")
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")
SERIES = {  # the columns, in reading order
    "truth": "Truth",
    "reconstruction": "Reconstruction",
    "mean_image": "Mean image",
    "nearest_public": "Nearest public",
    "wrong_observation": "Wrong observation",
}
ORACLES = ("nearest_public",)  # controls chosen with the truth in hand; all others are blind
MOST_POINTS = 400  # of a curve; a trace may have one point per step
LEFT, TOP, WIDTH, HEIGHT = 64, 8, 560, 180  # of a curve's axes, in pixels


class Metric(NamedTuple):
    """How a metric is written: sign is +1 where more is better, -1 where less is, 0 where we do not know."""

    label: str
    unit: str
    decimals: int
    sign: int


METRICS = {
    "psnr_db": Metric("PSNR", "dB", 2, +1),
    "ssim": Metric("SSIM", "", 3, +1),
    "lpips": Metric("LPIPS", "", 3, -1),
    "mse": Metric("MSE", "", 5, -1),
    "rouge1": Metric("ROUGE-1", "", 3, +1),
    "rouge2": Metric("ROUGE-2", "", 3, +1),
    "rouge_l": Metric("ROUGE-L", "", 3, +1),
    "exact_match": Metric("Word for word", "", 0, +1),
    "position_accuracy": Metric("Right places", "", 3, +1),
    "identification_rank": Metric("Rank", "", 0, -1),
}


class Cell(NamedTuple):
    """One picture of the gallery: a safe URI, or None with a note; the scores beneath it."""

    uri: str | None
    note: str
    captions: list[str]


class ScoreGroup(NamedTuple):
    """The columns of one metric: the attack, each control, the gap. The last row holds the means."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    has_gap: bool


class Tick(NamedTuple):
    at: float  # pixels
    text: str


class Curve(NamedTuple):
    """A loss curve in pixels: one string of "x,y" points for each unbroken piece."""

    pieces: list[str]
    across: list[Tick]
    up: list[Tick]
    is_log: bool
    every: int  # only every so many points are drawn


def render(record: Record) -> str:
    """The report as one self-contained HTML page. The same record gives the same page, and is not changed.

    Numbers that are null (or not finite, in a record that was never written) are shown as an en dash.
    """
    results = record["results"]
    page = _template().render(
        record=record,
        sections=[_section(result) for result in results],
        comparison=_comparison(results) if len(results) > 1 else None,
        table=record.get("table", []),
        table_heads=_heads(record.get("table", [])),
        plots=[(plot["title"], _safe(plot["image"])) for plot in record.get("plots", [])],
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a recovered text cannot be saved


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": plain, "describe": describe}
    return environment.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))


def plain(value: Any) -> str:
    """Any JSON value as a reader expects it: nested ones as JSON, missing numbers as an en dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str | int):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def describe(value: Mapping[str, Any] | None) -> str:
    """A choice that travels as data: {"kind": "Prune", "share": 0.9} becomes "Prune (share 0.9)"."""
    if not value:
        return "none"
    rest = ", ".join(f"{key} {plain(entry)}" for key, entry in value.items() if key != "kind")
    kind = plain(value.get("kind", ""))
    return f"{kind} ({rest})" if kind and rest else kind or rest


def _section(result: Result) -> dict[str, Any]:
    """What the template needs to draw one result."""
    pictures = result.get("pictures", {})
    texts = result.get("texts") or Texts(reconstruction=[])
    labels = result.get("labels") or Labels(recovered=[])
    images = max(map(len, pictures.values()), default=0)
    return {
        "result": result,
        "columns": [_series_label(name) for name in _ordered(pictures, SERIES)],
        "gallery": [[_cell(result, name, i) for name in _ordered(pictures, SERIES)] for i in range(images)],
        "texts": [(_at(texts.get("truth", []), i), text) for i, text in enumerate(texts["reconstruction"])],
        "labels": labels,
        "labels_right": (Counter(labels["recovered"]) & Counter(labels.get("true", []))).total(),
        "sample": "Image" if pictures else "Text" if texts["reconstruction"] else "Sample",
        "scores": [_score_group(name, result) for name in _ordered(result["scores"], METRICS)],
        "curve": _curve(result.get("trace", [])),
        "residual": _number(result["residual"], ".3g"),
        "seconds": _number(result["seconds"], ",.2f"),
    }


def _heads(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """The columns of a recipe's table in the order in which they turn up, and whether all they hold is numbers."""
    columns = {key: [row.get(key) for row in table] for row in table for key in row}
    return [(key, all(value is None or type(value) in (int, float) for value in columns[key])) for key in columns]


def _cell(result: Result, name: str, index: int) -> Cell:
    picture = _at(result.get("pictures", {})[name], index)
    uri = _safe(picture)
    note = "" if uri else "no picture" if picture is None else "left out: not an embedded PNG"
    if name == "truth":
        return Cell(uri, note, [f"Image {index + 1}"])
    scores = result["scores"] if name == "reconstruction" else result["controls"].get(name, {})
    captions = [
        f"{METRICS[metric].label} {_score(metric, _at(scores[metric], index))} {METRICS[metric].unit}".strip()
        for metric in ("psnr_db", "ssim", "identification_rank")
        if metric in scores
    ]
    return Cell(uri, note, captions)


def _score_group(name: str, result: Result) -> ScoreGroup:
    """One metric, per sample and on average, beside the controls that have it; the gap is to the best blind one."""
    controls = {key: result["controls"][key] for key in _ordered(result["controls"], SERIES)}
    beside = {key: scores[name] for key, scores in controls.items() if scores.get(name)}
    columns = [result["scores"][name], *beside.values()]
    metric = _metric(name)
    blind = [k for k, key in enumerate(beside, start=1) if key not in ORACLES]
    has_gap = bool(blind) and metric.sign != 0

    def row(texts: list[str], values: list[float | None]) -> list[str]:
        return [*texts, _gap(name, values[0], [values[k] for k in blind])] if has_gap else texts

    samples = [[_at(column, i) for column in columns] for i in range(max(map(len, columns)))]
    means = [_mean(column) if _share(column) == "" else None for column in columns]  # a gap of like with like
    rows = [row([_score(name, value) for value in values], values) for values in samples]
    rows.append(row([_mean_text(name, column) for column in columns], means))
    heads = ["Attack", *map(_series_label, beside), *(["Gap"] if has_gap else [])]
    return ScoreGroup(_title(name), heads, rows, has_gap)


def _comparison(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """All results in one table, as (heads, rows): means, the best blind control, how many were identified, the cost."""
    found = _ordered({name: None for result in results for name in result["scores"]}, METRICS)
    names = [name for name in found if name != "identification_rank"]
    has_ranks = "identification_rank" in found
    heads = [f"Mean {_title(name)}" for name in names] + ["Identified"] * has_ranks + ["Residual", "Seconds", "Flags"]
    heads[1:1] = [f"Best blind control, {_title(names[0])}"] if names else []
    rows = []
    for result in results:
        row = [_mean_text(name, result["scores"].get(name, [])) for name in names]
        row[1:1] = [_best_blind(names[0], result["controls"])] if names else []
        ranks = result["scores"].get("identification_rank", [])
        row += [f"{sum(rank == 1 for rank in ranks)} of {len(ranks)}" if ranks else DASH] * has_ranks
        levels = Counter(flag["level"] for flag in result["flags"])
        flags = ", ".join(f"{levels[level]} {level}" for level in ("error", "warning", "info") if levels[level])
        rows.append([*row, _number(result["residual"], ".3g"), _number(result["seconds"], ",.2f"), flags or "none"])
    return heads, rows


def _best_blind(name: str, controls: Mapping[str, Scores]) -> str:
    """The best mean among the blind controls and whose it is."""
    blind = {key: scores.get(name, []) for key, scores in controls.items() if key not in ORACLES}
    means = {key: mean for key, values in blind.items() if (mean := _mean(values)) is not None}
    if not means or (sign := _metric(name).sign) == 0:
        return DASH
    best = max(means, key=lambda key: sign * means[key])
    return f"{_mean_text(name, blind[best])} ({_series_label(best).lower()})"


def _gap(name: str, attack: float | None, controls: Sequence[float | None]) -> str:
    """How far the attack is ahead of the best control; positive says that it did better than all of them."""
    metric, known = _metric(name), _present([attack, *controls])
    if len(known) <= len(controls):  # a control without a number may be the best one
        return DASH
    own, *others = [metric.sign * value for value in known]
    return _number(own - max(others), f"+.{metric.decimals}f")


def _metric(name: str) -> Metric:
    return METRICS.get(name, Metric(name, "", 4, 0))


def _title(name: str) -> str:
    metric = _metric(name)
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def _series_label(name: str) -> str:
    return SERIES.get(name, name.replace("_", " ").capitalize())


def _ordered(names: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The names in the order of `known`, then the unknown ones as they come."""
    return [name for name in known if name in names] + [name for name in names if name not in known]


def _at(values: Sequence[T], index: int) -> T | None:
    return values[index] if index < len(values) else None


def _safe(uri: str | None) -> str | None:
    """The URI of an embedded PNG, or None: nothing else may stand in an image's source."""
    return uri if uri is not None and PICTURE.fullmatch(uri) else None


def _number(value: float | None, form: str) -> str:
    return DASH if value is None or not math.isfinite(value) else format(value, form).replace("-", MINUS)


def _score(name: str, value: float | None) -> str:
    return _number(value, f".{_metric(name).decimals}f")


def _present(values: Numbers) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Numbers) -> float | None:
    present = _present(values)
    return sum(present) / len(present) if present else None


def _share(values: Numbers) -> str:
    """How many of the numbers a mean is over, where some are missing."""
    present = len(_present(values))
    return "" if present in (0, len(values)) else f" ({present} of {len(values)})"


def _mean_text(name: str, values: Numbers) -> str:
    return _number(_mean(values), f".{max(1, _metric(name).decimals)}f") + _share(values)


def _curve(trace: Sequence[tuple[int, float | None]]) -> Curve | None:
    """The objective against the iteration; the line breaks at a missing value and where a restart begins again."""
    clean = [(i, v if v is not None and (v == 0 or 1e-300 < abs(v) < 1e300) else None) for i, v in trace]
    values = [v for _, v in clean if v is not None]
    if len(values) < 2:
        return None
    is_log = min(values) > 0
    every = math.ceil(len(clean) / MOST_POINTS)
    left, right = _limits([float(i) for i, _ in clean])
    low, high = _limits([math.log10(v) if is_log else v for v in values])

    def x(iteration: float) -> float:
        return LEFT + WIDTH * (iteration - left) / (right - left)

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - (math.log10(value) if is_log else value)) / (high - low)

    pieces: list[list[str]] = [[]]
    before = -math.inf
    for i, v in clean[:-1:every] + clean[-1:]:
        if v is None or i <= before:
            pieces.append([])
        if v is not None:
            pieces[-1].append(f"{x(i):.1f},{y(v):.1f}")
        before = i
    across = [Tick(round(x(i), 1), f"{i:,.0f}") for i in _round_numbers(left, right) if i == round(i)]
    decades = [10.0**e for e in range(math.ceil(low), math.floor(high) + 1)] if is_log else []
    if len(decades) > 1:
        up = [Tick(round(y(v), 1), f"{v:g}") for v in decades[:: math.ceil(len(decades) / 6)]]
    else:
        ends = (10.0**low, 10.0**high) if is_log else (low, high)
        up = [Tick(round(y(v), 1), f"{v:.4g}".replace("-", MINUS)) for v in _round_numbers(*ends)]
    return Curve([" ".join(piece) for piece in pieces if piece], across, up, is_log, every)


def _limits(values: list[float]) -> tuple[float, float]:
    """The smallest and the largest value, moved apart where they are (nearly) the same."""
    low, high = min(values), max(values)
    room = 0.0 if high - low > 1e-12 * max(abs(low), abs(high)) else abs(low) / 10 or 1.0
    return low - room, high + room


def _round_numbers(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten from low to high."""
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
