"""The span of a layer's inputs, as the gradient of its weight shows it, and whether a vector lies in it.

dL/dW = Delta^T X: its rows lie in the span of the inputs x_t. Rounding and noise make the span uncertain by what lies below
the gap between the singular values; how uncertain differs from vector to vector, and is computed for each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.observations.releases import Sketch

CLEAR = 2.0  # singular values of rounding that are neighbours do not differ by this factor
SURE = 5.0  # standard deviations of white noise that are allowed for
EDGE = 1.05  # times the edge of the Marchenko-Pastur law, beyond which a singular value is signal
FEWEST = 8  # singular values beyond the end that it takes to know them as noise


@dataclass(frozen=True)
class Span:
    """The span of F x_t over all tokens t, in float64.

    basis   V (rank, r), orthonormal rows
    values  the singular values s (rank,) that belong to them
    blur    (rank,): how far beyond the span a member may appear to be, per unit along each of them; 0 without noise
    factor  F (r, width), or None for the identity
    """

    basis: Tensor
    values: Tensor
    blur: Tensor
    factor: Tensor | None

    @property
    def rank(self) -> int:
        return len(self.basis)

    @property
    def clearance(self) -> float:
        """How far the least of the signal stands above the noise."""
        return 1 / max(self.worst, 1e-300)

    @property
    def worst(self) -> float:
        """The largest blur; 0 for a span of nothing."""
        return float(self.blur.max()) if self.rank else 0.0

    @property
    def full(self) -> bool:
        """Whether the inputs fill the whole space, so that nothing can be told apart."""
        return self.rank >= self.basis.shape[1]

    def seen(self, x: Tensor) -> Tensor:
        """F x: (..., width) -> (..., r)."""
        return x if self.factor is None else x @ self.factor.T.to(x)

    def distance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Relative distance of (..., width) to the span, and how far a true member may appear to be away: both (...)."""
        f = self.seen(x)
        a = f @ self.basis.T.to(x)
        size = f.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        outside = (f - a @ self.basis.to(x)).norm(dim=-1) / size
        outside = torch.where(f.any(dim=-1), outside, 1.0)  # zero, as a padding token may be, is no member
        return outside, (a * self.blur.to(x)).norm(dim=-1) / size

    def outside(self) -> Tensor:
        """Directions N (r - rank, width) with N x = 0 for every member."""
        N: Tensor = torch.linalg.svd(self.basis, full_matrices=True).Vh[self.rank :]
        return N if self.factor is None else N @ self.factor


def span_of(measured: Tensor, factor: Tensor | None, precision: str, noise: Tensor | None = None) -> Span:
    """The span of the rows of a matrix (rows, r), which was released in a number format.

    Rounding is relative to each row: with rows of equal length it is white, which uncovers what the strongest rows would bury.
    White noise is not: of the two, the matrix as it is and that with rows of equal length, the clearer one counts.

    noise: the deviation of the numbers of each row (rows,), where it is known; used if it is more than float32 rounds.
    """
    M, made = measured.double(), list[Span]()
    factor = None if factor is None else factor.double()
    rounding = torch.finfo(getattr(torch, precision)).eps
    if noise is not None and float(noise.norm()) > torch.finfo(torch.float32).eps * float(
        M.square().mean(1).sqrt().norm()
    ):
        values, basis = torch.linalg.svd(M / noise[:, None], full_matrices=False)[1:]
        blur = white(values, 1.0, M.shape)
        return Span(basis[: len(blur)], values[: len(blur)], blur, factor)
    sizes = M.norm(dim=1, keepdim=True)
    for rows in (M, M[sizes[:, 0] > 0] / sizes[sizes > 0][:, None]):
        values, basis = torch.linalg.svd(rows, full_matrices=False)[1:]
        rank, blur = ended(values, rows.shape, rounding)
        made.append(Span(basis[:rank], values[:rank], blur, factor))
    return max(made, key=lambda span: span.clearance if not span.full else 0.0)


