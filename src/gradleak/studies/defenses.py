"""What do defenses leave to attackers who know them, and to attackers who do not, and what do they cost? Of pictures, or of texts where the
data are texts."""

from collections.abc import Iterator

from gradleak.audit.advice import Tried, advice
from gradleak.modalities.texts import holds_texts
from gradleak.studies.defended_pictures import PERCEPTRON, PICTURES
from gradleak.studies.defended_pictures import cell as of_pictures
from gradleak.studies.defended_texts import TEXTS
from gradleak.studies.defended_texts import cell as of_texts
from gradleak.studies.defense_settings import GRADIENT, NONE, UTILITY, Case, Kind, Setting
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Those of texts where the data are texts, else of pictures."""
    return (TEXTS if holds_texts(data) else PICTURES).settings(size)


def kind_of(model: str) -> Kind:
    """What is played with a model of this name."""
    return PICTURES if model == PERCEPTRON else TEXTS


def cell(setting: Setting, bench: Bench) -> Result:
    """Accuracy or perplexity and epsilon of a training, or what an attack recovers of unseen samples."""
    return (of_pictures if setting.model == PERCEPTRON else of_texts)(setting, bench)


def tell(table: Table) -> Findings:
    """The advice for each thing that is shared, and leakage as bars."""
    words = list[str]()
    for case in dict.fromkeys((row["model"], row["shared"], row["batch"]) for row in table.rows):
        tried, (model, shared, batch) = list(tried_of(table, case)), case
        if tried and tried[0].name == NONE:
            kind, first = kind_of(model), attacks_on(table, case)[0]
            what = "A gradient" if shared == GRADIENT else "An adapter"
            words.append(
                f"{what} of {batch} {kind.noun}{'s' * (batch > 1)} in the {model}, {first['samples']} {kind.noun}s attacked."
            )
            words += advice(tried, kind.measure)
    attacks = [row for row in table.rows if row["attack"] != UTILITY and row["knows"]]
    shown = [row | {"leaked": kind_of(row["model"]).leaked(row)} for row in attacks]
    figure, [axes] = panels(width=7, height=1 + 0.2 * len(shown))
    if shown:
        names = "model", "shared", "batch", "defense", "attack"
        bars(axes, shown, lambda row: ", ".join(str(row[name]) for name in names), "leaked")
    measures = " or ".join(dict.fromkeys(kind_of(row["model"]).measure for row in shown))
    axes.set(xlabel=f"{measures}, the defense known", xlim=(0, 1.05))
    return Findings(" ".join(words) or "Not enough is finished to say.", {"What attackers recover": figure})


def attacks_on(table: Table, case: Case, **values: object) -> list[Row]:
    """The rows of attacks on what is shared in this case."""
    model, shared, batch = case
    return table.where(model=model, shared=shared, batch=batch, attack=lambda name: name != UTILITY, **values)


def tried_of(table: Table, case: Case) -> Iterator[Tried]:
    """Each defense as it was measured: the best attack that knows it, and the best that does not."""
    model, shared, batch = case
    kind = kind_of(model)
    for cost in table.where(model=model, shared=shared, batch=batch, attack=UTILITY):
        name = cost["defense"]
        aware, unaware = (attacks_on(table, case, defense=name, knows=knows) for knows in (True, False))
        unaware += [row for row in aware if row["attack"] in kind.untold and name != NONE]
        if aware:
            best = max(aware, key=kind.leaked)
            yield Tried(
                name=name,
                leaked=kind.leaked(best),
                attack=best["attack"],
                chance=kind.chance(best),
                unaware=max(map(kind.leaked, unaware), default=None),
                whole=None if best.get("exact_match") is None else best["exact_match"] / 100,
                accuracy=cost.get("accuracy"),
                perplexity=cost.get("perplexity"),
                epsilon=cost.get("epsilon"),
            )


STUDY = Study(
    name="defenses",
    question="What does each defense leave to an attacker who knows it, what to one who does not, and what does it cost?",
    settings=settings,
    cell=cell,
    tell=tell,
)
