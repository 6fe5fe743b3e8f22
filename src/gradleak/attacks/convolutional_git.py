"""Exact-GIT for convolutions: the weights of the leaked model out of pairs, then its backward pass read in reverse.

Sees      Gradient (or Update) of one picture, and the weights that were recovered from public pairs (`gradleak train
          convolutional-git`); never the observation's own. Sequences of biased linear layers and convolutions with
          sigmoid, tanh or leaky ReLU
Recovers  images (1, channel, height, width) in [0, 1], labels
Solves    g_l = Delta_l A_{l-1}^T and Delta_l = (W_{l+1}^T Delta_{l+1}) * s'(Z_l) for the W_l that fit all pairs. A layer is
          linear in its weights once its input and output are known, from the last one down:
              a_{l-1} = delta_l^T g_l / ||delta_l||^2 (linear), or g_l = Delta_l U^T for the patches U of a_{l-1} (convolution),
              W_l u + b_l = s^-1(a_l), and W_L a + b_L = log(delta_L + y) up to a constant: softmax minus one-hot
          and then the closed-form recursion (recursive.py) with these weights
Differs   The paper's exact form is for perceptrons (exact_git.py). Least squares in place of descent through
          pseudo-inverses: no step size, no start, nothing that could diverge. In a pair the picture is known: from
          the first layer up, each convolution's input follows from those below it, and its weights are solved anew.
          What no pair excites stays unknown: the mean over the classes of the last layer, taps that see margins only
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak import learned
from gradleak.attacks.layers import calls
from gradleak.attacks.network import unrolled
from gradleak.attacks.recursive import Recursive
from gradleak.distances import relative_residual
from gradleak.errors import BadInput, NotObserved
from gradleak.learned import Shards
from gradleak.models import Normalise
from gradleak.observations import Gradient, Model
from gradleak.optimise import OnStep
from gradleak.reconstruction import Reconstruction
from gradleak.tensors import Tensors

RIDGE = 1e-9  # of the mean square of a layer's inputs
EDGE = 1e-3  # outputs of a sigmoid or tanh closer than that to its ends are not inverted
CERTAIN = 1e-2  # probability of the true class above which that is known to 1e-5


@dataclass(frozen=True)
class Stage:
    """A layer with weights: its name, itself, the activation after it, and its input and output shapes for one example."""

    name: str
    layer: nn.Linear | nn.Conv2d
    activation: nn.Module | None
    input: tuple[int, ...]
    output: tuple[int, ...]


def stages(model: Model) -> list[Stage]:
    """The layers with weights, in order; BadInput naming the first layer that cannot be read."""
    example = torch.zeros(1, *model.architecture.input_shape)
    shapes = {c.name: (tuple(c.input.shape[1:]), tuple(c.output.shape[1:])) for c in calls(model, example)}
    found: list[Stage] = []
    trained = {name for name in model.parameters if name not in model.frozen}
    for name, layer in unrolled("", model.module):
        if isinstance(layer, nn.Flatten | Normalise):
            continue
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and plain(layer)):
            if {f"{name}.weight", f"{name}.bias"} <= trained:
                found.append(Stage(name, layer, None, *shapes[name]))
                continue
        elif isinstance(layer, nn.Sigmoid | nn.Tanh | nn.LeakyReLU) and found and found[-1].activation is None:
            found[-1] = replace(found[-1], activation=layer)
            continue
        raise BadInput(
            f"The exact form cannot read {name} ({type(layer).__name__}): it reads biased linear layers and convolutions with "
            "sigmoid, tanh or leaky ReLU. The coarse form reads any module: gradleak train git."
        )
    if not found or not isinstance(found[-1].layer, nn.Linear) or found[-1].activation is not None:
        raise BadInput("The exact form needs a model that ends in a biased linear layer.")
    return found


def plain(layer: nn.Conv2d) -> bool:
    """Whether the convolution is an ordinary one: no groups, no dilation, zeros around the picture."""
    ordinary = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return ordinary and not isinstance(layer.padding, str)


class Recovered(nn.Module):
    """The recovered weights: not trained, but solved for by `prepare`."""

    def __init__(self, model: Model, *, batch: int = 1) -> None:
        super().__init__()
        if batch != 1:
            raise BadInput(f"The exact form reads weights off gradients of single pictures, not of batches of {batch}.")
        self.stages = stages(model)
        self.normalise = next((m for m in model.module.modules() if isinstance(m, Normalise)), nn.Identity())
        names = [f"{stage.name}.{kind}" for stage in self.stages for kind in ("weight", "bias")]
        self.recovered = nn.ParameterDict({n.replace(".", "/"): torch.zeros_like(model.parameters[n]) for n in names})

    def weights(self) -> Tensors:
        """{parameter: recovered}."""
        return {name.replace("/", "."): p.detach() for name, p in self.recovered.items()}

    def hold_out(self, shard: int | None) -> None:
        """Nothing is trained."""

    def prepare(self, shards: Shards) -> None:
        """Solve for the weights over all pairs, in float64."""
        seen = Seen.of(self.stages, shards)
        seen = replace(seen, images=self.normalise(seen.images).double())
        for name, tensor in recover(self.stages, seen).items():
            self.recovered[name.replace(".", "/")].data.copy_(tensor)


@dataclass(frozen=True)
class Seen:
    """What pairs tell: images (n, ...), labels (n,); of each stage the bias gradients (n, out), and what the weight gradients
    say: the input (n, in) of a linear layer, the gradient itself (n, out, in * taps) of a convolution."""

    images: Tensor
    labels: Tensor
    bias: dict[str, Tensor]
    told: dict[str, Tensor]

    @classmethod
    def of(cls, found: list[Stage], shards: Shards) -> "Seen":
        """One pass over the pairs; a linear layer's gradient has rank one, and only its factors are kept."""
        images, labels = list[Tensor](), list[Tensor]()
        bias, told = ({stage.name: list[Tensor]() for stage in found} for _ in range(2))
        for pairs in shards():
            images.append(pairs.images[:, 0])
            labels.append(pairs.labels[:, 0])
            for stage in found:
                g, b = (pairs.gradients[f"{stage.name}.{kind}"] for kind in ("weight", "bias"))
                bias[stage.name].append(b.double())
                if isinstance(stage.layer, nn.Linear):
                    a = torch.einsum("no,noi->ni", b.double(), g.double())
                    told[stage.name].append(a / b.double().square().sum(1, keepdim=True).clamp_min(1e-30))
                else:
                    told[stage.name].append(g.flatten(2))
        joined = ({name: torch.cat(parts) for name, parts in every.items()} for every in (bias, told))
        return cls(torch.cat(images), torch.cat(labels), *joined)


