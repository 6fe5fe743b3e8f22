"""A small network that reads how often each class occurs off a sum of contributions; it learns from sums over public samples."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.attacks.label_counts.evidence import Evidence

DIRECTIONS = 128  # principal ones of what samples add
# Logarithm of the greatest precision, exp(-12) for a neighbouring count: beyond it small errors make training diverge.
SUREST = 2.5
CHUNK = 256  # simulated batches per step
SHARPEST = 1.0  # power of exponential variables that makes frequencies of classes: 0 all alike, 1 a flat Dirichlet draw
STEPS = 2000  # of training, a hundredth of a second each


@dataclass(frozen=True)
class Counter:
    """A network from a sum of contributions to counts: for each class a Gaussian on whole numbers.

    centre, directions  (numbers,), (numbers, k): what samples add, without its mean, in coordinates whose covariance within classes
                        is the identity
    network             (k,) -> (2 classes,): means, and logarithms of precisions
    """

    centre: Tensor
    directions: Tensor
    network: "Reader"
    classes: int
    batch: int

    @classmethod
    def trained(cls, seen: Evidence, *, generator: torch.Generator, steps: int = STEPS, width: int = 384) -> "Counter":
        """By Adam on the likelihood of the counts of random batches, whose class frequencies run from all alike to a flat Dirichlet draw."""
        labels, classes, batch = seen.labels, seen.classes, seen.batch
        centre, directions = whitening(seen.each, labels, classes)
        order = labels.argsort(stable=True)
        rows = ((seen.each - centre) @ directions).float()[order] / batch**0.5
        sizes = labels.bincount(minlength=classes)
        begin = sizes.cumsum(0) - sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            network = Reader(rows, labels[order], classes, batch, width)
            optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
            for _ in range(steps):
                weights = torch.empty(CHUNK, classes).exponential_() ** (SHARPEST * torch.rand(CHUNK, 1))
                drawn = torch.multinomial((weights + 1e-9) * (sizes > 0), batch, replacement=True)  # (CHUNK, batch)
                chosen = begin[drawn] + (torch.rand(drawn.shape) * sizes[drawn]).long()
                counts = torch.zeros(CHUNK, classes).scatter_add_(1, drawn, torch.ones(drawn.shape))
                loss = -network.log_likelihood(rows[chosen].sum(1)).gather(2, counts.long()[..., None]).mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                schedule.step()
        return cls(centre, directions, network.requires_grad_(False), classes, batch)

    def __call__(self, total: Tensor) -> tuple[Tensor, float]:
        """The most likely counts (classes,) with the batch's size in sum, and the expected share of labels that they have right."""
        x = ((total - self.batch * self.centre) @ self.directions).float() / self.batch**0.5
        told = self.network.log_likelihood(x[None])[0].double()  # (classes, batch + 1), concave in the count
        gain = told.diff(dim=1)
        counts = torch.zeros(self.classes, dtype=torch.int64)
        for _ in range(self.batch):  # of concave functions, one more where it gains most is the best there is
            more = gain.gather(1, counts.clamp_max(self.batch - 1)[:, None])[:, 0]
            counts[more.argmax()] += 1
        off = (torch.arange(self.batch + 1) - counts[:, None]).abs()
        return counts, 1 - float((told.exp() * off).sum()) / (2 * self.batch)


class Reader(nn.Module):
    """A linear map, and what a perceptron adds to it; it starts as the ridge regression of labels on what one sample adds.

    rows (samples, inputs): so scaled that the sum of a batch of them is the input; labels (samples,).
    """

    def __init__(self, rows: Tensor, labels: Tensor, classes: int, batch: int, width: int) -> None:
        super().__init__()
        shares = torch.eye(classes)[labels]
        rest = shares - shares.mean(0)
        normal = rows.T @ rows
        solved = torch.linalg.solve(normal + 1e-3 * normal.diag().mean() * torch.eye(len(normal)), rows.T @ rest)
        left = batch * (rest - rows @ solved).square().mean(0)  # (classes,): variance of a count
        self.linear = nn.Linear(rows.shape[1], classes)
        self.network = nn.Sequential(
            nn.Linear(rows.shape[1], width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 2 * classes),
        )
        with torch.no_grad():
            self.linear.weight.copy_(solved.T)
            self.linear.bias.copy_(batch * shares.mean(0))
            last = self.network[-1]
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.copy_(torch.cat([torch.zeros(classes), (-(2 * left).clamp_min(1e-4).log()).clamp_max(SUREST)]))
        self.register_buffer("grid", torch.arange(batch + 1.0))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """(n, inputs) -> (n, classes, batch + 1): of each count."""
        shift, precision = self.network(x).chunk(2, dim=1)
        mean = self.linear(x) + shift
        scores: Tensor = -precision.clamp(-8, SUREST).exp()[..., None] * (self.grid - mean[..., None]).square()
        return scores.log_softmax(2)


def whitening(contributions: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(numbers,) and (numbers, k): the mean, and directions along which the covariance within classes is the identity."""
    centre = contributions.mean(0)
    some = (contributions - centre)[: 4 * DIRECTIONS]  # enough for the principal directions
    values, turn = torch.linalg.eigh(some @ some.T)
    kept = values.flip(0)[:DIRECTIONS] > 1e-12 * values[-1]  # float32 rounds what samples add at 1e-7
    axes = torch.linalg.qr(some.T @ turn.flip(1)[:, :DIRECTIONS][:, kept])[0]
    z = (contributions - centre) @ axes
    means = torch.stack([z[labels == c].mean(0) if (labels == c).any() else z.mean(0) for c in range(classes)])
    rest = z - means[labels]
    covariance = rest.T @ rest / len(rest)
    covariance += 1e-4 * z.square().mean() * torch.eye(len(covariance), dtype=z.dtype)
    values, turn = torch.linalg.eigh(covariance)
    return centre, axes @ (turn / values.sqrt())
