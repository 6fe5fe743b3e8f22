"""What do defenses leave to attackers who know them, and to attackers who do not, and what do they cost?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks import ATTACKS
from gradleak.attacks.seed import with_start_recovered
from gradleak.attacks.truncated import with_truncation_undone
from gradleak.audit import metrics
from gradleak.audit.advice import Tried, advice
from gradleak.audit.gaussian_privacy import epsilon_of
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.defense_names import Chosen
from gradleak.observations.defenses import Defense
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.private_step import ClippedNoise
from gradleak.observations.releases import Gradient
from gradleak.observations.training import Recipe
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.adapter import fine_tune
from gradleak.victims.defended import accuracy, train_behind
from gradleak.victims.gradient import capture_gradient

FIRST = 2_000  # test row
DELTA = 1e-5
NONE, UTILITY, GRADIENT, ADAPTER = "none", "training", "gradient", "adapter"
SMOKE = {(GRADIENT, 1): (NONE, "top-k:0.1", "dp-sgd:1:0.8")}
EVERY = {  # by what is shared, of how many pictures
    (GRADIENT, 1): (
        *(NONE, "dp-sgd:1:0.8", "top-k:0.1", "bits:8", "sign", "relative-noise:0.1", "bits:4", "soteria:0.5"),
        *("qsgd:4", "top-k:0.01", "bits:2", "dp-sgd:1:0.1", "relative-noise:1", "bits:16"),
    ),
    (GRADIENT, 4): (NONE, "clients:2", "mix-up:0.7"),
    (ADAPTER, 1): (NONE, "frozen-a", "lora-dropout:0.3", "svd:2", "relative-noise:0.1", "bits:8"),
}
LEFT_OUT = ("dp-sgd:1:0.1", "relative-noise:1", "bits:16")  # but at paper size
BY = {
    GRADIENT: ("analytic", "recursive", "dlg", "idlg", "inverting-gradients", "map-inversion"),
    ADAPTER: ("inverting-gradients", "activation-patterns"),
}
UNAWARE = (
    "analytic",
    "inverting-gradients",
    "activation-patterns",
)  # of the attacks, those that are tried without the knowledge
BATCHES = {"smoke": 2, "small": 3, "paper": 100}  # private ones
TRAINING = {"smoke": (200, 2), "small": (1_000, 5), "paper": (10_000, 10)}  # pictures, epochs
DLG: dict[str, Any] = {"evaluations": 60, "rounds": 0, "restarts": 1}
SMALLER: dict[str, dict[str, Any]] = {  # efforts than are usual, but at paper size
    "dlg": DLG,
    "idlg": DLG,
    "inverting-gradients": {"steps": 100},
    "map-inversion": {"evaluations": 8, "pairs": 100},
}
ADAPTED = Recipe(optimizer="sgd", learning_rate=0.01, steps=2)
TUNING = Recipe(optimizer="adamw", learning_rate=3e-3, steps=100, batch_size=50)
RANK = 8


@dataclass(frozen=True)
class Setting:
    """defense: as --defense takes it. shared: a gradient of `batch` pictures, or an adapter. attack: a name, or training. knows: whether the
    attacker is told."""

    defense: str
    shared: str
    batch: int
    attack: str
    knows: bool = True


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Every defense: what it costs, then every attack that knows it, and that does not."""
    for (shared, batch), defenses in (SMOKE if size == "smoke" else EVERY).items():
        for defense in defenses:
            if size == "small" and defense in LEFT_OUT:
                continue
            yield Setting(defense, shared, batch, UTILITY)
            for attack in UNAWARE[:2] if size == "smoke" else BY[shared]:
                yield Setting(defense, shared, batch, attack)
                if defense != NONE and size != "smoke" and (attack in UNAWARE or size == "paper"):
                    yield Setting(defense, shared, batch, attack, knows=False)


