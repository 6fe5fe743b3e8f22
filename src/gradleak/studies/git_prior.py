"""A reconstruction as the start of a search: DLG and Inverting Gradients from noise and from GIT, at equal steps.

The GIT paper claims two to three times the PSNR for Inverting Gradients that starts from GIT.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from matplotlib.figure import Figure

from gradleak.attacks.dlg import DLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.search.start import Given
from gradleak.audit.metrics import psnr_db
from gradleak.studies.data_sets import rows_of
from gradleak.studies.findings import Findings, Row, Size, Start, interval, opening, plot
from gradleak.studies.learned_victims import GIT, Field, fit, found_for, prepare, scores
from gradleak.victims.gradient import capture_gradient

# pairs, epochs, private pictures, steps of a search
SIZES: dict[Size, tuple[int, int, int, tuple[int, ...]]] = {
    "smoke": (100, 3, 1, (5,)),
    "small": (10_000, 3, 8, (100, 300, 1_000)),
    "paper": (10_000, 30, 20, (300, 4_000)),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every search; the findings so far."""
    pairs, epochs, private, budgets = SIZES[size]
    field = prepare("lenet", data, size, seed, pairs, private)
    git, _ = fit(field, "git", GIT[size], pairs=pairs, epochs=epochs, seed=seed, on_step=start("git"))
    images, true = found_for(git, field, field.private), field.private.images
    rows: list[Row] = [{"search": "none", "start": "git", "steps": 0, **scores(images, true), "seconds": 0.0}]
    guesses = zip(images, field.private.labels, strict=True)
    starts: dict[str, list[Given | None]] = {
        "noise": [None] * len(true),
        "git": [Given(Reconstruction(x[None], y[None], 0.0, "", Outcome.GUESSED)) for x, y in guesses],
    }
    for steps in budgets:
        searches = {
            "inverting-gradients": lambda given, steps=steps: InvertingGradients(steps=steps, start=given),
            "inverting-gradients, small steps": lambda given, steps=steps: InvertingGradients(
                steps=steps, step_size=0.01, tv_weight=1e-3, start=given
            ),
            "dlg": lambda given, steps=steps: DLG(evaluations=steps, rounds=0, restarts=1, start=given),
        }
        for name, search in searches.items():
            for origin, given in starts.items():
                on_step = start(f"{name}, {steps} steps from {origin}")
                rows.append(
                    {"search": name, "start": origin, "steps": steps, **row(field, search, given, seed, on_step)}
                )
                yield findings(rows).after(opening(data, size, *field.notes(size, pairs, private)))


def row(field: Field, search: Callable[[Any], Any], given: list[Given | None], seed: int, on_step: OnStep) -> Row:
    """The search on every private picture, one after another, each from its own start."""
    recovered, began = [], time.process_time()
    for i, origin in enumerate(given):
        one = rows_of(field.private, i, 1)
        observation, _ = capture_gradient(field.model, one)
        recovered.append(search(origin)(observation, generator=torch.Generator().manual_seed(seed)).value)
        on_step(i + 1, len(given), float(psnr_db(recovered[-1], one.images)))
    images = torch.cat(recovered)
    seconds = round((time.process_time() - began) / len(given), 1)
    each = psnr_db(images, field.private.images).tolist()
    return {**scores(images, field.private.images), "seconds": seconds, "psnr_each": [round(v, 1) for v in each]}


def findings(rows: list[Row]) -> Findings:
    """The table, what the start is worth in decibels, and PSNR against steps."""
    parts = []
    for a in rows:
        for b in rows:
            if (a["search"], a["steps"], a["start"], b["start"]) == (b["search"], b["steps"], "noise", "git"):
                gain = [y - x for x, y in zip(a["psnr_each"], b["psnr_each"], strict=True)]
                half = interval(gain)
                more = f" +- {half:.1f}" if half is not None else ""
                parts.append(f"{a['search']}, {a['steps']} steps: {sum(gain) / len(gain):+.1f}{more} dB")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, origin in dict.fromkeys((r["search"], r["start"]) for r in rows[1:]):
        series = [r for r in rows if (r["search"], r["start"]) == (name, origin)]
        style = "o-" if origin == "git" else "o--"
        axes.plot([r["steps"] for r in series], [r["psnr_db"] for r in series], style, label=f"{name} from {origin}")
    axes.axhline(rows[0]["psnr_db"], color="black", linestyle=":", label="git alone")
    axes.set(xscale="log", xlabel="steps", ylabel="PSNR in dB")
    axes.legend(fontsize=6)
    table = [{k: v for k, v in r.items() if k != "psnr_each"} for r in rows]
    return Findings(
        table, "What GIT as the start is worth: " + "; ".join(parts) + ".", [plot("From noise or GIT", figure)]
    )
