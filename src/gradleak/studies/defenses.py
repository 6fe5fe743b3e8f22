"""What do defenses leave to attackers who know them, and to attackers who do not, and what do they cost?"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradleak.audit import metrics
from gradleak.audit.advice import Tried, advice
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import public_pool
from gradleak.studies.data_sets import rows_of, shrunk, unseen
from gradleak.studies.defense_victims import (
    ADAPTER,
    FIRST,
    GRADIENT,
    NONE,
    UTILITY,
    Setting,
    attacked,
    base_of,
    shaped,
    shared_of,
    trained,
)
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

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
