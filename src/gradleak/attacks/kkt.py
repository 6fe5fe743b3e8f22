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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.errors import NotObserved
from gradleak.fully_connected import FullyConnected, Target, distance, grams
from gradleak.observations import Gradient
from gradleak.optimise import OnStep
from gradleak.reconstruction import Reconstruction
from gradleak.trained_weights import STATIONARY, Weights

ROUNDING = 1e-5  # singular values below so much of the largest are rounding in float32
FAR_OUTSIDE = 0.3  # relative distance from the box at which a hidden unit is no start


@dataclass(frozen=True)
class Span:
    """The affine set origin + (anything) basis that the training inputs lie in: (in,), (rank, in) orthonormal rows."""

    origin: Tensor
    basis: Tensor

    def project(self, x: Tensor) -> Tensor:
        """The nearest points of the set: (..., in) -> (..., in)."""
        return self.origin + self.along(x - self.origin)

    def along(self, direction: Tensor) -> Tensor:
        """The part of directions that stays in the set."""
        return (direction @ self.basis.T) @ self.basis


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
    span              keep the inputs in the span of the first layer
    units             start at hidden units, else at noise
    first_layer       explain only that layer: later ones may remember where they started
    double            compute in float64, else in float32
    """

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
        self, observation: Gradient, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """NotObserved for anything but the weights of a fully connected ReLU network."""
        seen = weights_of(observation)
        found = self.search(seen, generator=generator, on_step=on_step)
        best = int(found.residuals.argmin())
        order = found.coefficients[best].sum(-1).argsort(descending=True)
        network = seen.network()
        shape = seen.model.architecture.input_shape
        images = network.images(found.x[best][order].to(network.shift), shape).clamp(0, 1).float()
        residual = float(found.residuals[best])
        return Reconstruction(
            images=images,
            labels=found.labels[best][order],
            residual=residual,
            status=f"{len(images)} candidates leave {residual:.2f} of the weights unexplained." + reservations(seen),
            iterations=self.steps,
            trace=found.trace,
        )

    def search(self, seen: Weights, *, generator: torch.Generator, on_step: OnStep | None = None) -> Search:
        """All restarts, with the evidence for each."""
        dtype = torch.float64 if self.double else torch.float32
        network = seen.network().to(dtype)
        factors = (1.0, *[0.0] * (len(network.weights) - 1)) if self.first_layer else ()
        space = span_of(network) if self.span else None
        many = self.candidates * (seen.batch_size or rank_of(network))
        x, y = self.starts(network, space, many, seen.labels, generator)
        settings = Settings(self.steps, self.step_size, self.coefficient_step, self.min_lambda, self.sharpness)
        return search(network, seen.target(factors).to(dtype), x, y, space, settings, generator, on_step)

    def starts(
        self, network: FullyConnected, space: Span | None, many: int, labels: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(R, many, in) inputs and (R, many) labels: hidden units far from each other (k-means++), or noise."""
        low, high = ((edge - network.shift) / network.scale for edge in (0, 1))
        noise = torch.randn(self.restarts, many, len(network.shift), generator=generator, dtype=torch.float64)
        x = self.start_scale * noise.to(network.shift)
        pool = unit_inputs(network, space) if self.units else x[0, :0]
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
) -> Search:
    """x and lambda >= 0 together, from starts x (R, m, in) with labels y (R, m), inside the box and the span."""
    low, high = ((edge - network.shift) / network.scale for edge in (0, 1))
    signals, pull = signalling(network, y)
    size = target.size(network)
    share = torch.ones(*y.shape, 1 if network.single else len(network.weights[-1])).to(x)
    K, t = grams(network, x, signals(share), target)
    least = t.abs().sum(-1) / K.abs().sum((-1, -2))  # where the starts' labels are wrong, no common lambda is positive
    unit = (t.sum(-1) / K.sum((-1, -2))).maximum(least)[:, None, None]  # (R, 1, 1)
    share = share * torch.rand(share.shape, generator=generator, dtype=torch.float64).to(x) * 2
    momenta = [torch.zeros_like(tensor) for tensor in (x, x[..., :1], share, share)]
    trace, value = list[tuple[int, float]](), size.expand(len(x))
    for step in range(1, settings.steps + 1):
        C = signals(unit * share)
        value, to_x, to_C = distance(network, x, C, target, sharpness=settings.sharpness, size=size)
        rate = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
        over = x - x.clamp(low, high)
        to_x = to_x if space is None else space.along(to_x)
        # One second moment per picture: the step keeps its direction, and so stays in the span.
        x = x - settings.step_size * rate * adam(momenta[:2], to_x, to_x.square().mean(-1, keepdim=True), step)
        x = x.clamp(low, high) if space is None else space.project(x - 0.5 * over)
        to_share = unit * pull(to_C)
        share = share - settings.coefficient_step * rate * adam(momenta[2:], to_share, to_share.square(), step)
        share = share.clamp_min(settings.min_lambda)
        if step % max(settings.steps // 100, 1) == 0 or step == settings.steps:
            trace.append((step, float((value.min() / size).clamp_min(0).sqrt())))
            if on_step is not None:
                on_step(step, settings.steps, trace[-1][1])
    residuals = (value / size).clamp_min(0).sqrt()
    return Search(x.clamp(low, high), unit * share, y, residuals, trace)


def weights_of(observation: Gradient) -> Weights:
    """The observation as weights; NotObserved when it is anything else."""
    if not isinstance(observation, Weights):
        raise NotObserved(
            f"What was released is {type(observation).__name__.lower()}, and this attack reads trained weights "
            "(`gradleak capture weights`)."
        )
    return observation


def reservations(seen: Weights) -> str:
    """What speaks against believing a result, in sentences."""
    said = ""
    if not seen.network().homogeneous:
        said += " The network is not homogeneous (it has biases after its first layer), which the theory asks for."
    if seen.stationarity is not None and seen.stationarity.kkt_residual > STATIONARY:
        told = f"{seen.stationarity.kkt_residual:.2f} of the first layer"
        said += f" The training is not near stationarity: at the true data {told} is unexplained."
    return said


def rank_of(network: FullyConnected) -> int:
    """How many singular values of the first layer stand out of the noise that it started from, at least 1.

    Those above omega(beta) times the median (Gavish and Donoho 2014, equation 11). All, where over half of them would.
    """
    W = with_bias(network)
    values = torch.linalg.svdvals(W)
    beta = min(W.shape) / max(W.shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    found = int(((values > omega * values.median()) & (values > ROUNDING * values[0])).sum())
    return max(found, 1) if found < len(values) / 2 else len(values)


def span_of(network: FullyConnected) -> Span | None:
    """Where the training inputs must lie; None when the first layer tells nothing, because its rows span everything.

    With a bias, its column is the inputs' last coordinate, which is 1: the set is affine.
    """
    rank, W = rank_of(network), with_bias(network)
    if rank >= min(W.shape):
        return None
    V = torch.linalg.svd(W, full_matrices=False)[2][:rank]  # (rank, in or in + 1)
    if network.biases[0] is None:
        return Span(torch.zeros_like(V[0]), V)
    last = V[:, -1]
    origin = V.T @ (last / last.square().sum())
    flat = V - torch.outer(last / last.square().sum(), last @ V)  # directions along which the last coordinate rests
    basis = torch.linalg.svd(flat[:, :-1], full_matrices=False)[2][: rank - 1]
    return Span(origin[:-1], basis)


def unit_inputs(network: FullyConnected, space: Span | None) -> Tensor:
    """Rows of the first layer over their biases that are nearly pictures: (k, in), none where there is no bias."""
    bias = network.biases[0]
    if bias is None:
        return network.weights[0][:0]
    x = network.weights[0][bias != 0] / bias[bias != 0, None]
    x = x if space is None else space.project(x)
    low, high = ((edge - network.shift) / network.scale for edge in (0, 1))
    inside = x.clamp(low, high)
    return inside[(x - inside).norm(dim=1) < FAR_OUTSIDE * x.norm(dim=1)]


def with_bias(network: FullyConnected) -> Tensor:
    """The first layer's weight with its bias as a last column."""
    W, b = network.weights[0], network.biases[0]
    return W if b is None else torch.cat([W, b[:, None]], dim=1)


def signalling(
    network: FullyConnected, labels: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """lambda (..., out) -> signals at the outputs, and the transposed map of derivatives; labels (R, m)."""
    if network.single:
        sign = (2 * labels - 1)[..., None].to(network.shift)
        return (lambda share: sign * share), (lambda C: sign * C)
    own = F.one_hot(labels, len(network.weights[-1])).to(network.shift)

    def signals(share: Tensor) -> Tensor:  # what belongs to the own class itself is not used
        others = share * (1 - own)
        return own * others.sum(-1, keepdim=True) - others

    return signals, lambda C: (1 - own) * ((own * C).sum(-1, keepdim=True) - C)


def adam(momenta: list[Tensor], gradient: Tensor, square: Tensor, step: int) -> Tensor:
    """The direction of Adam (Kingma and Ba 2015, algorithm 1); the two momenta are changed in place."""
    first, second = momenta
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).add_(square, alpha=0.001)
    direction: Tensor = (
        first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + torch.finfo(first.dtype).tiny ** 0.5)
    )
    return direction
