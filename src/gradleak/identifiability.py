"""What can be known at all: how much of the pictures a release holds, before any attack has to succeed.

Near the pictures x, a change d moves the release by J d, with J = d release / d x of shape (equations, unknowns). Under
noise N(0, noise_std^2) on each released number and a Gaussian prior N(mean, C) of the pictures, what remains unknown is

    posterior covariance = (C^-1 + J^T J / noise_std^2)^-1      (Bishop 2006, Pattern Recognition, equation 2.117)

and no estimate from that release has a lower expected squared error. Three limits. It is linear: it tells what is
determined near x, not whether a picture far away gives the same release. Labels are taken as known. And precision: J is
derived in the precision of the model, summed to J^T J in float64. With a float32 model single singular values are good
to about 1e-5, what remains to 1e-6; `observation.to(torch.float64)` takes twice the time. In J^T J singular values below
about 1e-7 of the largest become uncertain and below 1.5e-8 are lost: noise smaller than that cannot be asked about.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from gradleak.errors import BadInput
from gradleak.lora import Recipe
from gradleak.observations import Adapter, Gradient
from gradleak.optimise import OnStep, record
from gradleak.tensors import Tensors, flatten

NOISE_LEVELS = (1e-4, 1e-3, 1e-2, 1e-1)
PRIOR_STD = 0.25  # of a pixel in [0, 1], all independent: 12 dB for the mean image
PRESENT, ABSENT = 0.9, 0.1  # share of the prior's variance that the release explains
MOST_UNKNOWNS = 16_384  # J^T J then takes 2 GiB
WORTH_RECORDING = 12  # evaluations that a recording, seconds for a deep network, must save time on
HELD_BYTES = 2**31  # of J at once; where it is bigger, its rows are computed in several passes

Key = tuple[int, str]  # which observation, and the name of its released tensor
Piece = tuple[Key, int, int]  # rows of J: entries from:to of the flattened tensor of that name and observation


@dataclass(frozen=True)
class Identifiability:
    """What one release determines about its pictures. The tuples have one entry per noise level.

    release          "gradient", "update" or "adapter"
    unknowns         pixels, batch * channel * height * width
    equations        released numbers
    singular_values  (unknowns,) of J in units of the release per pixel in [0, 1], falling; 0 beyond the equations
    noise_levels     noise as a share of the root mean square of all released numbers, which the largest layer sets
    noise_std        the same in units of the release
    determined       directions that the noise leaves known better than the prior: singular value of J C^(1/2) > noise
    posterior_std    root mean variance of a pixel that remains
    psnr_db          of that variance, the least expected squared error. Peak 1, and no clamp to [0, 1]
    blind_psnr_db    the same with nothing released: of the prior's variance
    """

    release: str
    unknowns: int
    equations: int
    singular_values: Tensor = field(repr=False, compare=False)
    noise_levels: tuple[float, ...]
    noise_std: tuple[float, ...]
    determined: tuple[int, ...]
    posterior_std: tuple[float, ...]
    psnr_db: tuple[float, ...]
    blind_psnr_db: float

    @property
    def explained(self) -> tuple[float, ...]:
        """1 - trace(posterior) / trace(prior) per noise level: 0 nothing, 1 everything."""
        return tuple(1 - 10 ** ((self.blind_psnr_db - psnr) / 10) for psnr in self.psnr_db)

    def information(self, level: float = 1e-3) -> Literal["present", "partial", "absent"]:
        """By the share of the prior's variance explained at that noise level: from 0.9, between, or below 0.1."""
        explained = self.explained[self._index(level)]
        return "present" if explained >= PRESENT else "absent" if explained < ABSENT else "partial"

    def sentence(self, level: float = 1e-3) -> str:
        """The finding at one noise level in plain words."""
        i = self._index(level)
        verdict = {"present": "is there", "partial": "is there in part", "absent": "is absent"}[self.information(level)]
        return (
            f"This {self.release} holds {self.equations:,} equations for {self.unknowns:,} unknowns; "
            f"at noise {level:g} of its size {self.determined[i]:,} directions are determined, "
            f"enough for {self.psnr_db[i]:.1f} dB where a blind guess has {self.blind_psnr_db:.1f} dB: "
            f"the information {verdict}."
        )

    def _index(self, level: float) -> int:
        if level not in self.noise_levels:
            raise BadInput(
                f"Noise {level:g} was not looked at: choose one of {', '.join(map(str, self.noise_levels))}."
            )
        return self.noise_levels.index(level)


