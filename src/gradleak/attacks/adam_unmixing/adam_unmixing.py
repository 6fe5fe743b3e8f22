"""Several pictures behind steps of Adam: exactly after two steps, as what their signs tell after more; an attack of our own.
Adam: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101.

Sees      Adapter whose start is known (given, or recovered from a seed) and has B = 0, after two steps or more with all samples in
          each. Fully connected ReLU networks. Two steps: recipe, number and labels optional; more: the number of samples
Recovers  images (batch, channel, height, width) in [0, 1], labels
Solves    two steps   g = H^T X, the only gradient that moved A, out of its epsilon                     (second_step.py, 1)
                      C <- (H(C V)^T)^+ g V^T, X = C V, V the row space of g                            (2)
          more        A_T - A_0 at a pixel is a function of the direction of its N values alone, up to epsilon: every step divides
                      h_t x by sizes of such. The directions are those of the first N singular vectors, up to a matrix C
          start C     units that moved alike, up to their sign, were on for one sample alone, and units that did not move for none:
                      W x + b > 0 or < 0 for all of them
Differs   no paper to differ from. In (2) H is what the network sends back while B is halfway, which is where one step of two left it
Misses    formats that round epsilon away; other samples in each step; after more than two steps the sizes of a pixel's values,
          and all that units do not tell of eight samples
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from gradleak.attacks.adam_unmixing.second_step import recognised, second_step
from gradleak.attacks.attack import check_sees
from gradleak.attacks.reconstruction import CLOSE, Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.unmixing.sources import by_pixels
from gradleak.attacks.unmixing.span import Span, adapted_first_layer, divided
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe, train

ALIVE = 0.05  # a unit that moved less than this share of the strongest was off for all samples
ALIKE = 0.01  # of one: how far the cosine of units falls that were on for one sample alone
APART = 0.35  # least singular value of the directions of two samples' units
EDGE = 0.97  # share of a picture's pixels that its scale brings into the box
BLACK = 0.02  # how black a pixel is, in parts of the root mean square of all
INSIDE = 2 / 3  # of the way to the edge of the box: the mean of two values that are even in it, given their direction
ROUNDS = 40  # of (2), each halfway
ONE_WAY = 1.5  # learning rates: what has moved further in two steps was moved twice in one direction
ENOUGH = 0.03  # of the gradient: what is left of it where C is right, is rounding and the steps of B


@dataclass(frozen=True, kw_only=True)
class AdamUnmixing:
    """The effort.

    searches  more starts at random, where units and pixels do not lead to all samples of two steps
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = Architecture.modality

    searches: int = 10

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """NotObserved where the first layer is not fully connected, the start of the adapter is unknown, another optimizer moved it, or
        nothing tells the number of samples."""
        check_sees(self, observation)
        observation = observation.to(torch.device("cpu")).to(torch.float64)
        release, shape = observation.adapter, observation.model.architecture.input_shape
        network, module = adapted_first_layer(observation, release)
        A, B = f"{module}.lora_A", f"{module}.lora_B"
        if release.gradient or release.origin == "unknown" or not {A, B} <= set(observation.released):
            raise NotObserved(
                "A_T - A_0 tells of the pictures, and A_0 is not known: give the adapter before training."
            )
        change, recipe = observation.released[A], release.recipe
        if release.start[B].any() or not change.any() or (recipe and recipe.optimizer not in ("adam", "adamw")):
            raise NotObserved(
                "This attack reads what Adam made of an adapter that began at B = 0, in two steps or more."
            )
        samples = len(observation.labels) if observation.labels is not None else observation.batch_size
        samples = samples if samples and (samples > 1 or observation.labels is not None) else None  # 1: nobody knows
        if recipe and recipe.batch_size and not (samples and samples <= recipe.batch_size):
            raise NotObserved(
                "Steps took different samples, and what the first one did to B is not known to the second."
            )
        two = recognised(observation, release, module)
        if two is not None:
            x, labels, left, least = self.exact(observation, network, module, two, samples, generator)
            status = f"Two steps of Adam on {len(x)} samples: {left:.2g} of the gradient behind the second one is left."
            outcome = Outcome.CLOSE if left <= CLOSE else Outcome.STUCK
            if outcome is Outcome.CLOSE and left > least / 3:
                status += (
                    f" The weakest of their directions is {least:.2g} of it, so what is left may hide samples: a guess."
                )
                outcome = Outcome.GUESSED
        else:
            if recipe is None and not divided(release, observation.released[B]):
                raise NotObserved("The sizes of lora_B are not those that Adam makes.")
            if samples is None or not 1 < samples < len(change):
                raise NotObserved(
                    "After more than two steps of Adam, the number of samples has to be told, and to be below the rank."
                )
            x, labels = by_signs(observation, network, module, samples)
            left = observation.residual(network.images(x, shape).clamp(0, 1), labels)
            status = (
                f"Directions of {samples} samples by the signs of Adam: sizes are guessed, and nothing proves them."
            )
            outcome = Outcome.GUESSED
        return Reconstruction(network.images(x, shape).clamp(0, 1).float(), labels, left, status, outcome)

    def exact(
        self,
        observation: PictureObservation,
        network: FullyConnected,
        module: str,
        recipe: Recipe,
        samples: int | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, float, float]:
        """The inputs (N, in) behind the second step, their labels, what they leave of its gradient, and its least singular value, as a
        share: a sample that the network knows already sends back next to nothing, and hides below what is left."""
        A, B = f"{module}.lora_A", observation.released[f"{module}.lora_B"]
        start = observation.adapter.start[A]
        step = second_step(observation.released[A], start, recipe, observation.precision, samples)
        g = step.gradient
        S, V = torch.linalg.svd(g, full_matrices=False)[1:]
        N = int((S[0] * 1e-9 < S).sum())
        S, V = S[:N], V[:N]
        span = Span(network, V, S, step.noise, -B, start @ V.T)
        units = by_units(network, B, V.T, N)
        best, labels, least = units, units.new_zeros(N).long(), float("inf")
        for search in range(-1, self.searches + 1):
            if search < 0 and len(pixels := by_pixels(span, BLACK, generator)) < N:
                continue
            c = pixels if search < 0 else units
            if search > 0 or len(c) < N:
                guess = torch.randn(N, N, generator=generator, dtype=V.dtype)
                c = torch.cat([c, boxed(network, guess @ V)[1][:, None] * guess])[:N] if search < 2 else guess
                c = boxed(network, c @ V)[1][:, None] * c
            found = settled(observation, network, module, V, g @ V.T, c)
            if found[2] < least:
                best, labels, least = found
            if least < ENOUGH:
                break
        if least < CLOSE:
            found = settled(observation, network, module, V, g @ V.T, best, recipe)
            best, labels, least = found if found[2] < least else (best, labels, least)
        return best @ V, labels, least, float(S[-1] / S.norm())


