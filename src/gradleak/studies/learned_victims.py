"""What the studies of learned inversion share: a generator trained on public pairs, tried on gradients of unseen pictures."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

import torch
from scipy.stats import t
from torch import Tensor

from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.generator import Generator
from gradleak.attacks.learned.git import Transcript, units
from gradleak.attacks.learned.lti import Perceptron
from gradleak.attacks.learned.pairs import chosen, stream
from gradleak.audit.metrics import psnr_db
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.defenses import Defense
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.tensors import Tensors
from gradleak.studies.data_sets import beside, blueprint, rows_of, shrunk
from gradleak.studies.findings import Findings, shortage
from gradleak.studies.plots import bars, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.gradient import capture_gradient

ALONE, EQUAL, UNSEEN = "git, regression alone", "perceptron of equal size", "unseen, same kind"
SHUFFLE = 7  # seed of the order in which private gradients are made
WORDS = {"method": "{}", "private": "{}", "pairs": "{:,} pairs", "shared": "{} shared", "trained_on": "trained on {}"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "git": {},
    "git as of a perceptron": {"layout": "mlp"},
    "git as of two convolutions": {"layout": "convnet"},
    "git as of a residual network": {"layout": "resnet20"},
    "git, half as wide": {"width": 24},
    "git, twice as wide": {"width": 96},
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A generator, and what it is tried on.

    method    one of LAYOUTS, ALONE (GIT's closed form, nothing trained), EQUAL, or lti
    trained_on, shared  what was done to the gradients of public and of private pictures; None: nothing
    private   the private pictures, `unseen` of them: UNSEEN test rows of the same data, or a data set beside it
    """

    model: str = "lenet"
    method: str = "git"
    pairs: int
    epochs: int
    trained_on: Defense | None = None
    shared: Defense | None = None
    private: str = UNSEEN
    unseen: int = field(repr=False)

    @property
    def training(self) -> "Trial":
        """What trials of the same generator have in common."""
        return replace(self, shared=None, private=UNSEEN)


def lenet(size: Size, epochs: int) -> Trial:
    """GIT of LeNet. epochs: at small size."""
    effort = {"smoke": (100, 3, 20), "small": (10_000, epochs, 1_000), "paper": (10_000, 30, 1_000)}
    pairs, epochs, unseen = effort[size]
    return Trial(pairs=pairs, epochs=epochs, unseen=unseen)


def with_controls(git: Trial) -> Iterator[Trial]:
    """GIT, its regression alone, and a perceptron of its size."""
    yield from (git, replace(git, method=ALONE, epochs=0), replace(git, method=EQUAL, epochs=3 * git.epochs))


@dataclass(frozen=True, eq=False)
class Field:
    """An untrained victim, public pictures for pairs, unseen private ones, and what of them is not as asked."""

    model: PictureModel
    public: Pictures
    private: Pictures
    notes: tuple[str, ...] = ()


def prepare(trial: Trial, data: str, size: Size, seed: int) -> Field:
    """The model initialised from `seed`, random samples of training rows and of test rows."""
    shape, classes = blueprint(data, size)
    return field_of(Architecture(trial.model, shape, classes), trial, data, seed, shrunk(shape, size))


def field_of(architecture: Architecture, trial: Trial, data: str, seed: int, note: str) -> Field:
    """The same of any architecture; where there are too few pictures, one serves in several pairs."""
    public = public_pool(data, "train", shape=architecture.input_shape, limit=trial.pairs)
    held = public_pool(data, "test", shape=architecture.input_shape, limit=trial.unseen, seed=1)
    short = shortage("public pictures", trial.pairs, len(public.images))
    notes = note, short, shortage("unseen pictures", trial.unseen, len(held.images))
    return Field(Model.of(architecture.build(seed).eval(), architecture), public, held, notes)


@lru_cache(maxsize=1)
def trained(trial: Trial, data: str, size: Size, seed: int, prepared: Callable[..., Field]) -> tuple[Field, Generator]:
    """The victim and its generator, made once for all trials that a process tries it in."""
    victim = prepared(trial, data, size, seed)
    return victim, fit(victim, trial, size, seed)


