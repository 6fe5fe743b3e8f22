"""Which of her samples does an adapter give away that somebody trained as everybody does: AdamW, three epochs, hundreds of samples?

LoRA by the defaults of the Trainer. The attacker has its folder, the base model, and a list of samples: those it was trained on, and as
many fresh ones of the same split. Controls: the adapter of other samples, and classes that are permuted."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.membership import SCORES
from gradleak.attacks.membership.evidence import Evidence
from gradleak.attacks.seed import with_start_recovered
from gradleak.audit.membership.rates import auc, auc_interval, rate
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import public_pool
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import Model
from gradleak.studies.data_sets import IN_WHEELS, beside, blueprint, rows_of
from gradleak.studies.findings import Findings, stands_in
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.studies.text_victims import BESIDE, encoder, model_of, sources
from gradleak.victims.trainer_defaults import trained_by_defaults
from gradleak.victims.training import prepare_model

PERCEPTRON, TRANSFORMER, DECODER = "perceptron", "vision transformer", "small gpt2"
OF_PICTURES = {
    PERCEPTRON: ("mlp", 1),
    TRANSFORMER: ("vit", 3),
}  # what it is built as, and epochs on public pictures before
CALIBRATION, ENDS = 0.25, ("", "_low", "_high")  # of the fresh samples; of intervals


@dataclass(frozen=True)
class Setting:
    """candidates: all members, or half of them. control: none, another adapter (of other samples), classes (permuted)."""

    model: str
    data: str
    epochs: int = 3
    samples: int = 200
    start: str = "unknown"  # or recovered
    candidates: str = "all"
    control: str = "none"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Three epochs on each data set; on the first one ten, controls, and half a list."""
    texts = list(sources(data))
    usual = Setting(PERCEPTRON, "digits", samples=32) if size == "smoke" else Setting(encoder(), texts[-1])
    yield from (usual, replace(usual, control="another adapter"))
    if size == "smoke":
        return
    yield from (replace(usual, data=name) for name in texts[:-1])
    yield replace(usual, model=PERCEPTRON, data="mnist" if beside(data, "mnist") else "digits")
    transformer = replace(usual, model=TRANSFORMER, data="cifar10" if beside(data, "cifar10") else "embedded")
    yield from (transformer, replace(transformer, epochs=10), replace(transformer, control="another adapter"))
    yield from (replace(usual, model=DECODER), replace(usual, start="recovered"), replace(usual, epochs=10))
    yield from (replace(usual, control="classes"), replace(usual, candidates="half"))


@lru_cache(maxsize=2)
def victim(setting: Setting, data: str, size: Size, seed: int) -> tuple[Model[Any], Any, Tensor | None]:
    """The base model, and samples of one split at random: members, fresh ones, others."""
    count, place = 3 * setting.samples, str(beside(data, setting.data) or setting.data)
    if setting.model in OF_PICTURES:
        name, epochs = OF_PICTURES[setting.model]
        architecture = Architecture(name, *blueprint(place, size))
        pool = public_pool(place, "train", shape=architecture.input_shape, limit=count + 2_000, seed=seed)
        module = prepare_model(architecture, seed=seed, train_on=rows_of(pool, count, 2_000), epochs=epochs)
        return Model.of(module, architecture), pool.images[:count], pool.labels[:count]
    place = sources(data)[setting.data]
    language = model_of(setting.model, "causal-lm" if setting.model == DECODER else "classification", place, size, seed)
    every = load_texts(place, "train")
    chosen = torch.randperm(len(every.texts), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    some = replace(every, texts=tuple(every.texts[i] for i in chosen), labels=every.labels[chosen])
    return language, *language.architecture.feed(some)


def cell(setting: Setting, bench: Bench) -> Result:
    """Train, ask every score, and measure each."""
    same = Setting(setting.model, setting.data, samples=setting.samples)
    model, inputs, labels = victim(same, bench.data, bench.size, bench.seed)
    n = len(inputs) // 3
    own = slice(2 * n, 3 * n) if setting.control == "another adapter" else slice(0, n)
    classes = None if labels is None else labels[own]
    seen = trained_by_defaults(model, inputs[own], classes, epochs=setting.epochs, seed=42 + bench.seed)
    seen = with_start_recovered(seen) if setting.start == "recovered" else seen
    m = n // 2 if setting.candidates == "half" else n
    listed = slice(n - m, 2 * n)
    known = None if labels is None else labels[listed]
    if setting.control == "classes" and known is not None:
        known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(bench.seed))]
    reference = torch.arange(m, m + int(CALIBRATION * n))
    of = Evidence(seen, inputs[listed], known, reference, bench.on_step)
    facts: Row = {}
    for name, score in SCORES.items():
        try:
            values = score(of)
        except NotObserved:
            continue
        members, fresh = values[:m], values[m + len(reference) :]
        area, at = auc(members, fresh), rate(members, fresh, 0.01)
        ends = auc_interval(area, len(members), len(fresh))
        found = {"": (area, *ends), " found": (at["true"], at["low"], at["high"])}
        facts |= {f"{name}{what}{end}": v for what, all_ in found.items() for end, v in zip(ENDS, all_, strict=True)}
    return Result(facts, notes=(stands_in(setting.data, bench.data) if bench.data in IN_WHEELS else "",))


def tell(table: Table) -> Findings:
    """The area under the curve of each score, row by row."""
    said = []
    for row in table.rows:
        areas = ", ".join(f"{name} {row[name]:.2f}" for name in SCORES if row.get(name) is not None)
        about = f"{row['epochs']} epochs, start {row['start']}, {row['candidates']} listed, control: {row['control']}"
        said.append(f"{row['model']} on {row['data']}, {about}: {areas}")
    return Findings(f"Area under the ROC curve. {'; '.join(said)}.")


STUDY = Study(
    name="membership",
    question="Which of its training samples does an everyday adapter give away to somebody who has a list of candidates?",
    settings=settings,
    cell=cell,
    tell=tell,
    beside=(*BESIDE, "mnist", "cifar10"),
)
