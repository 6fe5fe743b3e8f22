"""How often each class occurs in a batch, read off the last layers whose gradient is shared, be the classifier among them or
not (GDBR, arXiv:2412.12640, sees the layer before it; iLRG, Ma et al. 2023, the classifier), with the help of public samples.

Sees      Gradient, or an Update of one step, of a classifier; the number of samples; public samples of the same classes
Recovers  the number of samples of each class, and how many of the labels are expected to be right
Solves    A batch's gradient is the sum of what its samples add. Behind the last normalisation, z = w * x + b, with the mean over
          positions and the classifier W after it, a sample adds m * W^T (p - e_y) to dL/db, m the share of positions at which
          its ReLUs are on. The paper takes class means a_c of what public samples add: min over n >= 0 of
          ||sum_c n_c a_c - B g||, sum_c n_c = B (`counts_by_means`)
Differs   All of what a layer's own parameters are told (`added`), of any layer that takes samples one by one, not the bias alone.
          A small network reads the counts, a Gaussian for each class, from sums over public samples drawn at random (`Counter`):
          the sums are as many as one likes, and any mixture of classes is among them
Misses    gradients that the network hardly makes: of samples that it is sure of
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from gradleak.attacks.labels import apportion
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.layers import calls
from gradleak.observations.model import PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors

LAYERS = 2  # that are read: the last of those that were shared
LARGEST = 2**12  # numbers of a tensor that are read: of larger matrices, how they act on the mean input
DIRECTIONS = 128  # principal ones of what samples add
# Logarithm of the greatest precision, exp(-12) for a neighbouring count: beyond it small errors make training diverge.
SUREST = 2.5
CHUNK = 256  # samples side by side, where they do not meet in BatchNorm; and simulated batches per step
SHARPEST = (
    3.0  # power of exponential variables that makes frequencies of classes: 0 all alike, 1 a flat Dirichlet prior
)


@dataclass(frozen=True)
class LabelCounts:
    """counts: (classes,) int64, of the batch's size in sum. expected: share of the labels that is right, as the reading itself
    believes. layers: the names of those that were read."""

    counts: Tensor
    expected: float
    layers: tuple[str, ...]

    @property
    def labels(self) -> Tensor:
        """The labels in ascending order, (batch,) int64."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def sentence(self) -> str:
        """What was read, in words."""
        told = ", ".join(f"{int(n)} of class {c}" for c, n in enumerate(self.counts) if n)
        where = " and ".join(self.layers)
        return (
            f"Labels are told by the gradient of {where}: {told}; {self.expected:.0%} of them are expected to be right."
        )


def label_counts(
    observation: PictureObservation, public: Pictures, *, generator: torch.Generator, steps: int = 600
) -> LabelCounts:
    """Read the counts; steps: of the training of the reader, about a hundredth of a second each.

    Raises NotObserved where the number of samples is withheld, a defense or several steps stand between, no layer can be read, or
    public samples are of fewer than two classes, or of classes that the model does not have.
    """
    if int(public.labels.max()) >= observation.model.architecture.classes:
        raise NotObserved("The public samples are of more classes than the model has: give data of the same kind.")
    seen = evidence(observation, public)
    counter = Counter.trained(seen, generator=generator, steps=steps)
    return LabelCounts(*counter(seen.total(observation)), seen.layers)


def last_layer_withheld(observation: Observation[Any]) -> bool:
    """Whether labels of pictures are neither given nor told by the layer that runs last, since nothing of it was shared."""
    model, release = observation.model, observation.release
    if observation.labels is not None or not isinstance(model.architecture, Architecture):
        return False
    if not isinstance(release, Gradient | Update):
        return False
    last = calls(model, model.architecture.blank(2).to(next(iter(observation.released.values()))))[-1].name
    return not any(name.startswith(f"{last}.") for name in observation.released)


def frequent_counts(public: Pictures, classes: int, batch: int) -> Tensor:
    """The control: what somebody says who has seen nothing but how often classes occur in public data, (classes,)."""
    frequent = public.labels.cpu().bincount(minlength=classes).double()
    return apportion(batch * frequent / frequent.sum(), torch.zeros(classes, dtype=torch.bool), batch).long()


