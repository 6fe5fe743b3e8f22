"""What the study of defenses plays: victims behind a defense, attacks on what they share, what it costs and what is proven."""

from collections.abc import Sequence
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
from gradleak.studies.data_sets import blueprint, rows_of, unseen
from gradleak.studies.study import Bench, Row
from gradleak.victims.adapter import fine_tune
from gradleak.victims.defended import accuracy, train_behind
from gradleak.victims.gradient import capture_gradient

FIRST = 2_000  # test row
DELTA = 1e-5
NONE, UTILITY, GRADIENT, ADAPTER = "none", "training", "gradient", "adapter"
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
