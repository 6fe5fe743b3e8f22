"""The last linear layer of a classifier, decoded from its sketch and the equation of the softmax. One picture, one step.

Its gradient is G = delta h^T, with delta = p - onehot(y) and h the features that it reads. So S = G A^T = delta (A h)^T
has rank one and gives delta up to its length c. But p = softmax(W h + b): for each c the logarithms of p are linear
equations on h, classes - 1 more than the rank that A h gives. c is then the one unknown left: it is searched on a grid
by the likelihood of all these measurements under a normal distribution of h, taken from public pictures, and h is its
conditional mean.
"""

import torch
from torch import Tensor, nn

from gradleak.observations.layers import calls
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Sketch

ROUNDING = 1e-7  # the relative error of a released float32
NOT_ONE_PICTURE = 1e-2  # a second singular value larger than this, relative to the first, is no rank-one sketch
IMPLAUSIBLE = 25.0  # mean square of the whitened measurements: beyond five standard deviations, p is no softmax


def find(adapter: PictureObservation, images: Tensor) -> str:
    """The adapted linear layer whose outputs are the model's logits, of at least three classes; "" if there is none."""
    logits = adapter.model.logits({}, images)
    last = [call for call in calls(adapter.model, images) if call.name in adapter.adapter.scaling][-1:]
    fits = [c.name for c in last if isinstance(c.layer, nn.Linear) and torch.equal(c.output, logits)]
    return fits[0] if fits and logits.shape[1] > 2 else ""


def decode(sketch: Sketch, W: Tensor, b: Tensor, mean: Tensor, covariance: Tensor) -> Tensor | None:
    """The layer's gradient (classes, features), or None where S is not that of one picture's gradient.

    W (classes, features) and b (classes,) are the layer's; mean (features,) and covariance of h. Computed in float64.
    """
    S, A, W, b, mean, covariance = (t.double() for t in (sketch.measured, sketch.through, W, b, mean, covariance))
    U, s, Vh = torch.linalg.svd(S, full_matrices=False)
    error = max(float(s[1] / s[0]), ROUNDING) if len(s) > 1 and s[0] > 0 else 1.0
    u = U[:, 0] if int((U[:, 0] < 0).sum()) == 1 else -U[:, 0]  # delta / c: negative at the label only
    if error > NOT_ONE_PICTURE or int((u < 0).sum()) != 1:
        return None
    v = (U[:, 0] @ u) * s[0] * Vh[0]  # c A h
    y = int(u.argmin())
    p_y = torch.sigmoid(torch.linspace(-15, 15, 4001, dtype=u.dtype, device=u.device))  # the grid
    c = (1 - p_y) / -u[y]
    log_p = torch.log(c[:, None] * u.clamp_min(error))  # (grid, classes)
    log_p[:, y] = torch.log(p_y)
    top = int(u.argmax())  # the other classes' reference: measured best
    rest = [k for k in range(len(u)) if k != top]
    M = torch.cat([A, W[rest] - W[top]])  # (rank + classes - 1, features)
    target = torch.cat([v / c[:, None], log_p[:, rest] - log_p[:, [top]] - (b[rest] - b[top])], 1)
    noise = (error / u[rest].abs().clamp_min(error)).square()  # variance of log p_k, where u_k is known within `error`
    K = M @ covariance @ M.T
    K.diagonal().add_(torch.cat([error * K.diagonal()[: len(A)], noise]) + 1e-9 * K.diagonal().mean())
    L = torch.linalg.cholesky(K)
    z = torch.linalg.solve_triangular(L, (target - M @ mean).T, upper=False)  # (measurements, grid)
    best = int(z.square().sum(0).argmin())
    if float(z[:, best].square().mean()) > IMPLAUSIBLE:
        return None
    h = mean + covariance @ M.T @ torch.linalg.solve_triangular(L.T, z[:, [best]], upper=True)[:, 0]
    G: Tensor = c[best] * torch.outer(u, h)
    return G.to(sketch.measured.dtype)
