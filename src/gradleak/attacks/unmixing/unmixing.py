"""Unmixing: every picture of a batch, or of a whole fine-tuning, out of the first layer of a ReLU network, an attack of our own.
Gradients: SPEAR (Dimitrov et al., NeurIPS 2024, arXiv:2403.03945). Adapters: LoRA (Hu et al. 2021, arXiv:2106.09685).

Sees      Adapter whose start is known (given, or recovered from a seed), after any number of SGD steps in any batches;
          Gradient or Update of several pictures. Fully connected ReLU networks; labels, recipe and number optional
Recovers  images (batch, channel, height, width) in [0, 1], labels
Solves    A_T - A_0 = (r x N) X: the span of the N inputs                                             (span.py, 1)
          min sum(x) s.t. x >= 0 in the span: pictures with many black pixels                         (sources.py, pixels)
          B_T = sum_i d_i (A x_i)^T, d_i = 0 where unit j is off: any pictures                        (sources.py, units)
          min over the N x N coordinates of ||simulate - released||, where all steps took all pictures (polished)
Differs   SPEAR reads gradients; here also both factors of an adapter, A at one third of its way: from B = 0, A moves with t^2
          q by descent, not by draws of N - 1 units; in gradients, every sample found takes a dimension off the search
          keeps whichever of pixels and units explains B, with zeros where the recovered pictures switch units off
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

from gradleak.attacks.attack import check_sees
from gradleak.attacks.reconstruction import CLOSE, Outcome, Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.unmixing.sources import by_pixels, by_units
from gradleak.attacks.unmixing.span import Span, span_of
from gradleak.modalities.networks import Architecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import train

PIXELS, UNITS, ALONE = "black pixels", "units that are off", "being the only one"
EDGE = 0.999  # the share of a picture's pixels that its scale brings into the box
BLACK = 0.01  # how black a pixel is, in parts of the root mean square of all
OFF = (0.02, 0.1)  # how small the signal of a unit is that is off: of a gradient, and of an adapter whose A has moved
CLEAR = 1.5  # pixels that explain B no more than so many times worse than units do are the exact ones
COARSE = 20  # steps of the training that the derivatives are taken of


@dataclass(frozen=True, kw_only=True)
class Unmixing:
    """The effort.

    searches  for units that are off, at most, each from two starts a sample; fewer where all samples are told
    polish    steps of Gauss-Newton on the replay of an adapter's training; 0: none
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter, Gradient, Update)
    modality: ClassVar[str] = Architecture.modality

    searches: int = 30
    polish: int = 20

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """NotObserved where the first layer is not fully connected or not trained, the start of an adapter is unknown, or
        there are more samples than the span can tell."""
        check_sees(self, observation)
        observation = observation.to(torch.device("cpu"))
        if observation.labels is not None:
            observation = replace(observation, batch_size=len(observation.labels))
        span, shape = span_of(observation), observation.model.architecture.input_shape
        c, way, residual = self.unmixed(span, generator)
        N, trace, labels, explains = len(span.basis), list[tuple[int, float]](), None, "the first layer"
        recipe, adapted = getattr(observation.release, "recipe", None), isinstance(observation.release, Adapter)
        replays = not adapted or (recipe is not None and (recipe.batch_size or N) >= N)  # the batches are known
        if len(c) == N:
            c, labels = labelled(observation.to(torch.float64), span, c)
            if self.polish and way == UNITS and replays and adapted:
                c, trace = polished(observation.to(torch.float64), span, c, labels, self.polish, on_step)
        images = span.pictures(c, shape).clamp(0, 1).float()
        images = torch.cat([images, images.new_full((N - len(c), *shape), 0.5)])
        if labels is not None and replays:
            residual, explains = observation.residual(images, labels), "the release"
        status = (
            f"{N} samples span the first layer, {len(c)} told apart by {way}: {residual:.2g} of {explains} is left."
        )
        outcome = outcome_of(residual) if len(c) else Outcome.NOTHING
        if span.told < N:
            status += f" Only {span.told} directions of the span stand above the rounding of the weights."
        if not replays and (outcome is Outcome.STUCK or span.told < N):  # what units did while A moved proves nothing
            outcome = Outcome.GUESSED
        return Reconstruction(images, labels, residual, status, outcome, iterations=len(trace), trace=trace)

    def unmixed(self, span: Span, generator: torch.Generator) -> tuple[Tensor, str, float]:
        """The coordinates (at most N, N) that explain the first layer best, by what they were found, and what they leave."""
        if len(span.basis) == 1:
            only = in_box(span, torch.ones(1, 1, dtype=span.basis.dtype))
            return only, ALONE, explained(span, only)[0]
        best, way = by_pixels(span, BLACK, generator), PIXELS
        least = enough = explained(span, best)[0]
        alone = replace(span, hidden=None)
        for seen, tolerance in [(span, OFF[0]), (alone, OFF[0]), (alone, OFF[1])][span.hidden is None :]:
            if least <= CLOSE / 10:
                break
            c = by_units(seen, self.searches, tolerance, generator)
            c = settled(span, c if seen.hidden is not None else in_box(span, c))
            left = explained(span, c)[0]
            if len(c) >= len(best) and left < min(least, enough / CLEAR):
                best, way, least = c, UNITS, left
        return best, way, least