def settled(
    observation: PictureObservation,
    network: FullyConnected,
    module: str,
    V: Tensor,
    goal: Tensor,
    c: Tensor,
    replayed: Recipe | None = None,
) -> tuple[Tensor, Tensor, float]:
    """(2) from the coordinates c (N, N) on: those that leave least of goal = g V^T (r, N), their labels, and what they leave. B is
    halfway, or where the first step of a recipe leaves it that is replayed on these inputs."""
    best, factors, model = (c, torch.zeros(len(c)).long(), float("inf")), halfway(observation), observation.model
    for _ in range(ROUNDS):
        c, labels = labelled(observation, network, module, factors, c, V, goal)
        if replayed is not None:
            images = network.images(c @ V, model.architecture.input_shape)
            release = observation.adapter
            after = train(partial(release.loss, model), release.start, images, labels, replace(replayed, steps=1))
            factors = {name: first_half(t, observation.released.get(name), replayed) for name, t in after.items()}
        d = signals(observation, network, factors, c @ V, labels)
        h = observation.adapter.scaling[module] * d @ factors[f"{module}.lora_B"]
        left = float((h.T @ c - goal).norm() / goal.norm())
        if not left < float("inf"):
            break
        if left < best[2]:
            best = c, labels, left
        c = (c + torch.linalg.lstsq(h.T, goal).solution) / 2
    return best


def first_half(replayed: Tensor, change: Tensor | None, recipe: Recipe) -> Tensor:
    """A factor after the first step: what two steps in one direction have moved, was moved so by the first."""
    if change is None:
        return replayed
    return torch.where(change.abs() > ONE_WAY * recipe.learning_rate, recipe.learning_rate * change.sign(), replayed)


def halfway(observation: PictureObservation) -> Tensors:
    """The factors with B halfway, where one step of two has left it but for its epsilon, and A where it began."""
    moved = {name: change / 2 for name, change in observation.released.items() if name.endswith("lora_B")}
    return {name: start + moved.get(name, 0) for name, start in observation.adapter.start.items()}


def signals(
    observation: PictureObservation, network: FullyConnected, factors: Tensors, x: Tensor, labels: Tensor
) -> Tensor:
    """d (N, out): what inputs x (N, in) send back to the first layer's outputs with these factors; h = s d B to A x."""
    release = observation.adapter

    def loss(aside: Tensor) -> Tensor:  # (N, out), added to the outputs
        z = x
        for layer, (W, b, name) in enumerate(zip(network.weights, network.biases, network.names, strict=True)):
            a, adapted = z.relu() if layer else z, name.removesuffix(".weight")
            z = F.linear(a, W, b)
            if s := release.scaling.get(adapted):
                z = z + s * F.linear(F.linear(a, factors[f"{adapted}.lora_A"]), factors[f"{adapted}.lora_B"])
            z = z if layer else z + aside
        logits = torch.cat([torch.zeros_like(z), z], dim=1) if network.single else z
        return observation.model.criterion(logits, labels)

    d: Tensor = grad(loss)(x.new_zeros(len(x), len(network.weights[0])))
    return d


