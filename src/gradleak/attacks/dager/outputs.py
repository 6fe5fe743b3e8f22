"""What the attention put out for one token, without knowing its sentence: the rest of the token's path through the first block
is its own.

After the attention an encoder's block treats every token by itself,

    a = norm(x + W o + b),   f = activation(W_1 a + b_1),

and the gradients of three linear layers show in which spans all outputs o, all a and all f of the batch lie. The first two
are linear in o once the token's x is given, up to one scale; the third has four times as many dimensions and the same rank: with n tokens
4 width - n equations for the few unknowns that are left. Gauss-Newton solves them in some steps, for each candidate (token, position)
alone, and has no solution for a candidate that is not in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.spans import Span, excess
from gradleak.observations.model import LanguageModel
from gradleak.observations.tensors import Tensors

ROWS = 64  # candidates at a time
STEPS = 12
SLOW = 0.8  # a residual that falls by less than this factor in a step is left alone
FIRST = 3  # steps before that is asked
DAMPING = 1e-6  # of the mean curvature


@dataclass(frozen=True)
class Path:
    """The first block after its attention, and the spans of what was seen there.

    before  V (n, width): the span of the attention's outputs, orthonormal
    linear  L (equations, width): L (x + W o + b) = 0, in which neither mean nor scale are left
    passed  the span of what the perceptron's first layer passes on (hidden)
    blur      relative uncertainty of the first two spans, and of f: noise over signal
    """

    model: LanguageModel
    exact: Tensors
    before: Span
    linear: Tensor
    passed: Span
    blur: float

    @classmethod
    def of(cls, model: LanguageModel, exact: Tensors, seen: list[list[Span]], rounding: float) -> "Path | None":
        """None where one of the spans was not seen, is full, or was seen through an adapter's factor only.

        seen: spans of the attention's outputs, of what the perceptron reads, and of what its first layer passes on.
        rounding: relative precision of the victim's forward pass.
        """
        if model.architecture.family.after is None or any(not s or s[0].full or s[0].factor is not None for s in seen):
            return None
        before, inner, passed = (found[0] for found in seen)
        norm = f"{model.architecture.family.block(0)}.{model.architecture.family.after}"
        N, beta = inner.outside(), exact[f"{norm}.bias"]
        own = N @ beta
        if bool(own.any()):
            N = N - own[:, None] * (own @ N) / own.square().sum()  # orthogonal to beta: free of the scale
        L = N * exact[f"{norm}.weight"]
        blur = rounding + before.worst + inner.worst
        return cls(model, exact, before, L - L.mean(1, keepdim=True), passed, blur)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The attention's output o (m, width) for each x, and whether x is in the batch (m,): f lies in its span.

        x: (m, width) in float64, inputs of the first layer.
        """
        W, b = self._weights(self.model.architecture.family.output)
        V = self.before.basis
        left, s, right = torch.linalg.svd(self.linear @ W @ V.T)
        sure = int((s > s[0] * self.blur**0.5).sum())
        fixed = (right[:sure].T / s[:sure]) @ left[:, :sure].T  # (n, equations)
        Z = right[sure:].T  # (n, free)
        made = [self._descend(part, W, b, fixed, Z) for part in torch.split(x, ROWS)]
        return torch.cat([o for o, _ in made]), torch.cat([near for _, near in made])

    def _weights(self, part: str) -> tuple[Tensor, Tensor]:
        name = f"{self.model.architecture.family.block(0)}.{part}"
        return self.exact[f"{name}.weight"], self.exact[f"{name}.bias"]

    def _descend(self, x: Tensor, W: Tensor, b: Tensor, fixed: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Gauss-Newton over t with o = V^T (c + Z t)."""
        from transformers.activations import ACT2FN

        activation = ACT2FN[self.model.architecture.config.hidden_act]
        gamma, beta = self._weights(self.model.architecture.family.after or "")
        W1, b1 = self._weights(self.model.architecture.family.hidden[0])
        V, P = self.before.basis, self.passed.basis
        c = -(x + b) @ self.linear.T @ fixed.T  # (m, n)
        K = W @ V.T @ Z
        K = K - K.mean(0)  # (width, free)
        A = (W1 @ (gamma[:, None] * K)).float()  # (hidden, free)
        y0 = x + b + c @ V @ W.T
        y0 = y0 - y0.mean(1, keepdim=True)
        t = x.new_zeros(len(x), Z.shape[1])
        best, rest = t.clone(), x.new_full((len(x),), torch.inf)
        open_ = torch.arange(len(x))
        low = P.float()
        for step in range(STEPS):
            y = y0[open_] + t[open_] @ K.T
            s = y.square().mean(1, keepdim=True).sqrt()
            u = y / s
            z, slope = (gamma * u + beta) @ W1.T + b1, gamma * u @ W1.T
            f, d = _with_slope(activation, z)
            r = f - f @ P.T @ P
            left = r.norm(dim=1) / f.norm(dim=1)
            before = rest[open_]
            better = left < before
            best[open_[better]], rest[open_[better]] = t[open_[better]], left[better]
            going = left < SLOW * before if step >= FIRST else torch.ones_like(better)
            if step == STEPS - 1 or not Z.shape[1] or not bool(going.any()):
                break
            # float32 is enough for a step; the residual stays in float64
            J = (d / s)[going, :, None].float() * (
                A - slope[going, :, None].float() * ((u[going] @ K) / y.shape[1])[:, None].float()
            )  # (m, hidden, free)
            PJ = low @ J
            H = (J.mT @ J - PJ.mT @ PJ).double()
            g = (J.mT @ r[going, :, None].float())[..., 0].double()
            H = H + DAMPING * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(H.shape[1], dtype=H.dtype)
            open_ = open_[going]
            t[open_] = t[open_] - torch.linalg.solve(H, g)
        y = y0 + best @ K.T
        u = y / y.square().mean(1, keepdim=True).sqrt()
        f = activation((gamma * u + beta) @ W1.T + b1)
        return (c + best @ Z.T) @ V, excess([self.passed], f, self.blur)[1] <= 1


def _with_slope(activation: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function and its derivative."""
    leaf = z.detach().requires_grad_()
    f = activation(leaf)
    return f.detach(), torch.autograd.grad(f.sum(), leaf)[0]