def before_relu(span: Span, c: Tensor) -> Tensor:
    """What the first layer gives before its ReLU: coordinates (n, N) -> (n, out)."""
    return F.linear(c @ span.basis, span.network.weights[0], span.network.biases[0])


def explained(span: Span, c: Tensor) -> tuple[float, Tensor]:
    """min over d of ||M - sum_i d_i (F c_i)^T|| / ||M||, with d zero where the unit is off, and that d (n, out)."""
    if not len(c):
        return math.inf, c.new_zeros(0, len(span.mixed))
    on, f = (before_relu(span, c) > 0).T.to(c), c @ span.factor.T  # (out, n), (n, k)
    size = f.norm(dim=1)
    f = f / size[:, None]
    gram = f @ f.T + 1e-9 * torch.eye(len(f), dtype=f.dtype)
    normal = gram * on[:, :, None] * on[:, None, :] + torch.diag_embed(1 - on)  # a system per unit
    d = torch.linalg.solve(normal, ((span.mixed @ f.T) * on)[..., None])[..., 0]
    return float((span.mixed - d @ f).norm() / span.mixed.norm()), (d / size).T


def in_box(span: Span, c: Tensor) -> Tensor:
    """Coordinates (n, N) times a factor each: such that the signals add up to the gradient of the bias; without that, such
    that black pixels are black; without those, such that units are on where they carry a signal, and the picture reaches
    the edge of the box."""
    if not len(c):
        return c
    signal = torch.linalg.pinv(c @ span.factor.T).T @ span.mixed.T  # (n, out)
    if span.bias is not None and len(c) == len(span.basis):
        c = c / torch.linalg.lstsq(signal.T, span.bias[:, None]).solution
        return c
    if span.black is not None:
        return c / (c @ span.black)[:, None]
    x, network = c @ span.basis, span.network
    sign = ((x @ network.weights[0].T).sign() * signal.abs()).sum(1, keepdim=True).sign()
    low, high = -network.shift / network.scale, (1 - network.shift) / network.scale
    over = torch.where(x * sign > 0, x * sign / high.clamp_min(1e-9), x * sign / low.clamp_max(-1e-9))
    c = c * sign / over.quantile(EDGE, dim=1, keepdim=True)
    return c


def settled(span: Span, c: Tensor) -> Tensor:
    """The coordinates again, from the units that these pictures (n, N) switch off, as long as they explain more."""
    N, (U, S, Q) = len(span.basis), torch.linalg.svd(span.mixed, full_matrices=False)
    rows, least = U[:, :N] / U[:, :N].norm(dim=1, keepdim=True).clamp_min(1e-9), explained(span, c)[0]
    for _ in range(4 if len(c) == N else 0):
        z = before_relu(span, c)
        off = z < -0.3 * z.abs().median(1, keepdim=True).values  # (N, out): those that stayed off
        q = torch.stack([torch.linalg.eigh(rows[o].T @ rows[o])[1][:, 0] for o in off])
        f = torch.linalg.pinv(q.T) @ (S[:N, None] * Q[:N])
        new = in_box(span, f @ torch.linalg.pinv(span.factor).T)
        if (left := explained(span, new)[0]) >= least:
            break
        c, least = new, left
    return c