def recover(found: list[Stage], seen: Seen) -> Tensors:
    """{parameter: its value, float64}: from the last layer down, then once more up from the known pictures."""
    top = found[-1]
    W, b = regress(*log_softmax(seen.told[top.name], seen.bias[top.name], seen.labels))
    weights, outputs = {f"{top.name}.weight": W, f"{top.name}.bias": b}, dict[str, Tensor]()
    a, delta = seen.told[top.name], seen.bias[top.name] @ W
    for number, stage in reversed(list(enumerate(found[:-1]))):
        outputs[stage.name] = a.view(-1, *stage.output)
        z, known, slope = inverted(outputs[stage.name], stage.activation)
        delta = delta.view(-1, *stage.output) * slope
        if isinstance(stage.layer, nn.Linear):
            a = seen.told[stage.name]
            W, b = regress(a, z, known)
            delta = seen.bias[stage.name] @ W
        else:
            a = deconvolved(delta, seen.told[stage.name], stage.layer, stage.input) if number else seen.images
            W, b = regress_convolution(a, z, known, stage.layer)
            delta = transposed(delta, W, stage.input, stage.layer) if number else delta
        weights |= {f"{stage.name}.weight": W, f"{stage.name}.bias": b}
    return upwards(weights, found, seen, outputs)


def upwards(weights: Tensors, found: list[Stage], seen: Seen, outputs: dict[str, Tensor]) -> Tensors:
    """The weights of convolutions above the first once more: their inputs follow from the picture and the layers below,
    better than by deconvolution."""
    h = seen.images
    for number, stage in enumerate(found[:-1]):
        if not isinstance(stage.layer, nn.Conv2d):
            break
        weight, bias = f"{stage.name}.weight", f"{stage.name}.bias"
        if number:
            z, known, _ = inverted(outputs[stage.name], stage.activation)
            weights[weight], weights[bias] = regress_convolution(h, z, known, stage.layer)
        h = F.conv2d(h, weights[weight], weights[bias], stage.layer.stride, stage.layer.padding)
        h = h if stage.activation is None else stage.activation(h)
    return weights


