"""Advice in words, and the closed form of epsilon behind it."""

import math

import pytest
import torch

from gradleak.audit.advice import Tried, advice
from gradleak.errors import BadInput
from gradleak.observations.private_step import gaussian_delta, gaussian_epsilon

BARE = Tried("none", 1.0, "analytic", 0.01, accuracy=0.91)


def test_a_sentence_says_what_is_saved_what_it_costs_and_what_is_proven() -> None:
    tried = Tried("dp-sgd:1:0.8", 0.07, "map-inversion", 0.01, accuracy=0.89, epsilon=8.94)
    assert advice([BARE, tried]) == [
        "dp-sgd:1:0.8: epsilon 8.94 at delta 1e-05; top-1 falls from 100 % to 7 % (map-inversion); accuracy goes from 0.91 to 0.89."
    ]


def test_a_defense_that_only_breaks_an_attack_is_not_called_safe() -> None:
    [sentence] = advice([BARE, Tried("top-k:0.1", 0.98, "likely-text", 0.01, unaware=0.0)])
    assert "hides nothing: top-1 stays at 98 % (likely-text)" in sentence
    assert "an attacker who does not know it would reach 0 %" in sentence
    assert "nothing is proven" in sentence


def test_chance_is_called_chance_of_what_was_tried() -> None:
    [sentence] = advice([BARE, Tried("sign", 0.01, "dlg", 0.01)])
    assert "falls from 100 % to 1 %, which is chance, in all attacks tried" in sentence


@pytest.mark.parametrize("mu", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_delta_is_how_much_one_density_exceeds_the_other(mu: float, epsilon: float) -> None:
    """The integral of max(p - e^epsilon q, 0) over N(mu, 1) and N(0, 1), summed: the definition."""
    x = torch.linspace(-12, 16, 400_001, dtype=torch.float64)
    p, q = (torch.exp(-((x - centre) ** 2) / 2) / math.sqrt(2 * math.pi) for centre in (mu, 0.0))
    integral = float((p - math.exp(epsilon) * q).clamp_min(0).sum() * (x[1] - x[0]))
    assert gaussian_delta(mu, epsilon) == pytest.approx(
        integral, abs=1e-6
    )  # the step of the sum, 7e-5, squared, over kinks


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
def test_epsilon_belongs_to_its_delta(mu: float) -> None:
    assert gaussian_delta(mu, gaussian_epsilon(mu, 1e-5)) == pytest.approx(1e-5, rel=1e-6)


def test_what_no_mechanism_has_is_refused_in_a_sentence() -> None:
    with pytest.raises(BadInput, match="mu above 0 and delta between 0 and 1, not 0 and 1e-05"):
        gaussian_epsilon(0, 1e-5)