def cell(setting: Setting, bench: Bench) -> Result:
    """Accuracy and epsilon of a training, or what an attack recovers of unseen pictures."""
    (shape, classes), names = shaped(bench), () if setting.defense == NONE else (setting.defense,)
    architecture = Architecture("mlp", shape, classes)
    if setting.attack == UTILITY:
        return Result(trained(architecture, setting.shared, names, bench), notes=(shrunk(shape, "smoke"),))
    pictures = unseen(bench.data, FIRST, setting.batch * BATCHES[bench.size], shape)
    public = public_pool(bench.data, "train", shape=shape, limit=500)
    model, blind = base_of(architecture, setting.shared, bench), public.images.mean(0)
    private = [rows_of(pictures, first, setting.batch) for first in range(0, len(pictures.labels), setting.batch)]
    seen = [shared_of(model, each, setting, names, bench.seed + number) for number, each in enumerate(private)]
    recovered = list[Tensor]()
    for found, true in zip(attacked(setting.attack, seen, public, bench), private, strict=True):
        missing = max(setting.batch - len(found), 0)  # what cannot be read is answered with the mean picture
        filled = torch.cat([found.nan_to_num().clamp(0, 1), blind.expand(missing, *shape)])
        recovered.append(filled[metrics.match(filled, true.images)])
    rows = compared(torch.cat(recovered), pictures.images, blind, public.images[:99])
    return Result(samples=rows, notes=(shrunk(shape, "smoke"),))


def attacked(name: str, seen: Sequence[PictureObservation], public: Pictures, bench: Bench) -> list[Tensor]:
    """What an attack finds of each observation of one model, (n, channel, height, width), n = 0 where it cannot read it; side by side where
    that can be."""
    attack, generator = ATTACKS[name](**({} if bench.size == "paper" else SMALLER.get(name, {}))), torch.Generator()
    attack = attack.prepared(seen[0], public, generator=generator) if hasattr(attack, "prepared") else attack
    alike = isinstance(seen[0].release, Gradient) and not any(d.reads for o in seen for d in o.defenses or ())
    results = list[Tensor]()
    for together in [seen] if alike and hasattr(attack, "many") else [[one] for one in seen]:
        generator.manual_seed(bench.seed)
        try:
            found = (
                attack.many(together, generator=generator)
                if together is seen
                else [attack(*together, generator=generator)]
            )
            results += [each.value for each in found]
        except NotObserved:
            results += [public.images[:0] for _ in together]
    return results


def shaped(bench: Bench) -> tuple[tuple[int, int, int], int]:
    """The shape of the pictures, small but at paper size, and how many classes they have."""
    return blueprint(bench.data, "paper" if bench.size == "paper" else "smoke")


def base_of(architecture: Architecture, shared: str, bench: Bench) -> PictureModel:
    """A fresh model; for adapters one that was trained on public pictures."""
    if shared == ADAPTER:
        return pretrained(architecture, bench)
    return Model.of(architecture.build(bench.seed), architecture)


@cache
def pretrained(architecture: Architecture, bench: Bench) -> PictureModel:
    """A model after two epochs on public pictures."""
    count, _ = TRAINING[bench.size]
    public = public_pool(bench.data, "train", shape=architecture.input_shape, limit=count)
    model = Model.of(architecture.build(bench.seed), architecture)
    return train_behind(model, public, (), epochs=2, seed=bench.seed)


def shared_of(
    model: PictureModel, private: Pictures, setting: Setting, names: Sequence[str], seed: int
) -> PictureObservation:
    """What the victim shares, as far as it is told, and what an attacker finds out who looks for the start of an adapter."""
    told = names if setting.knows else (*names, "unknown")
    if setting.shared == GRADIENT:
        chosen = Chosen.of(told)
        return capture_gradient(model, private, defenses=chosen.defenses, told=chosen.told, seed=seed)[0]
    with TemporaryDirectory() as folder:
        seen, _ = fine_tune(model, private, rank=RANK, recipe=ADAPTED, defenses=told, seed=seed, out=Path(folder))
    seen = seen if setting.knows else replace(seen, release=replace(seen.adapter, dropout=0.0))
    return with_start_recovered(with_truncation_undone(seen))