def labelled(observation: PictureObservation, span: Span, c: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates (N, N) and their labels (N,): those whose loss sends the signal d_i back to the first layer.

    Where the labels were given, the samples are put into their order.
    """
    from scipy.optimize import linear_sum_assignment

    d, fits = explained(span, c)[1], list[Tensor]()
    start = z = before_relu(span, c).requires_grad_()
    for W, b in zip(span.network.weights[1:], span.network.biases[1:], strict=True):
        z = F.linear(z.relu(), W, b)
    for label in range(observation.model.architecture.classes):
        loss = observation.model.criterion(logits(span.network, z), torch.full((len(c),), label))
        fits.append(F.cosine_similarity(torch.autograd.grad(loss, start, retain_graph=True)[0], d, dim=1))
    fit = torch.stack(fits, 1)  # (N, classes)
    if observation.labels is None:
        return c, fit.argmax(1)
    order = linear_sum_assignment(-fit[:, observation.labels].T.numpy())[1]
    return c[torch.as_tensor(order)], observation.labels


def logits(network: FullyConnected, z: Tensor) -> Tensor:
    """(n, out) of the last layer -> (n, classes): a single output stands against zero."""
    return torch.cat([torch.zeros_like(z), z], dim=1) if network.single else z


# -- the replay of the training


def polished(
    observation: PictureObservation, span: Span, c: Tensor, labels: Tensor, steps: int, on_step: OnStep | None
) -> tuple[Tensor, list[tuple[int, float]]]:
    """The coordinates (N, N) that explain the release best, from these on, and what they left at every step.

    First the factor of each sample, then all coordinates, by Levenberg and Marquardt. The first layer is replayed within the
    span: N inputs in place of the pixels give the same numbers. Derivatives are those of a training of fewer, longer steps.
    """
    model, release = observation.model, observation.adapter
    recipe, network = release.recipe, FullyConnected.of(model.module, model.parameters, model.architecture.input_shape)
    assert recipe is not None
    coarse = max(1, recipe.steps // COARSE) if recipe.optimizer == "sgd" else 1
    taken = recipe.steps // coarse
    rates = tuple(sum(recipe.rate(i * coarse + k) for k in range(coarse)) for i in range(taken))
    rough = replace(
        recipe, steps=taken, learning_rate=recipe.learning_rate * coarse, rates=rates if recipe.rates else ()
    )
    weights = [network.weights[0] @ span.basis.T, *network.weights[1:]]
    modules = [name.removesuffix(".weight") for name in network.names]
    first = f"{modules[0]}.lora_A"
    start, seen = ({**t, first: t[first] @ span.basis.T} for t in (release.start, observation.released))

    def loss(factors: Tensors, c: Tensor, labels: Tensor) -> Tensor:
        z = c
        for at, (W, b, module) in enumerate(zip(weights, network.biases, modules, strict=True)):
            a = z.relu() if at else z
            z = F.linear(a, W, b)
            if s := release.scaling.get(module):
                z = z + s * F.linear(F.linear(a, factors[f"{module}.lora_A"]), factors[f"{module}.lora_B"])
        return model.criterion(logits(network, z), labels)

    trace = list[tuple[int, float]]()
    for whole in (False, True):
        given, u = c, c if whole else c.new_zeros(len(c), 1)

        def residual(u: Tensor, coarsely: bool, given: Tensor = given, whole: bool = whole) -> Tensor:
            after = train(loss, start, u if whole else u.exp() * given, labels, rough if coarsely else recipe)
            left = [(after[k] - start[k] - t) / t.norm().clamp_min(1e-30) for k, t in seen.items()]
            return torch.cat([t.flatten() for t in left])

        u, values = levenberg_marquardt(residual, u, steps)
        trace += list(enumerate(values, len(trace) + 1))
        c = u if whole else u.exp() * given
        if on_step is not None and trace:
            on_step(len(trace), 2 * steps, trace[-1][1])
    return c, trace


def levenberg_marquardt(residual: Callable[..., Tensor], u: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """The least squares of residual(u, False) from u on, and its length after every step, which only falls. The derivatives
    are those of residual(u, True), taken anew where a step has not taken off two thirds."""
    value, damping, values, eye = residual(u, False), 1e-6, list[float](), torch.eye(u.numel(), dtype=u.dtype)
    H: Tensor | None = None
    for _ in range(steps):
        if H is None:
            with warnings.catch_warnings():  # torch's own: its first forward-mode derivative calls torch.jit.script
                warnings.simplefilter("ignore", DeprecationWarning)
                J = vmap(lambda t, u=u: jvp(lambda u: residual(u, True), (u,), (t,))[1])(eye.view(-1, *u.shape))
            H = J @ J.T
        step = torch.linalg.solve(H + damping * H.diagonal().mean() * eye, J @ value).view_as(u)
        new = residual(u - step, False)
        left = float(new.norm() / value.norm())
        u, value, damping = (u - step, new, damping / 10) if left < 1 else (u, value, damping * 100)
        H = H if left < 1 / 3 or left >= 1 else None
        values.append(float(value.norm()))
        if 0.99 < left < 1 or damping > 1:
            break
    return u, values
