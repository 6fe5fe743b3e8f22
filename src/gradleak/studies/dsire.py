"""DSiRe: from which adapters can the number of training images be read, and how well?

Every setting (base model, sizes, rank, fine-tuning recipe) gets a zoo of adapters trained on auxiliary images, on which
`DatasetSize` is fitted, and others trained on other images, of which it tells the size. Base model, zoo and victims see
three disjoint sets of images, and every adapter its own images and start. Training is `Adapter.simulate`'s, side by
side for many adapters; a handful trained by PEFT and read back from disk must give the same answers.

One zoo is also asked what it was not made for: other learning rates, optimisers, steps and sizes, the recipe withheld.
Controls: the zoo's median size for every adapter, and the same estimator with the zoo's sizes shuffled.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.dataset_size import DatasetSize, Estimate
from gradleak.errors import BadInput
from gradleak.modalities.networks import BINARY, Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.layers import is_adaptable
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Adapter
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe, train
from gradleak.report.record import Plot
from gradleak.studies.data_sets import blueprint, rows_of, shrunk
from gradleak.studies.findings import Findings, Row, Size, Start, interval, opening, plot, rectangular, shortage
from gradleak.victims.adapter import check_converged, fine_tune, lora_start
from gradleak.victims.training import prepare_model

FEW, MANY = (1, 2, 3, 4, 5, 6), (1, 2, 3, 5, 8, 12, 20, 30, 40, 50)
LEVEL, LIKE = 0.9, "like the zoo"
SIDE_BY_SIDE = 8  # adapters trained at a time
UNSEEN = 4_000  # pictures of the test split, shared between the attacker and the victims


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is fine-tuned how, for which N, and how many adapters of each N are in the zoo and held out."""

    model: str
    sizes: tuple[int, ...] = FEW
    rank: int = 8
    recipe: Recipe
    zoo: int = 40
    held_out: int = 20


ONE = Recipe(learning_rate=0.05, steps=1)
SINGLE = Recipe(learning_rate=0.02, steps=24, batch_size=1)  # one image a step, as in personalising a model
FULL = Recipe(learning_rate=0.05, steps=12)
ADAM = Recipe(optimizer="adam", learning_rate=1e-3, steps=24, batch_size=1)
ADAM_FULL = Recipe(optimizer="adam", learning_rate=1e-3, steps=12)
SHORT = Recipe(learning_rate=0.02, steps=12, batch_size=1)

SMALL = [
    Setting(model="convnet", recipe=SINGLE),  # the one that is also asked what it was not made for
    Setting(model="convnet", recipe=ONE),
    Setting(model="convnet", recipe=SINGLE, rank=4, zoo=30, held_out=15),
    Setting(model="convnet", recipe=SINGLE, rank=16, zoo=30, held_out=15),
    Setting(model="convnet", recipe=FULL, zoo=30, held_out=15),
    Setting(model="convnet", recipe=ADAM),
    Setting(model="convnet", recipe=ADAM_FULL, zoo=30, held_out=15),
    Setting(model="convnet", recipe=ONE, sizes=MANY, zoo=25, held_out=12),
    Setting(model="convnet", recipe=replace(SINGLE, steps=50), sizes=MANY, zoo=14, held_out=7),
    Setting(model="vit", recipe=ONE),
    Setting(model="vit", recipe=SHORT, zoo=60),
    Setting(model="mlp1000", recipe=ONE, zoo=30, held_out=15),
]
SIZES: dict[Size, tuple[list[Setting], int, int]] = {  # settings, adapters of each size by PEFT, unseen pictures
    # The losses of barely trained models on few pictures are large: a smaller rate, or some diverge.
    "smoke": (
        [
            Setting(
                model="convnet", recipe=replace(recipe, learning_rate=0.002), sizes=(1, 2), rank=4, zoo=8, held_out=2
            )
            for recipe in (SINGLE, ONE)
        ],
        1,
        100,
    ),
    "small": (SMALL, 2, UNSEEN),
    "paper": (
        [
            *(replace(setting, zoo=4 * setting.zoo, held_out=4 * setting.held_out) for setting in SMALL),
            Setting(model="vit", recipe=replace(ADAM, steps=12), zoo=160, held_out=80),
            Setting(model="vit", recipe=ONE, sizes=MANY, zoo=80, held_out=40),
        ],
        2,
        UNSEEN,
    ),
}


