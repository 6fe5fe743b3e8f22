"""Lower bounds on epsilon from one run: against sums done by hand, and on mechanisms whose epsilon is known."""

import math
import random
from collections.abc import Callable
from math import comb
from typing import Any

import numpy as np
import pytest

from gradleak.audit import one_run as bounds
from gradleak.audit import signed_ranks
from gradleak.audit.canaries import exposure, table, verdict
from gradleak.audit.gaussian_privacy import NORMAL, delta_of, epsilon_of, mu_of, success_at_most
from gradleak.audit.one_run import (
    Bound,
    epsilon_refuted,
    gaussian_inverse,
    independent_mu_refuted,
    mu_refuted,
    one_run,
    p_value,
    ranked,
    refutes,
)
from gradleak.errors import BadInput
from oracles import one_run_p_value_by_sums

DELTA = 1e-5


@pytest.mark.parametrize(("m", "guesses", "right"), [(10, 10, 9), (40, 20, 17), (100, 30, 30), (30, 8, 0), (9, 1, 1)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_the_p_value_is_the_sum_of_the_theorem(m: int, guesses: int, right: int, epsilon: float, delta: float) -> None:
    """Exact fractions of a double's chance against scipy's binomial: 1e-9 leaves room for its continued fractions."""
    expected = one_run_p_value_by_sums(m, guesses, right, epsilon, delta)
    assert p_value(m, guesses, right, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_what_is_refuted_is_where_the_p_value_is_the_level() -> None:
    found = epsilon_refuted(200, 50, 45, DELTA)
    assert p_value(200, 50, 45, found, DELTA) == pytest.approx(0.05, rel=1e-6)  # 60 halvings of 100, and its slope
    assert epsilon_refuted(200, 50, 25, DELTA) == 0.0  # half is what a coin has
    # All of g right: (e^eps / (1 + e^eps))^g = .05 without delta.
    exact = math.log(0.05 ** (1 / 50) / (1 - 0.05 ** (1 / 50)))
    assert epsilon_refuted(200, 50, 50, 1e-15) == pytest.approx(exact, rel=1e-6)


def test_of_one_canary_the_recursion_is_the_trade_off() -> None:
    """m = 1, right once: refuted while p <= Phi(mu/2) fails, which takes a level above that (equal masses in both worlds)."""
    for mu in (0.5, 1.0, 2.0):
        most = NORMAL.cdf(mu / 2)
        assert refutes(gaussian_inverse(mu), 1, 1, 1, level=most + 1e-6)
        assert not refutes(gaussian_inverse(mu), 1, 1, 1, level=most - 1e-6)


def test_the_recursion_never_refutes_the_best_independent_guesser() -> None:
    """Guesses that are each right with Phi(mu/2), the most that mu-GDP allows, are Binomial: that many right guesses or more have, by exact
    sums, the probability that is given as level; the mechanism is not to be refuted at it."""
    for mu in (0.5, 1.0, 2.0):
        chance = NORMAL.cdf(mu / 2)
        for right in range(6, 13):
            level = sum(comb(12, k) * chance**k * (1 - chance) ** (12 - k) for k in range(right, 13))
            assert not refutes(gaussian_inverse(mu), 12, 12, right, level=min(level, 1 - 1e-12))


def test_more_right_guesses_refute_more() -> None:
    mus = [mu_refuted(100, 40, right) for right in (20, 30, 35, 40)]
    assert mus == sorted(mus)
    assert mus[0] == 0.0
    coins = [i % 2 == 0 for i in range(100)]
    scores = [[((i % 2 == 0) != (i % 10 < wrong)) + i / 1_000 for i in range(100)] for wrong in (5, 4, 2, 0)]
    independent = [independent_mu_refuted(each, coins) for each in scores]
    assert independent == sorted(independent)
    assert independent[0] == 0.0


def test_gaussian_epsilon_is_balle_and_wangs() -> None:
    """Their theorem 8, by hand, and the two ends: mu = 0 tells nothing, delta at epsilon 0 is 2 Phi(mu/2) - 1."""
    assert delta_of(1.0, 0.0) == pytest.approx(2 * NORMAL.cdf(0.5) - 1, abs=1e-12)
    for mu, epsilon in ((0.5, 1.0), (1.0, 4.0), (3.0, 10.0)):
        by_hand = NORMAL.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * NORMAL.cdf(-mu / 2 - epsilon / mu)
        assert delta_of(mu, epsilon) == pytest.approx(by_hand, rel=1e-6)  # what is left of its digits by the difference
        assert epsilon_of(mu, delta_of(mu, epsilon)) == pytest.approx(epsilon, rel=1e-9)
        assert mu_of(epsilon, delta_of(mu, epsilon)) == pytest.approx(mu, rel=1e-9)
    assert epsilon_of(0.0, DELTA) == 0.0
    assert success_at_most(0.0, 0.01) == pytest.approx(0.01)
    assert success_at_most(1.0, 0.5) == pytest.approx(NORMAL.cdf(1.0))
    assert (success_at_most(1.0, 0.0), success_at_most(1.0, 1.0)) == (0.0, 1.0)


@pytest.mark.parametrize(("m", "mu"), [(8, 0.5), (50, 4.0), (300, 1.0)])
def test_draws_in_parts_are_those_of_every_guess(m: int, mu: float) -> None:
    """T(mu) by sorting m normal numbers, whose mean and deviation 4,000 draws of either tell to 5 of their own deviations."""
    weights, drawn = signed_ranks.totals(m, mu)
    y = np.random.default_rng(1).standard_normal((4_000, m)) + mu / 2
    surest = np.take_along_axis(y, np.argsort(-abs(y), axis=1), axis=1)
    slow = (surest > 0) @ np.repeat(weights, np.diff(signed_ranks.ends(m), prepend=0))
    assert abs(drawn.mean() - slow.mean()) < 5 * slow.std() * (2 / 4_000) ** 0.5
    assert drawn.std() == pytest.approx(
        slow.std(), rel=0.1
    )  # 5 deviations sqrt(2 / 4000 / 2), of normal sums; those of 8 have thinner tails


def test_no_other_guesser_has_more_weight() -> None:
    """Who knows y and gives its weights in another order, or guesses against its sign, is refuted no more often: 200 runs at the truth, 5 %
    and three deviations."""
    generator, mu, m = np.random.default_rng(2), 1.5, 60
    sizes = np.diff(signed_ranks.ends(m), prepend=0)
    guessers: list[Callable[[Any], tuple[Any, Any]]] = [
        lambda y: (-abs(y), y),
        lambda y: (abs(y), y),
        lambda y: (-abs(y), y - 1),
        lambda y: (y * 0, y),
    ]
    for guess in guessers:
        refuted = 0
        for _ in range(200):
            coins = generator.random(m) < 0.5
            sure, side = guess(mu * (coins - 0.5) + generator.standard_normal(m))
            right = ((side > 0) == coins)[np.argsort(sure, kind="stable")]
            parts = np.add.reduceat(right.astype(int), np.cumsum(sizes) - sizes)
            refuted += signed_ranks.p_value(m, parts.tolist(), mu) < 0.05
        assert refuted <= 0.05 * 200 + 3 * (200 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0, 4.0])
def test_at_a_thousand_canaries_the_bound_is_within_a_quarter(mu: float) -> None:
    """What has three quarters of the true epsilon is refuted in most of 1,000 runs: so the median bound is above it. The truth itself is
    refuted in 5 %, to three deviations of 1,000 runs and of the draws."""
    generator, m, runs = np.random.default_rng(3), 1_000, 1_000
    coins = generator.random((runs, m)) < 0.5
    order = np.argsort(mu * coins + generator.standard_normal((runs, m)), axis=1)
    included = np.take_along_axis(coins, order, axis=1)
    right = np.where(np.arange(m) < m // 2, ~included, included)[
        :, np.argsort(-abs(np.arange(m) - (m - 1) / 2), kind="stable")
    ]
    last = signed_ranks.ends(m)
    parts = np.add.reduceat(right.astype(int), [0, *last[:-1]], axis=1).tolist()
    less = mu_of(0.75 * epsilon_of(mu, DELTA), DELTA)
    rates = [sum(signed_ranks.p_value(m, each, x) < 0.05 for each in parts) / runs for x in (less, mu)]
    assert rates[0] > 0.5
    assert rates[1] < 0.05 + 3 * (0.05 * 0.95 * (1 / runs + 1 / signed_ranks.DRAWS)) ** 0.5


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_bounds_hold_on_gaussian_mechanisms(mu: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """score = coin + N(0, 1/mu^2), 300 canaries, 60 runs: each form may fail in 5 % of runs, so that more than 8 of 60 failures have a
    probability below 1 % (Binomial(60, .05)). Each form is sharper than the one before it in the median."""
    monkeypatch.setattr(bounds, "HALVINGS", 9)  # mu to .08, from below
    generator, truth = random.Random(0), epsilon_of(mu, DELTA)
    found = []
    for _ in range(60):
        coins = [generator.random() < 0.5 for _ in range(300)]
        found.append(one_run([mu * coin + generator.gauss() for coin in coins], coins, delta=DELTA))
    forms = [[getattr(b, form) for b in found] for form in ("unconditional", "gaussian", "independent")]
    assert all(sum(value > truth for value in form) <= 8 for form in forms)
    medians = [sorted(form)[30] for form in forms]
    assert medians == sorted(medians)


def test_scores_without_a_signal_refute_nothing() -> None:
    """At most 5 of 40 runs may, by Binomial(40, .05) at 1 %... 6 of them has probability 1.4 %, 7 has .3 %."""
    generator, wrong = random.Random(1), 0
    for _ in range(40):
        coins = [generator.random() < 0.5 for _ in range(100)]
        bound = one_run([generator.gauss() for _ in coins], coins, delta=DELTA)
        wrong += bound.independent > 0
    assert wrong <= 6


def test_guesses_are_the_ends() -> None:
    assert ranked([0.1, 0.9, 0.5, -3.0, 2.0], 3) == ([4, 1], [3])


@pytest.mark.parametrize(
    ("scores", "coins", "more", "said"),
    [
        ([1.0] * 7, [True] * 7, {}, "needs 8 canaries"),
        ([1.0] * 8, [True] * 9, {}, "needs 8 canaries"),
        ([math.nan] + [1.0] * 7, [True] * 8, {}, "NaN"),
        ([1.0] * 8, [True] * 8, {"guesses": 9}, "1 to 8 can be guessed"),
        ([1.0] * 8, [True] * 8, {"guesses": 0}, "1 to 8 can be guessed"),
        ([1.0] * 8, [True] * 8, {"delta": 0.0}, "A delta lies between"),
        ([1.0] * 8, [True] * 8, {"delta": 1.5}, "A delta lies between"),
    ],
)
def test_what_makes_no_sense_is_refused(
    scores: list[float], coins: list[bool], more: dict[str, float], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        one_run(scores, coins, **{"delta": DELTA, **more})  # type: ignore[arg-type]


def bound(unconditional: float, gaussian: float = 0.0) -> Bound:
    return Bound(100, 25, 20, 60, DELTA, unconditional, gaussian, 0.5, 0.0, 0.0)


def test_the_sentence_bounds_and_never_says_that_epsilon_is() -> None:
    said = verdict(bound(1.5, 2.0))
    assert said["sentence"].startswith(
        "Epsilon is at least 1.50 at delta 1e-05 with 95 % confidence, whatever the training was"
    )
    assert "at least 2.00 if its trade-off is that of a Gaussian mechanism" in said["sentence"]
    assert "may be far larger" in said["sentence"]
    assert "if moreover" not in said["sentence"]  # that one is 0
    assert said["level"] == "partial"
    assert "Without assumptions on the training no epsilon is refuted" in verdict(bound(0.0, 2.0))["sentence"]
    nothing = verdict(bound(0.0))
    assert nothing["level"] == "nothing"
    assert "That shows no privacy" in nothing["sentence"]


def test_exposure_is_carlinis() -> None:
    import torch

    everything = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert [exposure(value, everything) for value in (3.0, 2.0, 1.0, 0.0)] == pytest.approx(
        [2.0, 1.0, 2 - math.log2(3), 0.0]
    )
    assert exposure(1.0, torch.ones(8)) == 0.0  # all alike: nothing is exposed


def test_a_row_says_which_guess_was_right() -> None:
    rows = table(["a", "b", "c"], [0.5, 2.0, -1.0], [True, False, False], 2, None)
    assert [(row["shows"], row["guess"], row["right"]) for row in rows] == [
        ("b", "in", False),
        ("a", "none", None),
        ("c", "out", True),
    ]
