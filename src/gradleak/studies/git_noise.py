"""How GIT's error grows with Gaussian noise on the gradient, trained without and with that noise.

The paper claims less than 5 % more error at standard deviations of 0.01 and 0.1.
"""

from collections.abc import Iterator

from matplotlib.figure import Figure

from gradleak.observations.defenses import Defense, GaussianNoise, Sign, TopK
from gradleak.studies.findings import Findings, Row, Size, Start, opening, plot
from gradleak.studies.learned_victims import GIT, fit, found_for, prepare, scores

DEFENSES: dict[str, Defense | None] = {
    "none": None,
    "noise 0.001": GaussianNoise(0.001),
    "noise 0.01": GaussianNoise(0.01),
    "noise 0.1": GaussianNoise(0.1),
    "sign": Sign(),
    "top 1 %": TopK(0.01),
}
# pairs, epochs, unseen pictures
SIZES: dict[Size, tuple[int, int, int]] = {
    "smoke": (100, 3, 20),
    "small": (10_000, 2, 1_000),
    "paper": (10_000, 30, 1_000),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every defense; the findings so far."""
    pairs, epochs, private = SIZES[size]
    field, rows = prepare("lenet", data, size, seed, pairs, private), list[Row]()
    clean, _ = fit(field, "git", GIT[size], pairs=pairs, epochs=epochs, seed=seed, on_step=start("no defense"))
    mean = field.public.images.mean(0).expand_as(field.private.images)
    rows.append({"shared": "nothing (mean image)", "trained_on": "", **scores(mean, field.private.images)})
    for name, defense in DEFENSES.items():
        measured = scores(found_for(clean, field, field.private, defense), field.private.images)
        rows.append({"shared": name, "trained_on": "whole gradients", **measured})
        if defense is not None:
            on_step = start(name)
            trained_generator, _ = fit(
                field, "git", GIT[size], pairs=pairs, epochs=epochs, seed=seed, on_step=on_step, defense=defense
            )
            measured = scores(found_for(trained_generator, field, field.private, defense), field.private.images)
            rows.append({"shared": name, "trained_on": "the same defense", **measured})
        yield findings(rows).after(opening(data, size, *field.notes(size, pairs, private)))


def findings(rows: list[Row]) -> Findings:
    """The table, the growth of the error in words, and both curves."""
    best = next((row["mse"] for row in rows if row["shared"] == "none"), None)
    parts = []
    for row in rows:
        if best and row["shared"].startswith("noise"):
            parts.append(f"{row['shared']}, trained on {row['trained_on']}: {row['mse'] / best - 1:+.0%}")
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for trained in ("whole gradients", "the same defense"):
        series = [row for row in rows if row["trained_on"] == trained]
        axes.plot(
            [row["shared"] for row in series], [row["mse"] for row in series], "o-", label=f"trained on {trained}"
        )
    axes.axhline(rows[0]["mse"], color="black", linestyle="--", label="mean image")
    axes.set(yscale="log", ylabel="mean squared error")
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=7)
    return Findings(
        rows, "GIT's error against that on whole gradients: " + "; ".join(parts) + ".", [plot("Noise", figure)]
    )