def run(data: str, size: Size, *, seed: int, device: str, start: Start) -> Iterator[Findings]:
    """Yields after every setting; the findings so far. device: where adapters are trained."""
    rows, answers = list[Row](), dict[str, list[tuple[int, Estimate]]]()
    settings, by_peft, unseen = SIZES[size]
    for number, setting in enumerate(settings):
        bench = Bench.of(setting.model, data, size, unseen, seed=seed, device=torch.device(device), start=start)
        short = shortage("unseen pictures", unseen, len(bench.auxiliary.labels) + len(bench.private.labels))
        before = opening(data, size, shrunk(bench.model.architecture.input_shape, size), short)
        try:
            zoo, known = bench.adapters(setting, bench.auxiliary, setting.zoo, seed=seed + 2 * number)
            held, sizes = bench.adapters(setting, bench.private, setting.held_out, seed=seed + 2 * number + 1)
        except BadInput as reason:
            rows.append({**described(setting), "asked": LIKE, "note": str(reason)})
            yield findings(rows, answers).after(before)
            continue
        fitted, by_shape = (DatasetSize.fit(zoo, known, level=LEVEL, norm=norm) for norm in (True, False))
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        row = scored(setting, LIKE, fitted, by_shape, held, sizes)
        shuffled = DatasetSize.fit(zoo, known[order], level=LEVEL)
        row["shuffled_mae"] = mean_error([shuffled(adapter).size for adapter in held], sizes)
        rows.append(row)
        answers[setting_of(row)] = [(int(n), fitted(adapter)) for n, adapter in zip(sizes, held, strict=True)]
        yield findings(rows, answers).after(before)
        if number == 0:
            rows += asked_elsewhere(bench, setting, fitted, by_shape, seed)
            rows.append(asked_of_peft(bench, setting, fitted, by_shape, by_peft))
            yield findings(rows, answers).after(before)


