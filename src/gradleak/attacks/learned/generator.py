"""What learned attacks share: the training of a generator (gradient -> pictures) on pairs, and the generator on disk.

A generator is an nn.Module: {parameter: (n, ...)} -> (n, batch, channel, height, width), built from the leaked model's
structure and never from its weights.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from gradleak.attacks.labels import known_or_recovered
from gradleak.attacks.learned.pairs import Pairs
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput, NotObserved, checked, shortened
from gradleak.modalities.networks import Architecture
from gradleak.observations import tensor_file
from gradleak.observations.model import PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors

SCHEMA = "gradleak/generator/1"
MOST = 8  # pictures of a batch: training compares all their orders
Width = Annotated[int, Meta(ge=1, le=16_384)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the network of a generator is built, beside the model. The layout of git is none: no file can name code to import."""

    batch: Annotated[int, Meta(ge=1, le=MOST)] = 1
    width: Width | None = None
    hidden: Width | None = None
    widths: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=8)] | None = None


class About(msgspec.Struct, frozen=True):
    """The header of a generator."""

    kind: str
    options: Options
    architecture: tuple[str, tuple[int, int, int], int]
    state: str
    trace: list[tuple[int, float | None]] = []


Shards = Callable[[], Iterator[Pairs]]  # the same pairs, each time it is called


@dataclass(frozen=True, eq=False)
class Generator:
    """A trained generator, with what it was trained for.

    kind, options  how its network is built
    state          hash of the leaked model's state
    pictures       (n,) int64: a hash of each public picture that it was trained on, sorted
    trace          (CPU-independent step, training loss) pairs
    """

    kind: str
    options: dict[str, Any]
    network: nn.Module = field(repr=False)
    architecture: Architecture
    state: str
    pictures: Tensor = field(repr=False)
    trace: list[tuple[int, float]] = field(default_factory=list, repr=False)

    def check(self, observation: PictureObservation) -> None:
        """BadInput, with what differs, if the observation is of another model than the generator was trained for."""
        model = observation.model
        if model.architecture != self.architecture:
            raise BadInput(
                f"The generator was trained for {self.architecture}, the observation is of {model.architecture}."
            )
        if model.state_hash() != self.state:
            raise BadInput(
                "The generator was trained for another state of this architecture: its weights or buffers differ. "
                "Train one for this model, on pairs of it."
            )

    def __call__(self, gradients: Tensors) -> Tensor:
        """{parameter: (n, ...)} -> (n, batch, channel, height, width) in [0, 1]."""
        with torch.no_grad():
            images: Tensor = self.network(gradients).clamp(0, 1)
        return images

    def save(self, path: Path) -> None:
        """Write the generator as safetensors."""
        a = self.architecture
        about = {
            "kind": self.kind,
            "options": self.options,
            "architecture": [a.name, list(a.input_shape), a.classes],
            "state": self.state,
            "trace": self.trace,
        }
        tensors = tensor_file.prefixed("network", dict(self.network.state_dict()))
        tensor_file.write({**tensors, "pictures": self.pictures}, SCHEMA, about, path)


def load(path: Path, kind: str, build: Callable[..., nn.Module], model: PictureModel) -> Generator:
    """Read a generator of this kind back, for this model.

    Raises NotObserved for another kind, BadInput for a file that is no generator or is of another architecture.
    """
    tensors, plain = tensor_file.read(path, SCHEMA)
    about = checked(plain, About, f"{path} is damaged")
    if about.kind != kind:
        raise NotObserved(f"{path} holds a generator of the kind {shortened(about.kind)}, not {kind}.")
    architecture = Architecture(*about.architecture)
    if architecture != model.architecture:
        raise BadInput(f"{path} was trained for {architecture}, the observation is of {model.architecture}.")
    options = msgspec.to_builtins(about.options)
    with torch.random.fork_rng(devices=[]):
        try:
            network = build(model, **options)
        except TypeError as error:
            raise BadInput(f"{path} is damaged: its options are not those of {kind}.") from error
    expected, state = network.state_dict(), tensor_file.group(tensors, "network")
    if {k: (v.shape, v.dtype) for k, v in expected.items()} != {k: (v.shape, v.dtype) for k, v in state.items()}:
        raise BadInput(f"{path} does not fit the network that it names: it is damaged, or of another version.")
    network.load_state_dict(state)
    trace = [(step, float("nan") if value is None else value) for step, value in about.trace]
    return Generator(kind, options, network.eval(), architecture, about.state, known_pictures(tensors, path), trace)


def pictures_behind(path: Path) -> Tensor:
    """Hashes of the public pictures that the generator in this file was trained on; see `picture_hashes`."""
    return known_pictures(tensor_file.read(path, SCHEMA)[0], path)


