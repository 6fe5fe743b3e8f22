"""The span of a layer's inputs, which the gradient of its weight shows, and the check whether a vector lies in it.

dL/dW = Delta^T X (section 4): its rows lie in the span of the inputs x_t. Rounding and noise make the span uncertain by what
lies below the gap between the singular values. That uncertainty differs from vector to vector, and is computed for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.observations.observation import TextObservation
from gradleak.observations.release import Sketch
from gradleak.observations.transformer import layout_of

# The rounding of a victim's forward pass: sums of 1,024 terms, whose roundings add up like a random walk of as many steps.
FORWARD = 32 * torch.finfo(torch.float32).eps
# Gaussian matrices stand for rounding and noise. Ratios of neighbouring singular values: at most 1.64 in 1,000 of 64 x 32; in
# 7,480 square ones (8 to 192 columns) larger than 2 only among the last seven. The largest value was up to 1.05 of the edge
# of the Marchenko-Pastur law in 300 of 128 x 64, the smallest at least 0.95 of the lower edge in 300 of 576 x 64.
GAP, FEWEST, EDGE, LOWER_EDGE = 2.0, 8, 1.05, 0.9
DEVIATIONS = 5.0  # of a member's distance through white noise that are allowed: docs/findings/text.md, "What is proven"


@dataclass(frozen=True)
class Span:
    """The span of F x_t over all tokens t, in float64.

    basis   V (rank, r), orthonormal rows
    blur    (rank,): how far beyond the span a member may appear to be, per unit along each row of V; 0 without noise
    factor  F (r, width), or None for the identity
    """

    basis: Tensor
    blur: Tensor
    factor: Tensor | None

    @property
    def rank(self) -> int:
        return len(self.basis)

    @property
    def worst(self) -> float:
        """The largest blur; 0 for a span of nothing."""
        return float(self.blur.max()) if self.rank else 0.0

    @property
    def clearance(self) -> float:
        """How far the weakest direction of the signal stands above the noise."""
        return 1 / max(self.worst, 1e-300)

    @property
    def full(self) -> bool:
        """Whether the inputs fill the whole space, so that every vector is a member."""
        return self.rank >= self.basis.shape[1]

    def distance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Relative distance of (..., width) to the span, and how far away a true member may appear to be: both (...)."""
        f = x if self.factor is None else x @ self.factor.T.to(x)  # (..., r)
        a = f @ self.basis.T.to(x)
        size = f.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        distance = (f - a @ self.basis.to(x)).norm(dim=-1) / size
        distance = torch.where(f.any(dim=-1), distance, 1.0)  # zero, as a padding token may be, is no member
        return distance, (a * self.blur.to(x)).norm(dim=-1) / size

    def orthogonal(self) -> Tensor:
        """Directions N (r - rank, width) with N x = 0 for every member."""
        N: Tensor = torch.linalg.svd(self.basis, full_matrices=True).Vh[self.rank :]
        return N if self.factor is None else N @ self.factor


