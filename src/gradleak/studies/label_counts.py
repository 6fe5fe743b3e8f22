"""Which labels a batch's gradient tells where the classifier's own gradient is withheld, and how training changes that.

Counts are compared as multisets: of each class, the smaller of true and read number is right. Private pictures are drawn at random from
unseen rows (stored rows may rotate through the classes, and consecutive ones then have nearly equal counts).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from gradleak.attacks.ilrg import ilrg_of
from gradleak.attacks.label_counts.counter import Counter
from gradleak.attacks.label_counts.evidence import evidence
from gradleak.attacks.label_counts.label_counts import counts_by_means, frequent_counts
from gradleak.attacks.labels import recover_labels
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.model import Mode, Model, PictureModel
from gradleak.studies.data_sets import IN_WHEELS, blueprint, rows_of, shrunk
from gradleak.studies.findings import Findings, shortage
from gradleak.studies.plots import bars, panels
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.training import prepare_model

MODEL = "resnet18-16"
# epochs, pictures of training and of the attacker, steps of the reader, private pictures without the classifier and with it (seconds a batch)
EFFORT: dict[Size, tuple[tuple[int, ...], int, int, int, tuple[int, int]]] = {
    "smoke": ((0,), 100, 300, 20, (16, 16)),
    "small": ((0, 1, 10), 6_500, 8_000, 2_000, (960, 240)),
    "paper": ((0, 1, 10), 40_000, 8_000, 2_000, (6_400, 960)),
}
FIRST, LAST = 2_000, 9_000  # test rows


@dataclass(frozen=True)
class Setting:
    """shared: of the classifier's own gradient; epochs: that the model was trained for; mode: of BatchNorm."""

    epochs: int
    shared: bool
    batch: int
    mode: Mode = "eval"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Of the longest training first: with the classifier, then without it; last what BatchNorm's own statistics change."""
    small, sizes = (4, (4,)) if size == "smoke" else (8, (16, 64))
    for epochs in reversed(EFFORT[size][0]):
        yield Setting(epochs, True, small)
        yield from (Setting(epochs, False, batch) for batch in sizes)
    if size != "smoke":
        yield Setting(1, False, 16, "train")


@lru_cache(maxsize=1)
def prepare(data: str, size: Size, epochs: int, mode: Mode, seed: int) -> tuple[PictureModel, Pictures]:
    """The model, and public pictures that it was not trained on."""
    shape, classes = blueprint(data, size)
    architecture, (_, trained, public, _, _) = Architecture(MODEL, shape, classes), EFFORT[size]
    wheel = data in IN_WHEELS
    every = load(data, "train", indices=None if wheel else range(trained + public), resize=shape[1:])
    order = torch.randperm(len(every.labels), generator=torch.Generator().manual_seed(0)) if wheel else slice(None)
    every = replace(every, images=every.images[order], labels=every.labels[order])
    trained = min(trained, len(every.labels) // 2) if wheel else trained
    module = prepare_model(architecture, seed=seed, train_on=rows_of(every, 0, trained), epochs=epochs)
    return Model.of(module, architecture, mode=mode), rows_of(every, trained, public)


def cell(setting: Setting, bench: Bench) -> Result:
    """A reader for this model and batch size, and the batches."""
    _, _, _, steps, private_pictures = EFFORT[bench.size]
    wanted = private_pictures[setting.shared]
    model, public = prepare(bench.data, bench.size, setting.epochs, setting.mode, bench.seed)
    shape, generator = model.architecture.input_shape, torch.Generator().manual_seed(bench.seed)
    first, last = (0, IN_WHEELS[bench.data]) if bench.data in IN_WHEELS else (FIRST, LAST)
    rows = first + torch.randperm(last - first, generator=generator)[:wanted]
    private = load(bench.data, "test", indices=rows.tolist(), resize=shape[1:])
    count = max(len(private.labels) // setting.batch, 1)
    batches = [rows_of(private, i * setting.batch, setting.batch) for i in range(count)]
    seen = [capture_gradient(model, some, reveal_last_layer=setting.shared)[0] for some in batches]
    shown = evidence(seen[0], public)
    counter = Counter.trained(shown, generator=generator, steps=steps)
    totals = [shown.total(one) for one in seen]
    guess = frequent_counts(public, shown.classes, setting.batch)
    read = [counter(total) for total in totals]
    samples = list[Row]()
    for i, some in enumerate(batches):
        told = {"right": read[i][0], "by_means": counts_by_means(shown, totals[i])}
        if setting.shared:
            told |= {"alone": recover_labels(seen[i]).bincount(minlength=shown.classes), "ilrg": ilrg_of(seen[i])}
        told |= {"frequencies": guess, "other_batch": read[i - 1][0]}
        true = some.labels.bincount(minlength=shown.classes)
        samples.append({name: float(torch.minimum(n, true).sum() / true.sum()) for name, n in told.items()})
        samples[-1] |= {"believed": read[i][1], "all_right": samples[-1]["right"] == 1}
        bench.on_step(i + 1, count, -samples[-1]["right"])
    notes = shrunk(shape, bench.size), shortage("unseen pictures", wanted, len(private.labels))
    return Result({"model": MODEL, "layers": " ".join(shown.layers)}, samples, notes=notes)


def tell(table: Table) -> Findings:
    """Shares in words and as bars."""

    def label(row: Row) -> str:
        """The setting in words."""
        return f"{'with' if row['shared'] else 'without'} the last layer, {row['epochs']} epochs, {row['batch']} pictures, {row['mode']}"

    parts = [f"{label(row)}: {row['right']:.1%} (frequencies {row['frequencies']:.1%})" for row in table.rows]
    figure, [axes] = panels(width=7, height=1 + 0.4 * len(table.rows))
    bars(axes, table.rows, label, "right", "by_means", "frequencies")
    axes.set(xlabel="share of the labels that are right", xlim=(0, 1))
    return Findings(f"Labels read right: {'; '.join(parts)}.", {"Labels of batches": figure})


STUDY = Study(
    name="label-counts",
    question="Which labels does a batch's gradient tell, without the classifier's own and with it?",
    settings=settings,
    cell=cell,
    together=lambda setting: (setting.epochs, setting.mode),
    tell=tell,
)