def labelled(
    observation: PictureObservation,
    network: FullyConnected,
    module: str,
    factors: Tensors,
    c: Tensor,
    basis: Tensor,
    goal: Tensor,
) -> tuple[Tensor, Tensor]:
    """The coordinates (N, N) and the labels under which they send back what goal (r, N) = h^T c and B say; in the order of given ones."""
    from scipy.optimize import linear_sum_assignment

    h = torch.linalg.lstsq(c.T, goal.T).solution
    classes = range(observation.model.architecture.classes)
    x = c @ basis
    A, B = observation.adapter.start[f"{module}.lora_A"], factors[f"{module}.lora_B"]
    s, towards = observation.adapter.scaling[module], -x @ A.T @ observation.released[f"{module}.lora_B"].T  # (N, out)
    sent = [signals(observation, network, factors, x, torch.full((len(c),), label)) for label in classes]
    fits = [F.cosine_similarity(s * d @ B, h, dim=1) + F.cosine_similarity(s * d, towards, dim=1) for d in sent]
    fit = torch.stack(fits, 1)  # (N, classes)
    if observation.labels is None:
        return c, fit.argmax(1)
    order = linear_sum_assignment(-fit[:, observation.labels].T.nan_to_num().numpy())[1]
    return c[torch.as_tensor(order)], observation.labels


def by_units(network: FullyConnected, B: Tensor, basis: Tensor, samples: int) -> Tensor:
    """Coordinates (found, N) in a basis (in, N) of the samples that have units (out,) of their own in B (out, r), and a scale that brings
    them into the box: least squares of W x + b against 1 for such units, -1 for those of other samples and of none."""
    alive = B.abs().amax(1) > ALIVE * B.abs().max()
    rows = F.normalize(B, dim=1) * alive[:, None]
    alike, left, own = (rows @ rows.T).abs() > 1 - ALIKE, alive.clone(), list[Tensor]()
    chosen = rows[:0]
    while len(own) < samples and bool(left.any()):
        most = int(((alike & left).sum(1) * left).argmax())
        units, left = alike[most] & left, left & ~((rows @ rows[most]).abs() > 1 - 3 * ALIKE)
        if int(units.sum()) < 2:
            break
        with_it = torch.cat([chosen, rows[most : most + 1]])
        if float(torch.linalg.svdvals(with_it)[-1]) > APART:
            own, chosen = [*own, units], with_it
    z = network.weights[0] @ basis
    found = list[Tensor]()
    for units in own:
        off = ~alive | (torch.stack(own).any(0) & ~units)
        weight = (units / units.sum() + off / off.sum().clamp_min(1)).double().sqrt()[:, None]
        side = units.double()[:, None] - off.double()[:, None]
        found.append(torch.linalg.lstsq(weight * z, weight * side).solution[:, 0])
    c = torch.stack(found) if found else z[:0]
    return c * boxed(network, c @ basis.T)[1][:, None]


def boxed(network: FullyConnected, x: Tensor) -> tuple[Tensor, Tensor]:
    """How far inputs x (n, in) reach to the edge of the box, in every number (n, in), and the scale (n,) that brings them into it."""
    low, high = -network.shift / network.scale, (1 - network.shift) / network.scale
    over = torch.where(x > 0, x / high.clamp_min(1e-9), x / low.clamp_max(-1e-9))
    return over, 1 / over.quantile(EDGE, dim=1).clamp_min(1e-9)


def by_signs(
    observation: PictureObservation, network: FullyConnected, module: str, samples: int
) -> tuple[Tensor, Tensor]:
    """The inputs (N, in) after many steps, with a guess of the sizes of every pixel's N values, and their labels."""
    change, B = observation.released[f"{module}.lora_A"], observation.released[f"{module}.lora_B"]
    S, V = torch.linalg.svd(change, full_matrices=False)[1:]
    basis = F.normalize(S[:samples, None] * V[:samples], dim=0)  # (N, in): a pixel's values are of length one
    c = by_units(network, B, basis.T, samples)
    if len(c) < samples:
        raise NotObserved(f"Units tell {len(c)} of {samples} samples apart, and nothing else does after many steps.")
    c, labels = labelled(observation, network, module, halfway(observation), c, basis, -change @ basis.T)
    x = F.normalize(c @ basis, dim=0)
    return INSIDE * x / boxed(network, x)[0].amax(0).clamp_min(1e-9), labels
