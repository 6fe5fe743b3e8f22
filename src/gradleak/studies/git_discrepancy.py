"""What if the victim has trained on since the generator was? Its error on gradients of a model that moved away.

The generator learns from pairs of the initial LeNet. The victim then trains on 1, 10 or 100 % of its pictures for 1, 10 or 50 epochs,
and releases gradients of other pictures. The paper: discrepancy roughly doubles the error.
"""

from collections.abc import Iterator
from dataclasses import replace

from matplotlib.figure import Figure

from gradleak.modalities.pictures import public_pool
from gradleak.observations.model import Model
from gradleak.observations.tensors import flatten
from gradleak.studies.data_sets import rows_of
from gradleak.studies.findings import Findings, Row, Size, Start, opening, plot, shortage
from gradleak.studies.learned_victims import GIT, fit, found_for, prepare, scores
from gradleak.victims.training import train

# pairs, epochs of the generator, unseen pictures, pictures of the victim
SIZES: dict[Size, tuple[int, int, int, int]] = {
    "smoke": (100, 3, 20, 100),
    "small": (10_000, 3, 1_000, 2_000),
    "paper": (10_000, 30, 1_000, 10_000),
}
SHARES = (0.01, 0.1, 1.0)
EPOCHS = (1, 10, 50)


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every state of the victim; the findings so far."""
    pairs, epochs, private, local = SIZES[size]
    field = prepare("lenet", data, size, seed, pairs, private)
    git, _ = fit(field, "git", GIT[size], pairs=pairs, epochs=epochs, seed=seed, on_step=start("git"))
    same = scores(found_for(git, field, field.private), field.private.images)
    rows: list[Row] = [{"share": 0.0, "epochs": 0, "weights_moved": 0.0, **same, "growth": 0.0}]
    architecture = field.model.architecture
    local_pool = public_pool(data, "train", shape=architecture.input_shape, limit=local, seed=2)
    local_pool = replace(local_pool, labels=local_pool.labels % architecture.classes)
    short = (*field.notes(size, pairs, private), shortage("pictures of the victim", local, len(local_pool.images)))
    start_of_sentence = opening(data, size, *short)
    before = flatten(field.model.parameters)
    for share in SHARES:
        pictures = rows_of(local_pool, 0, max(round(share * len(local_pool.images)), 2))
        for many in EPOCHS:
            module = architecture.build(seed)
            train(module, pictures, epochs=many, seed=seed, on_step=start(f"victim, {share:.0%}, {many} epochs"))
            moved = replace(field, model=Model.of(module.eval(), architecture))
            measured = scores(found_for(git, moved, field.private), field.private.images)
            distance = float((flatten(moved.model.parameters) - before).norm() / before.norm())
            growth = measured["mse"] / same["mse"] - 1
            rows.append(
                {
                    "share": share,
                    "epochs": many,
                    "weights_moved": round(distance, 4),
                    **measured,
                    "growth": round(growth, 3),
                }
            )
            yield findings(rows).after(start_of_sentence)


def findings(rows: list[Row]) -> Findings:
    """The table, and the error's growth against how far the weights moved."""
    over = sorted(row["weights_moved"] for row in rows if row["growth"] > 0.5)
    under = sorted(row["weights_moved"] for row in rows if row["growth"] <= 0.5)
    sentence = f"The error has grown by less than 50 % where the weights moved by up to {under[-1]:.1%}"
    sentence += f", and by more from {over[0]:.1%} on." if over else "; nothing here made it grow by more."
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["weights_moved"] for row in rows], [row["mse"] for row in rows], "o")
    axes.axhline(1.5 * rows[0]["mse"], color="black", linestyle="--", label="50 % more")
    axes.set(xlabel="relative change of the weights", ylabel="mean squared error", xscale="symlog", yscale="log")
    axes.legend(fontsize=7)
    return Findings(rows, sentence, [plot("A victim that has trained on", figure)])
