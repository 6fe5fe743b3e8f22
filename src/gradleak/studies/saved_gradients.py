"""Is a gradient that was saved and attacked later harder to invert than one that is attacked where it was computed?

Five things can differ: whether the victim's BatchNorm was in train or eval mode, and what the attacker believes; buffers
from before or after the forward pass, known or replaced by initial values; float32 or float16 in the file. As train mode
never reads buffers and eval mode never writes them, the 32 combinations come to 14 runs. All else is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor, nn

from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.audit.metrics import mean_image
from gradleak.modalities.networks import Architecture, resnet
from gradleak.modalities.pictures import public_pool
from gradleak.observations.model import Mode, Model
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.gradient import capture_gradient

little = resnet((), 8)  # one convolution
BUFFERS: dict[Mode, tuple[str, ...]] = {"train": ("before", "after", "unknown"), "eval": ("known", "unknown")}


@dataclass(frozen=True)
class Setting:
    """A run, of one image. buffers: those in the file, taken before or after the forward pass where that matters."""

    model: str
    victim_mode: Mode
    attacker_mode: Mode
    buffers: str
    precision: str
    steps: int
    image: int


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Model by model, every distinct run, image by image."""
    models = [("convnet64", 20, 1_000), ("resnet32-10", 20, 1_000)]
    if size != "paper":
        models = [("convnet64", 3, 60), ("resnet32-10", 1, 25)] if size == "small" else [(f"{__name__}:little", 1, 3)]
    for (model, images, steps), victim, attacker in product(models, BUFFERS, BUFFERS):
        held = BUFFERS[victim] if attacker == "eval" else ("any",)
        for buffers, precision, image in product(held, ("float32", "float16"), range(images)):
            yield Setting(model, victim, attacker, buffers, precision, steps, image)


def cell(setting: Setting, bench: Bench) -> Result:
    """The image's scores, and its loss against the fresh gradient of the same victim."""
    victim, attacker = setting.victim_mode, setting.attacker_mode
    where = bench.data, bench.size, bench.seed, bench.device
    buffers = "any" if victim == "train" else "known"
    fresh = attacked(replace(setting, attacker_mode=victim, buffers=buffers, precision="float32"), *where)
    scores = attacked(setting, *where)
    loss = {"loss_db": fresh["psnr_db"] - scores["psnr_db"]}
    differences = attacker != victim, setting.buffers == "unknown", setting.precision == "float16"
    run = f"taken in {victim}, attacked in {attacker}, buffers {setting.buffers}, {setting.precision}"
    note = shrunk(blueprint(bench.data, bench.size)[0], bench.size)
    return Result({"run": run, "differences": sum(differences)}, [scores | loss], notes=(note,))


@lru_cache(maxsize=2)
def attacked(setting: Setting, data: str, size: Size, seed: int, device: str) -> Row:
    """The scores of an image whose gradient comes from an untrained victim, its buffers moved by four batches."""
    shape, classes = blueprint(data, size)
    private = rows_of(unseen(data, 2_000, setting.image + 1, shape), setting.image, 1)
    public = public_pool(data, "train", shape=shape, limit=512, seed=seed).images
    architecture = Architecture(setting.model, shape, classes)
    batches = list(torch.split(public[:64], 16))
    victim, after = (forwarded(architecture.build(seed), some) for some in (batches, [*batches, private.images]))
    model = Model.of(victim, architecture, mode=setting.victim_mode)
    taken, _ = capture_gradient(model, private, precision=getattr(torch, setting.precision), reveal_labels=True)
    shipped = Model.of({"after": after, "unknown": architecture.build(0)}.get(setting.buffers, victim), architecture)
    taken = replace(taken, model=model.assume(mode=setting.attacker_mode, buffers=shipped.buffers))
    attack, generator = InvertingGradients(steps=setting.steps), torch.Generator().manual_seed(seed + setting.image)
    found = attack(taken.to(torch.device(device)), generator=generator).value
    [scores] = compared(found, private.images, mean_image(public))
    return scores | {"replay_error": taken.residual(private.images, private.labels)}


@torch.no_grad()
def forwarded(module: nn.Module, batches: list[Tensor]) -> nn.Module:
    """The module after forward passes in train mode, which move its buffers."""
    for batch in batches:
        module.train()(batch)
    return module


def tell(table: Table) -> Findings:
    """What each difference alone costs, and all runs beside the mean image."""
    by_model = [table.where(model=model) for model in dict.fromkeys(row["model"] for row in table.rows)]
    figure, axes = panels(len(by_model), width=9, height=4, columns=1)
    for one, rows in zip(axes, by_model, strict=True):
        one.axvline(rows[0]["mean_image_psnr_db"], color="black", linestyle="--", label="mean image")
        bars(one, rows, lambda row: row["run"], "psnr_db", "loss_db")
        one.set(title=rows[0]["model"], xlabel="PSNR, and loss against the fresh gradient of the same victim, in dB")
    single = [f"{row['model']} {row['run']} {row['loss_db']:.1f} dB" for row in table.where(differences=1)]
    said = f"Loss against the fresh gradient when one thing differs: {'; '.join(single)}." if single else ""
    return Findings(said, {"Fresh against saved gradients": figure})


STUDY = Study(
    name="saved-gradients",
    question="Why are gradients that were saved to a file harder to invert than fresh ones?",
    settings=settings,
    cell=cell,
    together=lambda setting: (setting.model, setting.victim_mode, setting.image),
    over=("image",),
    tell=tell,
    anywhere=True,
)
