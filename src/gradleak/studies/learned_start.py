"""A reconstruction as the start of a search: DLG and Inverting Gradients from noise and from GIT, at equal steps.

The GIT paper claims two to three times the PSNR for Inverting Gradients that starts from GIT.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gradleak.attacks.dlg import DLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.start import Given
from gradleak.studies.findings import Findings
from gradleak.studies.learned_victims import found_for, lenet, prepare, searched, trained, tried, with_interval
from gradleak.studies.plots import lines, panels
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

SMALL_STEPS = "inverting-gradients, small steps"
PRIVATE: dict[Size, int] = {"smoke": 1, "small": 8, "paper": 20}  # pictures
STEPS: dict[Size, tuple[int, ...]] = {"smoke": (5,), "small": (100, 300, 1_000), "paper": (300, 4_000)}


@dataclass(frozen=True)
class Setting:
    """start: noise or git."""

    search: str
    start: str
    steps: int


def settings(data: str, size: Size) -> Iterator[Setting]:
    """GIT alone, then every search from both starts."""
    yield Setting("none", "git", 0)
    for steps in STEPS[size]:
        for search in ("inverting-gradients", SMALL_STEPS, "dlg"):
            yield from (Setting(search, start, steps) for start in ("noise", "git"))


def cell(setting: Setting, bench: Bench) -> Result:
    """One search on every private picture, each from its own start."""
    trial = replace(lenet(bench.size, 3), unseen=PRIVATE[bench.size])
    if setting.search == "none":
        return tried(trial, bench)
    if setting.start == "noise":
        victim = prepare(trial, bench.data, bench.size, bench.seed)
        starts: list[Given | None] = [None] * len(victim.private.images)
    else:
        victim, git = trained(trial, bench.data, bench.size, bench.seed, prepare)
        guesses = zip(found_for(git, victim, victim.private), victim.private.labels, strict=True)
        starts = [Given(Reconstruction(x[None], y[None], 0.0, "", Outcome.GUESSED)) for x, y in guesses]
    return searched(victim, [attack(setting, start) for start in starts], bench)


def attack(setting: Setting, start: Given | None) -> DLG | InvertingGradients:
    """The search."""
    if setting.search == "dlg":
        return DLG(evaluations=setting.steps, rounds=0, restarts=1, start=start)
    if setting.search == SMALL_STEPS:
        return InvertingGradients(steps=setting.steps, step_size=0.01, tv_weight=1e-3, start=start)
    return InvertingGradients(steps=setting.steps, start=start)


def tell(table: Table) -> Findings:
    """What the start is worth in decibels, and PSNR against steps."""
    parts, rows = list[str](), [row for row in table.rows if row["steps"]]
    for search, steps in dict.fromkeys((row["search"], row["steps"]) for row in rows):
        both = [table.sampled("psnr_db", search=search, steps=steps, start=start) for start in ("noise", "git")]
        if all(both):
            gain = [there - here for here, there in zip(*both, strict=True)]
            parts.append(f"{search}, {steps} steps: {with_interval(gain, 1)} dB")
    figure, [axes] = panels(width=6)
    lines(axes, rows, "steps", "psnr_db", ["search", "start"])
    for alone in table.where(search="none"):
        axes.axhline(alone["psnr_db"], color="black", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="steps of the search (dotted: GIT alone)", ylabel="PSNR in dB")
    return Findings(f"What GIT as the start is worth: {'; '.join(parts)}.", {"From noise or GIT": figure})


STUDY = Study(
    name="learned-start",
    question="Is the picture that a trained generator finds worth more as the start of a search than noise?",
    settings=settings,
    cell=cell,
    together=lambda setting: setting.start if setting.start == "git" else setting,
    tell=tell,
)
