"""What does a prior of pictures add to an adapter? The convnet and the vision transformer at rank 8 by a search, the perceptron by its
activation patterns: few and many public pictures behind the Gaussian, solvers times learned priors, with controls of equal evaluations on
unseen pictures, labels known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradleak.attacks import ATTACKS
from gradleak.studies import adapter_victims as victims
from gradleak.studies.findings import Findings
from gradleak.studies.learned_priors import behind, learned
from gradleak.studies.prior_adapters import adapters, begun, count, fresh, gaussian, search
from gradleak.studies.prior_comparisons import Begun, ahead, drawn, guide, learned_over_gaussian, rows_of, solver
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

NAMES = ("model", "training", "attack", "prior", "public", "effort", "release")
SOLVERS = ("red-diff", "sds", "dps")


@dataclass(frozen=True)
class Setting:
    """training: of the adapter, one step of SGD or four of AdamW. public: pictures behind the Gaussian, few (as in the studies of adapters) or
    many. effort: of the search (`prior_adapters.search`). release: right, wrong (another's), none (the prior alone)."""

    model: str
    attack: str
    prior: str = "gaussian"
    public: str = "many"
    effort: str = "plain"
    release: str = "right"
    training: str = "one step"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """The solvers under each prior beside the Gaussian of equal evaluations, blind controls, then few and many public pictures."""
    priors = learned(ffdnet=size != "smoke")
    if size == "smoke":
        yield from (Setting("convnet", attack) for attack in ("map-inversion", "daps", "guide"))
        return
    first, under = priors[0], (priors[0], "gaussian")
    yield Setting("convnet", "map-inversion")
    yield from (Setting("convnet", "daps", prior) for prior in (*priors, "gaussian"))
    yield from (Setting("convnet", attack, prior) for attack in SOLVERS for prior in under)
    yield from (Setting("convnet", "daps", first, release=release) for release in ("none", "wrong"))
    for model, training in (("convnet", "4 of AdamW"), ("vit", "one step")):
        yield Setting(model, "map-inversion", training=training)
        yield from (Setting(model, "daps", prior, training=training) for prior in under)
    yield Setting("convnet", "map-inversion", effort="long")
    yield Setting("convnet", "map-inversion", effort="deep")
    yield from (Setting("convnet", "map-inversion", public="few", effort=effort) for effort in ("plain", "deep"))
    yield Setting("convnet", "guide", "public pairs")
    yield from (Setting("mlp1000", "activation-patterns", public=public) for public in ("few", "many"))
    yield Setting("mlp1000", "activation-patterns", release="wrong")


def cell(setting: Setting, bench: Bench) -> Result:
    """An attack on adapters of unseen pictures, side by side, each beside the most likely picture under the Gaussian of many."""
    base, wrong = victims.prepare(setting.model, bench.data, bench.size), setting.release == "wrong"
    where = (setting.model, setting.training, bench.data, bench.size, bench.seed, wrong)
    prior = gaussian(setting.model, bench.data, bench.size, setting.public)
    if setting.attack == "activation-patterns":
        private, seen = adapters(*where)
        attack = ATTACKS[setting.attack](prior=prior)
        return victims.attacked(base, attack, seen, victims.batched(private, 1), bench, len(private.labels))
    start, draw = begun(*where), torch.Generator().manual_seed(bench.seed)
    ready = attack_of(setting, bench, start)
    found = start.likeliest if ready is None else ready.many(start.seen, generator=draw)
    notes = base.notes(bench, count(setting.model, setting.training, bench.size), len(start.private.labels))
    return Result(samples=rows_of(found, start, base.public.images.mean(0), base.decoys), notes=notes)


def attack_of(setting: Setting, bench: Bench, start: Begun) -> Any:
    """The attack, or None for the search that all begin with."""
    prior, size = gaussian(setting.model, bench.data, bench.size, setting.public), bench.size
    if setting.attack == "guide":
        return guide(search(prior, size), fresh(setting.model, bench.data, size), size)
    if setting.attack != "map-inversion":
        return solver(setting.attack, setting.prior, size, start, prior, blind=setting.release == "none")
    if (setting.public, setting.effort) == ("many", "plain"):
        return None
    return search(prior, size, setting.effort)


def tell(table: Table) -> Findings:
    """More public pictures and lower weights for the search, then learned priors beside the Gaussian."""
    said = []
    control = {"public": "few", "effort": "plain"}
    for row in table.where(prior="gaussian", release="right"):
        searched = row["attack"] in ("map-inversion", "activation-patterns") and not control.items() <= row.items()
        if searched and (gain := ahead(table, NAMES, control, **row)):
            which = f"{row['public']} public pictures, {row['effort']}"
            said.append(f"{row['model']}, {row['attack']}, {which}: {gain}, against few, plain")
    return drawn([*said, *learned_over_gaussian(table, NAMES)], table, NAMES, "Priors on adapters")


def depends(setting: Setting) -> tuple[Any, ...]:
    """The attacks, and the folder of the denoiser where it is that."""
    return (ATTACKS[setting.attack], *behind(setting.prior))


STUDY = Study(
    name="priors-on-adapters",
    question="What do priors of pictures, and more public pictures, add to an adapter of few steps?",
    settings=settings,
    cell=cell,
    together=lambda setting: setting.model,
    tell=tell,
    beside=("mnist",),
    depends=depends,
)
