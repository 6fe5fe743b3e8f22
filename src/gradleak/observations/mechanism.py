"""A differentially private training as its accountant sees it: so many steps of the Gaussian mechanism on samples drawn at a rate."""

import math
from dataclasses import dataclass

from gradleak.errors import BadInput

MOST_STEPS = 10_000_000
LEAST_NOISE, MOST_NOISE = 0.05, 1e4


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """DP-SGD (Abadi et al. 2016): in each step every sample takes part with probability `sample_rate` (Poisson), is cut to a norm, and
    noise of `noise_multiplier` times that norm is added to the sum. Neighbours differ by one sample that is added or removed.

    certain  of the steps, in how many a sample took part for sure, because an audit looks at a batch that it is in
    delta    at which epsilon is told
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    certain: int = 0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not LEAST_NOISE <= self.noise_multiplier <= MOST_NOISE:
            raise BadInput(
                f"A noise multiplier lies between {LEAST_NOISE} and {MOST_NOISE:g}, not at {self.noise_multiplier:g}: with less there is no bound."
            )
        if not 0 < self.sample_rate <= 1 or not 1 <= self.steps <= MOST_STEPS or not 0 <= self.certain <= self.steps:
            raise BadInput(
                f"A private training has a sample rate above 0 and up to 1, and 1 to {MOST_STEPS:,} steps, not {self.sample_rate:g} and {self.steps:,}."
            )
        if not (math.isfinite(self.delta) and 0 < self.delta < 1):
            raise BadInput(f"A delta lies between 0 and 1, both excluded, and not at {self.delta:g}: 1e-5 is usual.")

    def __str__(self) -> str:
        said = f"noise multiplier {self.noise_multiplier:g}, sample rate {self.sample_rate:.3g}, {self.steps:,} step{'s' * (self.steps > 1)}"
        return said + (f", of which {self.certain} with the sample in the batch" if self.certain else "")
