"""What the studies of adapters share: pre-trained base models, adapters and gradients of private pictures, attacks on many of them.

The adapters are those of one PEFT fine-tuning, computed by `Adapter.simulate`: the tests show that the two are equal.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.adam_step import with_step_undone
from gradleak.attacks.decoders.mlp import MLP
from gradleak.attacks.decoders.pairs import as_observation
from gradleak.attacks.decoders.ridge import PseudoInverse, Ridge
from gradleak.attacks.decoders.unet import UNet
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.seed import with_start_recovered
from gradleak.attacks.unmixing.span import with_samples_counted
from gradleak.audit import metrics
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.peft import read_adapter
from gradleak.modalities.networks import BINARY, Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.adapter import Adapter, product
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Gradient
from gradleak.observations.training import Recipe
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies.data_sets import beside, blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import name_of, shortage
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Row, Size
from gradleak.victims.adapter import check_converged, fine_tune, lora_start
from gradleak.victims.training import prepare_model

Decoder = Callable[[PictureObservation], PictureObservation]
SAME = "same"  # data
# public pictures, of which the base models are trained on at most 5,000, and for how many epochs
POOL: dict[Size, tuple[int, int]] = {"smoke": (500, 1), "small": (7_000, 5), "paper": (7_000, 5)}
TRAINING, DECOYS = 5_000, 99
EVALUATIONS: dict[Size, int] = {"smoke": 3, "small": 60, "paper": 150}  # of a search, at each prior weight
PAIRS: dict[Size, int] = {
    "smoke": 60,
    "small": 1_000,
    "paper": 1_000,
}  # public pictures that starts and decoders learn from
FIRST = 100  # test rows before that were looked at while the attacks were written
ONE_STEP = Recipe(learning_rate=0.01, steps=1)


@dataclass(frozen=True)
class Base:
    """A pre-trained model, and around it public pictures and decoys, which have none in common with each other or private ones."""

    model: PictureModel
    source: str
    public: Pictures
    decoys: Tensor
    prior: GaussianPrior | None

    @property
    def modules(self) -> list[str]:
        """Every linear layer, and every convolution outside of transformers."""
        kinds = (nn.Linear,) if self.model.architecture.name == "vit" else (nn.Linear, nn.Conv2d)
        return [name for name, layer in self.model.module.named_modules() if isinstance(layer, kinds)]

    def private(self, count: int) -> Pictures:
        """At most so many private pictures. Of the embedded ones the first ten show a photograph's whole square."""
        first, count = (0, min(count, 10)) if self.source == "embedded" else (FIRST, count)
        held = unseen(self.source, first, count, self.model.architecture.input_shape)
        return replace(held, labels=held.labels % self.model.architecture.classes)

    def elsewhere(self, data: str, folder: str, count: int) -> Pictures:
        """At most so many pictures of the data set beside `data`, as the model takes them."""
        shape, classes = self.model.architecture.input_shape, self.model.architecture.classes
        pool = public_pool(str(beside(data, folder)), "train", shape=shape, limit=count)
        return replace(pool, labels=pool.labels % classes)

    def notes(self, bench: Bench, wanted: int, there: int) -> tuple[str, ...]:
        """Another data set, small pictures, fewer private pictures than wanted."""
        architecture = self.model.architecture
        other = f"{architecture.name} on {name_of(self.source)}" if self.source != bench.data else ""
        fewer = shortage(f"private pictures for {architecture.name}", wanted, there)
        return other, shrunk(architecture.input_shape, bench.size), fewer


@lru_cache(maxsize=4)
def prepare(name: str, data: str, size: Size) -> Base:
    """The model of that name, trained on public pictures; models of digits on those beside `data`, or scikit-learn's."""
    source = data if name not in BINARY else str(beside(data, "mnist") or "digits")
    shape, classes = blueprint(source, size)
    architecture = Architecture(name, shape, 2 if name in BINARY else classes)
    limit, epochs = POOL[size]
    pool = public_pool(source, "train", shape=shape, limit=limit)
    pool = replace(pool, labels=pool.labels % architecture.classes)
    module = prepare_model(architecture, train_on=rows_of(pool, 0, TRAINING), epochs=epochs)
    # Pairs and priors come from pictures that the model was not trained on, where there are enough.
    rest = rows_of(pool, TRAINING, limit) if len(pool.images) > TRAINING + 1_000 else pool
    public = rows_of(rest, DECOYS, limit)
    prior = GaussianPrior.of_public(public.images)
    return Base(Model.of(module, architecture), source, public, rest.images[:DECOYS], prior)


def search(base: Base, size: Size, pairs: int, decode: Decoder | None = None) -> MapInversion:
    """The search under the public pictures' prior. It starts where a regression on so many pairs, or a decoded gradient, leads."""
    plain = MapInversion(prior=base.prior, evaluations=EVALUATIONS[size], pairs=pairs)
    if decode is None:
        return plain
    return replace(plain, start=lambda observation, generator: plain(decode(observation), generator=generator))


