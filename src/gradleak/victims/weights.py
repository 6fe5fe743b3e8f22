"""Somebody who trains a network on private pictures until nothing changes, and publishes the weights.

Full-batch gradient descent from a small first layer (Haim et al. 2022, section 5.1). That layer only ever moves within the
span of its inputs, W_1(t) = W_1(0) + B(t)^T X, so that what it does to them is followed through the (samples x samples) matrix
X X^T and the layer itself is written down once, at the end. The numbers are those of plain gradient descent.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.formats.secret_file import Secret
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations import tensor_file
from gradleak.observations.fully_connected import FullyConnected, Target, explained
from gradleak.observations.model import PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.tensors import Tensors, fingerprint
from gradleak.observations.trained_weights import Stationarity, Weights
from gradleak.victims.gradient import keep_secret

PROGRESS = "gradleak/training/1"
VEHICLES = ("airplane", "automobile", "ship", "truck")
SAVE_SECONDS = 20.0  # between two savings of unfinished training
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class FullBatch:
    """Gradient descent on the mean cross entropy of all pictures.

    learning_rate  of plain gradient descent; with loss_based, the step in the logarithm of the loss
    epochs         at most
    loss           at which training ends before that
    weight_decay   added to the gradient, times the parameters
    loss_based     step size in inverse proportion to the loss (Lyu and Li 2020, section 5.2): the same path, exponentially
                   faster once everything is classified; for one output without weight decay
    """

    learning_rate: float = 0.2
    epochs: int = 20_000
    loss: float = 0.0
    weight_decay: float = 0.0
    loss_based: bool = False


def first_of_each(source: str, split: str, per_class: int, *, resize: tuple[int, int] | None = None) -> Pictures:
    """The first pictures of two classes, in their order: vehicles and animals of CIFAR-10, else odd and even labels.

    Class 1 is what Haim et al. give the sign +1: vehicles, odd. Raises BadInput when there are too few.
    """
    rows = 4 * per_class + 16
    while True:
        try:
            pictures = load(source, split, indices=range(rows), resize=resize)
        except BadInput:
            pictures = load(source, split, resize=resize)
        labels = two_classes(pictures)
        chosen = torch.cat([torch.nonzero(labels == label)[:per_class, 0] for label in (1, 0)])
        if len(chosen) == 2 * per_class:
            break
        if len(labels) < rows:
            raise BadInput(f"{source} has fewer than {per_class} pictures of one of the two classes.")
        rows *= 2
    return Pictures(pictures.images[chosen], labels[chosen], ("0", "1"), pictures.source, pictures.split)


def two_classes(pictures: Pictures) -> Tensor:
    """(n,) labels 0 and 1: animals and vehicles where the classes are those of CIFAR-10, else even and odd."""
    if set(VEHICLES) <= set(pictures.classes):
        vehicles = torch.tensor([pictures.classes.index(name) for name in VEHICLES])
        return torch.isin(pictures.labels, vehicles).long()
    return pictures.labels % 2


def publish_weights(
    start: PictureModel,
    private: Pictures,
    recipe: FullBatch,
    *,
    reveal_initial: bool = False,
    reveal_labels: bool = False,
    reveal_batch_size: bool = True,
    resume: Path | None = None,
    on_step: OnStep | None = None,
) -> tuple[PictureObservation, Secret]:
    """Train the model on all of `private` at once, in the precision of its parameters, and release them.

    resume: a file that holds unfinished training; written about every 20 seconds, read if it is there. Raises BadInput when
    the model cannot take the pictures or is not fully connected, or the training diverges.
    """
    precision, shape = next(iter(start.parameters.values())).dtype, start.architecture.input_shape
    secret = keep_secret(start, replace(private, images=private.images.to(precision)))
    labels = private.labels
    before = FullyConnected.of(start.module, start.parameters, shape)
    x = before.inputs(secret.inputs)
    after, epochs = train(before, x, labels, recipe, resume=resume, on_step=on_step)
    model = replace(start, parameters=after.parameters())
    release = Weights(
        initial=start.parameters if reveal_initial else None,
        weight_decay=recipe.weight_decay,
        stationarity=stationarity(after, x, labels, epochs, recipe.weight_decay),
    )
    observation = Observation(
        model=model,
        release=release,
        released=model.parameters,
        batch_size=len(labels) if reveal_batch_size else None,
        labels=labels if reveal_labels else None,
        precision=str(precision).removeprefix("torch."),
    )
    return observation, replace(secret, inputs=private.images)


def train(
    network: FullyConnected,
    x: Tensor,
    labels: Tensor,
    recipe: FullBatch,
    *,
    resume: Path | None = None,
    on_step: OnStep | None = None,
) -> tuple[FullyConnected, int]:
    """The trained network, and the epochs that it took: x (n, in) inputs of the first layer, labels (n,) int64."""
    if recipe.loss_based and (not network.single or recipe.weight_decay):
        raise BadInput("Steps by the loss are for two classes without weight decay: leave out one of them.")
    G = x @ x.T + (network.biases[0] is not None)  # how far a change by one sample's gradient moves the others' z_1
    W, b = [w.clone() for w in network.weights[1:]], [None if v is None else v.clone() for v in network.biases[1:]]
    z, moved = network.forward(x)[0], x.new_zeros(len(x), len(network.weights[0]))  # W_1 = kept W_1(0) + moved^T X
    kept, epoch, saved = x.new_ones(()), torch.zeros((), dtype=torch.int64), time.monotonic()
    key = fingerprint({"x": x, "labels": labels, **network.parameters()}) + str({**asdict(recipe), "epochs": 0})
    if resume is not None and resume.is_file():
        state = unfinished(resume, key, progress(z, moved, kept, epoch, W, b))
        z, moved, kept, epoch = (state[name] for name in ("z", "moved", "kept", "epoch"))
        W = [state[f"weight{at}"] for at in range(len(W))]
        b = [state.get(f"bias{at}") for at in range(len(W))]
    while int(epoch) < recipe.epochs:
        a, h = [z.relu()], list[Tensor]()
        for at, (weight, bias) in enumerate(zip(W, b, strict=True)):
            h.append(a[at] @ weight.T if bias is None else a[at] @ weight.T + bias)
            a.append(h[at].relu())
        signal, loss = slope(h[-1], labels, recipe.loss_based)
        delta = [signal]
        for at in range(len(W) - 1, -1, -1):
            delta.insert(0, (delta[0] @ W[at]) * (a[at] > 0))
        step = recipe.learning_rate
        if recipe.loss_based:  # the step that brings log loss down by so much, to first order
            squares = [(delta[0] * (G @ delta[0])).sum()]
            squares += [((d @ d.T) * (v @ v.T)).sum() for d, v in zip(delta[1:], a, strict=False)]
            step = recipe.learning_rate / float(torch.stack(squares).sum())
        shrink = 1 - step * recipe.weight_decay
        for at, weight in enumerate(W):
            weight.addmm_(delta[at + 1].T, a[at], beta=shrink, alpha=step)
            if (bias := b[at]) is not None:
                bias.mul_(shrink).add_(delta[at + 1].sum(0), alpha=step)
        z.addmm_(G, delta[0], beta=shrink, alpha=step)
        moved.mul_(shrink).add_(delta[0], alpha=step)
        kept *= shrink
        epoch += 1
        if int(epoch) % 100 == 0 or int(epoch) == recipe.epochs:
            value = float(loss)
            if not value == value or value > 1e6:
                raise BadInput(
                    f"The training diverged at learning rate {recipe.learning_rate:g}: choose a smaller one."
                )
            if on_step is not None:
                on_step(int(epoch), recipe.epochs, value)
            if value <= recipe.loss:
                break
        if resume is not None and time.monotonic() - saved > SAVE_SECONDS:
            tensor_file.write(progress(z, moved, kept, epoch, W, b), PROGRESS, {"key": key}, resume)
            saved = time.monotonic()
    first, bias = kept * network.weights[0] + moved.T @ x, network.biases[0]
    shifts = (None if bias is None else kept * bias + moved.sum(0), *b)
    return replace(network, weights=(first, *W), biases=shifts), int(epoch)


def progress(
    z: Tensor, moved: Tensor, kept: Tensor, epoch: Tensor, W: list[Tensor], b: Sequence[Tensor | None]
) -> Tensors:
    """The state of unfinished training as named tensors."""
    state = {"z": z, "moved": moved, "kept": kept, "epoch": epoch} | {f"weight{at}": w for at, w in enumerate(W)}
    return state | {f"bias{at}": v for at, v in enumerate(b) if v is not None}


def unfinished(path: Path, key: str, like: Tensors) -> Tensors:
    """The state in a file, whose tensors are like these; BadInput where it is of other training, or damaged."""
    tensors, about = tensor_file.read(path, PROGRESS)
    if about.get("key") != key:
        raise BadInput(f"{path} holds the unfinished training of something else: choose another folder.")
    if {k: (v.shape, v.dtype) for k, v in tensors.items()} != {k: (v.shape, v.dtype) for k, v in like.items()}:
        raise BadInput(f"{path} is damaged: choose another folder, or remove it.")
    return tensors


def slope(outputs: Tensor, labels: Tensor, relative: bool = False) -> tuple[Tensor, Tensor]:
    """Minus the derivative of the mean cross entropy by the outputs (n, out), and that loss; relative: of its logarithm.

    One output is the logit of class 1 against zero. Relative derivatives stay finite long after the loss has underflown.
    """
    n = len(labels)
    if outputs.shape[1] > 1:
        one_hot = F.one_hot(labels, outputs.shape[1]).to(outputs)
        return (one_hot - outputs.softmax(1)) / n, F.cross_entropy(outputs, labels)
    sign = 2 * labels.to(outputs)[:, None] - 1
    margin = sign * outputs
    losses = F.softplus(-margin)
    if not relative:
        return sign * torch.sigmoid(-margin) / n, losses.mean()
    log_losses = torch.where(margin < 30, losses.clamp_min(1e-30).log(), -margin)
    return sign * torch.exp(F.logsigmoid(-margin) - log_losses.logsumexp(0)), losses.mean()


def stationarity(network: FullyConnected, x: Tensor, labels: Tensor, epochs: int, weight_decay: float) -> Stationarity:
    """How far the training of this network on x (n, in) has come."""
    signal, loss = slope(network.forward(x)[-1], labels)
    pull, own = network.combination(x, signal), network.parameters()
    gradient = torch.stack([(weight_decay * own[name] - pull[name]).square().sum() for name in own]).sum().sqrt()
    rows, C = network.margins(network.images(x, (len(x[0]), 1, 1)), labels)
    first = Target(layers=(1.0, *[0.0] * (len(network.weights) - 1)))
    return Stationarity(epochs, float(loss), float(gradient), explained(network, rows, C, first)[0])