def trained(architecture: Architecture, shared: str, names: Sequence[str], bench: Bench) -> Row:
    """Accuracy on unseen pictures after training behind the defense, and what is proven for each picture of that."""
    (count, epochs), defenses = TRAINING[bench.size], Chosen.of(names).defenses
    public = public_pool(bench.data, "train", shape=architecture.input_shape, limit=2 * count)
    test = unseen(bench.data, FIRST, 1_000, architecture.input_shape)
    if shared == ADAPTER:
        model, private = pretrained(architecture, bench), rows_of(public, len(public.labels) // 2, count)
        with TemporaryDirectory() as folder:
            seen, _ = fine_tune(
                model, private, rank=RANK, recipe=TUNING, defenses=names, seed=bench.seed, out=Path(folder)
            )
        model = replace(model, parameters={**model.parameters, **(seen.after() or {})})
        return {"accuracy": accuracy(model, test), "epsilon": None, "privacy": "none: no accountant"}
    model = base_of(architecture, shared, bench)
    model = train_behind(model, rows_of(public, 0, count), defenses, epochs=epochs, seed=bench.seed)
    return {"accuracy": accuracy(model, test), **proven(defenses, epochs)}


def proven(defenses: Sequence[Defense], epochs: int) -> Row:
    """What `train_behind` proves for each sample: it is in one batch of every epoch, without chance, so that steps add up to sqrt(epochs) /
    noise multiplier; twice that where another stands in its place. Nothing without noise on cut samples."""
    steps = [defense for defense in defenses if isinstance(defense, ClippedNoise) and defense.noise_multiplier]
    if not steps:
        return {"epsilon": None, "privacy": "none: no accountant"}
    mu = epochs**0.5 / steps[0].noise_multiplier
    other = f"{epsilon_of(2 * mu, DELTA):.3g} for one in the place of another"
    return {
        "epsilon": epsilon_of(mu, DELTA),
        "privacy": f"delta {DELTA:g}, one picture added or removed; {other}",
    }


def tell(table: Table) -> Findings:
    """The advice for each thing that is shared, and leakage as bars."""
    words = list[str]()
    for shared, batch in dict.fromkeys((row["shared"], row["batch"]) for row in table.rows):
        tried = list(tried_of(table, shared, batch))
        if tried and tried[0].name == NONE:
            what, count = "A gradient" if shared == GRADIENT else "An adapter", table.where(batch=batch)[1]["samples"]
            what = f"{what} of {batch} picture{'s' * (batch > 1)}, {count} attacked."
            words += [what, *advice(tried)]
    shown = [row for row in table.rows if row.get("identified") is not None and row["knows"]]
    figure, [axes] = panels(width=7, height=1 + 0.2 * len(shown))
    if shown:
        bars(axes, shown, lambda r: f"{r['shared']} of {r['batch']}, {r['defense']}, {r['attack']}", "identified")
    axes.set(xlabel="top-1 among 100, the defense known", xlim=(0, 1.05))
    return Findings(" ".join(words) or "Not enough is finished to say.", {"What attackers identify": figure})


def tried_of(table: Table, shared: str, batch: int) -> Iterator[Tried]:
    """Each defense as it was measured: the best attack that knows it, and the best that does not."""
    for cost in table.where(shared=shared, batch=batch, attack=UTILITY):
        rows = table.where(shared=shared, batch=batch, defense=cost["defense"])
        rows = [row for row in rows if row.get("identified") is not None]
        aware, unaware = ([row for row in rows if row["knows"] is knows] for knows in (True, False))
        if aware:
            best = max(aware, key=lambda row: row["identified"])
            other = max((row["identified"] for row in unaware), default=None)
            known: dict[str, Any] = {"unaware": other, "accuracy": cost.get("accuracy"), "epsilon": cost.get("epsilon")}
            yield Tried(cost["defense"], best["identified"], best["attack"], 0.01, **known)


STUDY = Study(
    name="defenses",
    question="What does each defense leave to an attacker who knows it, what to one who does not, and what does it cost?",
    settings=settings,
    cell=cell,
    tell=tell,
)
