"""The seed of an adapter: where its training began, drawn again.

Sees      an Adapter that began at B = 0, as PEFT draws it by default, or with init_lora_weights="gaussian"
Recovers  the seed, of 32 bits, and with it A at the start: then the change of both factors is known
Solves    the seed for which cos(A at the end, A as drawn) stands out: on the first module, then on all of them. PEFT draws
          on the CPU from torch's Mersenne twister, of each module, in the order of `named_modules`, A and B as nn.Linear or
          nn.Conv2d does, and A anew (peft 0.21, tuners/lora/layer.py, `update_layer`). torch cuts seeds to 32 bits there: s
          and s + 2^32 are one. We know of no publication that did this.
Errors    of a wrong seed, z = <a, u> / |a| with a = A at the end and u = its draw over the draw's deviation is sub-Gaussian,
          P(z >= t) <= exp(-t^2 / 2) for any a. All 2^32 seeds together pass with probability `ALARM` at most.
Misses    other draws (PiSSA, LoRA-GA, EVA; of biases or embeddings), and others before them than `drawn_before` lists
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise, product
from math import inf, log, pi, sqrt
from operator import length_hint
from time import process_time
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.init import kaiming_uniform_, normal_

from gradleak.attacks.search.descend import OnStep
from gradleak.modalities.networks import ImageTransformer
from gradleak.observations.layers import is_linear
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.releases import Adapter
from gradleak.observations.tensors import Tensors

TYPED: tuple[int, ...] = (42, 0, 1, 1234, 3407, 1337, 2023, 2024, 2025, 2026, 123, 7, 12345, 123456, 1234567, 12345678)
TYPED += (123456789, 31337, 314159, 3141592, 2**16, 114514, 19260817, 0xDEADBEEF, 0xC0FFEE, 2**31 - 1, 2**32 - 1)
USUAL: tuple[int, ...] = tuple(dict.fromkeys((*TYPED, *range(10_000))))  # what people type first
SEEDS = 2**32
ALARM = 1e-3  # probability that any of all wrong seeds passes
CUT = 3.0  # z that a seed has to reach in the quick test, as 1 of 740 wrong ones does
FEWEST, MOST = 1024, 8192  # numbers of A in the quick test, where there are as many
ABREAST = 768  # seeds side by side: their twisters fit into a cache of 2 MB
FAR = 2**20  # words before the adapter beyond which no new head is tried, and fewer seeds side by side

Factors = dict[str, tuple[Tensor, int]]  # {module: (A at the end, float32 on the CPU; count of B's numbers)}, as drawn
Floats = NDArray[np.float32]


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

    on_step is told how many seeds were tried, how many there are, and -z of the best. After `seconds` of CPU time no more
    seeds are begun. Raises NotObserved when what was released is no adapter.
    """
    release, model = observation.adapter, observation.model
    ended, zero = release.ended(observation.released), {k: torch.zeros_like(t) for k, t in release.start.items()}
    modules = [name for name, _ in model.module.named_modules() if name in release.scaling]
    factors = {m: (ended[f"{m}.lora_A"].detach().float().cpu(), zero[f"{m}.lora_B"].numel()) for m in modules}
    if len(modules) < len(release.scaling) or any(bool(release.start[f"{m}.lora_B"].any()) for m in modules):
        return None  # in the first case one module has two names, and PEFT sees it once
    offsets, tests = drawn_before(model), [QuickTest.of(factors, gaussian) for gaussian in (False, True)]
    threshold = sqrt(2 * log(SEEDS * len(offsets) * len(tests) / ALARM))
    seeds = USUAL if seeds is None else seeds
    remaining, total, tried, best = iter(seeds), length_hint(seeds), 0, 0.0
    until = process_time() + (inf if seconds is None else seconds)
    abreast = max(1, min(ABREAST, FAR * ABREAST // max(*offsets, tests[0].first)))
    spans = [[*offsets]] if max(offsets) <= MOST else [[skipped] for skipped in offsets]  # those that share their words
    while process_time() < until and (chunk := [seed % SEEDS for seed in islice(remaining, abreast)]):
        tried += len(chunk)
        for span in spans:
            count = span[-1] - span[0] + max(test.words for test in tests)
            numbers = uniform_numbers(chunk, span[0] + tests[0].first, count)
            for skipped, test in product(span, tests):
                z = test(numbers[skipped - span[0] :])
                best = max(best, float(z.max()))
                for seed in (chunk[i] for i in np.flatnonzero(z > CUT)):
                    drawn, cosine = confirm(seed, skipped, factors, test.gaussian, threshold)
                    if drawn:  # PEFT keeps A in the format of the layer's weight
                        start = {f"{m}.lora_A": A.to(model.parameters[f"{m}.weight"].dtype) for m, A in drawn.items()}
                        start = {name: start.get(name, tensor).to(tensor) for name, tensor in zero.items()}
                        return Found(seed, offsets[skipped], start, cosine, ALARM * tried / max(SEEDS, tried), tried)
        if on_step:
            on_step(tried, max(total, tried), -best)
    return None


def with_start_recovered(observation: Observation[Any], *, on_step: OnStep | None = None) -> Observation[Any]:
    """The observation with the start of all factors and their changes, where a usual seed drew them within 10 CPU-seconds.

    The same where none did, or there is nothing to find: no adapter, only gradients, a known start, or one not at B = 0.
    """
    release = observation.release
    open_start = isinstance(release, Adapter) and not release.gradient and release.origin == "unknown"
    if not open_start or not (found := recover_seed(observation, on_step=on_step, seconds=10.0)):
        return observation
    release, changes = observation.adapter.begun(observation.released, found.start, "recovered", found.seed)
    return replace(observation, release=release, released=changes)


def drawn_before(model: Model[Any]) -> dict[int, str]:
    """{words of the stream used before the adapter: what for}: nothing; of classifiers, a new head too.

    transformers draws a head's weights normally and no biases; of other networks the last linear layer may be new, as
    nn.Linear draws it. Heads of more than `FAR` numbers are left out.
    """
    network = model.module.network if isinstance(model.module, ImageTransformer) else model.module
    layers = {name: layer for name, layer in network.named_modules() if is_linear(layer)}
    if prefix := getattr(network, "base_model_prefix", ""):
        sizes = [layer.weight.numel() for name, layer in layers.items() if not name.startswith(f"{prefix}.")]
        head = sum(n + 16 * (n % 16 > 0) for n in sizes)  # torch draws the last 16 normal numbers again
    else:
        head = sum(p.numel() for layer in list(layers.values())[-1:] for p in layer.parameters())
    tried = model.architecture.classes > 1 and 0 < head <= FAR
    return {0: "", head: "a new classification head"} if tried else {0: ""}


def draw(seed: int, skipped: int, factors: Factors, gaussian: bool) -> Iterator[Tensor]:
    """A of each module as PEFT draws it after this seed and so many words of its stream, bit for bit; float32."""
    generator = torch.Generator().manual_seed(seed)
    torch.empty(skipped).uniform_(generator=generator)
    for shape, numbers_of_B in ((A.shape, n) for A, n in factors.values()):
        torch.empty(shape.numel() + numbers_of_B).uniform_(generator=generator)  # as the layers draw themselves
        A = torch.empty(shape)
        yield normal_(A, 0, 1 / len(A), generator) if gaussian else kaiming_uniform_(A, sqrt(5), generator=generator)


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
    first     words before the first A
    words     how many are read from there
    pieces    [(word where a part of A begins, counted from `first`; that part at the end)], together of length 1
    """

    gaussian: bool
    first: int
    words: int
    pieces: list[tuple[int, Floats]] = field(repr=False)

    @classmethod
    def of(cls, factors: Factors, gaussian: bool) -> Self:
        """As many modules as hold `FEWEST` numbers; more numbers where the words before them cost more anyway."""
        first = next(A.numel() + numbers_of_B for A, numbers_of_B in factors.values())
        wanted = min(max(FEWEST, first // 4), MOST) // (2 if gaussian else 1)
        parts, at = list[tuple[int, NDArray[np.float64]]](), -first
        for A, numbers_of_B in factors.values():
            at, n = at + A.numel() + numbers_of_B, A.numel()
            again = 16 * (n % 16 > 0 and gaussian)
            take = max(0, min(n - again, wanted)) // 16 * 16 if at <= 4 * MOST else 0
            parts.append((at, A.flatten()[:take].double().numpy()))
            at, wanted = at + n + again, wanted - take
        length = sqrt(sum(float(a @ a) for _, a in parts)) or 1.0
        pieces = [(row, (a / length).astype(np.float32)) for row, a in parts if len(a)]
        return cls(gaussian, first, max((row + len(a) for row, a in pieces), default=0), pieces)

    def __call__(self, numbers: Floats) -> Floats:
        """(words, seeds) uniform in [0, 1) -> z (seeds,)."""
        z = np.zeros(numbers.shape[1], np.float32)
        for row, a in self.pieces:
            u = numbers[row : row + len(a)]
            if self.gaussian:  # torch makes numbers i and i + 8 of each 16 from uniform ones i and i + 8
                first, second = u.reshape(-1, 2, 8, u.shape[1]).swapaxes(0, 1)
                radius, angle = np.sqrt(-2 * np.log1p(-first)), np.float32(2 * pi) * second
                z += a @ np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(u.shape)
            else:
                z += sqrt(12) * (a @ u - a.sum() / 2)
        return z


def uniform_numbers(seeds: list[int], first: int, count: int) -> Floats:
    """(count, seeds): the float32 numbers in [0, 1) that torch draws on the CPU after each seed, from the first-th on.

    The Mersenne twister MT19937 (Matsumoto and Nishimura 1998) of all seeds side by side; torch takes the low 24 bits.
    """
    state = np.empty((624, len(seeds)), np.uint32)
    state[0] = seeds
    thirty, factor = np.array(30, np.uint32), np.array(1812433253, np.uint32)
    for old, new, i in zip(state[:-1], state[1:], np.arange(1, 624, dtype=np.uint32)[:, None], strict=True):
        np.right_shift(old, thirty, out=new)
        new ^= old
        new *= factor
        new += i
    numbers, last = np.empty((count, len(seeds)), np.float32), first + count
    for block in range(0, last, 624):
        for a, b in pairwise((*range(0, 227, 57), *range(227, 623, 57), 623, 624)):  # parts that fit into a cache
            y = state[a:b] ^ (state[a + 1 : b + 1] if b < 624 else state[:1])
            y &= 0x7FFFFFFF
            y ^= state[a:b]  # its upper bit, and the 31 lower ones of the next
            odd = (y & 1) * np.uint32(0x9908B0DF)
            y >>= 1
            y ^= odd
            np.bitwise_xor(y, state[a + 397 : b + 397] if b <= 227 else state[a - 227 : b - 227], out=state[a:b])
            low, high = max(first, block + a), min(last, block + b)
            if low < high:
                y = state[low - block : high - block]
                y = y ^ (y >> np.uint32(11))
                y ^= (y << 7) & 0x9D2C5680
                y ^= (y << 15) & 0xEFC60000
                y ^= y >> 18
                numbers[low - first : high - first] = y & 0xFFFFFF
    return numbers * np.float32(2**-24)
