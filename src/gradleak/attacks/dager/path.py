"""The output of an encoder's first attention, for each candidate token alone.

After the attention an encoder's block treats every token by itself,

    a = norm(x + W o + b),   f = activation(W_1 a + b_1),

and the gradients of three linear layers show in which spans all outputs o, all a and all f of the batch lie. The first two are
linear in o once the token's x is given, up to one scale. The third has four times as many dimensions and the same rank: with n
tokens 4 width - n equations for the few unknowns that are left. Gauss-Newton solves them for each candidate (token, position)
alone, and has no solution for a candidate that is not in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.spans import Span, excess, spans_of
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.transformer import ROLES, layout_of

ROWS = 64  # candidates at a time: memory alone depends on it
DAMPING = 1e-6  # of the mean curvature, which is computed in float32: its rounding
# Gauss-Newton takes four steps (docs/findings/text.md, "Why batches are harder"): three times as many at most, and from the
# fourth on only where a step takes a fifth off the residual. These three, and the efforts of encoder.py, are chosen by hand: about
# half and twice of each (an eighth of AT_ONCE) leave the same 15 of 18 sentences right (texts of the package in batches of 3 to 6,
# BERTs of width 64 to 128), but FIRST = 6, which finds two more in a quarter more time, and TOGETHER = 16, which loses one.
STEPS, FIRST, SLOW = 12, 3, 0.8
UNLIKE = 1e-4  # relative: a norm's eps, and float32 in it, change less


@dataclass(frozen=True)
class Path:
    """The first block after its attention, and the spans of its layers' inputs.

    output, hidden  (W, b) and (W_1, b_1); norm: (gamma, beta)
    V       (n, width): the span of the attention's outputs, orthonormal
    L       (equations, width): L (x + W o + b) = 0, free of the norm's mean and scale
    passed  the span of what the perceptron's first layer passes on
    blur    relative uncertainty of the first two spans, and of f: noise over signal
    """

    output: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]
    hidden: tuple[Tensor, Tensor]
    activation: Callable[[Tensor], Tensor]
    V: Tensor
    L: Tensor
    passed: Span
    blur: float

    @classmethod
    def of(cls, observation: TextObservation, exact: Tensors, rounding: float) -> "Path | None":
        """None where one of the spans was not released, is full, or was released through an adapter's factor only, and where the
        block is not as above.

        exact: the first block's parameters in float64. rounding: relative precision of the victim's forward pass.
        """
        layout = layout_of(observation.model)
        spans = [spans_of(observation, names) for names in ((layout.output,), layout.hidden, layout.passed)]
        if any(not s or s[0].full or s[0].factor is not None for s in spans):
            return None
        outputs, inner, passed = (s[0] for s in spans)
        layers = _layers(observation.model, exact)
        if layers is None:
            return None
        output, norm, hidden, activation = layers
        N = inner.orthogonal()
        of_beta = N @ norm[1]
        if bool(of_beta.any()):
            N = N - of_beta[:, None] * (of_beta @ N) / of_beta.square().sum()  # orthogonal to beta: free of the scale
        blur = rounding + outputs.worst + inner.worst
        return cls(output, norm, hidden, activation, outputs.basis, _centred(N * norm[0]), passed, blur)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The attention's output o (m, width) for each x, and whether x is in the batch (m,): f lies in its span.

        x: (m, width) in float64, inputs of the first layer.
        """
        left, s, right = torch.linalg.svd(self.L @ self.output[0] @ self.V.T)
        # Below the root of the blur, noise costs an equation more than it tells: the third span fixes that direction.
        sure = int((s > s[0] * self.blur**0.5).sum())
        fixed = (right[:sure].T / s[:sure]) @ left[:, :sure].T  # (n, equations)
        solved = [self._solve(part, fixed, right[sure:].T) for part in torch.split(x, ROWS)]
        return torch.cat([o for o, _ in solved]), torch.cat([near for _, near in solved])

    def _solve(self, x: Tensor, fixed: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Gauss-Newton over t with o = V^T (c + Z t): y = x + W o + b, centred, has size s, and a = gamma u + beta."""
        (W, b), (gamma, beta), (W1, b1), P = self.output, self.norm, self.hidden, self.passed.basis
        c = -(x + b) @ self.L.T @ fixed.T  # (m, n)
        y0 = _centred(x + b + c @ self.V @ W.T)
        K = _centred((W @ self.V.T @ Z).T).T  # (width, free)
        A = (W1 @ (gamma[:, None] * K)).float()  # (hidden, free)
        t, active = x.new_zeros(len(x), Z.shape[1]), torch.arange(len(x))
        best, rest, near = t.clone(), x.new_full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.bool)
        for step in range(STEPS):
            y = y0[active] + t[active] @ K.T
            s = y.square().mean(1, keepdim=True).sqrt()
            u = y / s
            slope = gamma * u @ W1.T
            f, d = _with_derivative(self.activation, slope + beta @ W1.T + b1)
            r = f - f @ P.T @ P
            residual, before = r.norm(dim=1) / f.norm(dim=1), rest[active]
            better = residual < before
            improved = active[better]
            best[improved], rest[improved] = t[improved], residual[better]
            near[improved] = excess([self.passed], f[better], self.blur)[1] <= 1
            going = residual < SLOW * before if step >= FIRST else torch.ones_like(better)
            if not Z.shape[1] or not bool(going.any()):
                break
            # float32 is enough for a step; the residual stays in float64
            J = (d / s)[going, :, None].float() * (
                A - slope[going, :, None].float() * ((u[going] @ K) / y.shape[1])[:, None].float()
            )  # (m, hidden, free)
            PJ = P.float() @ J
            H = (J.mT @ J - PJ.mT @ PJ).double()
            g = (J.mT @ r[going, :, None].float())[..., 0].double()
            H = H + DAMPING * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(H.shape[1], dtype=H.dtype)
            active = active[going]
            t[active] = t[active] - torch.linalg.solve(H, g)
        return (c + best @ Z.T) @ self.V, near


Layer = tuple[Tensor, Tensor]  # weight and bias


def _layers(model: LanguageModel, exact: Tensors) -> tuple[Layer, Layer, Layer, Callable[[Tensor], Tensor]] | None:
    """(W, b), (gamma, beta), (W_1, b_1) and the activation, if the first block computes a and f as above, of
    values averaged by the softmax of queries and keys: tried on two tokens."""
    from transformers.activations import ACT2FN

    layout = layout_of(model)
    names = (layout.output, str(layout.after), layout.hidden[0], *layout.queries(0))
    separate = tuple(layout.attention.values()) == ROLES[:3]
    if not separate or any(f"{name}.{part}" not in exact for name in names for part in ("weight", "bias")):
        return None
    output, norm, hidden, *attention = ((exact[f"{name}.weight"], exact[f"{name}.bias"]) for name in names)
    reached = (layout.queries(0)[0], layout.output, layout.hidden[0], layout.passed[0])
    inputs = layer_inputs(model, reached, torch.arange(2)[None], parameters=exact)
    x, o, a, f = (inputs[name][0] for name in reached)
    heads = model.architecture.config.num_attention_heads
    q, k, v = (torch.unflatten(x @ W.T + b, 1, (heads, -1)).transpose(0, 1) for W, b in attention)
    averaged = (q @ k.mT / q.shape[2] ** 0.5).softmax(2) @ v
    y = _centred(x + o @ output[0].T + output[1])
    normed = norm[0] * y / y.square().mean(1, keepdim=True).sqrt() + norm[1]
    for expected, true in ((averaged.transpose(0, 1).flatten(1), o), (normed, a)):
        if float((expected - true).norm()) > UNLIKE * float(true.norm()):
            return None
    z = a @ hidden[0].T + hidden[1]
    known = (ACT2FN[name] for name in ("gelu", "relu", "gelu_new", "silu", "gelu_fast", "quick_gelu", "tanh"))
    apart, activation = min(((float((g(z) - f).norm()), g) for g in known), key=lambda pair: pair[0])
    return None if apart > UNLIKE * float(f.norm()) else (output, norm, hidden, activation)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _with_derivative(activation: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function and its derivative."""
    leaf = z.detach().requires_grad_()
    f = activation(leaf)
    return f.detach(), torch.autograd.grad(f.sum(), leaf)[0]
