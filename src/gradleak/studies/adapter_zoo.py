"""Many LoRA adapters of one base model, each trained on pictures and from a start of its own.

Base model, attacker and victims see three disjoint sets of pictures. Adapters are trained by `Adapter.loss`, several side
by side; a few are trained by PEFT and read back from disk, beside twins that are simulated from the same starts.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.dataset_size import DatasetSize
from gradleak.modalities.networks import BINARY, Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.adapter import Adapter
from gradleak.observations.layers import is_adaptable
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe, train
from gradleak.studies.data_sets import blueprint, rows_of, shrunk
from gradleak.studies.findings import shortage
from gradleak.studies.study import Bench, OnStep, Size, silent
from gradleak.victims.adapter import check_converged, fine_tune, lora_start
from gradleak.victims.training import prepare_model

LEVEL = 0.9  # of the intervals
SIDE_BY_SIDE = 8  # adapters trained at a time
Adapters = list[PictureObservation]


@dataclass(frozen=True)
class Kind:
    """Adapters that are trained alike, `count` for each of some numbers of pictures. seed: beside the bench's."""

    model: str
    recipe: Recipe
    numbers: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    rank: int = 8
    count: int = 40
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.model}, N {self.numbers[0]} to {self.numbers[-1]}, rank {self.rank}, {self.recipe}"

    @property
    def sizes(self) -> Tensor:
        """The number of pictures of every adapter."""
        return torch.tensor(self.numbers).repeat_interleave(self.count)


@dataclass(frozen=True)
class Base:
    """A trained model, its layers that can be adapted, and pictures that it was not trained on."""

    bench: Bench
    model: PictureModel
    modules: list[str]
    auxiliary: Pictures  # the attacker's, like the victims' but others
    private: Pictures
    notes: tuple[str, ...]

    def adapters(self, kind: Kind, pictures: Pictures, on_step: OnStep = silent) -> Adapters:
        """As `read_adapter` would find them without a recipe."""
        generator, made = torch.Generator().manual_seed(self.bench.seed + kind.seed), Adapters()
        for n in kind.numbers:
            for first in range(0, kind.count, SIDE_BY_SIDE):
                copies = range(first, min(first + SIDE_BY_SIDE, kind.count))
                rows = torch.stack([torch.randperm(len(pictures.labels), generator=generator)[:n] for _ in copies])
                starts = lora_start(self.model, self.modules, kind.rank, generator, copies=len(copies))
                made += self.trained(kind.recipe, starts, pictures.images[rows], pictures.labels[rows])
                on_step(len(made), len(kind.sizes), 0.0)
        return made

    def by_peft(self, kind: Kind) -> tuple[Adapters, Adapters]:
        """Private adapters by PEFT, from disk, and the same simulated from their starts."""
        real, twins, row = Adapters(), Adapters(), 0
        for number, n in enumerate(kind.sizes.tolist()):
            own, row = rows_of(self.private, row, n), row + n
            options: dict[str, Any] = {"rank": kind.rank, "target_modules": "all", "seed": self.bench.seed + number}
            both = [kind.recipe, replace(kind.recipe, steps=1, optimizer="sgd")]  # whose A is still where it started
            with TemporaryDirectory() as out:
                each = [fine_tune(self.model, own, out=Path(mkdtemp(dir=out)), recipe=r, **options)[0] for r in both]
            starts = {name: tensor[None] for name, tensor in each[1].adapter.start.items()}
            twins += self.trained(kind.recipe, starts, own.images[None], own.labels[None])
            real.append(replace(each[0], release=replace(each[0].adapter, recipe=None), batch_size=None))
        return real, twins

    def trained(self, recipe: Recipe, starts: Tensors, images: Tensor, labels: Tensor) -> Adapters:
        """One per start, of images (k, n, channel, height, width) and labels (k, n); BadInput when one diverges."""
        scaling, device, made = dict.fromkeys(self.modules, 1.0), torch.device(self.bench.device), Adapters()
        loss = partial(Adapter(start={}, scaling=scaling).loss, self.model.to(device))  # every factor is given
        starts = {name: tensor.to(device) for name, tensor in starts.items()}
        ends = vmap(partial(train, loss, recipe=recipe))(starts, images.to(device), labels.to(device))
        check_converged(ends.values(), recipe)
        for k in range(len(images)):
            own = {name: tensor[k].detach().cpu() for name, tensor in ends.items()}
            changes = {name: tensor for name, tensor in own.items() if name.endswith("lora_B")}
            start = own | {name: torch.zeros_like(tensor) for name, tensor in changes.items()}
            made.append(Observation(model=self.model, release=Adapter(start=start, scaling=scaling), released=changes))
        return made


