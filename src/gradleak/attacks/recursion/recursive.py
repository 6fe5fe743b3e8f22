"""Closed-form recursion (R-GAP, Zhu and Blaschko, ICLR 2021, arXiv:2010.07733): layer by layer from the loss to the picture.

Sees      Gradient, or Update of one local step, of one picture, from a sequence of layers that ends in a linear layer
          with bias; labels optional. Or of a few pictures, fewer than the classes
Recovers  images (batch, channel, height, width) in [0, 1], labels
Solves    last layer: [dL/dW, dL/db] = delta [a, 1]^T, the best matrix of rank one. Below it, for each layer Z = W U + b of
          the patches U of its input, with A = s(Z) and Delta = (back-propagated delta) * s'(Z) known from above,
              W U = s^-1(A) - b   and   dL/dW = Delta U^T                 (equations 6 and 7), least squares for the input
Differs   Every equation is weighted by what is known of its error: of the release (rounding, and noise, which the last
          layer's rank reveals) and of the A and Delta from above; bias gradients correct Delta. A broad prior of each
          input fills in what no equation tells. Max-pooling is undone where the convolution below is wide enough
          (max_pooling.py). A noisy release is followed by a maximum a posteriori search, in the metric of the
          recursion's last system. A layer of more than 4,096 unknowns is solved by conjugate gradients, which need
          not get there where its weight's gradient alone does not determine it. Residual blocks and global average
          pooling are crossed where the gradient determines what is behind them (residual.py). Where a layer ends the
          recursion, the picture is searched that has the features found there (feature_search.py); so is each of several, whose
          features at the last layer are told apart (batch.py).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import vjp

from gradleak.attacks.attack import DOUBLE, Effort, check_sees
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.recursion.batch import each_alone
from gradleak.attacks.recursion.feature_search import Found, invert_features, refine, smooth
from gradleak.attacks.recursion.inverses import EXACT, Signal, before, unknown
from gradleak.attacks.recursion.linear_systems import DENSE, Belief, Equations, linear_map
from gradleak.attacks.recursion.max_pooling import find_winners
from gradleak.attacks.recursion.network import Network
from gradleak.attacks.recursion.residual import Residual, active
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update

TOLD = 0.01  # what a block may leave open: of the prior's variance before it is solved, of its deviation afterwards
MATRICES = 12  # of a layer's unknowns squared, that are held at one time
GUESSES = 4  # how often a layer is solved at most, to choose between two inputs of an activation


@dataclass(frozen=True)
class Features:
    """How far the recursion came: the input of a layer, for one example, and the gradient of the loss there.

    layer   position in the sequence of layers; 0: the picture itself
    noise   standard deviation of the released entries beyond rounding, as the last layer shows it
    factor  lower L with L L^T the inverse covariance of the flat input of the first layer, where the release is noisy
    reason  the layer that ended it, and why; empty at the picture
    """

    layer: int
    input: Belief
    delta: Belief
    label: int
    noise: float
    factor: Tensor | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Recursive:
    """evaluations: of the objective in the search after a recursion that noise or a layer stopped; 0 for no search."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = Architecture.modality

    evaluations: int = 200

    def effort(self, observation: PictureObservation) -> Effort:
        """Of the search, where one follows, in float64; before it, of each layer, matrices of the unknowns that its input is."""
        large = math.prod(observation.model.architecture.input_shape) > DENSE
        searched = Effort.of_search(observation, 0 if large else self.evaluations)
        known = Network.of(replace(observation, batch_size=1))
        sizes = [t[0].numel() for where, t in enumerate(known.typical) if known.has_matrix(where)]
        sizes = [n for n in sizes if n <= DENSE] or [0]
        algebra, matrices = GUESSES * sum(n**3 for n in sizes), 8 * MATRICES * max(sizes) ** 2
        return Effort(DOUBLE * searched.simulations, DOUBLE * searched.together, 0.0, algebra, matrices)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved unless the model is a sequence that ends in a biased linear layer, and one picture took part, or a few that
        can be taken apart."""
        check_sees(self, observation)
        if observation.batch_size not in (None, 1):
            return each_alone(observation, self.evaluations, on_step)
        network = Network.of(observation)
        observation = observation.to(torch.device("cpu")).to(torch.float64)
        estimate = recurse(network)
        labels = torch.tensor([estimate.label]) if observation.labels is None else observation.labels
        images, iterations, trace = self.search(observation, network, estimate, labels, on_step)
        images = images.clamp(0, 1).float()
        residual = observation.residual(images.double(), labels)
        status = f"Closed form down to {estimate.reason or 'the picture'}; noise of {estimate.noise:.2g}"
        status += f", {iterations} evaluations of a search, relative residual {residual:.2g}."
        if not (estimate.layer or network.coarse(estimate.noise)) and residual > 0.01:
            status += " That is no solution: a layer was too ill-conditioned, or an activation went back the wrong way."
        outcome = outcome_of(residual)
        return Reconstruction(images, labels, residual, status, outcome, iterations=iterations, trace=trace)

    def search(
        self, observation: PictureObservation, network: Network, found: Features, labels: Tensor, on_step: OnStep | None
    ) -> Found:
        """From what the recursion found to the picture. None for large pictures, whose prior does not fit into memory."""
        shape = observation.model.architecture.input_shape
        idle = not self.evaluations or math.prod(shape) > DENSE
        release = observation.release
        unit = 1 / release.unit if isinstance(release, Update) else 1.0  # released / gradient
        variance = {name: unit**2 * network.variance(g, found.noise) for name, g in network.gradient.items()}
        if found.layer:
            if idle:
                return torch.full((1, *shape), 0.5), 0, []
            below = nn.Sequential(*(layer for _, layer in network.layers[: found.layer]))
            there = found.input.reshape(1, *found.input.value.shape)
            return invert_features(observation, labels, variance, below, there, self.evaluations, on_step)
        picture, first = found.input.value[None], next(i for i in range(len(network.layers)) if network.has_matrix(i))
        scale = network.scale(first)
        if idle or found.factor is None or scale is None:
            return picture, 0, []
        return refine(observation, labels, variance, picture, scale[:, None] * found.factor, self.evaluations, on_step)


def features(observation: PictureObservation) -> Features:
    """The picture, or else the input of the deepest layer that the recursion reaches. Raises NotObserved as Recursive."""
    return recurse(Network.of(observation))


def recurse(network: Network) -> Features:
    """From the last layer down as far as it goes."""
    return descend(network, last_layer(network))


def descend(network: Network, estimate: Features, *, surely: bool = False) -> Features:
    """From the input of a layer down as far as it goes; surely: no further than inputs are determined by the release."""
    while estimate.layer:
        below = max(filter(network.has_matrix, range(estimate.layer)), default=-1)
        signals = back(network, estimate, below)
        signal = signals[-1]
        if len(signals) < estimate.layer - below or (below < 0 and (signal.pool > 1 or signal.choice > 1)):
            return _stopped(network, estimate, signals)
        if below < 0:
            return replace(estimate, layer=0, input=signal.value, delta=signal.delta)
        if isinstance(network.layers[below][1], Residual):
            through = cross(network, below, signal, estimate)
            if through is None:
                return _stopped(network, estimate, signals)
            estimate = through
            continue
        if signal.gated:
            opened = open_gate(network, below, signal, estimate.noise)
            if opened is None:
                return _stopped(network, estimate, signals)
            signals.append(opened)
        if signal.choice > 1:
            winners = unpool(network, below, signal, estimate.noise)
            if winners is None:
                return _stopped(network, estimate, signals)
            signals.append(winners)
        for _ in range(GUESSES):
            solved = solve(network, below, signals[-1], estimate, surely=surely)
            if solved is None:
                return _stopped(network, estimate, signals)
            found = solved
            if not any(s.doubtful for s in signals):
                break
            again = back(network, estimate, below, network.layers[below][1](solved.input.value[None])[0])
            if torch.equal(again[-1].delta.value, signals[-1].delta.value):
                break
            signals = again
        estimate = found
    return estimate


def last_layer(network: Network) -> Features:
    """[dL/dW, dL/db] = delta [a, 1]^T, the best matrix of rank one; what it leaves is noise."""
    where, (name, layer) = len(network.layers) - 1, network.layers[-1]
    G = torch.cat([network.gradient[f"{name}.weight"], network.gradient[f"{name}.bias"][:, None]], dim=1)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)  # of (classes, inputs + 1)
    one = Vh[0, -1]
    if not bool(one * S[0] != 0):
        raise NotObserved(f"The gradient of the last layer {name} is zero: the picture left no trace in it.")
    a, delta = Vh[0, :-1] / one, U[:, 0] * S[0] * one
    left = float(S[1:].square().sum()) / ((G.shape[0] - 1) * (G.shape[1] - 1))
    rounding = float(network.variance(G, 0.0).mean())
    noise = math.sqrt(left - rounding) if left > 4 * rounding else 0.0
    variance = (noise**2 + rounding) * (1 + a.square()) / (delta @ delta)
    if not network.coarse(noise):
        variance = torch.where((G[:, :-1] == 0).all(0), EXACT, variance)  # a unit that was off
    output = Belief(delta, torch.full_like(delta, (noise**2 + rounding) / float(1 + a @ a)))
    return Features(where, Belief(a, variance), linear_map(layer, a.shape).back(output), int(delta.argmin()), noise)


def back(network: Network, found: Features, below: int, guess: Tensor | None = None) -> list[Signal]:
    """Backwards through the layers without a matrix between `below` and what was found: the signal at each, as far as
    it goes. guess: what comes out of layer `below`, roughly."""
    between, guesses = range(below + 1, found.layer), dict[int, Tensor | None]()
    for i in between:
        guesses[i] = guess
        guess = None if guess is None else network.layers[i][1](guess[None])[0]
    signals = [Signal(found.input, found.delta)]
    for i in reversed(between):
        earlier = before(network.layers[i][1], network.typical[i], signals[-1], guesses[i])
        if earlier is None:
            break
        signals.append(earlier)
    return signals


def solve(network: Network, where: int, output: Signal, above: Features, *, surely: bool = False) -> Features | None:
    """The input of a layer with a matrix, from what is known of its output and from the gradients of its parameters.

    surely: None where its weight's gradient alone does not determine it.
    """
    (name, layer), shape = network.layers[where], network.typical[where].shape[1:]
    plain, gradient = linear_map(layer, shape), network.released(f"{name}.weight", above.noise)
    delta = output.delta.reshape(len(gradient.value), -1)
    if f"{name}.bias" in network.gradient:
        delta = _with_sums(delta, network.released(f"{name}.bias", above.noise))
    equations = Equations(
        layer=plain,
        gradient=gradient,
        delta=delta,
        output=plain if output.pool == 1 else linear_map(layer, shape, output.pool),
        values=output.value.reshape(len(gradient.value), -1),
        prior=network.prior(where),
    )
    if surely and equations.left() > TOLD:
        return None
    precision, scale = None, network.scale(where)
    if not surely and scale is not None and len(scale) <= DENSE and network.coarse(above.noise):
        c, h, w = network.typical[0].shape[1:]
        precision = smooth((c, h, w))[1] / scale[:, None] / scale
    u, factor = equations.solve(precision)
    return replace(above, layer=where, input=u.reshape(*shape), delta=plain.back(delta).reshape(*shape), factor=factor)


def cross(network: Network, where: int, output: Signal, above: Features) -> Features | None:
    """The input of a residual block, from what is known of its output; None where it is not determined."""
    _, block = network.layers[where]
    assert isinstance(block, Residual)
    total, inner = before(block.after, network.typical[where + 1], output), network.inside(where)
    if total is None or total.choice > 1:
        return None
    top = replace(above, layer=len(inner.layers), input=unknown(total.delta.value), delta=total.delta)
    if total.gated:
        below = max(filter(inner.has_matrix, range(top.layer)), default=-1)
        signals = back(inner, top, below)
        opened = None if len(signals) < top.layer - below else open_gate(inner, below, signals[-1], above.noise)
        if opened is None:
            return None
        on = opened.delta.value != 0
        top = replace(top, delta=Belief(total.delta.value * on.view_as(total.delta.value), total.delta.variance))
    found = descend(inner, top, surely=True)
    if found.layer or float(found.input.variance.mean() / inner.prior(0).variance.mean()) > TOLD**2:
        return None
    pull = vjp(block, found.input.value[None])[1]
    delta = pull(output.delta.value.view(1, *network.typical[where + 1].shape[1:]))[0][0]
    return replace(above, layer=where, input=found.input, delta=Belief(delta, found.delta.variance))


def open_gate(network: Network, where: int, gated: Signal, noise: float) -> Signal | None:
    """The signal at the output of a convolution whose units' activity only its weight's gradient tells; None where not."""
    (name, layer), shape = network.layers[where], network.typical[where].shape[1:]
    delta = gated.delta.reshape(gated.delta.value.shape[0], -1)
    gradient = network.released(f"{name}.weight", noise).value
    slope = active(linear_map(layer, shape), gradient, delta.value) if isinstance(layer, nn.Conv2d) else None
    if slope is None:
        return None
    return Signal(gated.value, Belief(delta.value * slope, delta.variance).reshape(*gated.delta.value.shape))


def unpool(network: Network, where: int, pooled: Signal, noise: float) -> Signal | None:
    """The signal at the output of a convolution from that after max-pooling; None where that does not tell it."""
    (name, layer), typical = network.layers[where], network.typical[where]
    gradient, size = network.released(f"{name}.weight", noise), network.typical[where + 1].shape[1:]
    return find_winners(linear_map(layer, typical.shape[1:]), gradient, pooled, typical, size)


def _with_sums(delta: Belief, sums: Belief) -> Belief:
    """delta (out, positions), given what each row sums to: the gradient of the bias (out,)."""
    share = delta.variance / (delta.variance.sum(1) + sums.variance)[:, None]
    error = sums.value - delta.value.sum(1)
    return Belief(delta.value + share * error[:, None], delta.variance * (1 - share).clamp_min(1e-12))


def _stopped(network: Network, found: Features, signals: list[Signal]) -> Features:
    known = max(k for k, signal in enumerate(signals) if signal.pool == signal.choice == 1 and not signal.gated)
    name, layer = network.layers[found.layer - known - 1]
    kind = type(layer.whole if isinstance(layer, Residual) else layer).__name__
    reason = f"layer {name} ({kind}), whose output does not tell its input"
    at, signal = found.layer - known, signals[known]
    return replace(found, layer=at, input=signal.value, delta=signal.delta, factor=None, reason=reason)