def known_pictures(tensors: Tensors, path: Path) -> Tensor:
    """The hashes among the tensors of a generator; BadInput where there are none."""
    pictures = tensors.get("pictures")
    if pictures is None or pictures.ndim != 1 or pictures.dtype != torch.int64:
        raise BadInput(f"{path} is damaged: it does not say which pictures it was trained on.")
    return pictures


def trained_on(path: Path | None, images: Tensor) -> int:
    """How many of these pictures the generator in this file was trained on; 0 without a file."""
    return 0 if path is None else int(torch.isin(picture_hashes(images), pictures_behind(path)).sum())


def reconstruct(
    path: Path | None, kind: str, build: Callable[..., nn.Module], observation: PictureObservation
) -> Reconstruction:
    """One forward pass of the generator in this file. Raises NotObserved and BadInput as `load`, and without a file."""
    if path is None:
        raise NotObserved(
            f"It needs a trained generator: make one with `gradleak train {kind}`, give it with --generator."
        )
    observation = observation.to(torch.device("cpu"))
    trained = load(path, kind, build, observation.model)
    trained.check(observation)
    images = trained({name: gradient[None] for name, gradient in observation.as_gradient().items()})[0]
    if not bool(images.isfinite().all()):
        raise BadInput(f"The generator in {path} gives pixels that are NaN or infinite for this gradient.")
    if observation.batch_size not in (None, len(images)):
        raise BadInput(
            f"The generator was trained for batches of {len(images)}, the observation is of {observation.batch_size}."
        )
    labels = known_or_recovered(replace(observation, batch_size=len(images)))
    residual = observation.residual(images, labels)
    status = f"One forward pass of a generator trained on {len(trained.pictures):,} public pictures"
    status = f"{status}; relative residual {residual:.2g}."
    return Reconstruction(images, labels, residual, status, outcome_of(residual))


def train(
    kind: str,
    build: Callable[..., nn.Module],
    options: dict[str, Any],
    model: PictureModel,
    shards: Shards,
    *,
    epochs: int,
    batch: int = 50,
    learning_rate: float = 2e-3,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> Generator:
    """Minimise the mean squared error of the pictures over the shards, with AdamW and one cycle of the learning rate
    (Smith and Topin 2019). In a batch of several pictures, the error is that of the best assignment.

    The network's `prepare(shards)` comes first: standardisation, and whatever it solves in closed form; `hold_out(shard)`
    tells it which pairs come next. Raises BadInput for pairs that are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = build(model, **options)
    hashes, sizes = list[Tensor](), list[int]()
    for pairs in shards():
        hashes.append(picture_hashes(pairs.images.flatten(0, 1)))
        sizes.append(len(pairs.images))
    network.prepare(shards)  # type: ignore[operator]
    steps = epochs * sum(-(-n // batch) for n in sizes)
    optimiser = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-3)
    total = 11 if steps == 10 else max(steps, 2)  # torch divides by a tenth of the steps, less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=total, pct_start=0.1)
    step, trace = 0, list[tuple[int, float]]()
    for _ in range(epochs):
        error, seen = 0.0, 0
        for number, pairs in enumerate(shards()):
            network.hold_out(number)  # type: ignore[operator]
            for rows in torch.randperm(len(pairs.images), generator=generator).split(batch):  # type: ignore[no-untyped-call]
                predicted = network({name: g[rows] for name, g in pairs.gradients.items()})
                loss = assigned_error(predicted, pairs.images[rows])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                step, seen, error = step + 1, seen + len(rows), error + float(loss.detach()) * len(rows)
                if on_step is not None and step % 10 == 0:
                    on_step(step, steps, error / seen)
        trace.append((step, error / seen))
    network.hold_out(None)  # type: ignore[operator]
    pictures = torch.cat(hashes).unique()  # type: ignore[no-untyped-call]
    return Generator(kind, options, network.eval(), model.architecture, model.state_hash(), pictures, trace)


def assigned_error(found: Tensor, true: Tensor) -> Tensor:
    """Mean squared error over (n, batch, ...) with the pictures of each batch in their best order: a scalar.

    Exact for the small batches that are learned here: all orders are compared.
    """
    batch = found.shape[1]
    if batch == 1:
        return (found - true).square().mean()
    each = (found.flatten(2)[:, :, None] - true.flatten(2)[:, None]).square().mean(3)  # (n, found, true)
    orders = torch.tensor(list(itertools.permutations(range(batch))))  # (orders, batch)
    total = each[:, torch.arange(batch), orders].mean(2)  # (n, orders)
    return total.min(dim=1).values.mean()


def picture_hashes(images: Tensor) -> Tensor:
    """(n, channel, height, width) in [0, 1] -> (n,) int64: eight bytes of the SHA-256 of each picture's 8-bit pixels."""
    rows = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().flatten(1)
    digests = [hashlib.sha256(row.numpy().tobytes()).digest()[:8] for row in rows]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)
