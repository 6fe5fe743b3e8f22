"""What the recipes about adapters share: pre-trained base models, LoRA's usual start, one row of scores.

The adapters are those of one PEFT fine-tuning, computed by `Adapter.simulate`: the tests show that the two are equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.search.descend import OnStep
from gradleak.audit import metrics
from gradleak.modalities.networks import BINARY, Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Adapter, Gradient
from gradleak.observations.training import Recipe
from gradleak.priors.gaussian import GaussianPrior
from gradleak.victims.training import prepare_model

EPOCHS, TRAINING, POOL, DECOYS = 5, 5_000, 7_000, 99
ONE_STEP = Recipe(learning_rate=0.01, steps=1)


@dataclass(frozen=True)
class Base:
    """A pre-trained model, and the pictures around it: decoys, public and private ones have none in common."""

    model: PictureModel
    public: Pictures
    decoys: Tensor
    private: Pictures
    prior: GaussianPrior | None

    @property
    def modules(self) -> list[str]:
        """Every linear layer, and every convolution outside of transformers."""
        kinds = (nn.Linear,) if self.model.architecture.name == "vit" else (nn.Linear, nn.Conv2d)
        return [name for name, layer in self.model.module.named_modules() if isinstance(layer, kinds)]


def source_for(name: str, data: str) -> str:
    """Digits for the models of digits: the data set beside `data`, or scikit-learn's."""
    if name not in BINARY:
        return data
    beside = Path(data).parent / "mnist"
    return str(beside) if beside.is_dir() else "digits"


def prepare(name: str, data: str, private: int, start: Callable[[str], OnStep]) -> Base:
    """The model of that name, trained for five epochs on at most 5,000 public pictures; cached."""
    source = source_for(name, data)
    first = load(source, "test", indices=[0])
    shape = (first.images.shape[1], first.images.shape[2], first.images.shape[3])
    classes = 2 if name in BINARY else max(len(first.classes), 2)
    architecture = Architecture(name, shape, classes)
    pool = public_pool(source, "train", shape=shape, limit=POOL)
    pool = replace(pool, labels=pool.labels % classes)
    training = replace(pool, images=pool.images[:TRAINING], labels=pool.labels[:TRAINING])
    module = prepare_model(architecture, train_on=training, epochs=EPOCHS, on_step=start(f"training {name}"))
    # Pairs and priors come from pictures that the model was not trained on, where there are enough.
    rest = pool.images[TRAINING:] if len(pool.images) > TRAINING + 1_000 else pool.images
    labels = pool.labels[TRAINING:] if len(pool.images) > TRAINING + 1_000 else pool.labels
    public = replace(pool, images=rest[DECOYS:], labels=labels[DECOYS:])
    rows = range(10) if source == "embedded" else range(100, 100 + private)
    held = load(source, "test", indices=list(rows)[:private])
    enough = len(public.images) >= public.images[0].numel() / 2
    prior = GaussianPrior.fit(public.images) if enough else None
    model = Model.of(module, architecture)
    return Base(model, public, rest[:DECOYS], replace(held, labels=held.labels % classes), prior)


def blank(base: Base, rank: int, recipe: Recipe | None = ONE_STEP, *, batch: int = 1, seed: int = 0) -> Adapter:
    """An adapter that has learnt nothing yet, started as PEFT does: A uniform (Kaiming), B = 0, s = 1."""
    generator, start = torch.Generator().manual_seed(seed), {}
    for module in base.modules:
        weight = base.model.parameters[f"{module}.weight"]
        A = 2 * torch.rand(rank, *weight.shape[1:], generator=generator) - 1
        start[f"{module}.lora_A"] = A / weight[0].numel() ** 0.5
        start[f"{module}.lora_B"] = torch.zeros(len(weight), rank, *[1] * (weight.dim() - 2))
    released = {name: tensor for name, tensor in start.items() if name.endswith("lora_B")}
    scaling = dict.fromkeys(base.modules, 1.0)
    return Adapter(model=base.model, released=released, start=start, scaling=scaling, recipe=recipe, batch_size=batch)


def trained(adapter: Adapter, images: Tensor, labels: Tensor) -> Adapter:
    """The adapter after its recipe on these pictures."""
    return replace(adapter, released={k: v.detach() for k, v in adapter.simulate(images, labels).items()})


def full_gradient(base: Base, images: Tensor, labels: Tensor) -> PictureObservation:
    """The whole gradient of the adapted weights at the start of training, which the adapter is a sketch of."""
    names = [f"{module}.weight" for module in base.modules]
    frozen = tuple(name for name in base.model.parameters if name not in names)
    nothing = {name: torch.zeros_like(base.model.parameters[name]) for name in names}
    empty = Gradient(model=replace(base.model, frozen=frozen), released=nothing, batch_size=len(labels))
    return replace(empty, released={k: v.detach() for k, v in empty.simulate(images, labels).items()})


def scores(base: Base, found: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, Any]:
    """One row: means over all pictures; found and truth are batches, matched within each."""
    pairs = [(images[metrics.match(images, true)], true) for images, true in zip(found, truth, strict=True)]
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