def fit(victim: Field, trial: Trial, size: Size, seed: int) -> Generator:
    """A generator trained on pairs of the public pictures."""
    options: dict[str, Any] = {"hidden": 8 if size == "smoke" else 64}
    if trial.method == EQUAL:
        options = {"widths": (equal_size(victim, Transcript(victim.model, **options)),)}
    elif trial.method == "lti":
        options = {"widths": (100, 100)} if size == "smoke" else {}
    git, generator = "git" in trial.method, torch.Generator().manual_seed(seed)
    pairs: dict[str, Any] = {"count": trial.pairs, "shard": min(1_000, -(-trial.pairs // 5)), "seed": seed}
    return learned.train(
        "git" if git else "lti",
        Transcript if git else Perceptron,
        options | LAYOUTS.get(trial.method, {}),
        victim.model,
        lambda: stream(victim.model, victim.public, defenses=those(trial.trained_on), **pairs),
        epochs=trial.epochs,
        learning_rate=1e-3 if trial.method == "lti" else 2e-3,
        generator=generator,
    )


def equal_size(victim: Field, git: Transcript) -> int:
    """The width of a perceptron with one hidden layer and as many numbers as GIT uses."""
    used = sum(p.numel() for p in git.parameters()) + git.slopes[0].numel()
    released = sum(p.numel() for p in victim.model.parameters.values())
    return max(round(used / (released + victim.private.images[0].numel())), 1)


def those(defense: Defense | None) -> tuple[Defense, ...]:
    """One defense, or none."""
    return () if defense is None else (defense,)


def found_for(
    generator: Callable[[Tensors], Tensor], victim: Field, pictures: Pictures, defense: Defense | None = None
) -> Tensor:
    """What the generator makes of the gradients of these pictures, one at a time: (n, channel, height, width)."""
    known, count = replace(pictures, labels=pictures.labels % victim.model.architecture.classes), len(pictures.images)
    shards = stream(victim.model, known, count=count, shard=200, defenses=those(defense), seed=SHUFFLE)
    found = torch.cat([generator(pairs.gradients)[:, 0] for pairs in shards])
    return found[chosen(count, count, 1, SHUFFLE).flatten().argsort()]


def tried(trial: Trial, bench: Bench, prepared: Callable[..., Field] = prepare) -> Result:
    """A row: the generator on private pictures, beside the mean image of the public ones."""
    began = time.process_time()
    victim, generator = trained(trial.training, bench.data, bench.size, bench.seed, prepared)
    spent, pictures = time.process_time() - began, victim.private
    if folder := beside(bench.data, trial.private):
        pictures = public_pool(folder, "train", shape=victim.model.architecture.input_shape, limit=trial.unseen)
    images = found_for(generator, victim, pictures, trial.shared)
    samples = compared(images, pictures.images, victim.public.images.mean(0))
    facts = {"units": " > ".join(unit.name for unit in units(victim.model))}
    return Result(facts, samples, notes=victim.notes, cost={"fit_seconds": spent})


def searched(victim: Field, attacks: Sequence[Any], bench: Bench) -> Result:
    """A row: an untrained attack on each private picture, one after another."""
    recovered, began = list[Tensor](), time.process_time()
    for i, attack in enumerate(attacks):
        one = rows_of(victim.private, i, 1)
        observation, _ = capture_gradient(victim.model, one)
        recovered.append(attack(observation, generator=torch.Generator().manual_seed(bench.seed)).value)
        bench.on_step(i + 1, len(attacks), float(psnr_db(recovered[-1], one.images)))
    spent = (time.process_time() - began) / len(attacks)
    samples = compared(torch.cat(recovered), victim.private.images[: len(attacks)], victim.public.images.mean(0))
    return Result({}, samples, notes=victim.notes, cost={"seconds_per_picture": spent})


def told(table: Table) -> Findings:
    """Errors in words, and how much larger they are than the first, and as bars with those of the mean image."""
    rows = table.rows
    names = [name for name in WORDS if len({row[name] for row in rows}) > 1] or ["method"]

    def label(row: Row) -> str:
        return ", ".join(WORDS[name].format(row[name] or "whole gradients") for name in names)

    first = max(rows[0]["mse"], 1e-12)
    parts = [f"{label(row)}: {row['mse']:.4f} ({row['mse'] / first - 1:+.0%})" for row in rows]
    reads = "".join(f" GIT reads {units}." for units in dict.fromkeys(row["units"] for row in rows if "units" in row))
    figure, [axes] = panels(width=7, height=0.8 + 0.4 * len(rows))
    bars(axes, rows, label, "mse")
    axes.set_yticks(range(len(rows)), [fill(label(row), 45) for row in rows])
    axes.plot([row["mean_image_mse"] for row in rows], range(len(rows)), "k|", markersize=14)
    axes.set(xlabel="mean squared error per pixel (|: the mean image)", xlim=(0, None))
    blind = f"of the mean image {rows[0]['mean_image_mse']:.4f}"
    sentence = f"Mean squared error, and how far above the first: {'; '.join(parts)}; {blind}.{reads}"
    return Findings(sentence, {f"Learned inversion of {rows[0]['model']}": figure})


def with_interval(values: Sequence[float], digits: int) -> str:
    """The mean, with half the width of its 95 % interval (Student's t) where there is one."""
    mean = f"{fmean(values):+.{digits}f}"
    if (n := len(values)) < 2:
        return mean
    return f"{mean} +- {float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5:.{digits}f}"


study_of_trials = partial(Study[Trial], cell=tried, together=lambda trial: trial.training, tell=told)
