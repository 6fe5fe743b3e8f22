"""Fully connected ReLU networks, and what weights tell of samples: ||Delta - sum_i g_i||^2 without forming a gradient.

g_i = sum_k C_ik df_k(x_i)/dtheta is what backpropagation makes of the signal C_i at the outputs for x_i. Delta is the network's
own parameters (Haim et al. 2022, equation 4: theta = sum_i lambda_i y_i df(x_i)/dtheta), or a change of them (frozen features).

With the signal delta_l at the outputs of layer l and the activations a_{l-1} before it, layer l's part of sum_i g_i is
G_l = delta_l^T a_{l-1}, so that

    <Delta_l, G_l> = sum(delta_l * a_{l-1} Delta_l^T)        ||G_l||^2 = sum((delta_l delta_l^T) * (a_{l-1} a_{l-1}^T)),

products of (samples x width) matrices. A bias adds 1 to every entry of a_{l-1} a_{l-1}^T. All derivatives below are by hand.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import NotObserved
from gradleak.modalities.networks import AgainstZero, Normalise
from gradleak.observations.sequence import layers_of
from gradleak.observations.tensors import Tensors


@dataclass(frozen=True)
class FullyConnected:
    """Layers a -> relu(a W^T + b), without the ReLU after the last.

    weights  one (out, in) per layer
    biases   one (out,) per layer, or None
    names    of the weights in the model, "4.weight"
    shift    (in,) and scale: inputs are (pixel - shift) / scale
    single   there is one output z, against a second logit that is always 0
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    names: tuple[str, ...]
    shift: Tensor
    scale: Tensor
    single: bool

    @classmethod
    def of(cls, module: nn.Module, parameters: Tensors, input_shape: tuple[int, int, int]) -> Self:
        """The network behind a module of Normalise, Flatten, Linear, ReLU and AgainstZero; NotObserved for any other."""
        layers = layers_of(module)
        kinds = [type(layer) for _, layer in layers if not isinstance(layer, (Normalise, nn.Flatten, AgainstZero))]
        if not kinds or kinds[0::2] != [nn.Linear] * len(kinds[0::2]) or kinds[1::2] != [nn.ReLU] * len(kinds[1::2]):
            raise NotObserved(
                "This attack reads fully connected ReLU networks, linear layers with ReLU between them, and the observed "
                "model is none."
            )
        linear = [name for name, layer in layers if isinstance(layer, nn.Linear)]
        if missing := [f"{name}.weight" for name in linear if f"{name}.weight" not in parameters]:
            raise NotObserved(f"{missing[0]} was not trained, and this attack reads what training made of all layers.")
        first = parameters[f"{linear[0]}.weight"]
        norm = next((layer for _, layer in layers if isinstance(layer, Normalise)), None)
        ones = first.new_ones(input_shape)
        return cls(
            weights=tuple(parameters[f"{name}.weight"] for name in linear),
            biases=tuple(parameters.get(f"{name}.bias") for name in linear),
            names=tuple(f"{name}.weight" for name in linear),
            shift=(ones * norm.mean.to(first) if norm is not None else 0 * ones).flatten(),
            scale=(ones * norm.std.to(first) if norm is not None else ones).flatten(),
            single=any(isinstance(layer, AgainstZero) for _, layer in layers),
        )

    @property
    def homogeneous(self) -> bool:
        """f(x; c theta) = c^L f(x; theta) for every c > 0: there is no bias after the first layer."""
        return all(bias is None for bias in self.biases[1:])

    def to(self, dtype: torch.dtype) -> Self:
        """In another precision."""
        biases = tuple(None if bias is None else bias.to(dtype) for bias in self.biases)
        weights = tuple(weight.to(dtype) for weight in self.weights)
        return replace(self, weights=weights, biases=biases, shift=self.shift.to(dtype), scale=self.scale.to(dtype))

    def inputs(self, images: Tensor) -> Tensor:
        """(n, channel, height, width) in [0, 1] -> (n, in) as the first linear layer takes them."""
        return (images.flatten(1).to(self.shift) - self.shift) / self.scale

    def images(self, inputs: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The way back: (n, in) -> (n, channel, height, width), not clamped."""
        return (inputs * self.scale + self.shift).reshape(*inputs.shape[:-1], *shape)

    def parameters(self) -> Tensors:
        """{parameter: tensor}, as the model names them."""
        biases = {
            name.removesuffix("weight") + "bias": b
            for name, b in zip(self.names, self.biases, strict=True)
            if b is not None
        }
        return dict(zip(self.names, self.weights, strict=True)) | biases

    def margins(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What training pushes up, one row per picture and wrong class: inputs (m, in) and signals at the outputs (m, out).

        One output: m = n, signal +1 for class 1 and -1 for class 0. Else f_label - f_other, m = n (classes - 1); Buzaglo
        et al. 2023, equation 5.
        """
        x = self.inputs(images)
        if self.single:
            return x, (2 * labels.to(x) - 1)[:, None]
        outputs = len(self.weights[-1])
        true_class = torch.eye(outputs).to(x)[labels]  # (n, outputs)
        signals = true_class[:, None] - torch.eye(outputs).to(
            x
        )  # (n, outputs, outputs), zero where the other class is the own
        wrong = true_class == 0
        return x.repeat_interleave(outputs - 1, dim=0), signals[wrong]

    def combination(self, x: Tensor, C: Tensor) -> Tensors:
        """sum_i sum_k C_ik df_k(x_i)/dtheta as {parameter: tensor}: x (n, in), C (n, out)."""
        z, found, delta = self.forward(x), dict[str, Tensor](), C
        for at in range(len(z) - 1, -1, -1):
            found[self.names[at]] = delta.T @ (z[at - 1].relu() if at else x)
            if self.biases[at] is not None:
                found[self.names[at].removesuffix("weight") + "bias"] = delta.sum(0)
            if at:
                delta = (delta @ self.weights[at]) * (z[at - 1] > 0)
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        """What every layer gives before its ReLU, the outputs last: x (..., n, in) -> [(..., n, out)]."""
        return self.activations(x)[0]

    def activations(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """`forward`, and what every layer is given."""
        z, a = list[Tensor](), [x]
        for W, b in zip(self.weights, self.biases, strict=True):
            z.append(F.linear(a[-1], W, b))
            a.append(z[-1].relu())
        return z, a[:-1]


@dataclass(frozen=True)
class Target:
    """Delta: the parameters themselves (None), or other tensors of their shapes, and how much each layer counts.

    weights  one (out, in) per layer, or None for the network's own
    biases   one (out,) per layer, or None where a bias was not trained or there is none
    layers   a factor per layer for its part of the squared distance
    """

    weights: tuple[Tensor, ...] | None = None
    biases: tuple[Tensor | None, ...] = ()
    layers: tuple[float, ...] = ()

    def to(self, dtype: torch.dtype) -> Self:
        """In another precision."""
        if self.weights is None:
            return self
        biases = tuple(None if bias is None else bias.to(dtype) for bias in self.biases)
        return replace(self, weights=tuple(weight.to(dtype) for weight in self.weights), biases=biases)

    def size(self, network: FullyConnected) -> Tensor:
        """||Delta||^2 with the layers' factors: the distance of nothing."""
        weights = network.weights if self.weights is None else self.weights
        biases = network.biases if self.weights is None else self.biases
        factors = self.layers or (1.0,) * len(weights)
        parts = [
            k * (W.square().sum() + (0 if b is None else b.square().sum()))
            for k, W, b in zip(factors, weights, biases, strict=True)
        ]
        return torch.stack(parts).sum()


def distance(
    network: FullyConnected,
    x: Tensor,
    C: Tensor,
    target: Target = Target(),
    *,
    sharpness: float = torch.inf,
    size: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """||Delta - sum_i g_i||^2 and its derivatives: x (..., n, in), C (..., n, out) -> (...), (..., n, in), (..., n, out).

    Leading dimensions are separate problems. sharpness: alpha in the smoothed derivative of the ReLU, sigmoid(alpha z),
    which stands wherever the derivative does, also in the derivatives of this function; infinite: the ReLU's own.
    size: target.size(network), for those who ask often.
    """
    W, b, count = network.weights, network.biases, len(network.weights)
    factors = target.layers or (1.0,) * count
    z, a = network.activations(x)
    s = [smoothed(h, sharpness) for h in z[:-1]]
    delta, u = [C], list[Tensor]()  # from the last layer to the first; u = delta W, before the ReLU's derivative
    for at in range(count - 1, 0, -1):
        u.insert(0, delta[0] @ W[at])
        delta.insert(0, u[0] * s[at - 1])

    value: Tensor = target.size(network) if size is None else size
    to_delta, to_a = list[Tensor](), list[Tensor]()  # derivatives by each, where it stands in a layer's own part
    joined = False  # whether the first layer's part by x waits for another product with W[0]
    for at in range(count):
        if not factors[at]:
            to_delta.append(torch.zeros_like(delta[at]))
            to_a.append(torch.zeros_like(a[at]))
            continue
        unweighted = target.weights is None
        goal, shift = (W[at], b[at]) if target.weights is None else (target.weights[at], target.biases[at])
        n, (high, wide) = x.shape[-2], goal.shape
        if 2 * n * (wide + high) < 3 * wide * high:
            along = z[at] if unweighted else F.linear(a[at], goal, shift)
            joined = joined or (unweighted and at == 0)
            back = None if unweighted and at == 0 else u[at - 1] if unweighted else delta[at] @ goal
            step = by_grams(delta[at], a[at], along, back, biased=shift is not None)
        else:
            step = by_sum(delta[at], a[at], goal, shift)
        value = value + factors[at] * step[0]
        to_delta.append(step[1].mul_(2 * factors[at]))
        to_a.append(step[2].mul_(2 * factors[at]))

    slope = list[Tensor]()  # through the ReLU's derivatives, against the direction in which delta was made
    for at in range(count - 1):
        if sharpness < torch.inf:
            slope.append(torch.ops.aten.sigmoid_backward(u[at].mul_(to_delta[at]), s[at]).mul_(sharpness))
        to_delta[at + 1] += to_delta[at].mul_(s[at]) @ W[at + 1].T
    g = to_a[-1]
    for at in range(count - 1, 0, -1):
        h = g.mul_(s[at - 1]) if sharpness == torch.inf else slope[at - 1].addcmul_(g, s[at - 1])
        g = to_a[at - 1].add_((h.sub_(delta[0], alpha=2 * factors[0]) if joined and at == 1 else h) @ W[at - 1])
    if count == 1 and joined:
        g = g - 2 * factors[0] * delta[0] @ W[0]
    return value, g, to_delta[-1]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of matrices: (..., n, m), (..., n, m) -> (...)."""
    products: Tensor = torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))
    return products


def by_grams(
    delta: Tensor, a: Tensor, along: Tensor, back: Tensor | None, *, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """||G||^2 - 2 <Delta, G> for G = delta^T a, and half its derivatives by delta and a, through (n, n) matrices.

    delta (..., n, out), a (..., n, in), along = a Delta^T + Delta_b (..., n, out), back = delta Delta (..., n, in) or left out.
    """
    A, D = a @ a.mT, delta @ delta.mT
    to_delta = ((A.add_(1) if biased else A) @ delta).sub_(along)
    to_a = D @ a
    return inner(to_delta, delta) - inner(along, delta), to_delta, to_a if back is None else to_a.sub_(back)


def by_sum(delta: Tensor, a: Tensor, goal: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same with G formed, of Delta = goal (out, in) and Delta_b = shift (out,)."""
    rest = (delta.mT @ a).sub_(goal)  # (..., out, in)
    value, to_delta, to_a = inner(rest, rest) - goal.square().sum(), a @ rest.mT, delta @ rest
    if shift is not None:
        rest = delta.sum(-2) - shift
        value, to_delta = value + rest.square().sum(-1) - shift.square().sum(), to_delta.add_(rest[..., None, :])
    return value, to_delta, to_a


def smoothed(z: Tensor, sharpness: float) -> Tensor:
    """sigmoid(sharpness z), or the step at infinity. Not below the precision: denormal numbers take a hundred times as long."""
    if sharpness == torch.inf:
        return (z > 0).to(z)
    least = -math.log(torch.finfo(z.dtype).eps)
    return (sharpness * z).clamp_(-least, least).sigmoid_()


def grams(network: FullyConnected, x: Tensor, C: Tensor, target: Target = Target()) -> tuple[Tensor, Tensor]:
    """(<g_i, g_j>) and (<Delta, g_i>) with the layers' factors: (..., n, n) and (..., n), at the ReLU's own derivative."""
    factors = target.layers or (1.0,) * len(network.weights)
    z, a = network.activations(x)
    delta = C
    K, t = x.new_zeros(()), x.new_zeros(())
    for at in range(len(z) - 1, -1, -1):
        shift = network.biases[at] if target.weights is None else target.biases[at]
        along = z[at] if target.weights is None else F.linear(a[at], target.weights[at], shift)
        ones = 0 if shift is None else 1
        K = K + factors[at] * (delta @ delta.mT) * (a[at] @ a[at].mT + ones)
        t = t + factors[at] * (along * delta).sum(-1)
        if at:
            delta = (delta @ network.weights[at]) * (z[at - 1] > 0)
    return K, t


def cone(K: Tensor, t: Tensor) -> Tensor:
    """The lambda >= 0 that minimises lambda^T K lambda - 2 lambda^T t (Lawson and Hanson 1974): (n, n), (n,) -> (n,)."""
    from scipy.optimize import nnls

    values, vectors = torch.linalg.eigh(K.double())
    values = values.clamp_min(1e-12 * float(values[-1].clamp_min(1e-300))).sqrt()
    root, side = (vectors * values).T, (vectors.T @ t.double()) / values
    weights, _ = nnls(root.cpu().numpy(), side.cpu().numpy(), maxiter=100 * len(t))
    return torch.as_tensor(weights).to(t)


def explained(network: FullyConnected, x: Tensor, C: Tensor, target: Target = Target()) -> tuple[float, Tensor]:
    """min over lambda >= 0 of ||Delta - sum_i lambda_i g_i|| / ||Delta||, and that lambda (n,): x (n, in), C (n, out)."""
    K, t = grams(network, x, C, target)
    coefficients = cone(K, t)
    size = target.size(network)
    rest = (size - 2 * coefficients @ t + coefficients @ K @ coefficients).clamp_min(0)
    return float((rest / size).sqrt()), coefficients