def asked_elsewhere(
    bench: "Bench", setting: Setting, fitted: DatasetSize, by_shape: DatasetSize, seed: int
) -> Iterator[Row]:
    """What a zoo made for `setting` says of adapters that are made in another way."""
    recipe = setting.recipe
    others = {
        "learning rate x 1.25": replace(setting, recipe=replace(recipe, learning_rate=1.25 * recipe.learning_rate)),
        "learning rate x 2": replace(setting, recipe=replace(recipe, learning_rate=2 * recipe.learning_rate)),
        "twice the steps": replace(setting, recipe=replace(recipe, steps=2 * recipe.steps)),
        "all samples a step": replace(setting, recipe=replace(recipe, batch_size=None)),
        "Adam": replace(setting, recipe=ADAM),
        "9 and 12 samples": replace(setting, sizes=(9, 12)),
    }
    for asked, other in others.items():
        try:
            held, sizes = bench.adapters(other, bench.private, setting.held_out // 2, seed=seed + 1000)
        except BadInput as reason:
            yield {**described(setting), "asked": asked, "note": str(reason)}
            continue
        yield scored(setting, asked, fitted, by_shape, held, sizes)


def asked_of_peft(bench: "Bench", setting: Setting, fitted: DatasetSize, by_shape: DatasetSize, count: int) -> Row:
    """What it says of adapters that PEFT has trained, and how often the same of those simulated from their starts."""
    asked = "trained by PEFT, read from disk"
    try:
        held, twins, sizes = bench.by_peft(setting, count)
    except BadInput as reason:
        return {**described(setting), "asked": asked, "note": str(reason)}
    same = [fitted(a).size == fitted(b).size for a, b in zip(held, twins, strict=True)]
    return scored(setting, asked, fitted, by_shape, held, sizes) | {"same_as_simulated": sum(same) / len(same)}


@dataclass(frozen=True)
class Bench:
    """A trained base model, and two disjoint sets of pictures that it was not trained on."""

    model: PictureModel
    auxiliary: Pictures  # the attacker's, like the victims' but others
    private: Pictures
    seed: int
    device: torch.device
    start: Start

    @classmethod
    def of(
        cls, model: str, data: str, size: Size, unseen: int, *, seed: int, device: torch.device, start: Start
    ) -> "Bench":
        """The base is trained on public pictures; auxiliary and private ones are the halves of the test split."""
        shape, classes = blueprint(data, size)
        classes = 2 if model in BINARY else classes
        pictures = load(data, "test", limit=unseen, resize=shape[1:])
        public = public_pool(data, "train", shape=shape, limit=2_000, seed=0)
        public, pictures = (replace(some, labels=some.labels % classes) for some in (public, pictures))
        architecture = Architecture(model, shape, classes)
        module = prepare_model(architecture, seed=0, train_on=public, epochs=5, on_step=start(f"{model}, base model"))
        order = torch.randperm(len(pictures.labels), generator=torch.Generator().manual_seed(seed))
        mine, theirs = (
            replace(pictures, images=pictures.images[half], labels=pictures.labels[half]) for half in order.chunk(2)
        )
        return cls(Model.of(module, architecture), mine, theirs, seed, device, start)

    @property
    def modules(self) -> list[str]:
        """Every linear and convolutional layer."""
        return [name for name, layer in self.model.module.named_modules() if is_adaptable(layer)]

    def adapters(
        self, setting: Setting, pictures: Pictures, count: int, *, seed: int
    ) -> tuple[list[PictureObservation], Tensor]:
        """`count` adapters of each size, as `read_adapter` would find them without a recipe, and their sizes."""
        generator = torch.Generator().manual_seed(seed)
        on_step = self.start(f"{setting.model}, rank {setting.rank}, {setting.recipe}")
        made: list[PictureObservation] = []
        sizes = torch.tensor(setting.sizes).repeat_interleave(count)
        for n in setting.sizes:
            for first in range(0, count, SIDE_BY_SIDE):
                batch = min(SIDE_BY_SIDE, count - first)
                rows = torch.stack(
                    [torch.randperm(len(pictures.labels), generator=generator)[:n] for _ in range(batch)]
                )
                starts = lora_start(self.model, self.modules, setting.rank, generator, copies=batch)
                made += self.trained(setting.recipe, starts, pictures.images[rows], pictures.labels[rows])
                on_step(len(made), len(sizes), 0.0)
        return made, sizes

    def by_peft(
        self, setting: Setting, count: int
    ) -> tuple[list[PictureObservation], list[PictureObservation], Tensor]:
        """`count` adapters of each size by PEFT from disk, the same simulated from the same starts, and their sizes."""
        sizes = torch.tensor(setting.sizes).repeat_interleave(count)
        first_step = replace(setting.recipe, steps=1, optimizer="sgd")
        real, twins, row = list[PictureObservation](), list[PictureObservation](), 0
        for number, n in enumerate(sizes.tolist()):
            private = rows_of(self.private, row, n)
            row += n
            read = []
            for recipe in (setting.recipe, first_step):  # the first step leaves A where it started: it shows the start
                with tempfile.TemporaryDirectory() as folder:
                    adapter, _ = fine_tune(
                        self.model,
                        private,
                        rank=setting.rank,
                        out=Path(folder),
                        recipe=recipe,
                        target_modules="all",
                        seed=self.seed + number,
                        reveal_batch_size=False,
                    )
                read.append(replace(adapter, release=replace(adapter.adapter, recipe=None)))
            real.append(read[0])
            starts = {name: tensor[None] for name, tensor in read[1].adapter.start.items()}
            twins += self.trained(setting.recipe, starts, private.images[None], private.labels[None])
        return real, twins, sizes

    def trained(self, recipe: Recipe, starts: Tensors, images: Tensor, labels: Tensor) -> list[PictureObservation]:
        """One adapter per start, images (k, n, channel, height, width), labels (k, n): their A is where training ended.

        Raises BadInput when one diverges.
        """
        scaling, model = dict.fromkeys(self.modules, 1.0), self.model.to(self.device)
        whole = Adapter(start={}, scaling=scaling)  # every factor is given

        def ended(start: Tensors, x: Tensor, y: Tensor) -> Tensors:
            return train(lambda factors, x, y: whole.loss(model, factors, x, y), start, x, y, recipe)

        starts = {name: tensor.to(self.device) for name, tensor in starts.items()}
        ends = vmap(ended)(starts, images.to(self.device), labels.to(self.device))
        ends = {name: tensor.detach().cpu() for name, tensor in ends.items()}
        check_converged(ends.values(), recipe)
        adapters = []
        for k in range(len(images)):
            changes = {name: tensor[k].clone() for name, tensor in ends.items() if name.endswith("lora_B")}
            zeros = {name: torch.zeros_like(tensor) for name, tensor in changes.items()}
            start = zeros | {name: tensor[k].clone() for name, tensor in ends.items() if name.endswith("lora_A")}
            release = Adapter(start=start, scaling=scaling)
            adapters.append(Observation(model=self.model, release=release, released=changes))
        return adapters


def described(setting: Setting) -> Row:
    """The columns that tell settings apart."""
    recipe = setting.recipe
    return {
        "model": setting.model,
        "sizes": f"{setting.sizes[0]} to {setting.sizes[-1]}",
        "rank": setting.rank,
        "optimizer": recipe.optimizer,
        "learning_rate": recipe.learning_rate,
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "zoo": setting.zoo * len(setting.sizes),
    }


def scored(
    setting: Setting,
    asked: str,
    fitted: DatasetSize,
    by_shape: DatasetSize,
    held: Sequence[PictureObservation],
    sizes: Tensor,
) -> Row:
    """One row: what the zoo of `setting` says of the adapters `held`, which were trained on `sizes` images."""
    fits, shapes = [fitted(adapter) for adapter in held], [by_shape(adapter) for adapter in held]
    covered = [float(e.low <= n <= e.high) for e, n in zip(fits, sizes.tolist(), strict=True)]
    coverage = sum(covered) / len(covered)
    each = [float(torch.tensor(covered)[sizes == n].mean()) for n in set(sizes.tolist())]
    widths = sorted(e.high / e.low for e in fits)
    return {
        **described(setting),
        "asked": asked,
        "held_out": len(held),
        "mae": mean_error([e.size for e in fits], sizes),
        "mae_interval": round(interval([abs(e.size - n) for e, n in zip(fits, sizes.tolist(), strict=True)]) or 0, 3),
        "exact": round(sum(e.size == n for e, n in zip(fits, sizes.tolist(), strict=True)) / len(fits), 3),
        "vote_mae": mean_error([e.voted for e in fits], sizes),
        "shape_only_mae": mean_error([e.size for e in shapes], sizes),
        "median_size_mae": mean_error([float(fitted.sizes.double().quantile(0.5))] * len(held), sizes),
        "shuffled_mae": None,
        "coverage": round(coverage, 3),
        "coverage_error": round((coverage * (1 - coverage) / len(covered)) ** 0.5, 3),  # one binomial sigma
        "coverage_of_the_worst_size": round(min(each), 3),
        "high_over_low": round(widths[len(widths) // 2], 3),
        "out_of_range": round(sum(not e.in_range for e in fits) / len(fits), 3),
        "shape_out_of_range": round(sum(not e.in_range for e in shapes) / len(shapes), 3),
        "same_as_simulated": None,
    }


def mean_error(answers: Sequence[float], sizes: Tensor) -> float:
    """Mean absolute error in images."""
    return round(float((torch.tensor(answers, dtype=torch.double) - sizes).abs().mean()), 3)


def setting_of(row: Row) -> str:
    """A setting in a few words."""
    batch = "all" if row["batch_size"] is None else row["batch_size"]
    return f"{row['model']}, N {row['sizes']}, r {row['rank']}, {row['steps']} {row['optimizer']} steps of {batch}"


def findings(rows: list[Row], answers: dict[str, list[tuple[int, Estimate]]]) -> Findings:
    """The table, its plots, and in words how many settings were read, how well, and what the zoo did elsewhere."""
    like = [row for row in rows if row["asked"] == LIKE and "mae" in row]
    failed = " ".join(f"{setting_of(row)}, {row['asked']}: {row['note']}" for row in rows if "note" in row)
    if not like:
        return Findings(rectangular(rows), f"No zoo could be made. {failed}")
    total = sum(row["held_out"] for row in like)
    coverage = sum(row["coverage"] * row["held_out"] for row in like) / total
    sigma = (coverage * (1 - coverage) / total) ** 0.5
    errors = "; ".join(f"{setting_of(row)}: {row['mae']:.2f} (vote {row['vote_mae']:.2f})" for row in like)
    sentence = (
        f"Mean absolute error in images, with the paper's vote in brackets. {errors}. The {LEVEL:.0%} intervals hold "
        f"{coverage:.1%} +- {sigma:.1%} of {total} held-out adapters."
    )
    if others := [row for row in rows if row["asked"] != LIKE and "mae" in row]:
        answers_elsewhere = "; ".join(f"{r['asked']}: {r['mae']:.2f}, flagged {r['out_of_range']:.0%}" for r in others)
        sentence += f" The first zoo asked about other adapters: {answers_elsewhere}."
    sentence += f" Not had: {failed}" if failed else ""
    return Findings(rectangular(rows), sentence, [bars(like), scatter(answers)])


def bars(rows: list[Row]) -> Plot:
    """The error of every setting beside its controls, in units of the control's."""
    figure = Figure(figsize=(9, 1 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for k, (key, label) in enumerate({"mae": "regression", "vote_mae": "vote", "shuffled_mae": "shuffled zoo"}.items()):
        values = [row[key] / row["median_size_mae"] for row in rows]
        axes.barh([i + 0.25 * k for i in range(len(rows))], values, height=0.25, label=label)
    axes.set_yticks([i + 0.25 for i in range(len(rows))], [setting_of(row) for row in rows], fontsize=7)
    axes.axvline(1, color="black", linestyle="--", label="always the median size")
    axes.set(xlabel="mean absolute error / that of always answering the median size")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    return plot("How well the number of training images is read", figure)


def scatter(answers: dict[str, list[tuple[int, Estimate]]]) -> Plot:
    """Every held-out adapter's interval, by its true number of images."""
    columns = min(3, len(answers))
    lines = -(-len(answers) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, found) in zip(panels, answers.items(), strict=False):
        sizes = sorted({n for n, _ in found})
        places = [
            n * (1 + 0.15 * k / len(found) * len(sizes)) for n in sizes for k in range(sum(m == n for m, _ in found))
        ]
        colours = ["tab:green" if e.low <= n <= e.high else "tab:red" for n, e in found]
        axes.vlines(places, [e.low for _, e in found], [e.high for _, e in found], colors=colours, linewidth=1)
        axes.scatter(places, [e.size for _, e in found], s=2, color="black")
        axes.axline((1, 1), (2, 2), color="black", linewidth=0.5)
        axes.set(xscale="log", yscale="log", xlabel="true N", ylabel=f"estimate, {LEVEL:.0%} interval")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(sizes, labels=[str(n) for n in sizes])
            axis.set_ticks([], minor=True)
        axes.tick_params(labelsize=6)
        axes.set_title(name, fontsize=7)
    for axes in panels[len(answers) :]:
        axes.remove()
    return plot("Intervals of the held-out adapters", figure)
