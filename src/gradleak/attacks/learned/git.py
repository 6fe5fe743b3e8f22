"""Gradient Inversion Transcript, the coarse form: a generator laid out as the leaked model's backward pass in reverse.

Sees      Gradient (or Update) of a batch of the size that the generator was trained for; no labels, no weights
Recovers  images (batch, channel, height, width) in [0, 1], in one forward pass
Solves    h_L from the last layer's gradient (bootstrap), then unit by unit h_{l-1} = M_l(g_l, h_l), in place of the exact
          a_{l-1} = g_l^T (Delta_l^T)^+ ; the M_l are trained on pairs, min E ||x(g) - x||^2. A unit is a layer, or where
          blocks repeat (residual, transformer) a block: *layer-wise* and *module-wise*
Differs   Bootstrap of one picture in closed form: the input of a biased last layer is delta^T g / ||delta||^2. A ridge
          regression of the pictures on it comes first, and the trained units add what it lacks.
          M_l mirrors its unit: a convolution where that has positions, else an MLP; gradients are standardised, and
          those of more than HASHED numbers are hashed (Weinberger et al., ICML 2009).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.attack import check_sees
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.generator import Shards
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors

HASHED = 4_096  # numbers of a unit's gradient that are read as they are
FLAT = 1_024  # width of an estimate without positions, at most
RIDGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the closed-form regression
FOLDS = 5  # of the shards, for the regression


@dataclass(frozen=True)
class Unit:
    """A part of the leaked model that is read as one: its name, its parameters, and the shapes of one example."""

    name: str
    parameters: tuple[str, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]


def units(model: PictureModel) -> list[Unit]:
    """The units in the order in which the model calls them.

    A module is one if it has parameters of its own, or is one of several of its class that have children. Raises BadInput for a
    unit that is called more than once, or with anything but one tensor.
    """
    kinds = [type(m) for m in model.module.modules() if next(m.children(), None) is not None]
    containers = (nn.Sequential, nn.ModuleList)

    def walk(prefix: str, module: nn.Module) -> list[str]:
        repeated = kinds.count(type(module)) > 1 and not isinstance(module, containers)
        if next(module.parameters(recurse=False), None) is not None or repeated:
            return [prefix]
        return [name for key, child in module.named_children() for name in walk(f"{prefix}.{key}".strip("."), child)]

    names, shapes = walk("", model.module), dict[str, list[Any]]()

    def listen(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if not arguments or not isinstance(arguments[0], Tensor) or not isinstance(output, Tensor):
                raise BadInput(
                    f"GIT cannot read {name}: it does not map a tensor to a tensor. Wrap it in a module that does."
                )
            shapes.setdefault(name, []).append((tuple(arguments[0].shape[1:]), tuple(output.shape[1:])))

        return hook

    handles = [model.module.get_submodule(name).register_forward_hook(listen(name)) for name in names]
    try:
        with torch.no_grad():
            model.logits({}, torch.zeros(2, *model.architecture.input_shape).to(next(iter(model.parameters.values()))))
    finally:
        for handle in handles:
            handle.remove()
    for name, calls in shapes.items():
        if len(calls) > 1:
            raise BadInput(
                f"GIT cannot read {name}: it is called {len(calls)} times. Read the module around it as one."
            )
    trained = [name for name in model.parameters if name not in model.frozen]
    layers = []
    for name, [(given, made)] in shapes.items():
        parameters = tuple(p for p in trained if p.startswith(f"{name}."))
        if parameters:
            layers.append(Unit(name, parameters, given, made))
    return layers


def assumed(model: PictureModel, layout: str) -> list[Unit]:
    """The units of another architecture, each with the parameters of the unit of `model` that stands at the same height."""
    true, architecture = units(model), replace(model.architecture, name=layout)
    other = units(Model.of(architecture.build(0), architecture))
    units_of_layout = []
    for i, unit in enumerate(other):
        first, end = (j * len(true) // len(other) for j in (i, i + 1))
        standing = true[first : max(end, first + 1)]
        units_of_layout.append(replace(unit, parameters=tuple(name for part in standing for name in part.parameters)))
    return units_of_layout


class Reader(nn.Module):
    """A unit's gradient as a vector: in units of the last layer's, hashed if it is long, standardised."""

    mean: Tensor
    std: Tensor
    bucket: Tensor
    sign: Tensor

    def __init__(self, unit: Unit, sizes: dict[str, int]) -> None:
        super().__init__()
        self.names, total = unit.parameters, sum(sizes[name] for name in unit.parameters)
        self.width = min(total, HASHED)
        if total > HASHED:
            draw = torch.Generator().manual_seed(0)
            self.register_buffer("bucket", torch.randint(HASHED, (total,), generator=draw), persistent=False)
            self.register_buffer("sign", 2.0 * torch.randint(2, (total,), generator=draw) - 1, persistent=False)
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))

    def raw(self, gradients: Tensors, scale: Tensor) -> Tensor:
        """(n, width); scale (n, 1)."""
        flat = torch.cat([gradients[name].flatten(1) for name in self.names], dim=1)
        if flat.shape[1] > HASHED:
            flat = flat.new_zeros(len(flat), HASHED).index_add_(1, self.bucket, flat * self.sign)
        return flat / scale

    def forward(self, gradients: Tensors, scale: Tensor) -> Tensor:
        standard = (self.raw(gradients, scale) - self.mean) / self.std
        short: Tensor = standard.clamp(-10, 10) * (
            8 / self.width**0.5
        )  # of length 8: Adam's steps grow with the inputs
        return short


Shape = tuple[int, ...]


class Mirror(nn.Module):
    """M_l: (gradient of unit l, estimate of its output) -> estimate of what the unit below gave out.

    Where both have positions, convolutions: what the gradient tells is added to every position, and two maps of it to
    each. Else a perceptron. Estimates are maps (n, width, h, w), or vectors.
    """

    def __init__(self, read: int, before: Shape, after: Shape, hidden: int) -> None:
        super().__init__()
        self.after, self.maps = after, len(before) == len(after) == 3
        if self.maps:
            (width, h, w), up = before, after[1]
            last = nn.Linear(hidden, width + 2 * h * w)
            nn.init.zeros_(last.weight)  # at first the gradient of this unit says nothing
            self.told = nn.Sequential(nn.Linear(read, hidden), nn.GELU(), last)
            self.mix = nn.Conv2d(width + 2, width, 3, padding=1)
            self.again = nn.Conv2d(width, width, 3, padding=1)
            self.factor = max(round(up / h), 1)
            self.up = nn.Conv2d(width, after[0] * self.factor**2, 3, padding=1)
        else:
            self.net = nn.Sequential(
                nn.Linear(read + math.prod(before), 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, math.prod(after))
            )

    def forward(self, g: Tensor, h: Tensor) -> Tensor:
        if not self.maps:
            found: Tensor = self.net(torch.cat([g, h.flatten(1)], dim=1))
            return found.view(-1, *self.after)
        width, height, across = h.shape[1:]
        film = self.told(g)
        maps = film[:, width:].view(-1, 2, height, across)
        h = h + self.mix(F.gelu(torch.cat([h + film[:, :width, None, None], maps], dim=1)))
        h = h + self.again(F.gelu(h))
        h = F.pixel_shuffle(self.up(F.gelu(h)), self.factor)
        return h if h.shape[1:] == self.after else F.interpolate(h, self.after[1:])


class Transcript(nn.Module):
    """The generator: {parameter: (n, ...)} -> (n, batch, channel, height, width)."""

    centre: Tensor
    spread: Tensor
    slopes: Tensor
    mean_image: Tensor

    def __init__(
        self, model: PictureModel, *, batch: int = 1, width: int = 48, hidden: int = 256, layout: str | None = None
    ) -> None:
        """width of the estimates, hidden units of a mirror; layout: name of another architecture to be laid out like."""
        super().__init__()
        top = units(model)[-1]
        chain = units(model) if layout is None else assumed(model, layout)
        self.shape = (batch, *model.architecture.input_shape)
        sizes = {name: p.numel() for name, p in model.parameters.items()}
        readers = [Reader(unit, sizes) for unit in chain]
        self.readers = nn.ModuleList(readers)
        self.last = (f"{top.name}.weight", f"{top.name}.bias")
        self.closed = (
            batch == 1 and set(self.last) <= set(top.parameters) and len(model.parameters[self.last[0]].shape) == 2
        )
        self.inverse = inverse_activation(model.module, top.name) if self.closed else None
        known = model.parameters[self.last[0]].shape[1] if self.closed else 1
        # What the estimates are of: the outputs of the units below, and last the picture.
        shapes: list[Shape] = [unit.output for unit in reversed(chain[:-1])] + [self.shape[1:]]
        carried = [(channels(width, s[1]), *s[1:]) if len(s) == 3 else (min(math.prod(s), FLAT),) for s in shapes]
        below = shapes[0]
        self.maps = known // math.prod(below) if len(below) == 3 and known % math.prod(below) == 0 else 0
        start: Shape = carried[0] if self.maps else (known,)
        self.below, self.factor = below, self.shape[-1] // below[-1] if self.maps else 1
        seen = self.maps * below[0] + self.shape[1] * self.factor**2  # the bootstrap and the regression's picture
        self.lift = nn.Conv2d(seen, start[0], 3, padding=1) if self.maps else nn.Identity()
        pairs = zip(reversed(readers), [start, *carried[:-1]], carried, strict=True)
        self.mirrors = nn.ModuleList(Mirror(reader.width, before, after, hidden) for reader, before, after in pairs)
        self.out = nn.Conv2d(carried[-1][0], batch * self.shape[1], 3, padding=1)
        for parameter in self.out.parameters():  # at first the picture is the regression's
            nn.init.zeros_(parameter)
        pixels = math.prod(self.shape)
        for name, value in {"centre": torch.zeros(known), "spread": torch.ones(known)}.items():
            self.register_buffer(name, value)
        self.register_buffer("slopes", torch.zeros(FOLDS + 1, known, pixels))
        self.fold = FOLDS
        self.register_buffer("mean_image", torch.full((pixels,), 0.5))

    def forward(self, gradients: Tensors) -> Tensor:
        scale = self.scale(gradients)
        known = (self.bootstrap(gradients) - self.centre) / self.spread
        first = self.mean_image + known @ self.slopes[self.fold]
        h = known
        if self.maps:
            pixels = F.pixel_unshuffle(first.view(-1, *self.shape[1:]) - 0.5, self.factor)
            pixels = pixels if pixels.shape[2:] == self.below[1:] else F.interpolate(pixels, self.below[1:])
            h = self.lift(torch.cat([known.view(-1, self.maps * self.below[0], *self.below[1:]), 2 * pixels], dim=1))
        for reader, mirror in zip(reversed(list(self.readers)), self.mirrors, strict=True):
            h = mirror(reader(gradients, scale), h)
        images: Tensor = first.view(-1, *self.shape) + self.out(F.gelu(h)).view(-1, *self.shape)
        return images

    def hold_out(self, shard: int | None) -> None:
        """Use the regression that did not see this shard; None: the one that saw all. What the units learn to add in training
        is then what a new gradient will need."""
        self.fold = FOLDS if shard is None else shard % FOLDS

    def scale(self, gradients: Tensors) -> Tensor:
        """The length of the last unit's gradient (n, 1): how wrong the model was, which says little of the picture."""
        last = gradients[self.last[1] if self.last[1] in gradients else self.last[0]]
        length: Tensor = last.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-12)
        return length

    def bootstrap(self, gradients: Tensors) -> Tensor:
        """What went into the last layer, before its activation if that can be undone: (n, known); 0 where it is not to be had."""
        if not self.closed:
            return self.centre.new_zeros(len(gradients[self.last[0]]), 1)
        weight, bias = (gradients[name] for name in self.last)
        a = (bias[:, None] @ weight)[:, 0] / bias.square().sum(1, keepdim=True).clamp_min(1e-24)
        return a if self.inverse is None else self.inverse(a)

    def prepare(self, shards: Shards) -> None:
        """Standardise the readers by the first shard, and solve the regression over all of them."""
        with torch.no_grad():
            first = next(iter(shards()))
            scale = self.scale(first.gradients)
            for reader in self.readers:
                assert isinstance(reader, Reader)
                raw = reader.raw(first.gradients, scale)
                reader.mean.copy_(raw.mean(0))
                reader.std.copy_(raw.std(0) + 1e-3 * raw.std() + 1e-12)
            known = self.bootstrap(first.gradients)
            self.centre.copy_(known.mean(0))
            self.spread.copy_(known.std(0) + 1e-3 * known.std() + 1e-6)
            self.mean_image.copy_(first.images.flatten(1).mean(0))
            if self.closed:
                self._regress(shards)

    def _regress(self, shards: Shards) -> None:
        """Ridge regression of the pictures on the bootstrap, on all shards but those of one fold, and on all; its weight is
        the best on the first fold."""
        k, n = len(self.centre), len(self.mean_image)
        A, b = torch.zeros(FOLDS, k, k).double(), torch.zeros(FOLDS, k, n).double()
        counts, held = torch.zeros(FOLDS), list[tuple[Tensor, Tensor]]()
        for number, pairs in enumerate(shards()):
            known = ((self.bootstrap(pairs.gradients) - self.centre) / self.spread).double()
            wanted, fold = (pairs.images.flatten(1) - self.mean_image).double(), number % FOLDS
            A[fold] += known.T @ known
            b[fold] += known.T @ wanted
            counts[fold] += len(known)
            held += [(known, wanted)] if number == 0 else []

        def solved(used: list[int], weight: float) -> Tensor:
            total = float(counts[used].sum().clamp_min(1))
            mixed: Tensor = torch.linalg.solve(
                A[used].sum(0) / total + weight * torch.eye(k).double(), b[used].sum(0) / total
            )
            return mixed

        others = [[f for f in range(FOLDS) if f != fold] for fold in range(FOLDS)]
        if int((counts > 0).sum()) == 1:  # one shard only: there is nothing to hold out
            others, best = [list(range(FOLDS))] * FOLDS, RIDGE[-2]
        else:
            best = min(RIDGE, key=lambda w: sum(float((x @ solved(others[0], w) - y).square().sum()) for x, y in held))
        self.slopes.copy_(torch.stack([solved(used, best) for used in [*others, list(range(FOLDS))]]))


