"""What if the attacker assumes another depth or width? GIT laid out like another model, on the same pairs of LeNet.

An open question of the GIT paper (its second). The gradients are the true model's; only the generator's layout is wrong.
"""

from collections.abc import Iterator
from typing import Any

from gradleak.studies.findings import Findings, Row, Size, Start, opening
from gradleak.studies.learned_victims import GIT, fit, found_for, prepare, scores

# pairs, epochs, unseen pictures
SIZES: dict[Size, tuple[int, int, int]] = {
    "smoke": (100, 3, 20),
    "small": (10_000, 2, 1_000),
    "paper": (10_000, 30, 1_000),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "the true one": {},
    "a perceptron": {"layout": "mlp"},
    "two convolutions": {"layout": "convnet"},
}
LAYOUTS |= {"a residual network": {"layout": "resnet20"}, "half as wide": {"width": 24}, "twice as wide": {"width": 96}}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every layout; the findings so far."""
    pairs, epochs, private = SIZES[size]
    field, rows = prepare("lenet", data, size, seed, pairs, private), list[Row]()
    before = opening(data, size, *field.notes(size, pairs, private))
    true = field.private.images
    rows.append({"layout": "control: mean image", **scores(field.public.images.mean(0).expand_as(true), true)})
    alone, seconds = fit(field, "git", GIT[size], pairs=pairs, epochs=0, seed=seed)
    measured = {**scores(found_for(alone, field, field.private), true), "seconds": round(seconds, 1)}
    rows.append({"layout": "none: regression alone", **measured})
    for layout, options in LAYOUTS.items():
        git, seconds = fit(
            field, "git", {**GIT[size], **options}, pairs=pairs, epochs=epochs, seed=seed, on_step=start(layout)
        )
        measured = {**scores(found_for(git, field, field.private), true), "seconds": round(seconds, 1)}
        rows.append({"layout": layout, **measured})
        parts = [f"{row['layout']} {row['mse']:.4f}" for row in rows]
        yield Findings(rows, f"{before}Mean squared error by the layout of the generator: {', '.join(parts)}.")
