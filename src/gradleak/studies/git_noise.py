"""How GIT's error grows with Gaussian noise on the gradient, trained without and with that noise.

The paper claims less than 5 % more error at standard deviations of 0.01 and 0.1.
"""

from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.figure import Figure

from gradleak.attacks.search.descend import OnStep
from gradleak.observations.defenses import GaussianNoise, Sign, TopK
from gradleak.studies.findings import Findings, plot
from gradleak.studies.learned_victims import fit, found_for, prepare, scores

LEAKS = {
    "none": None,
    "noise 0.001": GaussianNoise(0.001),
    "noise 0.01": GaussianNoise(0.01),
    "noise 0.1": GaussianNoise(0.1),
    "sign": Sign(),
    "top 1 %": TopK(0.01),
}
SIZES = {
    "quick": (300, 2, 40),
    "small": (10_000, 2, 1_000),
    "paper": (10_000, 30, 1_000),
}  # pairs, epochs, unseen pictures


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every leak; the findings so far."""
    pairs, epochs, private = SIZES["quick" if data in ("embedded", "digits") else size]
    field, rows = prepare("lenet", data, seed, pairs, private), list[dict[str, Any]]()
    clean, _ = fit(field, "git", {"hidden": 64}, pairs=pairs, epochs=epochs, seed=seed, on_step=start("no leak"))
    mean = field.public.images.mean(0).expand_as(field.private.images)
    rows.append({"shared": "nothing (mean image)", "trained_on": "", **scores(mean, field.private.images)})
    for name, leak in LEAKS.items():
        told = scores(found_for(clean, field, field.private, leak), field.private.images)
        rows.append({"shared": name, "trained_on": "whole gradients", **told})
        if leak is not None:
            on_step = start(name)
            own, _ = fit(
                field, "git", {"hidden": 64}, pairs=pairs, epochs=epochs, seed=seed, on_step=on_step, defense=leak
            )
            told = scores(found_for(own, field, field.private, leak), field.private.images)
            rows.append({"shared": name, "trained_on": "the same leak", **told})
        yield findings(rows)


def findings(rows: list[dict[str, Any]]) -> Findings:
    """The table, the growth of the error in words, and both curves."""
    best = next((row["mse"] for row in rows if row["shared"] == "none"), None)
    parts = []
    for row in rows:
        if best and row["shared"].startswith("noise"):
            parts.append(f"{row['shared']}, trained on {row['trained_on']}: {row['mse'] / best - 1:+.0%}")
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for trained in ("whole gradients", "the same leak"):
        own = [row for row in rows if row["trained_on"] == trained]
        axes.plot([row["shared"] for row in own], [row["mse"] for row in own], "o-", label=f"trained on {trained}")
    axes.axhline(rows[0]["mse"], color="black", linestyle="--", label="mean image")
    axes.set(yscale="log", ylabel="mean squared error")
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=7)
    return Findings(
        rows, "GIT's error against that on whole gradients: " + "; ".join(parts) + ".", [plot("Noise", figure)]
    )