@dataclass(frozen=True)
class Evidence:
    """What public samples show of the layers of one model, in float64, each tensor in units of its root mean square.

    each     (samples, numbers): what each public sample adds to a sum over a batch
    labels   (samples,) of the public samples
    through  {name: (in,)}: vectors by which large matrices are told (`added`)
    scales   {name: the unit}
    """

    each: Tensor
    labels: Tensor
    classes: int
    batch: int
    layers: tuple[str, ...]
    through: Tensors
    scales: dict[str, float]

    def total(self, observation: PictureObservation) -> Tensor:
        """(numbers,): the sum over the batch of an observation of this model."""
        gradient = observation.as_gradient()
        share = self.batch if observation.model.criterion.reduction == "mean" else 1
        told = {k: gradient[k] @ self.through[k] if k in self.through else gradient[k] for k in self.scales}
        return torch.cat([share * told[k].flatten().double().cpu() / scale for k, scale in self.scales.items()])


def evidence(observation: PictureObservation, public: Pictures) -> Evidence:
    """What public samples show of the last layers that were shared. Raises NotObserved as `label_counts` does."""
    model, batch = observation.model, observation.batch_size
    if not isinstance(model.architecture, Architecture) or not isinstance(observation.release, Gradient | Update):
        raise NotObserved("Label counts are read off a gradient or an update of a classifier of pictures.")
    if batch is None:
        raise NotObserved("The batch size was withheld, and labels without it: neither can be told from one gradient.")
    if observation.defenses != () or (isinstance(observation.release, Gradient) and observation.release.private):
        raise NotObserved("Labels were not given, and a defense stands between them and what public samples show.")
    if reason := observation.release.inexact():
        raise NotObserved(f"Labels were not given, and are read off one gradient alone: {reason}.")
    if int((public.labels.bincount() > 0).sum()) < 2 or len(public.labels) < batch:
        raise NotObserved(f"Labels were not given, and {len(public.labels)} public samples are too few to learn from.")
    gradient = observation.as_gradient()
    layers = readable(model, gradient)
    size = (
        batch if model.mode == "train" else CHUNK
    )  # in train mode, samples meet in BatchNorm: as many as in the batch
    whole = (
        range(0, len(public.labels) - size + 1, size) if model.mode == "train" else range(0, len(public.labels), size)
    )
    like, through = next(iter(gradient.values())), Tensors()
    parts = []
    for first in whole:
        images, labels = public.images[first : first + size].to(like), public.labels[first : first + size]
        parts.append(added(model, layers, images, labels.to(like.device), through, tuple(gradient)))
    found = {name: torch.cat([part[name] for part in parts]).double().cpu() for name in parts[0]}
    scales = {name: float(each.square().mean().sqrt().clamp_min(1e-30)) for name, each in found.items()}
    each = torch.cat([found[name] / scale for name, scale in scales.items()], dim=1)
    labels = public.labels[: len(each)].cpu()
    return Evidence(each, labels, model.architecture.classes, batch, layers, through, scales)


def readable(model: PictureModel, gradient: Tensors) -> tuple[str, ...]:
    """The last two layers that hold a tensor that is shared and can be read, in order of execution; NotObserved if there is none."""
    grey = model.architecture.blank(2).to(next(iter(gradient.values())))
    names = dict.fromkeys(call.name for call in calls(model, grey))
    found = [
        name
        for name in names
        if any(f"{name}.{own}" in gradient for own in own_parameters(model, name))
        or (large_matrix(model, name) and f"{name}.weight" in gradient)
    ]
    if not found:
        raise NotObserved("Labels were not given, and no layer that was shared tells them.")
    return tuple(found[-LAYERS:])


def own_parameters(model: PictureModel, name: str) -> Tensors:
    """The parameters of one layer that are small enough to be read number by number."""
    parts = [part for part, _ in model.module.get_submodule(name).named_parameters(recurse=False)]
    own = {part: model.parameters[f"{name}.{part}"] for part in parts if f"{name}.{part}" in model.parameters}
    return {part: tensor for part, tensor in own.items() if tensor.numel() <= LARGEST}


def large_matrix(model: PictureModel, name: str) -> bool:
    """Whether the layer is linear, with a matrix that is told by how it acts on the mean input: dL/dW a / ||a||^2 in the paper."""
    layer, weight = model.module.get_submodule(name), model.parameters.get(f"{name}.weight")
    return isinstance(layer, nn.Linear) and weight is not None and weight.numel() > LARGEST


