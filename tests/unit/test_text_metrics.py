"""Scores of texts against slow references, and on cases that can be done by hand."""

import itertools
import random

import pytest

from gradleak.audit.metrics.texts import (
    exact_match,
    frequent_words,
    match_texts,
    position_accuracy,
    rouge1,
    rouge2,
    rouge_l,
    score_texts,
)
from gradleak.errors import BadInput
from oracles import longest_common_subsequence


def sentences(count: int, seed: int = 0) -> list[list[str]]:
    source = random.Random(seed)
    return [source.choices("abcdefgh", k=source.randint(1, 9)) for _ in range(count)]


def test_rouge_counts_shared_tokens_one_by_one() -> None:
    for a, b in zip(sentences(30), sentences(30, 1), strict=True):
        for n, ours in ((1, rouge1), (2, rouge2)):
            left = [tuple(a[i : i + n]) for i in range(len(a) - n + 1)]
            right = [tuple(b[i : i + n]) for i in range(len(b) - n + 1)]
            total, shared = len(left) + len(right), 0
            for gram in left:
                if gram in right:
                    right.remove(gram)
                    shared += 1
            if total:
                assert ours(a, b) == pytest.approx(2 * shared / total)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    for a, b in zip(sentences(30), sentences(30, 1), strict=True):
        expected = 2 * longest_common_subsequence(a, b) / (len(a) + len(b))
        assert rouge_l(a, b) == pytest.approx(expected)


def test_cases_by_hand() -> None:
    truth = ["the", "cat", "sat", "on", "the", "mat"]
    assert rouge1(["the", "cat"], truth) == pytest.approx(2 * 2 / 8)
    assert rouge2(["the", "cat"], truth) == pytest.approx(2 * 1 / 6)
    assert rouge1(["mat", "the", "on", "sat", "cat", "the"], truth) == 1
    assert position_accuracy(["the", "dog", "sat"], truth) == pytest.approx(2 / 6)
    assert exact_match(truth, truth) == 1
    assert exact_match(truth[:-1], truth) == 0
    assert rouge1([], truth) == rouge2([], truth) == rouge_l([], truth) == 0


def test_matching_finds_the_best_assignment_of_all() -> None:
    truth, found = sentences(4, 2), sentences(4, 3)
    best = max(
        sum(rouge1(f, t) + 1e-3 * rouge2(f, t) for f, t in zip(order, truth, strict=True))
        for order in itertools.permutations(found)
    )
    matched = match_texts(found, truth)
    assert sum(rouge1(f, t) + 1e-3 * rouge2(f, t) for f, t in zip(matched, truth, strict=True)) == pytest.approx(best)


def test_missing_sentences_score_nothing_and_superfluous_ones_cost_nothing() -> None:
    truth = [["a", "b"], ["c", "d"]]
    assert score_texts([["c", "d"]], truth)["exact_match"] == [0.0, 1.0]
    assert score_texts([["x"], ["c", "d"], ["a", "b"]], truth)["rouge1"] == [1.0, 1.0]
    with pytest.raises(BadInput, match="no true sentences"):
        score_texts([], [])


def test_frequent_words_are_in_order_of_frequency() -> None:
    assert frequent_words([["a", "b"], ["b", "c"], ["b", "a"]], 2) == ["b", "a"]