def channels(width: int, height: int) -> int:
    """How many maps an estimate of this height has: `width` up to 8 rows, then fewer, as they get larger."""
    return max(width * 8 // max(height, 8), width // 4)


def inverse_activation(module: nn.Module, last: str) -> Any:
    """The inverse of the activation that feeds the last layer, where that is a sigmoid or a tanh; else None."""
    leaves = [(name, m) for name, m in module.named_modules() if not list(m.children())]
    before = [
        m
        for name, m in leaves[: [name for name, _ in leaves].index(last)]
        if not isinstance(m, nn.Flatten | nn.Dropout)
    ]
    kind = type(before[-1]) if before else None
    if kind is nn.Sigmoid:
        return lambda a: torch.logit(a.clamp(1e-4, 1 - 1e-4))
    return (lambda a: torch.atanh(a.clamp(-1 + 1e-4, 1 - 1e-4))) if kind is nn.Tanh else None


@dataclass(frozen=True, kw_only=True)
class Git:
    """generator: a file of `gradleak train git`."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = Architecture.modality

    generator: Path | None = None

    def trained_on(self, images: Tensor) -> int:
        """How many of these pictures the generator was trained on."""
        return learned.trained_on(self.generator, images)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved without a generator, and for adapters; BadInput if it was trained for another model or batch."""
        check_sees(self, observation)
        return learned.reconstruct(self.generator, "git", Transcript, observation)