def identifiability(
    observation: Gradient,
    images: Tensor,
    labels: Tensor,
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    prior: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Identifiability:
    """What the observation determines about its pictures near `images` (batch, channel, height, width) with `labels`.

    images: the truth, or a public picture in its stead. prior: covariance of one picture (c*h*w, c*h*w) as `prior_of`
    gives it, or of the batch (n, n); None: independent pixels of std 0.25. Raises BadInput for shapes that do not fit,
    for levels that are not positive, where the release is zero, and where the model has no forward-mode derivative.
    """
    return compare([observation], images, labels, noise_levels=noise_levels, prior=prior, on_step=on_step)[0]


def compare(
    observations: Sequence[Gradient],
    images: Tensor,
    labels: Tensor,
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    prior: Tensor | None = None,
    on_step: OnStep | None = None,
) -> list[Identifiability]:
    """The same for several observations of one model, which share the derivatives through the network."""
    if not noise_levels or min(noise_levels) <= 0:
        raise BadInput("Noise levels are shares of the release's size above zero, such as 0.001: give at least one.")
    images, labels = _check(observations, images, labels)
    n = images.numel()
    root = None if prior is None else _root(_for_batch(prior, n).to(images.device))
    releases = [flatten(o.simulate(images, labels)).double() for o in observations]
    sizes = [float(release.square().mean().sqrt()) for release in releases]
    if 0.0 in sizes:
        raise BadInput("At these pictures every released number is zero: there is no size to measure noise by.")
    grams = jacobian_grams(observations, images, labels, on_step=on_step)
    found = []
    for observation, gram, equations, rms in zip(observations, grams, map(len, releases), sizes, strict=True):
        values = singular_values(gram, equations)
        noises = [level * rms for level in noise_levels]
        if root is None:
            whitened, blind = PRIOR_STD * values, PRIOR_STD**2
            left = [float((blind / (1 + (whitened / noise).square())).mean()) for noise in noises]
        else:
            whitened, blind = singular_values(root.T @ gram @ root, equations), float(root.square().sum() / n)
            left = [float(_posterior(gram, noise, root).mean()) for noise in noises]
        found.append(
            Identifiability(
                release=type(observation).__name__.lower(),
                unknowns=n,
                equations=equations,
                singular_values=values,
                noise_levels=tuple(noise_levels),
                noise_std=tuple(noises),
                determined=tuple(determined(whitened, noise) for noise in noises),
                posterior_std=tuple(math.sqrt(variance) for variance in left),
                psnr_db=tuple(-10 * math.log10(variance) for variance in left),
                blind_psnr_db=-10 * math.log10(blind),
            )
        )
    return found


def singular_values(gram: Tensor, equations: int | None = None) -> Tensor:
    """Of J from J^T J (n, n): (n,) float64, falling. Below 1.5e-8 of the largest, and beyond the equations: 0."""
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    squares[equations:] = 0
    return torch.where(squares > torch.finfo(gram.dtype).eps * squares[0], squares, 0).sqrt()


def determined(singular_values: Tensor, noise_std: float, prior_std: float = 1.0) -> int:
    """How many directions the release tells more of than the prior: prior_std * singular value > noise_std."""
    return int((prior_std * singular_values > noise_std).sum())


def posterior_variance(gram: Tensor, noise_std: float, prior_covariance: Tensor) -> Tensor:
    """The variance of each pixel that remains, (n,): the diagonal of (C^-1 + J^T J / noise_std^2)^-1, C (n, n).

    Raises BadInput if C is not positive definite or noise_std is not above zero.
    """
    if not noise_std > 0:
        raise BadInput(f"The noise must be above zero, not {noise_std:g}: without any, what is determined is exact.")
    return _posterior(gram, noise_std, _root(_for_batch(prior_covariance, len(gram))))


def _posterior(gram: Tensor, noise_std: float, L: Tensor) -> Tensor:
    """With C = L L^T the covariance is L (1 + L^T J^T J L / noise_std^2)^-1 L^T, where 1 keeps the inverse well-posed."""
    information = L.T @ gram @ L / noise_std**2
    information.diagonal().add_(1)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(information), L.T, upper=False)
    variance: Tensor = half.square().sum(0)
    return variance