def added(
    model: PictureModel,
    layers: tuple[str, ...],
    images: Tensor,
    labels: Tensor,
    through: Tensors,
    shared: tuple[str, ...] | None = None,
) -> Tensors:
    """What each sample adds to the sum over the batch of the gradient of these layers' parameters: {name: (batch, numbers)}.

    They sum to the gradient of the batch, in train mode too, where BatchNorm lets samples meet. through: {name: (in,)} of matrices
    above LARGEST, of which the product with this vector is told; what is not yet there is put in, the mean input.
    """
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def listen(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nudge = torch.zeros_like(output).requires_grad_()
            seen[name] = (layer, inputs[0].detach(), nudge)
            return output + nudge

        return hook

    handles = [model.module.get_submodule(name).register_forward_hook(listen(name)) for name in layers]
    try:
        loss = model.loss({}, images, labels) * (len(images) if model.criterion.reduction == "mean" else 1)
        slopes = torch.autograd.grad(loss, [seen[name][2] for name in layers])
    finally:
        for handle in handles:
            handle.remove()
    found: Tensors = {}
    for name, slope in zip(layers, slopes, strict=True):
        layer, inputs, _ = seen[name]
        if large_matrix(model, name):
            vector = through.setdefault(f"{name}.weight", inputs.reshape(-1, inputs.shape[-1]).mean(0))
            found[f"{name}.weight"] = (
                (slope * (inputs @ vector)[..., None]).reshape(len(slope), -1, slope.shape[-1]).sum(1)
            )
        each = of_each(model, name, layer, inputs, slope)
        found |= {f"{name}.{part}": told.flatten(1) for part, told in each.items()}
    return {full: told.detach() for full, told in found.items() if shared is None or full in shared}


def of_each(model: PictureModel, name: str, layer: nn.Module, inputs: Tensor, slope: Tensor) -> Tensors:
    """{parameter: (batch, ...)}: the product of a layer's derivative by its own parameters with the slope of its output."""
    own = {part: tensor.to(inputs) for part, tensor in own_parameters(model, name).items()}
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # behind the statistics it scales and shifts channels
        buffers = {k.removeprefix(f"{name}."): t for k, t in (model.buffers or {}).items() if k.startswith(f"{name}.")}
        bare = {"weight": torch.ones_like(own["weight"]), "bias": torch.zeros_like(own["bias"])}
        with torch.no_grad():
            inputs = functional_call(layer, {**buffers, **bare}, (inputs,))
        positions = tuple(range(2, inputs.ndim))
        scale, shift = slope * inputs, slope
        return {
            "weight": scale.sum(positions) if positions else scale,
            "bias": shift.sum(positions) if positions else shift,
        }
    parts = [part for part, _ in layer.named_parameters() if part not in own]
    rest = {part: model.parameters[f"{name}.{part}"] for part in parts if f"{name}.{part}" in model.parameters}

    def one(x: Tensor, s: Tensor) -> Tensors:
        pull = vjp(lambda chosen: functional_call(layer, {**rest, **chosen}, (x[None],)), own)[1]
        told: Tensors = pull(s[None])[0]
        return told

    return vmap(one)(inputs, slope)


def counts_by_means(seen: Evidence, total: Tensor) -> Tensor:
    """The paper's counts (classes,): non-negative least squares against class means, rounded by largest remainders."""
    from scipy.optimize import nnls

    there = (seen.labels.bincount() > 0).nonzero()[:, 0]
    means = torch.stack([seen.each[seen.labels == c].mean(0) for c in there])  # (there, numbers)
    heavy = 1e3 * means.norm()  # so that the counts sum to the batch
    left, right = torch.cat([means.T, heavy.expand(1, len(means))]), torch.cat([total, (heavy * seen.batch)[None]])
    raw = torch.zeros(seen.classes, dtype=torch.float64)
    raw[there] = torch.from_numpy(nnls(left.numpy(), right.numpy())[0])
    return apportion(raw, torch.zeros(seen.classes, dtype=torch.bool), seen.batch).long()


@dataclass(frozen=True)
class Counter:
    """A network from a sum of contributions to counts: for each class a Gaussian on whole numbers.

    centre, directions  (numbers,), (numbers, k): what samples add, without its mean, in coordinates whose covariance within classes
                        is the identity
    network             (k,) -> (2 classes,): means, and logarithms of precisions
    """

    centre: Tensor
    directions: Tensor
    network: "Reader"
    classes: int
    batch: int

    @classmethod
    def trained(cls, seen: Evidence, *, generator: torch.Generator, steps: int = 600, width: int = 384) -> "Counter":
        """By Adam on the likelihood of the counts of random batches, whose class frequencies run from all alike to few classes."""
        labels, classes, batch = seen.labels, seen.classes, seen.batch
        centre, directions = whitening(seen.each, labels, classes)
        order = labels.argsort(stable=True)
        rows = ((seen.each - centre) @ directions).float()[order] / batch**0.5
        sizes = labels.bincount(minlength=classes)
        begin = sizes.cumsum(0) - sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            network = Reader(rows, labels[order], classes, batch, width)
            optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
            for _ in range(steps):
                weights = torch.empty(CHUNK, classes).exponential_() ** (SHARPEST * torch.rand(CHUNK, 1))
                drawn = torch.multinomial((weights + 1e-9) * (sizes > 0), batch, replacement=True)  # (CHUNK, batch)
                chosen = begin[drawn] + (torch.rand(drawn.shape) * sizes[drawn]).long()
                counts = torch.zeros(CHUNK, classes).scatter_add_(1, drawn, torch.ones(drawn.shape))
                loss = -network.log_likelihood(rows[chosen].sum(1)).gather(2, counts.long()[..., None]).mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                schedule.step()
        return cls(centre, directions, network.requires_grad_(False), classes, batch)

    def __call__(self, total: Tensor) -> tuple[Tensor, float]:
        """The most likely counts (classes,) with the batch's size in sum, and the expected share of labels that they have right."""
        x = ((total - self.batch * self.centre) @ self.directions).float() / self.batch**0.5
        told = self.network.log_likelihood(x[None])[0].double()  # (classes, batch + 1), concave in the count
        gain = told.diff(dim=1)
        counts = torch.zeros(self.classes, dtype=torch.int64)
        for _ in range(self.batch):  # of concave functions, one more where it gains most is the best there is
            more = gain.gather(1, counts.clamp_max(self.batch - 1)[:, None])[:, 0]
            counts[more.argmax()] += 1
        off = (torch.arange(self.batch + 1) - counts[:, None]).abs()
        return counts, 1 - float((told.exp() * off).sum()) / (2 * self.batch)


class Reader(nn.Module):
    """A linear map, and what a perceptron adds to it; it starts as the ridge regression of labels on what one sample adds.

    rows (samples, inputs): so scaled that the sum of a batch of them is the input; labels (samples,).
    """

    def __init__(self, rows: Tensor, labels: Tensor, classes: int, batch: int, width: int) -> None:
        super().__init__()
        shares = torch.eye(classes)[labels]
        rest = shares - shares.mean(0)
        normal = rows.T @ rows
        solved = torch.linalg.solve(normal + 1e-3 * normal.diag().mean() * torch.eye(len(normal)), rows.T @ rest)
        left = batch * (rest - rows @ solved).square().mean(0)  # (classes,): variance of a count
        self.linear = nn.Linear(rows.shape[1], classes)
        self.network = nn.Sequential(
            nn.Linear(rows.shape[1], width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 2 * classes),
        )
        with torch.no_grad():
            self.linear.weight.copy_(solved.T)
            self.linear.bias.copy_(batch * shares.mean(0))
            last = self.network[-1]
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.copy_(torch.cat([torch.zeros(classes), (-(2 * left).clamp_min(1e-4).log()).clamp_max(SUREST)]))
        self.register_buffer("grid", torch.arange(batch + 1.0))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """(n, inputs) -> (n, classes, batch + 1): of each count."""
        shift, precision = self.network(x).chunk(2, dim=1)
        mean = self.linear(x) + shift
        scores: Tensor = -precision.clamp(-8, SUREST).exp()[..., None] * (self.grid - mean[..., None]).square()
        return scores.log_softmax(2)


def whitening(contributions: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(numbers,) and (numbers, k): the mean, and directions along which the covariance within classes is the identity."""
    centre = contributions.mean(0)
    some = (contributions - centre)[: 4 * DIRECTIONS]  # enough for the principal directions
    values, turn = torch.linalg.eigh(some @ some.T)
    kept = values.flip(0)[:DIRECTIONS] > 1e-12 * values[-1]  # float32 rounds what samples add at 1e-7
    axes = torch.linalg.qr(some.T @ turn.flip(1)[:, :DIRECTIONS][:, kept])[0]
    z = (contributions - centre) @ axes
    means = torch.stack([z[labels == c].mean(0) if (labels == c).any() else z.mean(0) for c in range(classes)])
    rest = z - means[labels]
    covariance = rest.T @ rest / len(rest)
    covariance += 1e-4 * z.square().mean() * torch.eye(len(covariance), dtype=z.dtype)
    values, turn = torch.linalg.eigh(covariance)
    return centre, axes @ (turn / values.sqrt())
