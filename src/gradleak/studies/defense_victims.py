"""What the study of defenses plays, of pictures as of texts: what a victim shares behind a defense, what an attack makes of it, and what is
proven."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from gradleak.attacks import ATTACKS
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.seed import with_start_recovered
from gradleak.attacks.truncated import with_truncation_undone
from gradleak.audit.gaussian_privacy import epsilon_of
from gradleak.errors import NotObserved
from gradleak.modalities.modality import Blueprint
from gradleak.observations.defense_names import Chosen
from gradleak.observations.defenses import Defense
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.private_step import ClippedNoise
from gradleak.observations.releases import Gradient
from gradleak.observations.training import Recipe
from gradleak.studies.defense_settings import GRADIENT, Setting
from gradleak.studies.study import Bench, Row
from gradleak.victims.adapter import fine_tune
from gradleak.victims.gradient import capture_gradient

A = TypeVar("A", bound=Blueprint)
DELTA = 1e-5
DLG: dict[str, Any] = {"evaluations": 60, "rounds": 0, "restarts": 1}
SMALLER: dict[str, dict[str, Any]] = {  # efforts than are usual, but at paper size
    "dlg": DLG,
    "idlg": DLG,
    "inverting-gradients": {"steps": 100},
    "map-inversion": {"evaluations": 8, "pairs": 100},
}
ADAPTED = Recipe(optimizer="sgd", learning_rate=0.01, steps=2)
NOTHING: Row = {"epsilon": None, "privacy": "none: no accountant"}


def shared_of(model: Model[A], private: Any, setting: Setting, rank: int, seed: int) -> Observation[A]:
    """What the victim shares, as far as it is told, and what an attacker finds out who looks for the start of an adapter."""
    told = setting.names if setting.knows else (*setting.names, "unknown")
    if setting.shared == GRADIENT:
        chosen = Chosen.of(told)
        return capture_gradient(model, private, defenses=chosen.defenses, told=chosen.told, seed=seed)[0]
    with TemporaryDirectory() as folder:
        seen, _ = fine_tune(model, private, rank=rank, recipe=ADAPTED, defenses=told, seed=seed, out=Path(folder))
    seen = seen if setting.knows else replace(seen, release=replace(seen.adapter, dropout=0.0))
    return with_start_recovered(with_truncation_undone(seen))


def tuned(model: Model[A], private: Any, setting: Setting, rank: int, recipe: Recipe, seed: int) -> Model[A]:
    """The model with an adapter in it that was trained behind the defense, for use and not for an attack."""
    with TemporaryDirectory() as folder:
        seen, _ = fine_tune(
            model, private, rank=rank, recipe=recipe, defenses=setting.names, seed=seed, out=Path(folder)
        )
    return replace(model, parameters={**model.parameters, **(seen.after() or {})})


def attacked(name: str, seen: Sequence[Observation[A]], public: Any, bench: Bench) -> list[Reconstruction | None]:
    """What an attack finds of each observation of one model, None where it cannot read it; side by side where that can be."""
    attack, generator = ATTACKS[name](**({} if bench.size == "paper" else SMALLER.get(name, {}))), torch.Generator()
    attack = attack.prepared(seen[0], public, generator=generator) if hasattr(attack, "prepared") else attack
    alike = isinstance(seen[0].release, Gradient) and not any(d.reads for o in seen for d in o.defenses or ())
    results = list[Reconstruction | None]()
    for together in [seen] if alike and hasattr(attack, "many") else [[one] for one in seen]:
        generator.manual_seed(bench.seed)
        try:
            if together is seen:
                results += attack.many(together, generator=generator)
            else:
                results.append(attack(*together, generator=generator))
        except NotObserved:
            results += [None for _ in together]
    return results


def proven(defenses: Sequence[Defense], epochs: int) -> Row:
    """What `train_behind` proves for each sample: it is in one batch of every epoch, without chance, so that steps add up to sqrt(epochs) /
    noise multiplier; twice that where another stands in its place. Nothing without noise on cut samples."""
    steps = [defense for defense in defenses if isinstance(defense, ClippedNoise) and defense.noise_multiplier]
    if not steps:
        return NOTHING
    mu = epochs**0.5 / steps[0].noise_multiplier
    other = f"{epsilon_of(2 * mu, DELTA):.3g} for one in the place of another"
    return {"epsilon": epsilon_of(mu, DELTA), "privacy": f"delta {DELTA:g}, one sample added or removed; {other}"}
