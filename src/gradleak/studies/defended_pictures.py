"""Pictures in the study of defenses: a perceptron, what attacks recover of unseen pictures, and what training behind a defense costs."""

from functools import cache

import torch
from torch import Tensor

from gradleak.audit import metrics
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import public_pool
from gradleak.observations.defense_names import Chosen
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.training import Recipe
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.defense_settings import ADAPTER, GRADIENT, NONE, UTILITY, Case, Kind, Setting
from gradleak.studies.defense_victims import NOTHING, attacked, proven, shared_of, tuned
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Row
from gradleak.victims.defended import accuracy, train_behind

PERCEPTRON = "perceptron"
ONE, FOUR, ADAPTED = (PERCEPTRON, GRADIENT, 1), (PERCEPTRON, GRADIENT, 4), (PERCEPTRON, ADAPTER, 1)
EVERY: dict[Case, tuple[str, ...]] = {
    ONE: (
        *(NONE, "dp-sgd:1:0.8", "top-k:0.1", "bits:8", "sign", "relative-noise:0.1", "bits:4", "soteria:0.5"),
        *("qsgd:4", "top-k:0.01", "bits:2", "dp-sgd:1:0.1", "relative-noise:1", "bits:16"),
    ),
    FOUR: (NONE, "clients:2", "mix-up:0.7"),
    ADAPTED: (NONE, "frozen-a", "lora-dropout:0.3", "svd:2", "relative-noise:0.1", "bits:8"),
}
OF_GRADIENTS = ("analytic", "recursive", "dlg", "idlg", "inverting-gradients", "map-inversion")
FIRST = 2_000  # test row
BATCHES = {"smoke": 2, "small": 3, "paper": 100}  # private ones
TRAINING = {"smoke": (200, 2), "small": (1_000, 5), "paper": (10_000, 10)}  # pictures, epochs
TUNING = Recipe(optimizer="adamw", learning_rate=3e-3, steps=100, batch_size=50)
RANK = 8


def cell(setting: Setting, bench: Bench) -> Result:
    """Accuracy and epsilon of a training, or what an attack recovers of unseen pictures. They are small but at paper size."""
    shape, classes = blueprint(bench.data, "paper" if bench.size == "paper" else "smoke")
    architecture, notes = Architecture("mlp", shape, classes), (shrunk(shape, "smoke"),)
    if setting.attack == UTILITY:
        return Result(trained(architecture, setting, bench), notes=notes)
    pictures = unseen(bench.data, FIRST, setting.batch * BATCHES[bench.size], shape)
    public = public_pool(bench.data, "train", shape=shape, limit=500)
    model, blind = base_of(architecture, setting.shared, bench), public.images.mean(0)
    private = [rows_of(pictures, first, setting.batch) for first in range(0, len(pictures.labels), setting.batch)]
    seen = [shared_of(model, each, setting, RANK, bench.seed + number) for number, each in enumerate(private)]
    recovered = list[Tensor]()
    for result, true in zip(attacked(setting.attack, seen, public, bench), private, strict=True):
        found = public.images[:0] if result is None else result.value
        missing = max(setting.batch - len(found), 0)  # what cannot be read is answered with the mean picture
        filled = torch.cat([found.nan_to_num().clamp(0, 1), blind.expand(missing, *shape)])
        recovered.append(filled[metrics.match(filled, true.images)])
    return Result(samples=compared(torch.cat(recovered), pictures.images, blind, public.images[:99]), notes=notes)


def base_of(architecture: Architecture, shared: str, bench: Bench) -> PictureModel:
    """A fresh model; for adapters one that was trained on public pictures."""
    if shared == ADAPTER:
        return pretrained(architecture, bench)
    return Model.of(architecture.build(bench.seed), architecture)


@cache
def pretrained(architecture: Architecture, bench: Bench) -> PictureModel:
    """A model after two epochs on public pictures."""
    count, _ = TRAINING[bench.size]
    public = public_pool(bench.data, "train", shape=architecture.input_shape, limit=count)
    model = Model.of(architecture.build(bench.seed), architecture)
    return train_behind(model, public, (), epochs=2, seed=bench.seed)


def trained(architecture: Architecture, setting: Setting, bench: Bench) -> Row:
    """Accuracy on unseen pictures after training behind the defense, and what is proven for each picture of that."""
    (count, epochs), defenses = TRAINING[bench.size], Chosen.of(setting.names).defenses
    public = public_pool(bench.data, "train", shape=architecture.input_shape, limit=2 * count)
    test = unseen(bench.data, FIRST, 1_000, architecture.input_shape)
    model = base_of(architecture, setting.shared, bench)
    if setting.shared == ADAPTER:
        private = rows_of(public, len(public.labels) // 2, count)
        return {"accuracy": accuracy(tuned(model, private, setting, RANK, TUNING, bench.seed), test), **NOTHING}
    model = train_behind(model, rows_of(public, 0, count), defenses, epochs=epochs, seed=bench.seed)
    return {"accuracy": accuracy(model, test), **proven(defenses, epochs)}


PICTURES = Kind(
    noun="picture",
    measure="top-1",
    every=EVERY,
    smoke={ONE: (NONE, "top-k:0.1", "dp-sgd:1:0.8")},
    by={ONE: OF_GRADIENTS, FOUR: OF_GRADIENTS, ADAPTED: ("inverting-gradients", "activation-patterns")},
    unaware=("analytic", "inverting-gradients", "activation-patterns"),
    untold=(),
    smoke_by=("analytic", "inverting-gradients"),
    left_out=("dp-sgd:1:0.1", "relative-noise:1", "bits:16"),
    leaked=lambda row: float(row["identified"]),
    chance=lambda row: 0.01,
)