def excess(spans: Sequence[Span], x: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """(largest distance, largest ratio of distance to what is allowed) over the spans: at most 1 for members. (...), (...).

    rounding: relative precision of the inputs themselves, as the victim's forward pass computed them.
    """
    both = [span.distance(x) for span in spans]
    ratios = [distance / (allowed + rounding) for distance, allowed in both]
    return torch.stack([distance for distance, _ in both]).amax(0), torch.stack(ratios).amax(0)


def telling(spans: Sequence[Span], random: Tensor, rounding: float) -> list[Span]:
    """The spans that refuse most of these random inputs. The others are so full, or so blurred, that passing means nothing."""
    return [span for span in spans if float((excess([span], random, rounding)[1] <= 1).double().mean()) < 0.5]


def spans_of(observation: TextObservation, modules: Sequence[str]) -> list[Span]:
    """What the release shows of the common input of some modules (query, key, value): one span per adapter factor.

    Whole gradients, and sketches through the same factor, are pooled. Two kinds of sketch are left out where values, or in an
    encoder queries, are there (docs/findings/text.md, "What is proven"): keys show differences of inputs only, because the
    deltas of a text's keys sum to zero; queries of a decoder do not show its first token, which attends to itself only. So is a
    factor that shows fewer directions than another although it has room for more: rounding hides the rest from it.
    """
    sketches = [s for s in observation.sketches(modules) if s.side == "right" and bool(s.measured.any())]
    whole = [sketch for sketch in sketches if sketch.factor is None]
    through = [sketch for sketch in sketches if sketch.factor is not None]
    layout = layout_of(observation.model)
    fewest = min((layout.gap(sketch.module) for sketch in through), default=0)
    through = [sketch for sketch in through if layout.gap(sketch.module) == fewest]
    pooled = [_pooled(whole, observation.precision)] if whole else []
    seen = [span_of(s.measured, s.factor, observation.precision, s.noise) for s in through]
    most = max((span.rank for span in seen), default=0)
    return pooled + [span for span in seen if span.rank >= min(most, span.basis.shape[1])]


def _pooled(whole: list[Sketch], precision: str) -> Span:
    noise = [sketch.noise for sketch in whole if sketch.noise is not None]
    known = torch.cat(noise) if len(noise) == len(whole) else None
    return span_of(torch.cat([sketch.measured for sketch in whole]), None, precision, known)


def span_of(measured: Tensor, factor: Tensor | None, precision: str, noise: Tensor | None = None) -> Span:
    """The span of the rows of a matrix (rows, r), which was released in a number format.

    Rounding is relative to each row. Rows of equal length make it white, which uncovers what the strongest rows would bury.
    Other noise is white as it is. So the span is computed from both, and the clearer one counts.

    noise: the deviation of the numbers of each row (rows,), where it is known. It is used if float32 rounds less.
    """
    M, factor = measured.double(), None if factor is None else factor.double()
    float32 = torch.finfo(torch.float32).eps * float(M.square().mean(1).sqrt().norm())
    if noise is not None and float(noise.norm()) > float32:
        values, basis = torch.linalg.svd(M / noise[:, None], full_matrices=False)[1:]
        blur = white_noise_blur(values, 1.0, M.shape)
        return Span(basis[: len(blur)], blur, factor)
    sizes, spans = M.norm(dim=1, keepdim=True), list[Span]()
    for rows in (M, M[sizes[:, 0] > 0] / sizes[sizes > 0][:, None]):
        values, basis = torch.linalg.svd(rows, full_matrices=False)[1:]
        rank, blur = numerical_rank(values, rows.shape, torch.finfo(getattr(torch, precision)).eps)
        spans.append(Span(basis[:rank], blur, factor))
    return max(spans, key=lambda span: span.clearance if not span.full else 0.0)


def numerical_rank(values: Tensor, shape: torch.Size, rounding: float) -> tuple[int, Tensor]:
    """Where the signal ends in descending singular values of a matrix, and how blurred it is: (rank, blur (rank,)).

    Rounding the entries leaves singular values up to rounding |M| (sqrt rows + sqrt columns) / sqrt(rows columns), the edge
    of the Marchenko-Pastur law. The sums behind the entries, of about `rows` rounded terms, leave sqrt rows times that. The
    signal ends at the last gap beyond which everything is that small. Whatever rounding E does, a member x = M^T c is then
    at most (s_(rank + 1) + |E|) |c| <= 2 s_(rank + 1) |c| beyond the span, with |c| = |s^-1 V x|.

    Without such a gap the rest is noise: the rank is the least that leaves values below the edge that their own root mean
    square implies. Where they lie above the lower edge as well, the noise is white.
    """
    rows, columns = shape
    entry = rounding * float(values.norm()) * (rows**0.5 + columns**0.5) / (rows * columns) ** 0.5
    padded = torch.cat([values, values.new_zeros(1)]) if rows < columns else values
    raised = (padded.square() + entry**2).sqrt()
    ratios = raised[:-1] / raised[1:]
    ratios[padded[1:] > entry * rows**0.5] = 0
    if rows < 2 * columns:
        ratios[-FEWEST:] = 0
    if bool((ratios > GAP).any()):
        rank = int((ratios > GAP).nonzero()[-1]) + 1
        return rank, 2 * raised[rank] / values[:rank]
    squares = values.square().flip(0).cumsum(0).flip(0)  # sum of squares from i on
    for rank in range(1, len(values)):
        left = len(values) - rank
        edge = (float(squares[rank]) / left) ** 0.5 * (1 + (left / max(rows - rank, left)) ** 0.5)
        if float(values[rank]) <= edge and left > 1:
            deviation = (float(squares[rank]) / ((rows - rank) * (columns - rank))) ** 0.5
            lower_edge = deviation * abs((rows - rank) ** 0.5 - (columns - rank) ** 0.5)
            if left >= FEWEST and columns <= rows and float(values[-1]) > LOWER_EDGE * lower_edge:
                blur = white_noise_blur(values, deviation, shape)
                return len(blur), blur
            return rank, 2 * values[rank] / values[:rank]
    return len(values), torch.zeros_like(values)


def white_noise_blur(values: Tensor, deviation: float, shape: torch.Size) -> Tensor:
    """The blur of those singular values of a matrix that stand out of white noise: (rank,).

    A value y was theta before the noise: theta^2 is the larger root of y^2 = (theta^2 + rows)(theta^2 + columns) / theta^2 in
    units of the deviation. Its direction leans out by tan^2 = columns (theta^2 + rows) / (theta^4 - rows columns)
    (Benaych-Georges and Nadakuditi, arXiv:1103.2221, section 3.1). How far a member leans out in all is a sum of squares.
    """
    rows, columns = shape
    y = values / deviation
    y = y[y > EDGE * (rows**0.5 + columns**0.5)]
    half = (y.square() - rows - columns) / 2
    square = half + (half.square() - rows * columns).sqrt()  # theta^2
    tangent = (columns * (square + rows) / (square.square() - rows * columns)).sqrt()
    blur: Tensor = tangent * (1 + DEVIATIONS / (2 * max(columns - len(y), 1)) ** 0.5)
    return blur
