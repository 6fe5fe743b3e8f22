"""What the recipes about adapters share: pre-trained base models, LoRA's usual start, one row of scores.

The adapters are those of one PEFT fine-tuning, computed by `Adapter.simulate`: the tests show that the two are equal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradleak.audit import metrics
from gradleak.modalities.networks import BINARY, Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Adapter, Gradient
from gradleak.observations.training import Recipe
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies.data_sets import beside, blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Row, Size, Start, name_of, opening, shortage
from gradleak.victims.adapter import check_converged, lora_start
from gradleak.victims.training import prepare_model

# public pictures, of which the base models are trained on at most 5,000, and for how many epochs
POOL: dict[Size, tuple[int, int]] = {"smoke": (500, 1), "small": (7_000, 5), "paper": (7_000, 5)}
TRAINING, DECOYS = 5_000, 99
FIRST = 100  # test rows before that were looked at while the attacks were written
ONE_STEP = Recipe(learning_rate=0.01, steps=1)


@dataclass(frozen=True)
class Base:
    """A pre-trained model, and the pictures around it: decoys, public and private ones have none in common.

    wanted: how many private pictures were asked for; there may be fewer.
    """

    model: PictureModel
    public: Pictures
    decoys: Tensor
    private: Pictures
    prior: GaussianPrior | None
    wanted: int = 0

    @property
    def modules(self) -> list[str]:
        """Every linear layer, and every convolution outside of transformers."""
        kinds = (nn.Linear,) if self.model.architecture.name == "vit" else (nn.Linear, nn.Conv2d)
        return [name for name, layer in self.model.module.named_modules() if isinstance(layer, kinds)]

    def batches(self, size: int, count: int) -> list[Pictures]:
        """The private pictures in batches of `size`, at most `count` of them."""
        return [rows_of(self.private, i * size, size) for i in range(min(count, len(self.private.labels) // size))]


def source_for(name: str, data: str) -> str:
    """Digits for the models of digits: the data set beside `data`, or scikit-learn's."""
    return data if name not in BINARY else str(beside(data, "mnist") or "digits")


def prepare(name: str, data: str, private: int, size: Size, start: Start) -> Base:
    """The model of that name, trained on at most 5,000 public pictures; cached. There may be fewer private pictures."""
    source = source_for(name, data)
    shape, classes = blueprint(source, size)
    classes = 2 if name in BINARY else classes
    architecture = Architecture(name, shape, classes)
    limit, epochs = POOL[size]
    pool = public_pool(source, "train", shape=shape, limit=limit)
    pool = replace(pool, labels=pool.labels % classes)
    training = rows_of(pool, 0, TRAINING)
    module = prepare_model(architecture, train_on=training, epochs=epochs, on_step=start(f"training {name}"))
    # Pairs and priors come from pictures that the model was not trained on, where there are enough.
    rest = rows_of(pool, TRAINING, limit) if len(pool.images) > TRAINING + 1_000 else pool
    public = rows_of(rest, DECOYS, limit)
    # Of the embedded pictures the first ten show a photograph's whole square.
    first, count = (0, min(private, 10)) if source == "embedded" else (FIRST, private)
    held = unseen(source, first, count, shape)
    enough = len(public.images) >= public.images[0].numel() / 2
    prior = GaussianPrior.fit(public.images) if enough else None
    model = Model.of(module, architecture)
    return Base(model, public, rest.images[:DECOYS], replace(held, labels=held.labels % classes), prior, private)


def before(data: str, size: Size, bases: Iterable[Base]) -> str:
    """How a sentence about these models begins."""
    notes = list[str]()
    for base in bases:
        name, source = base.model.architecture.name, base.private.source
        notes.append(shrunk(base.model.architecture.input_shape, size))
        notes += [f"{name} on {name_of(source)}"] if source != data else []
        notes.append(shortage(f"private pictures for {name}", base.wanted, len(base.private.labels)))
    return opening(data, size, *notes)


def blank(
    base: Base, rank: int, recipe: Recipe | None = ONE_STEP, *, batch: int = 1, seed: int = 0
) -> PictureObservation:
    """An adapter that has learnt nothing yet, with s = 1."""
    start = lora_start(base.model, base.modules, rank, torch.Generator().manual_seed(seed))
    release = Adapter(start=start, scaling=dict.fromkeys(base.modules, 1.0), recipe=recipe)
    released = {name: tensor for name, tensor in start.items() if name.endswith("lora_B")}
    return Observation(model=base.model, release=release, released=released, batch_size=batch)


def trained(adapter: PictureObservation, images: Tensor, labels: Tensor) -> PictureObservation:
    """The adapter after its recipe on these pictures, beside the A that it started from; BadInput when it diverges."""
    change = {k: v.detach() for k, v in adapter.simulate(images, labels).items()}
    check_converged(change.values(), adapter.adapter.recipe or ONE_STEP)
    return replace(adapter, released=change)


def full_gradient(base: Base, images: Tensor, labels: Tensor) -> PictureObservation:
    """The whole gradient of the adapted weights at the start of training, which the adapter is a sketch of."""
    weights = {f"{module}.weight": base.model.parameters[f"{module}.weight"] for module in base.modules}
    model = replace(base.model, frozen=tuple(name for name in base.model.parameters if name not in weights))
    gradient = Gradient().simulate(model, weights, images, labels)
    return Observation(model=model, released={k: v.detach() for k, v in gradient.items()}, batch_size=len(labels))


def scores(base: Base, recovered: Sequence[Tensor], truth: Sequence[Tensor]) -> Row:
    """One row: means over all pictures; both are batches, matched within each."""
    pairs = [(images[metrics.match(images, true)], true) for images, true in zip(recovered, truth, strict=True)]
    images, true = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    blind = metrics.mean_image(base.public.images).expand_as(true)
    psnr_db, mean_psnr_db = metrics.psnr_db(images, true), metrics.psnr_db(blind, true)
    ssim, mean_ssim = metrics.ssim(images, true), metrics.ssim(blind, true)
    ranks = metrics.identification(images, true, base.decoys)
    return {
        "images": len(true),
        "psnr_db": round(float(psnr_db.mean()), 2),
        "mean_image_psnr_db": round(float(mean_psnr_db.mean()), 2),
        "beats_mean_psnr": round(float((psnr_db > mean_psnr_db).double().mean()), 3),
        "ssim": round(float(ssim.mean()), 3),
        "mean_image_ssim": round(float(mean_ssim.mean()), 3),
        "beats_mean_ssim": round(float((ssim > mean_ssim).double().mean()), 3),
        "top1_of_100": round(float((ranks == 1).double().mean()), 3),
    }
