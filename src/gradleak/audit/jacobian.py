"""The Jacobian of a release by the pictures, J = d simulate(images, labels) / d images, summed to J^T J in blocks.

Forward-over-reverse: columns of J, many at once, by `vmap` of `jvp` through the gradient that the release is.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from gradleak.attacks.search.descend import OnStep, record
from gradleak.errors import BadInput
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe

MOST_UNKNOWNS = 16_384  # J^T J then takes 2 GiB
WORTH_RECORDING = 12  # evaluations that a recording, seconds for a deep network, must save time on
HELD_BYTES = 2**31  # of J at once; where it is bigger, its rows are computed in several passes

Key = tuple[int, str]  # which observation, and the name of its released tensor
Piece = tuple[Key, int, int]  # rows of J: entries from:to of the flattened tensor of that name and observation


def jacobian_gram(
    observation: PictureObservation, images: Tensor, labels: Tensor, *, chunk: int = 32, on_step: OnStep | None = None
) -> Tensor:
    """J^T J (n, n) float64, J = d simulate(images, labels) / d images of (equations, n = batch*channel*height*width).

    J is derived in the precision of the model's parameters, `chunk` columns at a time.
    """
    return jacobian_grams([observation], images, labels, chunk=chunk, on_step=on_step)[0]


def jacobian_grams(
    observations: Sequence[PictureObservation],
    images: Tensor,
    labels: Tensor,
    *,
    chunk: int = 32,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """The same for several observations of one model, one matrix each."""
    x, labels = checked(observations, images, labels)
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


def _release(
    observations: Sequence[PictureObservation], images: Tensor, labels: Tensor
) -> Callable[[Tensor], dict[Key, Tensor]]:
    """images -> what each observation would release, from one pass through the network where that is possible.

    It is for factors B after one SGD step, which change by -rate s delta^T Z, with delta the derivative of the loss by
    the layer's output and Z = A applied to the layer's input: no gradient of a weight, nor its derivative, is formed.
    """
    adapters = [o for o in observations if isinstance(o.release, Adapter)]
    outputs = _outputs_once(adapters, images) if len(adapters) == len(observations) and _sketches(adapters) else None
    if outputs is None:
        return lambda x: {(i, k): t for i, o in enumerate(observations) for k, t in o.simulate(x, labels).items()}
    module = copy.deepcopy(adapters[0].model.module)
    model, merged = replace(adapters[0].model, module=module), adapters[0].adapter.merged(adapters[0].model, {})
    size = adapters[0].adapter.recipe.batch_size if adapters[0].adapter.recipe else None
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
            holding = [i for i, o in enumerate(adapters) if f"{name}.lora_B" in o.released]
            A = torch.cat(
                [_step(adapters[i], name) * adapters[i].adapter.start[f"{name}.lora_A"] for i in holding]
            )  # (ranks, ...)
            Z = _applied(module.get_submodule(name), A, seen[name])
            channel = -1 if A.dim() == 2 else 1
            changes = delta[name].movedim(channel, 0).flatten(1) @ Z.movedim(channel, 0).flatten(1).T  # (out, ranks)
            ranks = [len(adapters[i].adapter.start[f"{name}.lora_A"]) for i in holding]
            found |= {(i, f"{name}.lora_B"): B for i, B in zip(holding, changes.split(ranks, dim=1), strict=True)}
        return dict(sorted(found.items()))

    return release


def _sketches(adapters: Sequence[PictureObservation]) -> bool:
    """Whether all are factors B after one step of SGD on the same pictures, from starts that make the same model."""
    recipes = [o.adapter.recipe or Recipe(learning_rate=1.0, steps=1) for o in adapters]
    return (
        all(name.endswith(".lora_B") for o in adapters for name in o.released)
        and all(r.steps == 1 and r.optimizer in ("sgd", "momentum") for r in recipes)
        and len({r.batch_size for r in recipes}) == 1
        and (
            len(adapters) == 1
            or not any(bool(B.any()) for o in adapters for k, B in o.adapter.start.items() if k.endswith("B"))
        )
    )


def _outputs_once(adapters: Sequence[PictureObservation], images: Tensor) -> dict[str, torch.Size] | None:
    """{adapted layer: shape of its output}; None unless each is a plain linear layer or convolution, called once."""
    size = adapters[0].adapter.recipe.batch_size if adapters[0].adapter.recipe else None
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


def _step(adapter: PictureObservation, name: str) -> float:
    """The change of B per unit of delta^T Z: -rate s."""
    return -adapter.adapter.scaling[name] * (adapter.adapter.recipe.learning_rate if adapter.adapter.recipe else 1.0)


def _applied(layer: nn.Module, A: Tensor, x: Tensor) -> Tensor:
    """A in place of the layer's weight, without its bias."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, A, None, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, A)


def checked(observations: Sequence[PictureObservation], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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
        taken = (model.mode, model.criterion) == (first.mode, first.criterion)
        if not (model is first or (taken and model.state_hash() == first.state_hash())):
            raise BadInput("Only observations of one model state, taken in one way, can share their derivatives.")
    like = next(iter(first.parameters.values()))
    return images.to(like), labels.to(like) if labels.is_floating_point() else labels.to(like.device)