@lru_cache(maxsize=2)
def base_of(name: str, bench: Bench) -> Base:
    """Trained on public pictures; auxiliary and private ones are the halves of the test split."""
    (shape, classes), wanted = blueprint(bench.data, bench.size), 100 if bench.size == "smoke" else 4_000
    classes = 2 if name in BINARY else classes
    test = load(bench.data, "test", limit=wanted, resize=shape[1:])
    public = public_pool(bench.data, "train", shape=shape, limit=2_000)
    test, public = (replace(some, labels=some.labels % classes) for some in (test, public))
    architecture, count = Architecture(name, shape, classes), len(test.labels)
    module = prepare_model(architecture, train_on=public, epochs=5)
    modules = [layer for layer, kind in module.named_modules() if is_adaptable(kind)]
    halves = torch.randperm(count, generator=torch.Generator().manual_seed(bench.seed)).chunk(2)
    mine, theirs = (replace(test, images=test.images[half], labels=test.labels[half]) for half in halves)
    notes = shrunk(shape, bench.size), shortage("unseen pictures", wanted, count)
    return Base(bench, Model.of(module, architecture), modules, mine, theirs, notes)


@lru_cache(maxsize=1)
def estimators(zoo: Kind, bench: Bench) -> list[DatasetSize]:
    """Fitted on the zoo, on the shapes of its spectra alone, and on shuffled sizes."""
    base, known = base_of(zoo.model, bench), zoo.sizes
    made = base.adapters(zoo, base.auxiliary)
    shuffled = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(bench.seed))]
    fits = (known, True), (known, False), (shuffled, True)
    return [DatasetSize.fit(made, sizes, level=LEVEL, norm=norm) for sizes, norm in fits]


MANY = (1, 2, 3, 5, 8, 12, 20, 30, 40, 50)
ONE = Recipe(learning_rate=0.05, steps=1)
SINGLE = Recipe(learning_rate=0.02, steps=24, batch_size=1)  # one picture a step, as in personalising a model
ADAM = Recipe(optimizer="adam", learning_rate=1e-3, steps=24, batch_size=1)
RECIPES = (
    Kind("convnet", SINGLE),  # the one that is also asked what it was not made for
    Kind("convnet", ONE),
    Kind("convnet", SINGLE, rank=4, count=30),
    Kind("convnet", SINGLE, rank=16, count=30),
    Kind("convnet", replace(ONE, steps=12), count=30),
    Kind("convnet", ADAM),
    Kind("convnet", replace(ADAM, steps=12, batch_size=None), count=30),
    Kind("convnet", ONE, MANY, count=25),
    Kind("convnet", replace(SINGLE, steps=50), MANY, count=14),
    Kind("vit", ONE),
    Kind("vit", replace(SINGLE, steps=12), count=60),
    Kind("mlp1000", ONE, count=30),
)
ZOOS: dict[Size, tuple[Kind, ...]] = {
    # The losses of barely trained models on few pictures are large: a smaller rate, or some diverge.
    "smoke": tuple(Kind("convnet", replace(r, learning_rate=0.002), (1, 2), 4, 5) for r in (SINGLE, ONE)),
    "small": RECIPES,
    "paper": (*RECIPES, Kind("vit", replace(ADAM, steps=12)), Kind("vit", ONE, MANY, count=20)),
}


def other_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """How adapters may have been trained that a zoo of this recipe was not made for."""
    return {
        "learning rate x 1.25": replace(recipe, learning_rate=1.25 * recipe.learning_rate),
        "learning rate x 2": replace(recipe, learning_rate=2 * recipe.learning_rate),
        "twice the steps": replace(recipe, steps=2 * recipe.steps),
        "all samples a step": replace(recipe, batch_size=None),
        "Adam": ADAM,
    }