def _for_batch(prior: Tensor, n: int) -> Tensor:
    """(n, n) float64 from the covariance of the batch, or of one picture: pictures are independent."""
    if prior.dim() != 2 or prior.shape[0] != prior.shape[1] or n % len(prior):
        raise BadInput(f"The prior covariance is {tuple(prior.shape)}; it must be square, and fit {n:,} unknowns.")
    batch: Tensor = torch.block_diag(*[prior.double()] * (n // len(prior)))  # type: ignore[no-untyped-call]
    return batch


def _root(covariance: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise BadInput("The prior covariance is not positive definite: shrink it, as prior_of does.")
    return factor


def prior_of(images: Tensor) -> Tensor:
    """The covariance (c*h*w, c*h*w) float64 of public pictures (m, c, h, w), by Ledoit and Wolf (2004).

    The sample covariance S is mixed with its mean variance: (1 - a) S + a tr(S)/n I, with their estimate of the best a
    in [0, 1]. Few pictures make it large; no picture in the private batch may be among them.
    """
    if images.dim() != 4 or len(images) < 2:
        raise BadInput("A prior needs at least two public pictures, as (pictures, channel, height, width).")
    X = images.flatten(1).double()
    X = X - X.mean(0)
    m, n = X.shape
    S = X.T @ X / m
    mean = S.diagonal().mean()
    if mean == 0:
        raise BadInput("These public pictures are all equal: a prior needs pictures that differ.")
    spread = S.square().sum() / n - mean**2
    error = (X.square().sum(1).square().mean() - S.square().sum()) / (m * n)  # of S, as S varies with the sample
    a = float((error / spread).clamp(0, 1)) if spread > 0 else 1.0
    C = (1 - a) * S
    C.diagonal().add_(a * mean)
    return C


def jacobian_gram(
    observation: Gradient, images: Tensor, labels: Tensor, *, chunk: int = 32, on_step: OnStep | None = None
) -> Tensor:
    """J^T J (n, n) float64, J = d simulate(images, labels) / d images of (equations, n = batch*channel*height*width).

    J is derived in the precision of the model's parameters, `chunk` columns at a time.
    """
    return jacobian_grams([observation], images, labels, chunk=chunk, on_step=on_step)[0]


def jacobian_grams(
    observations: Sequence[Gradient],
    images: Tensor,
    labels: Tensor,
    *,
    chunk: int = 32,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """The same for several observations of one model, one matrix each."""
    x, labels = _check(observations, images, labels)
    n, chunk = x.numel(), min(chunk, x.numel())
    release = _release(observations, x, labels)
    sizes = {key: tensor.numel() for key, tensor in release(x).items()}
    groups = _groups(sizes, HELD_BYTES // (n * x.element_size()))
    grams = [x.new_zeros(n, n, dtype=torch.float64) for _ in observations]
    starts = range(0, n, chunk)
    for number, group in enumerate(groups):
        J = x.new_empty(n, sum(stop - start for _, start, stop in group))  # transposed: a row per unknown
        columns = _columns(release, group, x, chunk, len(starts))
        for done, first in enumerate(starts, start=1):
            rows = J[first : first + chunk]
            rows.copy_(columns(x, first)[: len(rows)])
            if on_step is not None:
                total, done = len(groups) * len(starts), number * len(starts) + done
                on_step(done, total, done / total)
        start = 0
        for owner, pieces in itertools.groupby(group, key=lambda piece: piece[0][0]):
            width = sum(to - at for _, at, to in pieces)
            _add_gram(grams[owner], J[:, start : start + width])
            start += width
    for gram in grams:
        gram.tril_().add_(gram.tril(-1).T)
        if not bool(gram.isfinite().all()):
            raise BadInput("The derivative of the release is not finite at these pictures: take others.")
    return grams


def _columns(
    release: Callable[[Tensor], dict[Key, Tensor]], group: Sequence[Piece], x: Tensor, chunk: int, calls: int
) -> Callable[[Tensor, int], Tensor]:
    """(x, first) -> the columns first:first + chunk of these rows of J, as (chunk, rows); zero beyond the last."""

    def rows(x: Tensor) -> Tensor:
        released = release(x)
        return torch.cat([released[key].reshape(-1)[start:stop] for key, start, stop in group])

    def along(x: Tensor, tangents: Tensor) -> Tensor:
        derivative: Tensor = vmap(lambda t: jvp(rows, (x,), (t,))[1])(tangents)
        return derivative

    def tangents(first: int) -> Tensor:
        units = x.new_zeros(chunk, x.numel())
        units.diagonal(first).fill_(1)
        return units.view(chunk, *x.shape)

    evaluate = along
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # torch's own: its first forward-mode derivative calls torch.jit.script
            warnings.simplefilter("ignore", DeprecationWarning)
            if calls >= WORTH_RECORDING:
                evaluate = record(along, x, tangents(0))  # what only other rows need is dropped from the recording
            evaluate(x, tangents(0))
    except NotImplementedError as error:
        raise BadInput("An operation of this model has no forward-mode derivative: J cannot be had.") from error

    def columns(x: Tensor, first: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = evaluate(x, tangents(first))
        return found

    return columns


def _groups(sizes: dict[Key, int], room: int) -> list[list[Piece]]:
    """All rows of J in order, cut into the fewest groups of at most `room` rows, and these of nearly equal size."""
    total = sum(sizes.values())
    room = -(-total // -(-total // max(room, 1)))
    groups: list[list[Piece]] = []
    free = 0
    for key, size in sizes.items():
        at = 0
        while at < size:
            if not free:
                groups.append([])
                free = room
            step = min(free, size - at)
            groups[-1].append((key, at, at + step))
            at, free = at + step, free - step
    return groups


def _add_gram(gram: Tensor, J: Tensor, block: int = 256, depth: int = 4096) -> None:
    """gram += J J^T in float64, J (n, rows), in the blocks on and below the diagonal only: half the work."""
    for k in range(0, J.shape[1], depth):
        part = J[:, k : k + depth].double()
        for i in range(0, len(J), block):
            gram[i : i + block, : i + block].addmm_(part[i : i + block], part[: i + block].T)


def _release(observations: Sequence[Gradient], images: Tensor, labels: Tensor) -> Callable[[Tensor], dict[Key, Tensor]]:
    """images -> what each observation would release, from one pass through the network where that is possible.

    It is for factors B after one SGD step, which change by -rate s delta^T Z, with delta the derivative of the loss by
    the layer's output and Z = A applied to the layer's input: no gradient of a weight, nor its derivative, is formed.
    """
    adapters = [o for o in observations if isinstance(o, Adapter)]
    outputs = _outputs_once(adapters, images) if len(adapters) == len(observations) and _sketches(adapters) else None
    if outputs is None:
        return lambda x: {(i, k): t for i, o in enumerate(observations) for k, t in o.simulate(x, labels).items()}
    module = copy.deepcopy(adapters[0].model.module)
    model, merged = replace(adapters[0].model, module=module), adapters[0].merged({})
    size = adapters[0].recipe.batch_size if adapters[0].recipe else None
    nudges: Tensors = {}
    inputs: Tensors = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name] = arguments[0]
            return output + nudges[name]

        return hook

    for name in outputs:
        module.get_submodule(name).register_forward_hook(watch(name))

    def nudged(by: Tensors, x: Tensor) -> tuple[Tensor, Tensors]:
        nudges.update(by)
        return model.loss(merged, x, labels[:size]), dict(inputs)

    def release(x: Tensor) -> dict[Key, Tensor]:
        delta, seen = grad(nudged, has_aux=True)({k: x.new_zeros(shape) for k, shape in outputs.items()}, x[:size])
        found: dict[Key, Tensor] = {}
        for name in outputs:
            own = [i for i, o in enumerate(adapters) if f"{name}.lora_B" in o.released]
            A = torch.cat([_step(adapters[i], name) * adapters[i].start[f"{name}.lora_A"] for i in own])  # (ranks, ...)
            Z = _applied(module.get_submodule(name), A, seen[name])
            channel = -1 if A.dim() == 2 else 1
            changes = delta[name].movedim(channel, 0).flatten(1) @ Z.movedim(channel, 0).flatten(1).T  # (out, ranks)
            ranks = [len(adapters[i].start[f"{name}.lora_A"]) for i in own]
            found |= {(i, f"{name}.lora_B"): B for i, B in zip(own, changes.split(ranks, dim=1), strict=True)}
        return dict(sorted(found.items()))

    return release


def _sketches(adapters: Sequence[Adapter]) -> bool:
    """Whether all are factors B after one step of SGD on the same pictures, from starts that make the same model."""
    recipes = [o.recipe or Recipe(learning_rate=1.0, steps=1) for o in adapters]
    return (
        all(name.endswith(".lora_B") for o in adapters for name in o.released)
        and all(r.steps == 1 and r.optimizer in ("sgd", "momentum") for r in recipes)
        and len({r.batch_size for r in recipes}) == 1
        and (
            len(adapters) == 1
            or not any(bool(B.any()) for o in adapters for k, B in o.start.items() if k.endswith("B"))
        )
    )


def _outputs_once(adapters: Sequence[Adapter], images: Tensor) -> dict[str, torch.Size] | None:
    """{adapted layer: shape of its output}; None unless each is a plain linear layer or convolution, called once."""
    size = adapters[0].recipe.batch_size if adapters[0].recipe else None
    module = copy.deepcopy(adapters[0].model.module)
    shapes: dict[str, list[torch.Size]] = {}
    for name in {key.removesuffix(".lora_B") for o in adapters for key in o.released}:
        layer = module.get_submodule(name)
        plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
        if not (plain or type(layer) is nn.Linear):
            return None
        calls = shapes.setdefault(name, [])
        layer.register_forward_hook(lambda _, inputs, output, calls=calls: calls.append(output.shape))
    with torch.no_grad():
        replace(adapters[0].model, module=module).logits({}, images[:size])
    return {k: calls[0] for k, calls in sorted(shapes.items())} if all(len(c) == 1 for c in shapes.values()) else None


def _step(adapter: Adapter, name: str) -> float:
    """The change of B per unit of delta^T Z: -rate s."""
    return -adapter.scaling[name] * (adapter.recipe.learning_rate if adapter.recipe else 1.0)


def _applied(layer: nn.Module, A: Tensor, x: Tensor) -> Tensor:
    """A in place of the layer's weight, without its bias."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, A, None, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, A)


def _check(observations: Sequence[Gradient], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images, and labels that are probabilities, in the precision and on the device of the model."""
    if not observations:
        raise BadInput("Give at least one observation.")
    first = observations[0].model
    shape = first.architecture.input_shape
    if images.dim() != 4 or tuple(images.shape[1:]) != tuple(shape) or not len(images):
        raise BadInput(
            f"The model takes pictures of (batch, {', '.join(map(str, shape))}), not {tuple(images.shape)}: resize them."
        )
    if labels.dim() not in (1, 2) or len(labels) != len(images):
        raise BadInput(f"{len(images)} pictures need as many labels, not labels of shape {tuple(labels.shape)}.")
    if images.numel() > MOST_UNKNOWNS:
        raise BadInput(
            f"These pictures have {images.numel():,} pixels, and their matrix as many rows and columns: "
            f"take fewer or smaller ones, of {MOST_UNKNOWNS:,} pixels in all at most."
        )
    for model in (o.model for o in observations[1:]):
        taken = (model.mode, model.reduction) == (first.mode, first.reduction)
        if not (model is first or (taken and model.state_hash() == first.state_hash())):
            raise BadInput("Only observations of one model state, taken in one way, can share their derivatives.")
    like = next(iter(first.parameters.values()))
    return images.to(like), labels.to(like) if labels.is_floating_point() else labels.to(like.device)
