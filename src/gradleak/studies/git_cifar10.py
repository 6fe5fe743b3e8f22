"""Learned inversion of LeNet: GIT against LTI, a plain perceptron of GIT's size, the recursion, DLG and Inverting Gradients.

GIT's published mean squared error on CIFAR-10 with 10,000 pairs is 0.010, LTI's 0.015. `git-cifar10` also runs on other data.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from gradleak.studies.learned_victims import GIT, Field, equal_size, fit, found_for, prepare, scores
from gradleak.victims.gradient import capture_gradient


@dataclass(frozen=True, kw_only=True)
class Effort:
    """pairs, unseen: pictures; epochs of GIT and of LTI; seeds of GIT and the perceptron, and of LTI; widths of LTI; the attacks
    that are not trained, and on how many pictures."""

    pairs: int
    unseen: int
    epochs: int
    lti_epochs: int
    seeds: int
    lti_seeds: int
    lti: dict[str, Any] = field(default_factory=dict)
    searched: int
    dlg: DLG = field(default_factory=DLG)
    inverting_gradients: InvertingGradients

    @property
    def searches(self) -> dict[str, Any]:
        """By name."""
        return {"recursive": Recursive(), "dlg": self.dlg, "inverting-gradients": self.inverting_gradients}


SIZES: dict[Size, Effort] = {
    "smoke": Effort(
        pairs=100,
        unseen=20,
        epochs=3,
        lti_epochs=1,
        seeds=2,
        lti_seeds=1,
        lti={"widths": (100, 100)},
        searched=1,
        dlg=DLG(evaluations=20, rounds=0, restarts=1),
        inverting_gradients=InvertingGradients(steps=20),
    ),
    "small": Effort(
        pairs=10_000,
        unseen=1_000,
        epochs=6,
        lti_epochs=10,
        seeds=3,
        lti_seeds=1,
        searched=4,
        inverting_gradients=InvertingGradients(steps=1_000),
    ),
    "paper": Effort(
        pairs=10_000,
        unseen=1_000,
        epochs=30,
        lti_epochs=200,
        seeds=3,
        lti_seeds=3,
        searched=20,
        inverting_gradients=InvertingGradients(steps=4_000),
    ),
}


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every method and seed; the findings so far."""
    effort, rows = SIZES[size], list[Row]()
    pairs, epochs = effort.pairs, effort.epochs
    for s in range(seed, seed + effort.seeds):
        victim = prepare("lenet", data, size, s, pairs, effort.unseen)
        before = opening(data, size, *victim.notes(size, pairs, effort.unseen))
        true = victim.private.images
        mean = victim.public.images.mean(0).expand_as(true)
        rows.append({"method": "control: mean image", "seed": s, **scores(mean, true), "seconds": 0.0})
        row, network = trained(victim, "git", "git", GIT[size], pairs, epochs, s, start)
        rows.append(row)
        yield findings(rows).after(before)
        row, _ = trained(victim, "git, regression alone", "git", GIT[size], pairs, 0, s, start)
        rows.append(row)
        yield findings(rows).after(before)
        assert isinstance(network, Transcript)
        widths = {"widths": equal_size(victim, network)}
        row, _ = trained(victim, "perceptron of equal size", "lti", widths, pairs, 3 * epochs, s, start)
        rows.append(row)
        yield findings(rows).after(before)
        if s < seed + effort.lti_seeds:
            row, _ = trained(victim, "lti", "lti", effort.lti, pairs, effort.lti_epochs, s, start, learning_rate=1e-3)
            rows.append(row)
            yield findings(rows).after(before)
    victim = prepare("lenet", data, size, seed, pairs, effort.unseen)
    for name, attack in effort.searches.items():
        rows.append(searched_for(victim, name, attack, effort.searched, seed))
        yield findings(rows).after(before)


def trained(
    victim: Field,
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
    generator, seconds = fit(
        victim, kind, options, pairs=pairs, epochs=epochs, seed=seed, on_step=on_step, learning_rate=learning_rate
    )
    measured = scores(found_for(generator, victim, victim.private), victim.private.images)
    return {"method": method, "seed": seed, **measured, "seconds": round(seconds, 1), "pairs": pairs}, generator.network


def searched_for(victim: Field, name: str, attack: Any, count: int, seed: int) -> Row:
    """One row: an attack that is not trained, on the first private pictures, one after another."""
    recovered, seconds = [], 0.0
    for i in range(count):
        observation, _ = capture_gradient(victim.model, rows_of(victim.private, i, 1))
        began = time.process_time()
        recovered.append(attack(observation, generator=torch.Generator().manual_seed(seed)).value)
        seconds += time.process_time() - began
    measured = scores(torch.cat(recovered), victim.private.images[:count])
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
