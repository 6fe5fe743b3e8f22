"""How much of the gradient comes back from an adapter? The cosine of the decoded to the true gradient at the start of training, on
unseen pictures, by rank, batch size, steps, kind of layer, number of public pictures and their distance. The decoders are fitted on
adapters of one public picture and one step. R2F (arXiv:2512.07374) trains such a decoder, and publishes no cosine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gradleak.observations.distances import cosine
from gradleak.observations.tensors import Tensors
from gradleak.studies import adapter_victims as victims
from gradleak.studies.adapter_victims import DECODERS, ONE_STEP, SAME
from gradleak.studies.data_sets import beside
from gradleak.studies.findings import Findings, shortage
from gradleak.studies.plots import lines, panels
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier")
IMAGENET, FACES = "imagenet_sample", "orl_faces"


@dataclass(frozen=True)
class Setting:
    """decoder: fitted on `pairs` public pictures; pictures: private ones, at most; layers: all, or one kind of them."""

    decoder: str
    pairs: int
    pictures: int
    rank: int = 8
    batch: int = 1
    steps: int = 1
    layers: str = "all"
    public: str = SAME
    private: str = SAME


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Ranks with batches, steps, kinds of layer, fewer pairs, other data, trained decoders."""
    pairs, pictures = {"smoke": (60, 2), "small": (1_800, 60), "paper": (2_000, 500)}[size]
    smoke, ridge = size == "smoke", Setting("ridge", pairs, pictures)
    for rank in (4, 8) if smoke else (2, 4, 8, 16, 32):
        yield from (replace(ridge, decoder=name, rank=rank) for name in list(DECODERS)[:4])
        yield from (replace(ridge, rank=rank, batch=batch) for batch in ((2,) if smoke else (2, 4)))
    few = replace(ridge, pictures=min(pictures, 20))
    yield from (replace(few, steps=steps) for steps in ((2,) if smoke else (2, 5, 10, 50)))
    yield from (replace(few, layers=kind) for kind in LAYERS)
    yield from (replace(ridge, pairs=count) for count in ((30,) if smoke else (250, 500, 1_000)))
    if beside(data, IMAGENET) is not None:
        yield from (replace(ridge, decoder=name, public=IMAGENET) for name in ("ridge", "plain ridge"))
    if beside(data, FACES) is not None:
        yield from (replace(ridge, decoder=name, private=FACES) for name in ("ridge", "plain ridge"))
    yield from (replace(ridge, decoder=name) for name in (() if smoke else ("mlp", "unet")))


def cell(setting: Setting, bench: Bench) -> Result:
    """One decoder on the adapters of unseen pictures."""
    base, asked = victims.prepare("vit", bench.data, bench.size), (bench.seed, setting.rank, setting.pairs)
    decoder, pairs, seconds = victims.fitted(setting.decoder, "vit", bench.data, bench.size, *asked, setting.public)
    private = base.private(setting.pictures)
    if setting.private != SAME:
        private = base.elsewhere(bench.data, setting.private, setting.pictures)
    recipe = replace(ONE_STEP, steps=setting.steps)
    start = victims.blank(base, setting.rank, recipe, batch=setting.batch, seed=bench.seed)
    samples, batches = list[Row](), victims.batched(private, setting.batch)
    for i, some in enumerate(batches):
        decoded = decoder(victims.trained(start, some)).released
        samples.append(fidelity(decoded, victims.full_gradient(base, some).released, setting.layers))
        bench.on_step(i + 1, len(batches), samples[-1]["cosine"])
    fewer = shortage("public pictures", setting.pairs, pairs)
    notes = *base.notes(bench, setting.pictures, len(private.labels)), fewer
    return Result({"fitted_on": pairs}, samples, notes=notes, cost={"fit_seconds": seconds})


def fidelity(decoded: Tensors, true: Tensors, layers: str = "all") -> Row:
    """The cosine of the layers as one vector, and the mean over single ones; of all, the last is left out there."""

    def similarity(*names: str) -> float:
        found, wanted = ({name: tensors[name].double() for name in names} for tensors in (decoded, true))
        return 1 - float(cosine(found, wanted))

    names = [name for name in true if layers in ("all", name.removesuffix(".weight").rpartition(".")[2])]
    single = [similarity(name) for name in (names[:-1] if layers == "all" else names)]
    return {"cosine": similarity(*names), "cosine_layers": sum(single) / len(single)}


def tell(table: Table) -> Findings:
    """The ridge decoder in words; the cosine by rank for every decoder, and by steps for ridge."""
    most = max(row["pairs"] for row in table.rows)
    plain = {"batch": 1, "layers": "all", "public": SAME, "private": SAME, "pairs": most}
    by_rank, by_steps = table.where(steps=1, **plain), table.where(decoder="ridge", rank=8, **plain)
    ridge = [f"{row['cosine']:.3f} at r = {row['rank']}" for row in by_rank if row["decoder"] == "ridge"]
    figure, [left, right] = panels(2)
    lines(left, by_rank, "rank", "cosine", by=("decoder",))
    lines(right, by_steps, "steps", "cosine")
    for axes, rows, column, title in (
        (left, by_rank, "rank", "one picture, one step"),
        (right, by_steps, "steps", "ridge, rank 8, one picture"),
    ):
        axes.set(xscale="log", xlabel=column, ylabel="cosine to the true gradient", title=title)
        axes.set_xticks(ticks := sorted({row[column] for row in rows}), map(str, ticks))
        axes.minorticks_off()
    words = f"Cosine of the gradient decoded by ridge, one picture, one step: {', '.join(ridge) or 'not yet measured'}."
    return Findings(words, {"How much of the gradient comes back": figure})


STUDY = Study(
    name="adapter-decoding",
    question="How much of the private gradient comes back from an adapter that was trained for a few steps?",
    settings=settings,
    cell=cell,
    together=lambda s: (s.decoder, s.rank, s.pairs, s.public),
    tell=tell,
    beside=(IMAGENET, FACES),
)
