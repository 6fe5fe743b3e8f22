"""What do defenses leave to attackers who know them, and to attackers who do not, and what do they cost?"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch

from gradleak.attacks import ATTACKS
from gradleak.audit.advice import Tried, advice
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import public_pool
from gradleak.observations.defense_names import Chosen
from gradleak.observations.model import Model
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.defended import accuracy, epsilon_of, train_behind
from gradleak.victims.gradient import capture_gradient

FIRST = 2_000  # test row
SMOKE = ("none", "top-k:0.1", "dp-sgd:1:0.8")
EVERY = (
    *(
        "none",
        "relative-noise:0.1",
        "relative-noise:1",
        "dp-sgd:1:0.1",
        "dp-sgd:1:0.8",
        "top-k:0.1",
        "top-k:0.01",
        "sign",
    ),
    *("bits:16", "bits:8", "bits:4", "bits:2", "qsgd:4", "soteria:0.5"),
)
BY = ("analytic", "recursive", "dlg", "idlg", "inverting-gradients", "map-inversion")
TRAINING, UTILITY = {"smoke": (200, 2), "small": (1_000, 10), "paper": (10_000, 10)}, "training"  # pictures, epochs
DELTA = 1e-5


@dataclass(frozen=True)
class Setting:
    """defense: as --defense takes it. attack: a name, or training. knows: whether the attacker is told."""

    defense: str
    attack: str
    knows: bool = True


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Every defense: what it costs, then every attack that knows it, and that does not."""
    for defense in SMOKE if size == "smoke" else EVERY:
        yield Setting(defense, UTILITY)
        for attack in BY[:1] + BY[4:5] if size == "smoke" else BY:
            yield Setting(defense, attack)
            if defense != "none" and size != "smoke":
                yield Setting(defense, attack, knows=False)


def cell(setting: Setting, bench: Bench) -> Result:
    """Accuracy and epsilon of a training, or what an attack recovers of single unseen pictures."""
    shape, classes = blueprint(bench.data, bench.size)
    chosen = Chosen.of(() if setting.defense == "none" else (setting.defense,))
    architecture = Architecture("mlp", shape, classes)
    if setting.attack == UTILITY:
        return Result(trained(architecture, chosen, bench), notes=(shrunk(shape, bench.size),))
    count = {"smoke": 2, "small": 10, "paper": 100}[bench.size]
    pictures, public = unseen(bench.data, FIRST, count, shape), public_pool(bench.data, "train", shape=shape, limit=500)
    blind, recovered = public.images.mean(0), list[torch.Tensor]()
    for i in range(len(pictures.labels)):
        model = Model.of(architecture.build(bench.seed + i), architecture)
        one, seed = rows_of(pictures, i, 1), bench.seed + i
        seen, _ = capture_gradient(model, one, defenses=chosen.defenses, told=setting.knows, seed=seed)
        attack, found = ATTACKS[setting.attack](), blind[None]
        attack = attack.prepared(seen, public, generator=torch.Generator()) if hasattr(attack, "prepared") else attack
        with suppress(NotObserved):  # what cannot be read is answered with the mean picture
            found = attack(seen, generator=torch.Generator().manual_seed(bench.seed)).value
        recovered.append(found.nan_to_num().clamp(0, 1))
    rows = compared(torch.cat(recovered), pictures.images, blind, public.images[:100])
    return Result(samples=rows, notes=(shrunk(shape, bench.size),))


def trained(architecture: Architecture, chosen: Chosen, bench: Bench) -> Row:
    """Accuracy on unseen pictures after training behind the defense, and what is proven for each picture of that."""
    count, epochs = TRAINING[bench.size]
    public = public_pool(bench.data, "train", shape=architecture.input_shape, limit=count)
    test = unseen(bench.data, FIRST, count, architecture.input_shape)
    model = Model.of(architecture.build(bench.seed), architecture)
    model = train_behind(model, public, chosen.defenses, epochs=epochs, seed=bench.seed)
    epsilon = epsilon_of(chosen.defenses, epochs, DELTA)
    privacy = "none: no accountant" if epsilon is None else f"delta {DELTA:g}, one picture added or removed"
    return {"accuracy": accuracy(model, test), "epsilon": epsilon, "privacy": privacy}


def tell(table: Table) -> Findings:
    """The advice, and leakage as bars."""
    tried = list[Tried]()
    for cost in table.where(attack=UTILITY):
        rows = [row for row in table.where(defense=cost["defense"]) if row.get("identified") is not None]
        aware, unaware = ([row for row in rows if row["knows"] is knows] for knows in (True, False))
        if aware:
            best = max(aware, key=lambda row: row["identified"])
            other = max((row["identified"] for row in unaware), default=None)
            known = {"unaware": other, "accuracy": cost["accuracy"], "epsilon": cost["epsilon"]}
            tried.append(Tried(cost["defense"], best["identified"], best["attack"], 0.01, **known))
    shown = [row for row in table.rows if row.get("identified") is not None]
    figure, [axes] = panels(width=7, height=1 + 0.25 * len(shown))
    if shown:
        bars(axes, shown, lambda r: f"{r['defense']}, {r['attack']}{'' if r['knows'] else ' (not told)'}", "identified")
    axes.set(xlabel="top-1 among 100", xlim=(0, 1.05))
    words = advice(tried) if tried and tried[0].name == "none" else ["Not enough is finished to say."]
    return Findings(" ".join(words), {"What attackers identify": figure})


STUDY = Study(
    name="defenses",
    question="What does each defense leave to an attacker who knows it, what to one who does not, and what does it cost?",
    settings=settings,
    cell=cell,
    tell=tell,
)
