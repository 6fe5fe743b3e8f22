"""The seed of an adapter that was merged into the weights: the energy of A as a seed draws it in the rows that the weights changed in.

Sees      an Update (or an Adapter read off merged weights, `observations/merged.py`): W before and after, W_T = W_0 + s B A
Recovers  the seed, and with it both factors and their changes: then all attacks on adapters apply
Solves    the rows of dW are combinations of those of A_T = A_0 + C. With V (k, in) an orthonormal basis of them, the energy
          |u V^T|^2 of u = A_0 over its deviation stands out. The rank of the adapter is k, or more where there were fewer samples
Errors    of a wrong seed u is independent of V, and its numbers are sub-Gaussian with factor 1 (uniform ones, and normal ones). Hence
          E exp(t |u V^T|^2) <= (1 - 2 t)^(-d / 2), as of chi^2 with d = r k degrees of freedom: average exp(sqrt(2 t) <g, u V^T>) over
          normal g (Hsu et al., ECP 2012, arXiv:1110.2842). By Chernoff, P(energy >= e) <= exp(-z^2 / 2) with
          z = sqrt(e - d - d log(e / d)). All 2^32 seeds and ranks together pass with probability `ALARM` at most
Misses    what attacks/seed.py misses; ranks that are neither k nor a power of two; modules of different ranks
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import inf, log, sqrt
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradleak.attacks.draws import Factors, draw, drawn_before, first_word, rounded
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.seed import ALARM, CUT, FEW, FEWEST, MOST, SEEDS, USUAL, Found, first_drawn
from gradleak.attacks.twisters import TOGETHER, Floats, Twisters, normal
from gradleak.observations.layers import is_adaptable, oriented
from gradleak.observations.merged import merged, was_merged, with_start
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Update
from gradleak.observations.tensors import Tensors

RANKS, TIMES = 64, 4  # powers of two up to the first, and to so many times k, are tried as ranks
PART = 4.0  # a module with so much less than its share of the energy was drawn otherwise


def recover_merged_seed(
    observation: Observation[Any],
    *,
    seeds: Iterable[int] | None = None,
    on_step: OnStep | None = None,
    seconds: float | None = None,
) -> Found | None:
    """`attacks.seed.recover_seed` of an adapter that was read off merged weights."""
    release, model = observation.adapter, observation.model
    if any(name not in dict(model.module.named_modules()) for name in release.unmerged):
        return None  # one module has two names, and PEFT sees it once
    rows = {m: release.start[f"{m}.lora_A"].detach().cpu() for m in release.unmerged}
    bases = {m: torch.linalg.qr(V.flatten(1).double().T)[0].T.float() for m, V in rows.items()}
    k = max(len(V) for V in rows.values())
    ranks = sorted({k, *(2**i for i in range(31) if k <= 2**i <= max(RANKS, TIMES * k))})
    offsets = drawn_before(model)
    draws = [*product(adapted(model, rows), ranks, offsets, (False, True))]
    factors = [drawn_factors(model, modules, r) for modules, r, _, _ in draws]
    sieve, strong = (
        [
            EnergyTest.of(shapes, bases, gaussian, skipped, wanted)
            for shapes, (_, _, skipped, gaussian) in zip(factors, draws, strict=True)
        ]
        for wanted in (FEW, FEWEST)
    )
    threshold = sqrt(2 * log(SEEDS * len(draws) / ALARM))

    def confirmed(seed: int, test: int) -> Found | None:
        _, r, skipped, gaussian = draws[test]
        drawn, cosine = confirm(seed, skipped, factors[test], bases, gaussian, threshold)
        if not drawn:
            return None
        zero = {f"{m}.lora_A": A for m, A in drawn.items() if m in rows}
        for m in rows:
            B = release.start[f"{m}.lora_B"]
            zero[f"{m}.lora_B"] = B.new_zeros(len(B), r, *B.shape[2:])
        return Found(seed, offsets[skipped], rounded(drawn, model, zero), cosine, 0.0, 0)

    scores, farthest = (partial(energies, tests=sieve), partial(energies, tests=strong)), max(map(first_word, factors))
    about: Any = {"seeds": USUAL if seeds is None else seeds, "on_step": on_step, "seconds": seconds}
    return first_drawn(scores, confirmed, max(*offsets, farthest), **about)


def adapted(model: Model[Any], seen: Collection[str]) -> list[tuple[str, ...]]:
    """The modules that may have been adapted, in the order of the model: those that were seen to change; all that have such a name but for
    numbers, some of which rounding may have hidden; all."""
    layers = [name for name, layer in model.module.named_modules() if is_adaptable(layer)]
    kinds = {re.sub(r"\d+", "", name) for name in seen}
    whole = tuple(name for name in layers if re.sub(r"\d+", "", name) in kinds)
    return list(dict.fromkeys((tuple(name for name in layers if name in seen), whole, tuple(layers))))


def drawn_factors(model: Model[Any], modules: Collection[str], rank: int) -> Factors:
    """What is drawn for these modules: A in its shape, no numbers, and how many B has."""
    weights = {m: oriented(model, m, model.parameters[f"{m}.weight"]) for m in modules}
    return {m: (torch.empty(rank, *W.shape[1:], device="meta"), rank * len(W)) for m, W in weights.items()}


def with_merged_recovered(
    observation: Observation[Any], *, seeds: range | None = None, on_step: OnStep | None = None
) -> Observation[Any]:
    """The observation as that of the adapter which was merged into the weights, with its start where one of these seeds drew it.

    Without `seeds`, the usual ones within 10 CPU-seconds. Where none did, an adapter knows how many were tried in vain; a change of
    weights that something else may have made stays one: few samples leave a low rank too.
    """
    known, else_ = unmerged(observation)
    if known is None:
        return observation
    told = [0]

    def tell(tried: int, total: int, value: float) -> None:
        told[0] = tried
        if on_step:
            on_step(tried, total, value)

    seconds = 10.0 if seeds is None else None
    if found := recover_merged_seed(known, seeds=seeds, on_step=tell, seconds=seconds):
        return with_start(known, found.start, found.seed)
    return (
        replace(else_, release=replace(else_.adapter, tried=else_.adapter.tried + told[0])) if else_ is known else else_
    )


def unmerged(observation: Observation[Any]) -> tuple[Observation[Any] | None, Observation[Any]]:
    """(an adapter of unknown start that may have been merged or None, what to go on with where no seed drew it)."""
    if was_merged(observation) and observation.adapter.origin == "unknown":
        return observation, observation
    found = merged(observation, observation.release.recipe) if isinstance(observation.release, Update) else None
    if found is None:
        return None, observation
    return found.observation, found.observation if found.sure else observation


def confirm(
    seed: int, skipped: int, factors: Factors, bases: Tensors, gaussian: bool, threshold: float
) -> tuple[Tensors, float]:
    """({module: A at the start}, cosine) as this seed draws it; ({}, 0) where z of all modules is below the threshold.

    The same where one module has much less than its share of the energy that a start which stayed has: something was drawn before it.
    cosine: root of that share, the mean over all modules, by their directions.
    """
    drawn, parts, numbers = dict[str, Tensor](), [], 0
    for (module, _), A in zip(factors.items(), draw(seed, skipped, factors, gaussian), strict=True):
        V = bases[module].double() if module in bases else A.new_zeros(0, A[0].numel()).double()
        deviation = 1 / len(A) if gaussian else 1 / sqrt(3 * A[0].numel())
        energy = float((A.flatten(1).double() / deviation @ V.T).square().sum())
        drawn[module], numbers = A, numbers + A.numel() * (len(V) > 0)
        parts.append([energy, len(A) * len(V), float(A[0].numel() * len(V))])
        e, d, most = np.array(parts).T  # most: of a V that lies in the rows of A
        if numbers >= FEWEST and signed_root(e.sum(), d.sum()) < CUT:
            return {}, 0.0
    share = (e.sum() - d.sum()) / max((most - d).sum(), 1e-300)
    expected = share * np.maximum(most - d, 0)
    stray = ((e - d) < expected / PART) & (expected > 2 * CUT * np.sqrt(2 * d))
    if signed_root(e.sum(), d.sum()) < threshold or stray.any():
        return {}, 0.0
    return drawn, float(np.minimum(np.sqrt(e / np.maximum(most, 1)), 1.0) @ most / most.sum())


def signed_root(energy: Any, d: Any) -> Any:
    """z of an energy of d degrees of freedom, below zero for less than d."""
    e = np.maximum(energy, 1e-9)
    return np.sign(e - d) * np.sqrt(np.maximum(e - d - d * np.log(e / np.maximum(d, 1e-9)), 0))


@dataclass(frozen=True)
class EnergyTest:
    """z of many seeds at once, from the first rows of A in the stream.

    gaussian  whether A was drawn normally
    pieces    [(word where a part of a row begins, number of the row, that part of V (k, numbers))], `TOGETHER` numbers at most each
    freedom   degrees of freedom of all rows
    """

    gaussian: bool
    pieces: list[tuple[int, int, Floats]] = field(repr=False)
    freedom: int

    @classmethod
    def of(cls, factors: Factors, bases: Tensors, gaussian: bool, skipped: int, wanted: int) -> Self:
        """Of as many whole rows as hold the numbers wanted, where those follow soon."""
        pieces, at, row, freedom = list[tuple[int, int, Floats]](), skipped, 0, 0
        last = inf
        for module, (A, numbers_of_B) in factors.items():
            at, n, numbers = at + A.numel() + numbers_of_B, A[0].numel(), A.numel()
            seen, last = module in bases, min(last, at + 4 * MOST if module in bases else inf)
            again = 16 * (numbers % 16 > 0 and gaussian)  # torch draws the last 16 again
            for first in range(0, numbers if at <= last else 0, n):
                if wanted <= 0 or not seen:
                    break
                V = bases[module].numpy()
                begin, end = first, min(first + n, numbers - again)
                if gaussian:  # blocks of 16, with zeros beside the row
                    begin, end = begin // 16 * 16, min(-(-end // 16) * 16, (numbers - again) // 16 * 16)
                for i in range(begin, end, TOGETHER):
                    columns = np.arange(i, min(i + TOGETHER, end)) - first
                    part = np.where((columns >= 0) & (columns < n), V[:, columns % n], np.float32(0))
                    pieces.append((at + i, row, np.ascontiguousarray(part)))
                row, freedom, wanted = row + 1, freedom + len(V), wanted - n
            at += numbers + again
        return cls(gaussian, pieces, freedom)


def energies(seeds: list[int], tests: list[EnergyTest]) -> Floats:
    """(tests, seeds): z of each seed in each test."""
    z: NDArray[np.float32] = np.zeros((len(tests), len(seeds)), np.float32)
    if not seeds:
        return z
    twisters, sums = Twisters(seeds), dict[tuple[int, int], Floats]()
    pieces = [(word, i, row, V) for i, test in enumerate(tests) for word, row, V in test.pieces]
    for word, i, row, V in sorted(pieces, key=lambda piece: piece[:3]):
        u = twisters.numbers(word, V.shape[1])
        u = normal(u) if tests[i].gaussian else np.float32(sqrt(12)) * (u - np.float32(0.5))
        sums[i, row] = sums.get((i, row), np.float32(0)) + V @ u
    for (i, _), projected in sums.items():
        z[i] += np.square(projected).sum(0)
    return np.stack([signed_root(e, test.freedom) for e, test in zip(z, tests, strict=True)]).astype(np.float32)