def ended(values: Tensor, shape: torch.Size, rounding: float) -> tuple[int, Tensor]:
    """Where the signal ends in descending singular values of a matrix, and how blurred it is: (rank, blur (rank,)).

    Rounding the entries leaves singular values up to rounding |M| (sqrt rows + sqrt columns) / sqrt(rows columns), the edge
    of the Marchenko-Pastur law; the sums that made them, of about `rows` rounded terms, sqrt rows times that. If what lies
    beyond the last ratio of neighbours that rounding does not have is that small, it is rounding: whatever it does, a member x = M^T c is at most
    (s_(rank + 1) + |E|) |c| <= 2 s_(rank + 1) |c| beyond the span, with |c| = |s^-1 V x|. Otherwise it is noise: the rank
    is the least that leaves values below the edge that their own root mean square implies, and where they are above the lower
    edge as well, it is white.
    """
    rows, columns = shape
    entry = rounding * float(values.norm()) * (rows**0.5 + columns**0.5) / (rows * columns) ** 0.5
    padded = torch.cat([values, values.new_zeros(1)]) if rows < columns else values
    raised = (padded.square() + entry**2).sqrt()
    ratios = raised[:-1] / raised[1:]
    ratios[padded[1:] > entry * rows**0.5] = 0
    if rows < 2 * columns:  # the least singular values of a square matrix of noise do differ by that factor
        ratios[-FEWEST:] = 0
    if bool((ratios > CLEAR).any()):
        rank = int((ratios > CLEAR).nonzero()[-1]) + 1
        return rank, 2 * raised[rank] / values[:rank]
    after = values.square().flip(0).cumsum(0).flip(0)  # sum of squares from i on
    for rank in range(1, len(values)):
        left = len(values) - rank
        edge = (float(after[rank]) / left) ** 0.5 * (1 + (left / max(rows - rank, left)) ** 0.5)
        if float(values[rank]) <= edge and left > 1:
            deviation = (float(after[rank]) / ((rows - rank) * (columns - rank))) ** 0.5
            lowest = deviation * abs((rows - rank) ** 0.5 - (columns - rank) ** 0.5)
            if left >= FEWEST and columns <= rows and float(values[-1]) > 0.9 * lowest:
                blur = white(values, deviation, shape)
                return len(blur), blur
            return rank, 2 * values[rank] / values[:rank]
    return len(values), torch.zeros_like(values)


def white(values: Tensor, deviation: float, shape: torch.Size) -> Tensor:
    """The blur of those singular values of a matrix that stand out of white noise: (rank,).

    A value y was theta before the noise, theta^2 the larger root of y^2 = (theta^2 + rows)(theta^2 + columns) / theta^2 in units of
    the deviation; its direction leans out by tan^2 = columns (theta^2 + rows) / (theta^4 - rows columns)
    (Benaych-Georges and Nadakuditi, arXiv:1103.2221, section 3.1). How far a member leans out in all is a sum of squares.
    """
    rows, columns = shape
    y = values / deviation
    y = y[y > EDGE * (rows**0.5 + columns**0.5)]
    half = (y.square() - rows - columns) / 2
    square = half + (half.square() - rows * columns).sqrt()  # theta^2
    tangent = (columns * (square + rows) / (square.square() - rows * columns)).sqrt()
    blur: Tensor = tangent * (1 + SURE / (2 * max(columns - len(y), 1)) ** 0.5)
    return blur


def spans(views: list[Sketch], modules: tuple[str, ...], precision: str, *, causal: bool = False) -> list[Span]:
    """What is known of the common input of some modules (query, key, value): one span for each factor that was looked through.

    Views through the same factor are pooled. Alone, keys show differences of inputs only (softmax does not see what all
    keys share: the deltas of a text's keys sum to zero), and queries of a decoder do not show its first token, which has
    nothing else to attend to: both are left out where values, or in an encoder queries, are there.
    """
    chosen = [view for view in views if view.module in modules and view.side == "right" and bool(view.measured.any())]
    whole = [view for view in chosen if view.factor is None]
    found = [_pooled(whole, precision)] if whole else []
    through = [view for view in chosen if view.factor is not None]
    if len(modules) == 3:
        rank = {modules[2]: 0, modules[0]: 1 if causal else 0, modules[1]: 2}
        best = min((rank[view.module] for view in through), default=0)
        through = [view for view in through if rank[view.module] == best]
    return found + [span_of(view.measured, view.factor, precision) for view in through]


def _pooled(whole: list[Sketch], precision: str) -> Span:
    noise = [view.noise for view in whole if view.noise is not None]
    known = torch.cat(noise) if len(noise) == len(whole) else None
    return span_of(torch.cat([view.measured for view in whole]), None, precision, known)


def excess(found: list[Span], x: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """(largest distance, largest ratio of distance to what is allowed) over the spans: at most 1 for members. (...), (...).

    rounding: relative precision of the inputs themselves, as the victim's forward pass computed them.
    """
    distances, ratios = [], []
    for span in found:
        outside, allowed = span.distance(x)
        distances.append(outside)
        ratios.append(outside / (allowed + rounding))
    return torch.stack(distances).amax(0), torch.stack(ratios).amax(0)
