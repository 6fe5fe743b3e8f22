"""How well can the number of training pictures be read from a LoRA adapter (DSiRe, arXiv:2406.19395)?

A zoo of adapters, trained by one recipe on auxiliary pictures, fits a `DatasetSize`, which is asked about adapters that
were trained on other pictures; the first zoo also about adapters of other kinds. Controls: always answering the zoo's
median size, and the same estimator with the zoo's sizes shuffled.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from matplotlib.figure import Figure

from gradleak.studies.adapter_zoo import LEVEL, ZOOS, Kind, base_of, estimators, other_recipes
from gradleak.studies.findings import Findings
from gradleak.studies.plots import COLOURS, bars, panels
from gradleak.studies.statistics import summary
from gradleak.studies.study import Bench, Published, Result, Row, Size, Study, silent
from gradleak.studies.table import Table

LIKE, PEFT = "like the zoo", "trained by PEFT, read from disk"


@dataclass(frozen=True)
class Setting:
    """A zoo, and the adapters that it is asked about."""

    zoo: Kind
    asked: str
    held_out: Kind


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Every zoo asked about adapters like its own, half as many but at most 20; the first also about others."""
    times = 4 if size == "paper" else 1
    for place, zoo in enumerate(ZOOS[size]):
        like = replace(zoo, count=times * min(zoo.count // 2, 20), seed=2 * place + 1)
        zoo = replace(zoo, count=times * zoo.count, seed=2 * place)
        yield Setting(zoo, LIKE, like)
        if place == 0:
            other = replace(like, count=like.count // 2, seed=1_000)
            for asked, recipe in other_recipes(zoo.recipe).items():
                yield Setting(zoo, asked, replace(other, recipe=recipe))
            yield Setting(zoo, "9 and 12 samples", replace(other, numbers=(9, 12)))
            yield Setting(zoo, PEFT, replace(like, count=1 if size == "smoke" else 2, seed=0))


def cell(setting: Setting, bench: Bench) -> Result:
    """The zoo's answers about adapters that it has not seen, beside those of the controls."""
    kind, quiet = setting.held_out, replace(bench, on_step=silent)
    base, (fitted, by_shape, shuffled) = base_of(kind.model, quiet), estimators(setting.zoo, quiet)
    by_peft = setting.asked == PEFT
    held, twins = base.by_peft(kind) if by_peft else (base.adapters(kind, base.private, bench.on_step), [])
    samples, median = list[Row](), float(fitted.sizes.double().quantile(0.5))
    for adapter, n in zip(held, kind.sizes.tolist(), strict=True):
        fit, shape, random = fitted(adapter), by_shape(adapter), shuffled(adapter)
        sample: Row = {"error": abs(fit.size - n), "vote_error": abs(fit.voted - n)}
        sample |= {"median_size_error": abs(median - n), "shape_only_error": abs(shape.size - n)}
        sample |= {"shuffled_error": abs(random.size - n), "exact": fit.size == n}
        sample |= {"covered": fit.low <= n <= fit.high, "high_over_low": fit.high / fit.low}
        sample |= {"in_range": fit.in_range, "shape_in_range": shape.in_range}
        samples.append(sample | {"pictures": n, "answer": fit.size, "lowest": fit.low, "highest": fit.high})
    for sample, twin in zip(samples, twins, strict=False):
        sample["same_as_simulated"] = fitted(twin).size == sample["answer"]
    worst = min(fmean(s["covered"] for s in samples if s["pictures"] == n) for n in kind.numbers)
    facts = {"zoo_adapters": len(setting.zoo.sizes), "coverage_of_the_worst_size": worst}
    return Result(facts, samples, notes=base.notes)


def tell(table: Table) -> Findings:
    """How well every kind of adapter is read, how often intervals hold, and what the first zoo says of other kinds."""
    like, other = table.where(asked=LIKE), [row for row in table.rows if row["asked"] != LIKE]
    units = [row | {k: v / row["median_size_error"] for k, v in row.items() if "error" in k} for row in table.rows]
    figure, [axes] = panels(width=10, height=1 + 0.5 * len(units))
    axes.axvline(1, color="black", linestyle="--", label="always the median size")
    names = "error", "vote_error", "shuffled_error"
    bars(axes, units, lambda row: row["zoo" if row["asked"] == LIKE else "asked"], *names)
    axes.set(xlabel="mean absolute error / that of always answering the median size")
    said, plots = list[str](), {"How well the number of training pictures is read": figure}
    if like:
        covered = table.sampled("covered", asked=LIKE)
        share, low, high = summary("share", covered).values()
        errors = "; ".join(f"{row['zoo']}: {row['error']:.2f} (vote {row['vote_error']:.2f})" for row in like)
        said = [f"Mean absolute error in pictures, with the paper's vote in brackets: {errors}."]
        said += [f"{share:.1%} ({low:.1%} to {high:.1%}) of {len(covered)} intervals hold the true number."]
        plots["Intervals of the held-out adapters"] = intervals(table, like)
    if other:
        errors = "; ".join(f"{r['asked']}: {r['error']:.2f}, flagged {1 - r['in_range']:.0%}" for r in other)
        said += [f"The first zoo asked about other adapters: {errors}."]
    return Findings(" ".join(said), plots)


def intervals(table: Table, rows: list[Row]) -> Figure:
    """Those of all held-out adapters and the true numbers, a panel for each zoo."""
    figure, axes = panels(len(rows), width=5)
    for one, zoo in zip(axes, (row["zoo"] for row in rows), strict=True):
        samples = [sample for sample in table.samples if sample["zoo"] == zoo and sample["asked"] == LIKE]
        low, high, answer, true = ([s[k] for s in samples] for k in ("lowest", "highest", "answer", "pictures"))
        one.vlines(range(len(true)), low, high, color=COLOURS[5], linewidth=1, label=f"{LEVEL:.0%} interval")
        one.plot(answer, ".", color=COLOURS[0], markersize=3, label="estimate")
        one.plot(true, color=COLOURS[1], drawstyle="steps-mid", label="true N")
        one.set(yscale="log", xlabel="held-out adapter", ylabel="training pictures")
        one.set_title(zoo, fontsize=7)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


STUDY = Study(
    name="adapter-sample-count",
    question="How well can the number of pictures that trained an adapter be read from the adapter?",
    settings=settings,
    cell=cell,
    together=lambda setting: setting.zoo,
    unlisted=("pictures", "answer", "lowest", "highest", "high_over_low"),
    tell=tell,
    published=(Published({"asked": LIKE, "zoo": lambda zoo: "to 6" in zoo}, "vote_error", 0.36, "arXiv:2406.19395"),),
    anywhere=True,
)
