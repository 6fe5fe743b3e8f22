"""Which of her samples does an adapter give away that somebody trained as everybody does: AdamW, three epochs, hundreds of samples?

LoRA by the defaults of the Trainer. The attacker has its folder, the base model, and a list of samples: those it was trained on, and as
many fresh ones of the same split. Controls: the adapter of other samples, and classes that are permuted."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from gradleak.attacks.membership import SCORES
from gradleak.attacks.membership.evidence import Evidence
from gradleak.attacks.seed import with_start_recovered
from gradleak.audit.membership.rates import auc, auc_interval, rate
from gradleak.errors import NotObserved
from gradleak.studies.data_sets import IN_WHEELS, beside
from gradleak.studies.findings import Findings, stands_in
from gradleak.studies.membership_victims import DECODER, PERCEPTRON, TRANSFORMER, Setting, victim
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.studies.text_victims import BESIDE, encoder, sources
from gradleak.victims.trainer_defaults import trained_by_defaults

CALIBRATION, ENDS = 0.25, ("", "_low", "_high")  # of the fresh samples; of intervals


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
