"""Learned inversion of LeNet: GIT against LTI, a plain perceptron of GIT's size, the recursion, DLG and Inverting Gradients.

GIT's published mean squared error on CIFAR-10 with 10,000 pairs is 0.010, LTI's 0.015. `git-cifar10` also runs on other data.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure

from gradleak.attacks.dlg import DLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.learned.git import Transcript
from gradleak.attacks.recursion.recursive import Recursive
from gradleak.attacks.search.descend import OnStep
from gradleak.studies.findings import Findings, interval, plot
from gradleak.studies.learned_victims import Field, equal_size, fit, found_for, prepare, scores
from gradleak.victims.gradient import capture_gradient

# pairs, epochs of GIT, of LTI, seeds of GIT and the perceptron, of LTI, unseen pictures, pictures for searches
SIZES = {
    "quick": (300, 3, 2, 2, 1, 40, 1),
    "small": (10_000, 6, 10, 3, 1, 1_000, 4),
    "paper": (10_000, 30, 200, 3, 3, 1_000, 20),
}


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every method and seed; the findings so far."""
    pairs, epochs, lti_epochs, seeds, lti_seeds, private, searched = SIZES[
        "quick" if data in ("embedded", "digits") else size
    ]
    rows: list[dict[str, Any]] = []
    for s in range(seed, seed + seeds):
        field = prepare("lenet", data, s, pairs, private)
        true = field.private.images
        mean = field.public.images.mean(0).expand_as(true)
        rows.append({"method": "control: mean image", "seed": s, **scores(mean, true), "seconds": 0.0})
        git, seconds = fit(
            field, "git", {"hidden": 64}, pairs=pairs, epochs=epochs, seed=s, on_step=start(f"git, seed {s}")
        )
        images = found_for(git, field, field.private)
        rows.append({"method": "git", "seed": s, **scores(images, true), "seconds": round(seconds, 1), "pairs": pairs})
        yield findings(rows)
        alone, seconds = fit(field, "git", {"hidden": 64}, pairs=pairs, epochs=0, seed=s)
        told = {"seconds": round(seconds, 1), "pairs": pairs}
        rows.append(
            {
                "method": "git, regression alone",
                "seed": s,
                **scores(found_for(alone, field, field.private), true),
                **told,
            }
        )
        yield findings(rows)
        assert isinstance(git.network, Transcript)
        widths = equal_size(field, git.network)
        plain, seconds = fit(
            field,
            "lti",
            {"widths": widths},
            pairs=pairs,
            epochs=3 * epochs,
            seed=s,
            on_step=start(f"perceptron, seed {s}"),
        )
        told = {"seconds": round(seconds, 1), "pairs": pairs}
        rows.append(
            {
                "method": "perceptron of equal size",
                "seed": s,
                **scores(found_for(plain, field, field.private), true),
                **told,
            }
        )
        yield findings(rows)
        if s < seed + lti_seeds:
            on_step = start(f"lti, seed {s}")
            lti, seconds = fit(
                field, "lti", {}, pairs=pairs, epochs=lti_epochs, seed=s, on_step=on_step, learning_rate=1e-3
            )
            told = {"seconds": round(seconds, 1), "pairs": pairs}
            rows.append({"method": "lti", "seed": s, **scores(found_for(lti, field, field.private), true), **told})
            yield findings(rows)
    for name, attack in searches(size).items():
        rows.append(searched_for(prepare("lenet", data, seed, pairs, private), name, attack, searched, seed))
        yield findings(rows)


def searches(size: str) -> dict[str, Any]:
    """The attacks that are not trained."""
    steps = 4_000 if size == "paper" else 1_000
    return {"recursive": Recursive(), "dlg": DLG(), "inverting-gradients": InvertingGradients(steps=steps)}


def searched_for(field: Field, name: str, attack: Any, count: int, seed: int) -> dict[str, Any]:
    """One row: an attack on the first private pictures, one after another."""
    found, seconds = [], 0.0
    for i in range(count):
        one = replace(field.private, images=field.private.images[i : i + 1], labels=field.private.labels[i : i + 1])
        observation, _ = capture_gradient(field.model.architecture.build(seed), field.model.architecture, one)
        began = time.process_time()
        found.append(attack(observation, generator=torch.Generator().manual_seed(seed)).images)
        seconds += time.process_time() - began
    told = {"seconds": round(seconds / count, 1), "seed": seed}
    return {"method": name, **scores(torch.cat(found), field.private.images[:count]), **told}


def findings(rows: list[dict[str, Any]]) -> Findings:
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
