"""The Mersenne twisters MT19937 of many seeds, side by side (Matsumoto and Nishimura, ACM TOMACS 8, 1998; seeded as in their 2002
version), as torch draws uniform numbers from them on the CPU.

Word m follows from words m - 624, m - 623 and m - 227, and takes the place of the first of them: row m mod 624. Any 320 words in a
row depend on all that were made before them (64 on 63 % of the 2,048 before them, 94 % of 12,288), so no word is left out.
"""

from collections.abc import Iterable
from math import pi

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
TOGETHER = 32  # rows at a time: those of 2,048 seeds fit into a cache three times


def words(numbers: Iterable[int]) -> list[NDArray[np.uint32]]:
    """Each as an array of its own, which numpy computes with faster than with a number."""
    return [np.array(number, np.uint32) for number in numbers]


ONE, SEVEN, ELEVEN, FIFTEEN, EIGHTEEN, THIRTY = words((1, 7, 11, 15, 18, 30))
LOWER, FACTOR, MATRIX = words((0x7FFFFFFF, 1812433253, 0x9908B0DF))


class Twisters:
    """state (624, seeds): the last words of each; at: how many words were made since the seed."""

    def __init__(self, seeds: list[int]) -> None:
        self.state, self.at = np.empty((624, len(seeds)), np.uint32), 0
        self.state[0], self.scratch = seeds, np.empty((2, TOGETHER, len(seeds)), np.uint32)
        rows = [*self.state]
        for old, new, i in zip(rows[:-1], rows[1:], words(range(1, 624)), strict=True):
            np.right_shift(old, THIRTY, new)
            np.bitwise_xor(new, old, new)
            np.multiply(new, FACTOR, new)
            np.add(new, i, new)

    def forward(self, end: int) -> None:
        """Make all words before this one."""
        x = self.state
        while self.at < end:
            a = self.at % 624
            b = min(a + TOGETHER, a + end - self.at, next(edge for edge in (227, 623, 624) if a < edge))
            y, odd = self.scratch[:, : b - a]
            np.bitwise_xor(x[a:b], x[a + 1 : b + 1] if b < 624 else x[:1], y)
            np.bitwise_and(y, LOWER, y)
            np.bitwise_xor(y, x[a:b], y)  # its upper bit, and the 31 lower ones of the next
            np.bitwise_and(y, ONE, odd)
            np.multiply(odd, MATRIX, odd)
            np.right_shift(y, ONE, y)
            np.bitwise_xor(y, odd, y)
            np.bitwise_xor(y, x[a + 397 : b + 397] if b <= 227 else x[a - 227 : b - 227], x[a:b])
            self.at += b - a

    def numbers(self, first: int, count: int) -> Floats:
        """(count, seeds): what torch draws on the CPU from the first-th word on, float32 in [0, 1): of the last 624 words only."""
        self.forward(first + count)
        y, t = self.state[np.arange(first, first + count) % 624], self.scratch[0, :count]
        y ^= np.right_shift(y, ELEVEN, t)
        y ^= np.bitwise_and(np.left_shift(y, SEVEN, t), 0x9D2C5680, t)
        y ^= np.bitwise_and(np.left_shift(y, FIFTEEN, t), 0xEFC60000, t)
        y ^= np.right_shift(y, EIGHTEEN, t)
        y &= 0xFFFFFF  # torch takes the low 24 bits
        u = y.view(np.int32).astype(np.float32)
        u *= np.float32(2**-24)
        return u


def normal(u: Floats) -> Floats:
    """Normal numbers as torch makes them of uniform ones (numbers, seeds), whose count is a multiple of 16."""
    first, second = u.reshape(-1, 2, 8, u.shape[1]).swapaxes(0, 1)  # torch makes numbers i and i + 8 of each 16
    radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * pi) * second  # from uniform ones i and i + 8
    both: Floats = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(u.shape)
    return both
