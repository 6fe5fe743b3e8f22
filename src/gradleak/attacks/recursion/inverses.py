"""From what comes out of a layer without a matrix to what went into it: activations, scales and shifts, mean pooling."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.recursion.linear_systems import Belief
from gradleak.modalities.networks import Normalise

TINY = 1e-30
EXACT = 1e-59  # the variance of what is known without an error


@dataclass(frozen=True)
class Signal:
    """What is known of one place in a network, for one example without the batch.

    value     what flows there: averages over pool x pool cells, or maxima of choice x choice cells
    delta     the gradient of the loss there; where the value is a maximum, of the loss by that
    doubtful  whether `value` was chosen between two that are possible: a guess can improve the choice
    gated     whether a ReLU behind is not undone: nothing is known of the value, and delta is what it is if all units are on
    """

    value: Belief
    delta: Belief
    pool: int = 1
    choice: int = 1
    doubtful: bool = False
    gated: bool = False


def unknown(like: Tensor) -> Belief:
    """Nothing."""
    return Belief(torch.zeros_like(like), torch.full_like(like, torch.inf))


def before(layer: nn.Module, typical: Tensor, after: Signal, guess: Tensor | None = None) -> Signal | None:
    """What is known of the layer's input; None where its output does not determine it.

    typical: such inputs for other pictures, (pictures, ...). guess: the input, roughly, where it is known from elsewhere.
    """
    shape = typical.shape[1:]
    if is_affine(layer):
        scale, shift = affine(layer)
        value = Belief((after.value.value - shift) / scale, after.value.variance / scale.square())
        delta = Belief(after.delta.value * scale, after.delta.variance * scale.square())
        if after.choice > 1:  # a negative scale would make a minimum of the maximum
            return replace(after, value=value, delta=delta) if bool((scale > 0).all()) else None
        value = value if after.pool > 1 else value.reshape(*shape)
        return replace(after, value=value, delta=delta.reshape(*shape))
    if (
        type(layer) in ACTIVATIONS
        and after.pool == 1
        and not after.gated
        and (type(layer) is not nn.GELU or after.choice == 1)
    ):
        z, slope = ACTIVATIONS[type(layer)](layer, after.value, typical, guess)
        d = after.delta
        spread = d.variance * slope.value.square() + (d.value.square() + d.variance) * slope.variance
        near = after.value.value.abs() < 6 * after.value.variance.sqrt()  # zero, where all but sigmoids have their bend
        doubtful = (
            after.choice == 1
            and type(layer) not in (nn.Sigmoid, nn.Tanh)
            and bool((near | (after.value.value < 0)).any())
        )
        return Signal(z, Belief(d.value * slope.value, spread), choice=after.choice, doubtful=doubtful)
    if type(layer) is nn.ReLU and after.pool > 1:
        return Signal(unknown(after.delta.value), after.delta, gated=True)
    if after.pool > 1 or after.choice > 1 or after.gated:
        return None
    if size := _mean_pool(layer, shape):
        return Signal(after.value, _unpool(after.delta, size, shape), pool=size)
    if size := _max_pool(layer):
        return Signal(after.value, after.delta, choice=size)
    return None


def is_affine(layer: nn.Module) -> bool:
    """Whether the layer scales and shifts every entry by itself, or only gives the entries another shape."""
    fixed = isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats
    return fixed or isinstance(layer, Normalise | nn.Flatten | nn.Identity | nn.Dropout)


def affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """scale and shift of such a layer, (channel, 1, 1) or ()."""
    if isinstance(layer, Normalise):
        return 1 / layer.std, -layer.mean / layer.std
    if isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None and layer.running_mean is not None:
        scale = (layer.running_var + layer.eps).rsqrt()
        scale = scale * layer.weight.detach() if layer.affine else scale
        shift = (layer.bias.detach() if layer.affine else 0) - layer.running_mean * scale
        return scale[:, None, None], shift[:, None, None]
    return torch.ones(()), torch.zeros(())


def _mean_pool(layer: nn.Module, shape: torch.Size) -> int:
    """The width k of a layer that averages k x k cells side by side; 0 for every other layer."""
    if isinstance(layer, nn.AvgPool2d):
        k, plain = layer.kernel_size, not layer.padding and not layer.ceil_mode and layer.divisor_override is None
        return k if isinstance(k, int) and layer.stride == k and plain else 0
    if isinstance(layer, nn.AdaptiveAvgPool2d) and isinstance(layer.output_size, int):
        k = shape[-1] // layer.output_size
        return k if shape[-2:] == (k * layer.output_size, k * layer.output_size) else 0
    return 0


def _max_pool(layer: nn.Module) -> int:
    """The width k of a layer that takes the maximum of k x k cells side by side; 0 for every other layer."""
    if not isinstance(layer, nn.MaxPool2d) or layer.padding or layer.ceil_mode or layer.dilation != 1:
        return 0
    k = layer.kernel_size
    return k if isinstance(k, int) and layer.stride == k else 0


def _unpool(delta: Belief, k: int, shape: torch.Size) -> Belief:
    def spread(t: Tensor) -> Tensor:
        cells = t.repeat_interleave(k, -1).repeat_interleave(k, -2)
        return F.pad(cells, (0, shape[-1] - cells.shape[-1], 0, shape[-2] - cells.shape[-2]))

    return Belief(spread(delta.value) / k**2, spread(delta.variance) / k**4)


# --- Activations: (layer, output, typical inputs, guess of the input or None) -> (input, slope) ---

Inverse = Callable[[nn.Module, Belief, Tensor, Tensor | None], tuple[Belief, Belief]]


def _inside(a: Belief, low: float) -> Tensor:
    """The value, kept from the ends of the range (low, 1) by half its standard deviation."""
    margin = a.variance.sqrt().clamp(1e-14, 0.2) / 2
    return torch.minimum(torch.maximum(a.value, low + margin), 1 - margin)


def _sigmoid(_: nn.Module, a: Belief, *__: Tensor | None) -> tuple[Belief, Belief]:
    p = _inside(a, 0)
    slope = p * (1 - p)
    return Belief(torch.logit(p), a.variance / slope.square()), Belief(slope, (1 - 2 * p).square() * a.variance)


def _tanh(_: nn.Module, a: Belief, *__: Tensor | None) -> tuple[Belief, Belief]:
    t = _inside(a, -1)
    slope = 1 - t.square()
    return Belief(torch.atanh(t), a.variance / slope.square()), Belief(slope, 4 * t.square() * a.variance)


def _rectified(layer: nn.Module, a: Belief, _: Tensor, guess: Tensor | None) -> tuple[Belief, Belief]:
    """Leaky or not. Near zero, within the error of the value, a unit may have been on either side."""
    low, std = float(getattr(layer, "negative_slope", 0.0)), a.variance.sqrt()
    common = a.value.square().mean().sqrt() + TINY  # so many are as close as that by chance
    near = a.value.abs() < 6 * std
    surely = bool((a.variance <= EXACT).any())  # units that were off are known to be, so that all others were on
    least = 0 if low or surely else torch.minimum(4 * std, -2 * a.value.min())  # what is below zero is an error
    active = a.value > torch.where(near & (a.variance > EXACT), least, 1e-12 * common)
    if guess is not None:
        active, near = torch.where(near, guess > 0, active), near & (guess.abs() < std)
    slope = torch.where(active, 1.0, low).to(a.value)
    doubt = torch.where(near & (std > 1e-3 * common), (std / common).clamp_max(0.25), 0)
    value = torch.where(slope > 0, a.value / slope, 0)
    variance = torch.where(slope > 0, a.variance / slope.square(), torch.inf)
    return Belief(value, variance), Belief(slope, (1 - low) ** 2 * doubt)


def _gelu(layer: nn.Module, a: Belief, typical: Tensor, guess: Tensor | None) -> tuple[Belief, Belief]:
    """Below zero two inputs have one output. Without a guess each is as likely as in a typical normal variable."""
    least = -0.751791  # where it turns
    near = _bisect(layer, a.value, torch.full_like(a.value, least), a.value.clamp_min(0) + 0.5)
    far = _bisect(layer, a.value, torch.full_like(a.value, least), torch.full_like(a.value, -12.0))
    (near_slope, bend), (far_slope, _) = _gelu_slope(near), _gelu_slope(far)
    if guess is None:
        mean, variance = typical.mean(), typical.var()
        odds = (((near - mean).square() - (far - mean).square()) / (2 * variance)).exp() * near_slope / far_slope.abs()
        chance = torch.where(a.value < 0, odds / (1 + odds), 0)
    else:
        chance = ((a.value < 0) & ((guess - far).abs() < (guess - near).abs())).to(near)
    z, slope = torch.lerp(near, far, chance), torch.lerp(near_slope, far_slope, chance)
    doubt = chance * (1 - chance)
    bent = (bend / near_slope).square() * a.variance
    variance = a.variance / near_slope.square() + (near - far).square() * doubt
    return Belief(z, variance), Belief(slope, bent + (near_slope - far_slope).square() * doubt)


def _bisect(function: Callable[[Tensor], Tensor], a: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """z between the two with function(z) = a, where function(low) <= a <= function(high); either may be the greater."""
    for _ in range(60):
        middle = (low + high) / 2
        less = function(middle) < a
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return (low + high) / 2


def _gelu_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """First derivative, kept from zero, and second derivative."""
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    slope = 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    return torch.where(slope.abs() < 1e-6, 1e-6, slope), density * (2 - z.square())


ACTIVATIONS: dict[type[nn.Module], Inverse] = {
    nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh,
    nn.ReLU: _rectified,
    nn.LeakyReLU: _rectified,
    nn.GELU: _gelu,
}
