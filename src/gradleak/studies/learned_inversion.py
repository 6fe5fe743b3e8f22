"""Learned inversion of LeNet: GIT against LTI, a plain perceptron of GIT's size, the recursion, DLG and Inverting Gradients.

GIT is published with a mean squared error of 0.010 on CIFAR-10 with 10,000 pairs, LTI with 0.015. The study also runs on other data.
"""

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean

from gradleak.attacks.dlg import DLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.recursion.recursive import Recursive
from gradleak.studies import learned_victims
from gradleak.studies.findings import Findings, name_of
from gradleak.studies.learned_victims import EQUAL, Trial, lenet, prepare, searched, tried, with_controls, with_interval
from gradleak.studies.study import Bench, Published, Result, Size
from gradleak.studies.table import Table

LTI_EPOCHS: dict[Size, int] = {"smoke": 1, "small": 10, "paper": 200}
SEARCHED: dict[Size, tuple[int, int]] = {"smoke": (1, 20), "small": (4, 1_000), "paper": (20, 4_000)}  # pictures, steps


def settings(data: str, size: Size) -> Iterator[Trial]:
    """The generators, then the attacks that are not trained."""
    git = lenet(size, 6)
    yield from with_controls(git)
    yield replace(git, method="lti", epochs=LTI_EPOCHS[size])
    for name in ("recursive", "dlg", "inverting-gradients"):
        yield replace(git, method=name, epochs=0, unseen=SEARCHED[size][0])


def cell(trial: Trial, bench: Bench) -> Result:
    """One method."""
    attacks = {
        "recursive": Recursive(),
        "dlg": DLG(evaluations=20, rounds=0, restarts=1) if bench.size == "smoke" else DLG(),
        "inverting-gradients": InvertingGradients(steps=SEARCHED[bench.size][1]),
    }
    if trial.method in attacks:
        victim = prepare(trial, bench.data, bench.size, bench.seed)
        result = searched(victim, [attacks[trial.method]] * len(victim.private.images), bench)
    else:
        result = tried(trial, bench)
    return replace(result, facts={**result.facts, "data": name_of(bench.data)})


def tell(table: Table) -> Findings:
    """The errors, and GIT's lead over the perceptron of equal size over seeds."""
    findings = learned_victims.told(table)
    seeds = dict.fromkeys(table.sampled("seed"))
    both = [[table.sampled("mse", method=name, seed=seed) for name in ("git", EQUAL)] for seed in seeds]
    lead = [fmean(plain) - fmean(git) for git, plain in both if git and plain]
    said = f" The perceptron's error minus GIT's: {with_interval(lead, 4)} over {len(lead)} seeds." if lead else ""
    return replace(findings, sentence=findings.sentence + said)


STUDY = learned_victims.study_of_trials(
    name="learned-inversion",
    question="What does a generator, trained on public pictures, read from one gradient, beside attacks without training?",
    settings=settings,
    cell=cell,
    tell=tell,
    seeds=lambda size: 2 if size == "smoke" else 3,
    published=(
        Published({"method": "git", "data": "cifar10", "pairs": 10_000}, "mse", 0.010, "GIT, CIFAR-10, LeNet, batch 1"),
        Published({"method": "lti", "data": "cifar10", "pairs": 10_000}, "mse", 0.015, "LTI, in the paper of GIT"),
    ),
)