def batched(private: Pictures, size: int) -> list[Pictures]:
    """The pictures in batches of `size`; BadInput when they do not fill one."""
    if size > len(private.labels):
        raise BadInput(f"{len(private.labels)} private pictures fill no batch of {size}.")
    return [rows_of(private, i * size, size) for i in range(len(private.labels) // size)]


def blank(base: Base, rank: int, recipe: Recipe = ONE_STEP, *, batch: int = 1, seed: int = 0) -> PictureObservation:
    """An adapter that has learnt nothing yet, with s = 1."""
    start = lora_start(base.model, base.modules, rank, torch.Generator().manual_seed(seed))
    release = Adapter(start=start, scaling=dict.fromkeys(base.modules, 1.0), recipe=recipe)
    released = {name: tensor for name, tensor in start.items() if name.endswith("lora_B")}
    return Observation(model=base.model, release=release, released=released, batch_size=batch)


def trained(adapter: PictureObservation, some: Pictures) -> PictureObservation:
    """The adapter after its recipe on these pictures, beside the A that it started from; BadInput when it diverges."""
    change = {k: v.detach() for k, v in adapter.simulate(some.images, some.labels).items()}
    check_converged(change.values(), adapter.adapter.recipe or ONE_STEP)
    return replace(adapter, released=change)


def full_gradient(base: Base, some: Pictures) -> PictureObservation:
    """The whole gradient of the adapted weights at the start of training, which the adapter is a sketch of."""
    weights = {f"{module}.weight": base.model.parameters[f"{module}.weight"] for module in base.modules}
    model = replace(base.model, frozen=tuple(name for name in base.model.parameters if name not in weights))
    gradient = Gradient().simulate(model, weights, some.images, some.labels)
    return Observation(model=model, released={k: v.detach() for k, v in gradient.items()}, batch_size=len(some.labels))


def raw(adapter: PictureObservation) -> PictureObservation:
    """B A taken for the gradient, as if nothing had to be decoded."""
    start, scaling = adapter.adapter.start, adapter.adapter.scaling
    factors = {**start, **{name: start[name] + change for name, change in adapter.released.items()}}
    weights = {f"{m}.weight": -product(factors[f"{m}.lora_A"], factors[f"{m}.lora_B"]) for m in scaling}
    return as_observation(adapter, weights)


DECODERS: dict[str, Callable[..., Decoder]] = {
    "B A as gradient": lambda *given, generator: raw,
    "pseudo-inverse": PseudoInverse.fit,
    "plain ridge": partial(Ridge.fit, groups=1, softmax=False),  # one second moment a layer, no softmax equations
    "ridge": Ridge.fit,
    "mlp": MLP.fit,
    "unet": UNet.fit,
}


@lru_cache(maxsize=2)
def fitted(
    decoder: str, model: str, data: str, size: Size, seed: int, rank: int, pairs: int, public: str = SAME
) -> tuple[Decoder, int, float]:
    """A decoder of the model's adapters, the number of public pictures (of `public`, beside the data) it is fitted on, CPU seconds."""
    base = prepare(model, data, size)
    pool = rows_of(base.public if public == SAME else base.elsewhere(data, public, 2_000), 0, pairs)
    began, generator = time.process_time(), torch.Generator().manual_seed(seed)
    found = DECODERS[decoder](blank(base, rank, seed=seed), pool.images, pool.labels, generator=generator)
    return found, len(pool.labels), time.process_time() - began


def attacked(
    base: Base, attack: Any, seen: Sequence[PictureObservation], truth: Sequence[Pictures], bench: Bench, wanted: int
) -> Result:
    """What an attack makes of batches, side by side where that can be, or the mean image where it refuses. wanted: pictures."""
    began, generator = time.process_time(), torch.Generator().manual_seed(bench.seed)
    images, mean = list[Tensor](), base.public.images.mean(0, keepdim=True)
    scale_known = all(not isinstance(o.release, Adapter) or o.release.recipe is not None for o in seen)
    if isinstance(attack, MapInversion) and scale_known:
        found = [o.value for o in attack.many(seen, generator=generator, on_step=bench.on_step)]
        images = [torch.where(some.isfinite().all(), some, mean) for some in found]
    else:
        for observation in seen:
            try:
                images.append(attack(observation, generator=generator, on_step=bench.on_step).value)
            except NotObserved:
                images.append(mean.expand(observation.batch_size or 1, -1, -1, -1))
    cost = {"attack_seconds": (time.process_time() - began) / len(seen)}
    samples = scores(base, images, [some.images for some in truth])
    empty = sum(not any(bool(tensor.any()) for tensor in o.released.values()) for o in seen)
    facts = {"data": name_of(base.source), "empty": empty}
    return Result(facts, samples, notes=base.notes(bench, wanted, len(samples)), cost=cost)


def scores(base: Base, recovered: Sequence[Tensor], truth: Sequence[Tensor]) -> list[Row]:
    """One row per picture, beside the mean image's and among decoys; both are batches, matched within each."""
    images = torch.cat([some[metrics.match(some, true)] for some, true in zip(recovered, truth, strict=True)])
    rows = compared(images, torch.cat(list(truth)), metrics.mean_image(base.public.images), base.decoys)
    for row in rows:
        row["psnr_above_mean_db"] = row["psnr_db"] - row["mean_image_psnr_db"]
        row["better_than_mean_ssim"] = row["ssim"] > row["mean_image_ssim"]
    return rows


def in_words(row: Row) -> str:
    """A row of a table for a sentence."""
    blind = f"mean image {row['mean_image_psnr_db']:.1f}, better on {row['better_than_mean']:.0%}"
    return f"{row['model']}, {row['attack']}: {row['psnr_db']:.1f} dB ({blind}, top-1 of 100 {row['identified']:.0%})"


def of_a_stranger(
    model: PictureModel, pictures: Pictures, rank: int, recipe: Recipe, precision: str, seed: int
) -> PictureObservation:
    """An adapter's folder by PEFT under this seed, as somebody reads it who has the base model: neither recipe nor number is told."""
    kind = getattr(torch, precision)
    with TemporaryDirectory() as out:
        fine_tune(model, pictures, rank=rank, recipe=recipe, out=Path(out), seed=seed, precision=kind)
        unknown = read_adapter(Path(out) / "adapter", model, batch_size=1)
    return with_samples_counted(with_step_undone(with_start_recovered(unknown)))
