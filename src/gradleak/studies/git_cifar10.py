"""Learned inversion of LeNet: GIT against LTI, a plain perceptron of GIT's size, the recursion, DLG and Inverting Gradients.

GIT's published mean squared error on CIFAR-10 with 10,000 pairs is 0.010, LTI's 0.015. `git-cifar10` also runs on other data.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from gradleak.attacks.dlg import DLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.learned.git import Transcript
from gradleak.attacks.recursion.recursive import Recursive
from gradleak.studies.data_sets import rows_of
from gradleak.studies.findings import Findings, Row, Size, Start, interval, opening, plot
from gradleak.studies.learned_victims import Field, equal_size, fit, found_for, prepare, scores
from gradleak.victims.gradient import capture_gradient

# pairs, epochs of GIT, of LTI, seeds of GIT and the perceptron, of LTI, unseen pictures, pictures for searches, their steps
SIZES: dict[Size, tuple[int, int, int, int, int, int, int, int]] = {
    "smoke": (100, 3, 1, 2, 1, 20, 1, 50),
    "small": (10_000, 6, 10, 3, 1, 1_000, 4, 1_000),
    "paper": (10_000, 30, 200, 3, 3, 1_000, 20, 4_000),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every method and seed; the findings so far."""
    pairs, epochs, lti_epochs, seeds, lti_seeds, private, searched, steps = SIZES[size]
    rows = list[Row]()
    before = ""
    for s in range(seed, seed + seeds):
        field = prepare("lenet", data, size, s, pairs, private)
        before = opening(data, size, *field.notes(size, pairs, private))
        true = field.private.images
        mean = field.public.images.mean(0).expand_as(true)
        rows.append({"method": "control: mean image", "seed": s, **scores(mean, true), "seconds": 0.0})
        row, network = trained(field, "git", "git", {"hidden": 64}, pairs, epochs, s, start)
        rows.append(row)
        yield findings(rows).after(before)
        row, _ = trained(field, "git, regression alone", "git", {"hidden": 64}, pairs, 0, s, start)
        rows.append(row)
        yield findings(rows).after(before)
        assert isinstance(network, Transcript)
        widths = {"widths": equal_size(field, network)}
        row, _ = trained(field, "perceptron of equal size", "lti", widths, pairs, 3 * epochs, s, start)
        rows.append(row)
        yield findings(rows).after(before)
        if s < seed + lti_seeds:
            row, _ = trained(field, "lti", "lti", {}, pairs, lti_epochs, s, start, learning_rate=1e-3)
            rows.append(row)
            yield findings(rows).after(before)
    searches = {"recursive": Recursive(), "dlg": DLG(), "inverting-gradients": InvertingGradients(steps=steps)}
    for name, attack in searches.items():
        rows.append(searched_for(prepare("lenet", data, size, seed, pairs, private), name, attack, searched, seed))
        yield findings(rows).after(before)


def trained(
    field: Field,
    method: str,
    kind: str,
    options: dict[str, Any],
    pairs: int,
    epochs: int,
    seed: int,
    start: Start,
    learning_rate: float = 2e-3,
) -> tuple[Row, nn.Module]:
    """One row, of a generator trained here, and its network."""
    on_step = start(f"{method}, seed {seed}")
    made, seconds = fit(
        field, kind, options, pairs=pairs, epochs=epochs, seed=seed, on_step=on_step, learning_rate=learning_rate
    )
    measured = scores(found_for(made, field, field.private), field.private.images)
    return {"method": method, "seed": seed, **measured, "seconds": round(seconds, 1), "pairs": pairs}, made.network


def searched_for(field: Field, name: str, attack: Any, count: int, seed: int) -> Row:
    """One row: an attack that is not trained, on the first private pictures, one after another."""
    recovered, seconds = [], 0.0
    for i in range(count):
        observation, _ = capture_gradient(field.model, rows_of(field.private, i, 1))
        began = time.process_time()
        recovered.append(attack(observation, generator=torch.Generator().manual_seed(seed)).value)
        seconds += time.process_time() - began
    measured = scores(torch.cat(recovered), field.private.images[:count])
    return {"method": name, **measured, "seconds": round(seconds / count, 1), "seed": seed}


def findings(rows: list[Row]) -> Findings:
    """The table; GIT's lead over the perceptron of equal size over seeds; the errors as bars."""
    by = {m: [row["mse"] for row in rows if row["method"] == m] for m in dict.fromkeys(row["method"] for row in rows)}
    sentence = "Mean squared error: " + ", ".join(f"{m} {sum(v) / len(v):.4f}" for m, v in by.items()) + "."
    git, plain = by.get("git", []), by.get("perceptron of equal size", [])
    lead = [b - a for a, b in zip(git, plain, strict=False)]
    if len(lead) > 1:
        sentence += f" The perceptron's error minus GIT's: {sum(lead) / len(lead):.4f} +- {interval(lead):.4f} over {len(lead)} seeds."
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(by), [sum(v) / len(v) for v in by.values()])
    axes.set(xscale="log", xlabel="mean squared error per pixel")
    axes.invert_yaxis()
    return Findings(rows, sentence, [plot("Learned inversion of LeNet", figure)])
