"""What if the victim has trained on since the generator was? Its error on gradients of a model that moved away.

The generator learns from pairs of the initial LeNet. The victim then trains on 1, 10 or 100 % of its pictures for 1, 10 or 50 epochs,
and releases gradients of other pictures. The GIT paper: discrepancy roughly doubles the error.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gradleak.modalities.pictures import public_pool
from gradleak.observations.model import Model
from gradleak.observations.tensors import flatten
from gradleak.studies.data_sets import rows_of
from gradleak.studies.findings import Findings, shortage
from gradleak.studies.learned_victims import found_for, lenet, prepare, trained
from gradleak.studies.plots import lines, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.training import train

LOCAL: dict[Size, int] = {"smoke": 100, "small": 2_000, "paper": 10_000}  # pictures of the victim


@dataclass(frozen=True)
class Setting:
    """share: of its pictures that the victim trains on."""

    share: float
    epochs: int


def settings(data: str, size: Size) -> Iterator[Setting]:
    """The initial model, then those that moved away."""
    yield Setting(0.0, 0)
    yield from (Setting(share, epochs) for share in (0.01, 0.1, 1.0) for epochs in (1, 10, 50))


def cell(setting: Setting, bench: Bench) -> Result:
    """The same generator on gradients of the model that has trained on, and of the initial one."""
    victim, git = trained(lenet(bench.size, 3), bench.data, bench.size, bench.seed, prepare)
    architecture, true = victim.model.architecture, victim.private.images
    local = public_pool(bench.data, "train", shape=architecture.input_shape, limit=LOCAL[bench.size], seed=2)
    pictures = rows_of(local, 0, max(round(setting.share * len(local.images)), 2))
    module = architecture.build(bench.seed)
    train(module, pictures, epochs=setting.epochs, seed=bench.seed, on_step=bench.on_step)
    moved = replace(victim, model=Model.of(module, architecture))
    now, before = (found_for(git, state, victim.private) for state in (moved, victim))
    change = flatten(moved.model.parameters) - flatten(victim.model.parameters)
    facts = {
        "weights_moved": float(change.norm() / flatten(victim.model.parameters).norm()),
        "growth": float((now - true).square().mean() / (before - true).square().mean()) - 1,
    }
    short = shortage("pictures of the victim", LOCAL[bench.size], len(local.images))
    samples = compared(now, true, victim.public.images.mean(0))
    return Result(facts, samples, notes=(*victim.notes, short))


def tell(table: Table) -> Findings:
    """The error's growth against how far the weights moved."""
    figure, [axes] = panels(width=6)
    lines(axes, table.rows, "weights_moved", "mse", ["share"], control="mean_image_mse")
    axes.axhline(1.5 * table.rows[0]["mse"] / (1 + table.rows[0]["growth"]), color="black", linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="relative change of the weights", ylabel="mean squared error per pixel")
    axes.legend(title="share trained on; dashed: mean image; dotted: 50 % more", fontsize=7, title_fontsize=7)
    under = [row["weights_moved"] for row in table.rows if row["growth"] <= 0.5]
    over = [row["weights_moved"] for row in table.rows if row["growth"] > 0.5]
    sentence = f"The error has grown by less than 50 % where the weights moved by up to {max(under, default=0.0):.1%}"
    sentence += f", and by more from {min(over):.1%} on." if over else "; nothing here made it grow by more."
    return Findings(sentence, {"A victim that has trained on": figure})


STUDY = Study(
    name="learned-inversion-moved-model",
    question="Does a trained generator still work when the model has trained on since?",
    settings=settings,
    cell=cell,
    together=lambda setting: 0,
    tell=tell,
)
