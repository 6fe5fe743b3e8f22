"""Privacy that is known, measured: do lower bounds hold, and how close do attacks come to upper ones? docs/findings/canaries.md.

python benchmarks/known_epsilon.py runs                        # Gaussian mechanisms, 1,000 canaries, 200 runs each
python benchmarks/known_epsilon.py level                       # how often the third form refutes the truth, in 10,000 runs
python benchmarks/known_epsilon.py line-up --data MNIST        # top-1 of 100 from one step, by how long LeNet was trained
python benchmarks/known_epsilon.py steps --data MNIST          # the same after 160 steps at sample rate 0.064
"""

import random
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tyro.conf import Positional

from gradleak.audit import signed_ranks
from gradleak.audit.gaussian_privacy import bisected, epsilon_of, mu_of, success_at_most
from gradleak.audit.line_up import success, success_over_steps
from gradleak.audit.one_run import LEVEL, one_run
from gradleak.audit.privacy_loss import epsilon, most
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.mechanism import Mechanism

DELTA, CLIP, CANDIDATES = 1e-5, 0.1, 100
RATE, STEPS = 0.064, 160


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    what: Positional[Literal["runs", "level", "line-up", "steps"]]
    data: str = "mnist"
    """A folder of MNIST, or its name on the hub."""
    canaries: int = 1_000
    runs: int = 200
    draws: int = 2_000
    """Of the noise, for each candidate (a tenth of them over several steps, for every fourth one)."""


def runs(given: Settings) -> None:
    """Median bounds, and how often they were below the truth."""
    for mu in (0.5, 1.0, 2.0, 4.0):
        generator, truth = random.Random(0), epsilon_of(mu, DELTA)
        found = []
        for _ in range(given.runs):
            coins = [generator.random() < 0.5 for _ in range(given.canaries)]
            found.append(one_run([mu * coin + generator.gauss() for coin in coins], coins, delta=DELTA))
        for form in ("unconditional", "gaussian", "independent"):
            values = [getattr(bound, form) for bound in found]
            valid = sum(value <= truth for value in values) / len(values)
            print(
                f"mu {mu:g}, epsilon {truth:.2f}: {form} {median(values):.2f} ({median(values) / truth:.0%}), valid {valid:.1%}"
            )


def level(given: Settings) -> None:
    """How often the truth, and three quarters of its epsilon, are refuted by the form of independent canaries; 50 times as many runs."""
    m, runs, generator = given.canaries, 50 * given.runs, np.random.default_rng(5)
    surest = np.argsort(-abs(np.arange(m) - (m - 1) / 2), kind="stable")
    for mu in (0.0, 0.5, 1.0, 2.0, 4.0):
        coins = generator.random((runs, m)) < 0.5
        order = np.argsort(mu * coins + generator.standard_normal((runs, m)), axis=1)
        included = np.take_along_axis(coins, order, axis=1)
        right = np.where(np.arange(m) < m // 2, ~included, included)[:, surest]
        parts = np.add.reduceat(right.astype(int), [0, *signed_ranks.ends(m)[:-1]], axis=1).tolist()
        for share in (1.0, 0.75):
            tried = mu_of(share * epsilon_of(mu, DELTA), DELTA)
            refuted = sum(signed_ranks.p_value(m, each, tried) < LEVEL for each in parts) / runs
            print(f"mu {mu:g}: {share:g} of epsilon refuted in {refuted:.1%}")


def cut_gradients(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Inner products (n, n) of the gradients of single pictures, cut to CLIP, in units of CLIP."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (x[None],)), y[None])

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    each = vmap(grad(loss), (None, 0, 0))(parameters, images, labels)
    rows = torch.cat([part.flatten(1) for part in each.values()], dim=1)
    rows = rows * (CLIP / rows.norm(dim=1, keepdim=True)).clamp(max=1) / CLIP
    gram: Tensor = rows @ rows.T
    return gram


def trained(net: nn.Module, public: Pictures, steps: int, generator: torch.Generator) -> None:
    """So many steps of Adam on public pictures."""
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(public.labels), (64,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(net(public.images[rows]), public.labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def line_up(given: Settings) -> None:
    """One step with the sample in it."""
    public, candidates, net, generator = setting(given)
    wrong = (candidates.labels + torch.randint(1, 10, (CANDIDATES,), generator=generator)) % 10
    done = 0
    for steps in (0, 100, 500):
        trained(net, public, steps - done, generator)
        done = steps
        for name, labels in (("", candidates.labels), (", mislabelled", wrong)):
            gram = cut_gradients(net, candidates.images, labels)
            for e in (4.0, 8.0, 16.0):
                mu = mu_of(e, DELTA)
                share = sum(success(gram, 1 / mu, i, draws=given.draws, seed=i) for i in range(CANDIDATES)) / CANDIDATES
                print(f"{steps} steps{name}, epsilon {e:g}: {share:.2%} of {success_at_most(mu, 1 / CANDIDATES):.2%}")


def over_steps(given: Settings) -> None:
    """Many steps, in each of which the sample was drawn or not."""
    public, candidates, net, generator = setting(given)
    trained(net, public, 300, generator)
    grams = []
    for _ in range(STEPS):
        trained(net, public, 1, generator)
        grams.append(cut_gradients(net, candidates.images, candidates.labels))
    every = torch.stack(grams)
    for e in (4.0, 8.0, 16.0):
        noise = bisected(lambda s, e=e: epsilon(training(s)) > e, 0.3, 4.0, 20)  # type: ignore[misc]
        rows = range(0, CANDIDATES, 4)
        shares = [success_over_steps(every, noise, RATE, i, draws=given.draws // 10, seed=i) for i in rows]
        share = sum(shares) / len(shares)
        print(f"epsilon {e:g}, noise {noise:.3f}: {share:.2%} of {most(training(noise), 1 / CANDIDATES):.2%}")


def training(noise: float) -> Mechanism:
    """That of the table."""
    return Mechanism(noise_multiplier=noise, sample_rate=RATE, steps=STEPS, delta=DELTA)


def setting(given: Settings) -> tuple[Pictures, Pictures, nn.Module, torch.Generator]:
    """(public pictures, candidates, an untrained LeNet, randomness)."""
    public = load(given.data, "train", limit=2_000)
    candidates = load(given.data, "test", indices=range(2_000, 2_000 + CANDIDATES))
    net = Architecture("lenet", (1, 28, 28), 10).build(0)
    return public, candidates, net, torch.Generator().manual_seed(0)


if __name__ == "__main__":
    chosen = tyro.cli(Settings)
    {"runs": runs, "level": level, "line-up": line_up, "steps": over_steps}[chosen.what](chosen)