def log_softmax(a: Tensor, delta: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(inputs of the last layer, log p minus its mean over the classes) of the pairs that tell them well.

    p = delta + one-hot: where the true class is improbable, its p is a difference of nearly equal numbers, lost in rounding.
    """
    true = 1 + delta.gather(1, labels[:, None])[:, 0]
    enough = min(2 * (a.shape[1] + 1), len(a))
    rows = true >= true.topk(enough).values[-1].clamp(1e-12, CERTAIN)
    p = (delta + F.one_hot(labels, delta.shape[1]))[rows].clamp_min(1e-12).log()
    return a[rows], p - p.mean(1, keepdim=True)


def inverted(a: Tensor, activation: nn.Module | None) -> tuple[Tensor, Tensor, Tensor]:
    """s^-1(a), 1 or 0 for whether it is known, and s'(s^-1(a))."""
    if isinstance(activation, nn.Sigmoid):
        inside = a.clamp(EDGE, 1 - EDGE)
        return inside.logit(), (a == inside).double(), inside * (1 - inside)
    if isinstance(activation, nn.Tanh):
        inside = a.clamp(EDGE - 1, 1 - EDGE)
        return inside.atanh(), (a == inside).double(), 1 - inside.square()
    slope = torch.ones_like(a)
    if isinstance(activation, nn.LeakyReLU):
        slope = torch.where(a > 0, slope, activation.negative_slope)
    return a / slope, torch.ones_like(a), slope


def regress(u: Tensor, z: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """W (out, in) and b (out,) with z = W u + b by least squares over the rows; known (rows, out), 1 or 0, tells which
    entries count."""
    u = torch.cat([u, torch.ones(len(u), 1).to(u)], dim=1)  # (rows, in + 1)
    ridge = RIDGE * u.square().mean() * torch.eye(u.shape[1]).to(u)
    if known is None or bool(known.all()):
        V = torch.linalg.solve(u.T @ u / len(u) + ridge, u.T @ z / len(u)).T
    else:  # a system for each output
        systems = torch.stack([(u * k[:, None]).T @ u / len(u) for k in known.T])
        V = torch.linalg.solve(systems + ridge, ((known * z).T @ u / len(u)))
    return V[:, :-1], V[:, -1]


def regress_convolution(x: Tensor, z: Tensor, known: Tensor, layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """The same for a convolution: x (n, in, h, w), z and known (n, out, h', w') -> (out, in, k, k), (out,)."""
    rows, z, known = (t.flatten(2).transpose(1, 2).flatten(0, 1) for t in (patches(x, layer), z, known))
    W, b = regress(rows, z, known)
    return W.view(layer.weight.shape), b


def patches(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """(n, in, h, w) -> (n, in * taps, positions)."""
    return F.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride)  # type: ignore[arg-type]


def transposed(delta: Tensor, W: Tensor, shape: tuple[int, ...], layer: nn.Conv2d) -> Tensor:
    """The gradient by the convolution's input, of this shape, from that by its output."""
    rows = W.flatten(1).T @ delta.flatten(2)  # (n, in * taps, positions)
    return F.fold(rows, shape[1:], layer.kernel_size, 1, layer.padding, layer.stride)  # type: ignore[arg-type]


def deconvolved(delta: Tensor, g: Tensor, layer: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    """The input (n, in, h, w) from g = Delta U^T (n, out, in * taps), U its patches: least squares for each channel.

    delta (n, out, h', w'). All channels share one system, of out * taps equations for h * w unknowns.
    """
    channels, height, width = shape
    taps, unknowns = g.shape[2] // channels, height * width
    # Which pixel each position sees through each tap; 0 is the margin, which is known to be zero.
    pixel = torch.arange(1, unknowns + 1).double().view(1, 1, height, width)
    where = patches(pixel, layer)[0].long()  # (taps, positions)
    parts = []
    for d, part in zip(delta.flatten(2).split(100), g.double().split(100), strict=True):  # type: ignore[no-untyped-call]
        n, out = d.shape[:2]
        D = torch.zeros(n, out, taps, unknowns + 1).to(d)
        D.scatter_add_(3, where.expand(n, out, -1, -1), d[:, :, None].expand(-1, -1, taps, -1))
        D = D[..., 1:].flatten(1, 2)  # (n, out * taps, unknowns)
        told = part.view(n, out, channels, taps).transpose(2, 3).flatten(1, 2)  # (n, out * taps, channels)
        gram = D.mT @ D
        gram.diagonal(dim1=1, dim2=2).add_(1e-13 * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
        parts.append(torch.linalg.solve(gram, D.mT @ told).mT.reshape(n, *shape))
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class ConvolutionalGit:
    """generator: a file of `gradleak train convolutional-git`."""

    generator: Path | None = None

    def __call__(
        self, observation: Gradient, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved without a file, and where the recursion does; BadInput if it is of another model."""
        if self.generator is None:
            raise NotObserved(
                "It needs recovered weights: `gradleak train convolutional-git` makes them; give them with --generator."
            )
        trained = learned.load(self.generator, "convolutional-git", Recovered, observation.model)
        trained.check(observation)
        assert isinstance(trained.network, Recovered)
        believed = {**observation.model.parameters, **trained.network.weights()}
        blind = replace(observation, model=replace(observation.model, parameters=believed))
        found = Recursive()(blind, generator=generator, on_step=on_step)
        residual = float(relative_residual(observation.simulate(found.images, found.labels), observation.released))
        return replace(found, residual=residual, status=f"With weights recovered from pairs. {found.status}")
