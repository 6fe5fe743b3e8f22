"""The seed of an adapter: where its training began, drawn again.

Sees      an Adapter that began at B = 0, as PEFT draws it by default, or with init_lora_weights="gaussian"
Recovers  the seed, of 32 bits, and with it A at the start: then the change of both factors is known
Solves    the seed for which cos(A at the end, A as drawn) stands out: on the first module, then on all of them. PEFT draws
          on the CPU from torch's Mersenne twister, of each module, in the order of `named_modules`, A and B as nn.Linear or
          nn.Conv2d does, and A anew (peft 0.21, tuners/lora/layer.py, `update_layer`). torch cuts seeds to 32 bits there: s
          and s + 2^32 are one. We know of no publication that did this.
Errors    of a wrong seed, z = <a, u> / |a| with a = A at the end and u = its draw over the draw's deviation is sub-Gaussian,
          P(z >= t) <= exp(-t^2 / 2) for any a. All 2^32 seeds together pass with probability `ALARM` at most.
Misses    other draws (PiSSA, LoRA-GA, EVA; of biases, or of embeddings that come later), and others before them than `drawn_before`
          and `embedded_before` list
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, product
from math import inf, log, sqrt
from operator import length_hint
from time import process_time
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gradleak.attacks.draws import FAR, Factors, draw, drawn_before, embedded_before, first_word, rounded
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.twisters import TOGETHER, Floats, Twisters, normal
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors

TYPED: tuple[int, ...] = (42, 0, 1, 1234, 3407, 1337, 2023, 2024, 2025, 2026, 123, 7, 12345, 123456, 1234567, 12345678)
TYPED += (123456789, 31337, 314159, 3141592, 2**16, 114514, 19260817, 0xDEADBEEF, 0xC0FFEE, 2**31 - 1, 2**32 - 1)
USUAL: tuple[int, ...] = tuple(dict.fromkeys((*TYPED, *range(10_000))))  # what people type first
GAUSSIAN = {
    "True": (False,),
    "gaussian": (True,),
}  # was A drawn normally? By the config; either, where that says nothing
SEEDS = 2**32
ALARM = 1e-3  # probability that any of all wrong seeds passes
FEW, FEWEST, MOST = 320, 1024, 8192  # numbers of A in the sieve; in the strong test, at least and at most
CUT = 3.0  # z of all numbers that so far fit, below which no more are drawn
LOW, HIGH = 2.2, 3.5  # z that a seed has to reach in those two tests, as 1 of 72 and 1 of 4,300 wrong ones does
ABREAST = 2048  # seeds side by side

Score = Callable[[list[int]], Floats]  # z (tests, seeds)


@dataclass(frozen=True)
class Found:
    """The seed that drew an adapter.

    seed         in [0, 2^32)
    before       what was drawn between the seed and the adapter, in words; "" for nothing
    start        {MODULE.lora_A: as the seed draws it, MODULE.lora_B: zero}, of all modules, in the shapes of the release
    cosine       of A at the end with A at the start, the mean over all modules, by their numbers
    false_alarm  probability, at most, that any of the tried seeds would have passed, had all been wrong
    tried        how many seeds were tried
    """

    seed: int
    before: str
    start: Tensors = field(repr=False)
    cosine: float
    false_alarm: float
    tried: int


def recover_seed(
    observation: Observation[Any],
    *,
    seeds: Iterable[int] | None = None,
    on_step: OnStep | None = None,
    seconds: float | None = None,
) -> Found | None:
    """The first of these seeds (default: `USUAL`) that drew the adapter; None when none did, or B did not begin at zero.

    A sieve looks at few numbers of every seed; those that pass wait until they are many enough for the strong test, and what
    passes that is drawn as a whole. Where a cosine of .3 is left, the right seed has z = 5.4 +- 1 in the sieve and 9.6 in the
    test: it is missed once in 1,000 times. As few seeds as the usual ones are not sieved.

    on_step is told how many seeds were tried, how many there are, and -z of the best. After `seconds` of CPU time no more
    seeds are begun. Raises NotObserved when what was released is no adapter.
    """
    release, model = observation.adapter, observation.model
    ended, zero = release.ended(observation.released), {k: torch.zeros_like(t) for k, t in release.start.items()}
    modules = [name for name, _ in model.module.named_modules() if name in release.scaling]
    factors = {m: (ended[f"{m}.lora_A"].detach().float().cpu(), zero[f"{m}.lora_B"].numel()) for m in modules}
    if len(modules) < len(release.scaling) or any(bool(release.start[f"{m}.lora_B"].any()) for m in modules):
        return None  # in the first case one module has two names, and PEFT sees it once
    offsets, first = (
        {embedded_before(release, model) + n: what for n, what in drawn_before(model).items()},
        first_word(factors),
    )
    draws = [*product(offsets, GAUSSIAN.get(release.init, (False, True)))]
    sieve, strong = (
        [QuickTest.of(factors, gaussian, skipped, wanted) for skipped, gaussian in draws]
        for wanted in (FEW, min(max(FEWEST, first // 4), MOST))
    )
    threshold = sqrt(2 * log(SEEDS * 2 * len(offsets) / ALARM))

    def confirmed(seed: int, test: int) -> Found | None:
        skipped, gaussian = draws[test]
        drawn, cosine = confirm(seed, skipped, factors, gaussian, threshold)
        start = rounded(drawn, model, zero)
        return Found(seed, offsets[skipped], start, cosine, 0.0, 0) if drawn else None

    scores = partial(agreements, tests=sieve), partial(agreements, tests=strong)
    return first_drawn(
        scores,
        confirmed,
        max(*offsets, first),
        seeds=USUAL if seeds is None else seeds,
        on_step=on_step,
        seconds=seconds,
    )


def first_drawn(
    scores: tuple[Score, Score],
    confirmed: Callable[[int, int], Found | None],
    farthest: int,
    *,
    seeds: Iterable[int],
    on_step: OnStep | None,
    seconds: float | None,
) -> Found | None:
    """The first seed that passes the sieve, the strong test and `confirmed`, which is given a seed and the number of a test.

    scores: z of seeds in both. farthest: word that the sieve reaches. The rest as `recover_seed`.
    """
    total, best = length_hint(seeds), 0.0
    until = process_time() + (inf if seconds is None else seconds)
    abreast = max(1, min(ABREAST, FAR * ABREAST // farthest))
    low = LOW if total > len(USUAL) else -inf
    for tried, passed in sieved(iter(seeds), scores[0], low, abreast, until):
        z = scores[1](passed)
        best = max(best, float(z.max(initial=0)))
        for i, test in np.argwhere(z.transpose() > HIGH):
            if found := confirmed(passed[i], test):
                return replace(found, false_alarm=ALARM * tried / max(SEEDS, tried), tried=tried)
        if on_step:
            on_step(tried, max(total, tried), -best)
    return None


def sieved(
    seeds: Iterator[int], score: Score, low: float, abreast: int, until: float
) -> Iterator[tuple[int, list[int]]]:
    """(how many were looked at so far, the new ones whose z exceeds `low` in any test), whenever many wait, and at the end.

    No more are begun after `until`, in CPU time of the process.
    """
    tried, passed = 0, list[int]()
    while process_time() < until and (chunk := [seed % SEEDS for seed in islice(seeds, abreast)]):
        tried += len(chunk)
        passed += [chunk[i] for i in np.flatnonzero((score(chunk) > low).any(0))]
        if len(passed) >= abreast // 4:
            yield tried, passed
            passed = []
    yield tried, passed


def with_start_recovered(
    observation: Observation[Any],
    *,
    seeds: range | None = None,
    on_step: OnStep | None = None,
) -> Observation[Any]:
    """The observation with the start of all factors and their changes, where one of these seeds drew them.

    Without `seeds`, the usual ones within 10 CPU-seconds. Where none did, it knows how many were tried in vain. The same where
    there is nothing to find: see `has_open_start`.
    """
    if not has_open_start(observation):
        return observation
    told = [0]

    def tell(tried: int, total: int, value: float) -> None:
        told[0] = tried
        if on_step:
            on_step(tried, total, value)

    adapter, seconds = observation.adapter, 10.0 if seeds is None else None
    if found := recover_seed(observation, seeds=seeds, on_step=tell, seconds=seconds):
        release, changes = adapter.begun(observation.released, found.start, "recovered", found.seed)
        return replace(observation, release=release, released=changes)
    return replace(observation, release=replace(adapter, tried=adapter.tried + told[0]))


def has_open_start(observation: Observation[Any]) -> bool:
    """Whether a seed can be looked for: an adapter, no gradients, of unknown start, at B = 0, not said to be drawn otherwise."""
    release = observation.release
    if not isinstance(release, Adapter) or release.gradient or release.unmerged or release.origin != "unknown":
        return False
    if release.frozen_a and not observation.defenses:
        return False
    drawn = release.init in ("", "False", *GAUSSIAN)
    return drawn and not any(t.any() for name, t in release.start.items() if name.endswith("lora_B"))


def confirm(seed: int, skipped: int, factors: Factors, gaussian: bool, threshold: float) -> tuple[Tensors, float]:
    """({module: A at the start}, cosine) as this seed draws it; ({}, 0) where z of all modules is below the threshold.

    The same where one module has less than half of its share of z, of 2 `CUT` or more: something was drawn before it.
    """
    drawn, parts = dict[str, Tensor](), []
    for (module, (ended, _)), A in zip(factors.items(), draw(seed, skipped, factors, gaussian), strict=True):
        drawn[module], deviation = A, 1 / len(A) if gaussian else 1 / sqrt(3 * A[0].numel())
        a, u = (tensor.flatten().double() / deviation for tensor in (ended, A))
        length, inner = float(a.norm()) or inf, float(a @ u)
        parts.append([inner / length, len(a) / length, inner / length / float(u.norm()), len(a)])
        z, expected, cosines, numbers = np.array(parts).T  # expected: z, were all steps random
        share = z @ expected / max(expected @ expected, 1e-300)
        if numbers.sum() >= FEWEST and share * np.linalg.norm(expected) < CUT:
            return {}, 0.0
    stray = (z < share * expected / 2) & (share * expected > 2 * CUT)
    passed = share * np.linalg.norm(expected) >= threshold and not stray.any()
    return (drawn, float(cosines @ numbers / numbers.sum())) if passed else ({}, 0.0)


@dataclass(frozen=True)
class QuickTest:
    """z of many seeds at once, from the first numbers of A in the stream.

    gaussian  whether A was drawn normally
    skipped   words used before the adapter
    pieces    [(word where a part of A begins, that part at the end)], `TOGETHER` numbers at most each; all of them have length 1
    """

    gaussian: bool
    skipped: int
    pieces: list[tuple[int, Floats]] = field(repr=False)

    @classmethod
    def of(cls, factors: Factors, gaussian: bool, skipped: int, wanted: int) -> Self:
        """Of as many modules as hold the numbers wanted, where those follow soon."""
        parts, at = list[tuple[int, Floats]](), skipped
        last = skipped + first_word(factors) + 4 * MOST
        for A, numbers_of_B in factors.values():
            at, n = at + A.numel() + numbers_of_B, A.numel()
            again = 16 * (n % 16 > 0 and gaussian)  # torch draws the last 16 normal numbers again
            take = max(0, min(n - again, wanted)) // 16 * 16 if at <= last else 0
            a = A.flatten()[:take].numpy()
            parts += [(at + i, a[i : i + TOGETHER]) for i in range(0, take, TOGETHER)]
            at, wanted = at + n + again, wanted - take
        length = np.float32(sqrt(sum(float(a @ a) for _, a in parts)) or 1.0)
        return cls(gaussian, skipped, [(word, a / length) for word, a in parts])

    def agreement(self, a: Floats, u: Floats) -> Floats:
        """<a, draws over their deviation> (seeds,), of uniform numbers u (len(a), seeds) in [0, 1)."""
        if not self.gaussian:
            uniform: Floats = np.float32(sqrt(12)) * (a @ u - a.sum() / 2)
            return uniform
        normal_numbers: Floats = a @ normal(u)
        return normal_numbers


def agreements(seeds: list[int], tests: list[QuickTest]) -> Floats:
    """(tests, seeds): z of each seed in each test."""
    z = np.zeros((len(tests), len(seeds)), np.float32)
    if not seeds:
        return z
    twisters = Twisters(seeds)
    pieces = [(word, i, a) for i, test in enumerate(tests) for word, a in test.pieces]
    for word, i, a in sorted(pieces, key=lambda piece: piece[:2]):
        z[i] += tests[i].agreement(a, twisters.numbers(word, len(a)))
    return z
