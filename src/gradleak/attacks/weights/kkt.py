"""Training data out of trained weights (Haim et al., NeurIPS 2022, arXiv:2206.07758; Buzaglo et al., NeurIPS 2023).

Sees      Weights of a fully connected ReLU network trained to near-stationarity; labels, start and number optional
Recovers  images (candidates, channel, height, width) in [0, 1], more than were trained on, and their labels
Solves    min over x in [0, 1] and lambda >= 0 of ||theta - sum_i lambda_i y_i df(x_i)/dtheta||^2      (equations 6 and 7)
          with f_label - f_other and a lambda for every other class where there are several outputs (Buzaglo, equation 5)
Differs   the parameter-sized sum is never formed where its Gram form is shorter, and no derivative is left to autograd
          (fully_connected.py)
          inputs stay in the affine span of the first layer's rows: gradient descent leaves W_1(0) only within the span of
          its inputs, so what stands out of W_1's singular values spans the training images (Gavish and Donoho 2014 say
          what stands out)
          starts are hidden units: a row of W_1 over its bias is an affine combination of images, one image where the unit
          saw one
          labels are those the network gives the starts: it has fitted its training data
          Adam and a cosine schedule in place of momentum; lambda in units of the least-squares common lambda, so that one
          setting serves networks of any norm; lambda is kept at min_lambda by the box and not by a penalty
          no statistic of the private images is added back: inputs are normalised by public constants
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.attack import check_sees
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.weights.row_space import Span, rank_of, span_of, unit_inputs
from gradleak.modalities.networks import Architecture
from gradleak.observations.fully_connected import FullyConnected, Target, distance, grams
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.trained_weights import Weights


@dataclass(frozen=True)
class Search:
    """Where the restarts ended: x (R, m, in), lambda (R, m, out), labels (R, m), relative residuals (R,), a trace."""

    x: Tensor
    coefficients: Tensor
    labels: Tensor
    residuals: Tensor
    trace: list[tuple[int, float]]


@dataclass(frozen=True)
class Settings:
    """Of the joint search over inputs and coefficients; the fields of `KKT`."""

    steps: int
    step_size: float
    coefficient_step: float
    min_lambda: float
    sharpness: float


@dataclass(frozen=True)
class Trained:
    """Observed weights, laid out layer by layer.

    network     the trained network
    learned     what training made of what it trained
    target      what the samples have to add up to
    batch_size  number of private images, or None
    labels      (batch,), or None
    doubt       why training may not have come near enough to stationarity, or nothing
    """

    network: FullyConnected
    learned: FullyConnected
    target: Target
    batch_size: int | None
    labels: Tensor | None
    doubt: str


@dataclass(frozen=True, kw_only=True)
class KKT:
    """The search.

    steps             of Adam
    step_size         of the inputs, in standard deviations of the normalised pixels
    coefficient_step  of lambda, in units of the common lambda that explains the starts best
    min_lambda        in the same units; every candidate is kept in use
    sharpness         alpha of the smoothed derivative of the ReLU, sigmoid(alpha z)
    start_scale       standard deviation of the noise on the starts, and of starts that are only noise
    candidates        per training image; how many images there were is read off the singular values where it was withheld
    restarts          side by side; the best residual wins
    span              keep the inputs in the span of the first layer, where its bias was trained
    units             start at hidden units, else at noise
    first_layer       explain only that layer: later ones may remember where they started
    double            compute in float64, else in float32
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Weights,)
    modality: ClassVar[str] = Architecture.modality

    steps: int = 1_500
    step_size: float = 0.05
    coefficient_step: float = 0.05
    min_lambda: float = 0.2
    sharpness: float = 100.0
    start_scale: float = 0.1
    candidates: int = 2
    restarts: int = 1
    span: bool = True
    units: bool = True
    first_layer: bool = False
    double: bool = True

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """NotObserved for anything but the weights of a fully connected ReLU network."""
        seen = trained(self, observation)
        solutions = self.search(seen, generator=generator, on_step=on_step)
        best = int(solutions.residuals.argmin())
        order = solutions.coefficients[best].sum(-1).argsort(descending=True)
        network, shape = seen.network, observation.model.architecture.input_shape
        images = network.images(solutions.x[best][order].to(network.shift), shape).clamp(0, 1).float()
        residual = float(solutions.residuals[best])
        return Reconstruction(
            value=images,
            labels=solutions.labels[best][order],
            residual=residual,
            status=f"{len(images)} candidates leave {residual:.2f} of the weights unexplained." + reservations(seen),
            outcome=outcome_of(residual),
            iterations=self.steps,
            trace=solutions.trace,
        )

    def search(self, seen: Trained, *, generator: torch.Generator, on_step: OnStep | None = None) -> Search:
        """All restarts, with the evidence for each."""
        dtype = torch.float64 if self.double else torch.float32
        network = seen.network.to(dtype)
        factors = (1.0, *[0.0] * (len(network.weights) - 1)) if self.first_layer else ()
        learned = seen.learned.to(dtype)
        space = span_of(learned) if self.span and learned.biases[0] is not None else None  # else inputs have no scale
        many = self.candidates * (seen.batch_size or max(rank_of(learned), 1))
        x, y = self.starts(network, learned, space, many, seen.labels, generator)
        settings = Settings(self.steps, self.step_size, self.coefficient_step, self.min_lambda, self.sharpness)
        return search(
            network, replace(seen.target, layers=factors).to(dtype), x, y, space, settings, generator, on_step
        )

    def starts(
        self,
        network: FullyConnected,
        learned: FullyConnected,
        space: Span | None,
        many: int,
        labels: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """(R, many, in) inputs and (R, many) labels: hidden units far from each other (k-means++), or noise."""
        low, high = ((edge - network.shift) / network.scale for edge in (0, 1))
        noise = torch.randn(self.restarts, many, len(network.shift), generator=generator, dtype=torch.float64)
        x = self.start_scale * noise.to(network.shift)
        pool = unit_inputs(learned, space) if self.units else x[0, :0]
        if len(pool) >= many:
            apart = torch.cdist(pool, pool).square().double()
            for r in range(self.restarts):
                chosen = [int(torch.randint(len(pool), (1,), generator=generator))]
                while len(chosen) < many:
                    nearest = apart[chosen].min(0).values.clamp_min(1e-12).cpu()
                    chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
                x[r] += pool[chosen]
        x = x if space is None else space.project(x.clamp(low, high))
        if len(pool) >= many:
            outputs = network.forward(x)[-1]
            return x, (outputs[..., 0] > 0).long() if network.single else outputs.argmax(-1)
        classes = torch.arange(2 if network.single else len(network.weights[-1]), device=x.device)
        known = classes if labels is None else labels
        return x, known.repeat(-(-many // len(known)))[:many].expand(self.restarts, many)


def search(
    network: FullyConnected,
    target: Target,
    x: Tensor,
    y: Tensor,
    space: Span | None,
    settings: Settings,
    generator: torch.Generator,
    on_step: OnStep | None = None,
    known: Tensor | None = None,
) -> Search:
    """x and lambda >= 0 together, from starts x (R, m, in) with labels y (R, m), inside the box and the span.

    known: lambda (R, m, out), which then is not searched for.
    """
    low, high = ((edge - network.shift) / network.scale for edge in (0, 1))
    signals, pull = signalling(network, y)
    size = target.size(network)
    share = torch.ones(*y.shape, 1 if network.single else len(network.weights[-1])).to(x)
    K, t = grams(network, x, signals(share), target)
    common, most = K.sum((-1, -2)), K.abs().sum((-1, -2)).clamp_min(torch.finfo(K.dtype).tiny)
    least = t.abs().sum(-1) / most  # where the starts' labels are wrong, no common lambda is positive
    cancelling = common < torch.finfo(K.dtype).eps ** 0.5 * most  # starts of both labels at one point
    unit = torch.where(cancelling, least, t.sum(-1) / common).maximum(least)[:, None, None]  # (R, 1, 1)
    share = share * torch.rand(share.shape, generator=generator, dtype=torch.float64).to(x) * 2
    if known is not None:
        unit, share = torch.ones_like(unit), known.to(x)
    x, momenta = x.clone(), [torch.zeros_like(tensor) for tensor in (x, x[..., :1], share, share)]
    trace, value = list[tuple[int, float]](), size.expand(len(x))
    for step in range(1, settings.steps + 1):
        C = signals(unit * share)
        value, to_x, to_C = distance(network, x, C, target, sharpness=settings.sharpness, size=size)
        rate = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
        to_x = to_x if space is None else space.along(to_x)
        # One second moment per picture: the step keeps its direction, and so stays in the span.
        size_of = torch.linalg.vecdot(to_x, to_x)[..., None] / to_x.shape[-1]
        move = adam(momenta[:2], to_x, size_of, step).mul_(settings.step_size * rate)
        if space is None:
            x.sub_(move).clamp_(low, high)
        else:
            x = space.project((x + x.clamp(low, high)).mul_(0.5).sub_(move))  # half of the way back into the box
        if known is None:
            to_share = unit * pull(to_C)
            share = share - settings.coefficient_step * rate * adam(momenta[2:], to_share, to_share.square(), step)
            share = share.clamp_min(settings.min_lambda)
        if step % max(settings.steps // 100, 1) == 0 or step == settings.steps:
            trace.append((step, float((value.min() / size).clamp_min(0).sqrt())))
            if on_step is not None:
                on_step(step, settings.steps, trace[-1][1])
    residuals = (value / size).clamp_min(0).sqrt()
    return Search(x.clamp(low, high), unit * share, y, residuals, trace)


def trained(attack: Any, observation: PictureObservation) -> Trained:
    """NotObserved when it is anything else than the weights of a fully connected ReLU network."""
    check_sees(attack, observation)
    weights, seen = observation.expect(Weights), (observation.model, observation.released)
    return Trained(
        weights.network(*seen),
        weights.learned(*seen),
        weights.target(*seen),
        observation.batch_size,
        observation.labels,
        weights.inexact(),
    )


def reservations(seen: Trained) -> str:
    """What speaks against believing a result, in sentences."""
    doubts = ""
    if not seen.network.homogeneous:
        doubts += " The network is not homogeneous (it has biases after its first layer), which the theory asks for."
    if seen.doubt:
        doubts += f" The training is not near stationarity: {seen.doubt}."
    return doubts


def signalling(
    network: FullyConnected, labels: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """lambda (..., out) -> signals at the outputs, and the transposed map of derivatives; labels (R, m)."""
    if network.single:
        sign = (2 * labels - 1)[..., None].to(network.shift)
        return (lambda share: sign * share), (lambda C: sign * C)
    true_class = F.one_hot(labels, len(network.weights[-1])).to(network.shift)

    def signals(share: Tensor) -> Tensor:  # what belongs to the own class itself is not used
        others = share * (1 - true_class)
        return true_class * others.sum(-1, keepdim=True) - others

    return signals, lambda C: (1 - true_class) * ((true_class * C).sum(-1, keepdim=True) - C)


def adam(momenta: list[Tensor], gradient: Tensor, square: Tensor, step: int) -> Tensor:
    """The direction of Adam (Kingma and Ba 2015, algorithm 1); the two momenta are changed in place."""
    first, second = momenta
    first.lerp_(gradient, 0.1)
    second.lerp_(square, 0.001)
    size = (second / (1 - 0.999**step)).sqrt_().add_(torch.finfo(first.dtype).tiny ** 0.5)
    return first * size.mul_(1 - 0.9**step).reciprocal_()
