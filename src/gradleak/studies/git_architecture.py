"""What if the attacker assumes another depth or width? GIT laid out like another model, on the same pairs of LeNet.

An open question of the GIT paper (its second). The gradients are the true model's; only the generator's layout is wrong.
"""

from collections.abc import Callable, Iterator
from typing import Any

from gradleak.attacks.search.descend import OnStep
from gradleak.studies.findings import Findings
from gradleak.studies.learned_victims import fit, found_for, prepare, scores

SIZES = {"quick": (300, 2, 40), "small": (10_000, 2, 1_000), "paper": (10_000, 30, 1_000)}  # pairs, epochs, unseen
LAYOUTS: dict[str, dict[str, Any]] = {
    "the true one": {},
    "a perceptron": {"layout": "mlp"},
    "two convolutions": {"layout": "convnet"},
}
LAYOUTS |= {"a residual network": {"layout": "resnet20"}, "half as wide": {"width": 24}, "twice as wide": {"width": 96}}


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every layout; the findings so far."""
    pairs, epochs, private = SIZES["quick" if data in ("embedded", "digits") else size]
    field, rows = prepare("lenet", data, seed, pairs, private), list[dict[str, Any]]()
    true = field.private.images
    rows.append({"layout": "control: mean image", **scores(field.public.images.mean(0).expand_as(true), true)})
    alone, seconds = fit(field, "git", {"hidden": 64}, pairs=pairs, epochs=0, seed=seed)
    told = {**scores(found_for(alone, field, field.private), true), "seconds": round(seconds, 1)}
    rows.append({"layout": "none: regression alone", **told})
    for layout, options in LAYOUTS.items():
        git, seconds = fit(
            field, "git", {"hidden": 64, **options}, pairs=pairs, epochs=epochs, seed=seed, on_step=start(layout)
        )
        told = {**scores(found_for(git, field, field.private), true), "seconds": round(seconds, 1)}
        rows.append({"layout": layout, **told})
        parts = [f"{row['layout']} {row['mse']:.4f}" for row in rows]
        yield Findings(rows, f"Mean squared error by the layout of the generator: {', '.join(parts)}.")
