"""Scores of recovered texts: pure functions of token sequences, one number per sentence, all in [0, 1].

Sentences are sequences of tokens of any kind (ids, or words). ROUGE is the F-measure of Lin (2004), without stemming.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from gradleak.errors import BadInput

Sentence = Sequence[Hashable]


def rouge_n(found: Sentence, truth: Sentence, n: int) -> float:
    """F-measure of shared n-grams, each counted as often as it occurs in both; 1 for two sentences without any."""
    a, b = (Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (found, truth))
    if not a and not b:
        return float(list(found) == list(truth))
    return 2 * sum((a & b).values()) / (a.total() + b.total())


def rouge1(found: Sentence, truth: Sentence) -> float:
    """ROUGE-1: shared tokens, whatever their order; the token F1."""
    return rouge_n(found, truth, 1)


def rouge2(found: Sentence, truth: Sentence) -> float:
    """ROUGE-2: shared pairs of neighbours."""
    return rouge_n(found, truth, 2)


def rouge_l(found: Sentence, truth: Sentence) -> float:
    """ROUGE-L: F-measure of the longest common subsequence."""
    if not found and not truth:
        return 1.0
    row = [0] * (len(truth) + 1)
    for token in found:
        previous = row[:]
        for j, other in enumerate(truth, 1):
            row[j] = previous[j - 1] + 1 if token == other else max(previous[j], row[j - 1])
    return 2 * row[-1] / (len(found) + len(truth))


def exact_match(found: Sentence, truth: Sentence) -> float:
    """1 when every token is right and in its place."""
    return float(list(found) == list(truth))


def position_accuracy(found: Sentence, truth: Sentence) -> float:
    """Share of the true tokens that stand in their place; tokens beyond the truth's end do not count."""
    if not truth:
        return float(not found)
    return sum(a == b for a, b in zip(found, truth, strict=False)) / len(truth)


TEXT_METRICS: dict[str, Callable[[Sentence, Sentence], float]] = {
    "rouge1": rouge1,
    "rouge2": rouge2,
    "rouge_l": rouge_l,
    "exact_match": exact_match,
    "position_accuracy": position_accuracy,
}


def match_texts(found: Sequence[Sentence], truth: Sequence[Sentence]) -> list[Sentence]:
    """For each true sentence the one found for it: the assignment with the largest total ROUGE-1, ROUGE-2 breaking ties.

    Missing ones are empty, superfluous ones are dropped.
    """
    from scipy.optimize import linear_sum_assignment

    if not truth:
        raise BadInput("There are no true sentences to compare with.")
    empty: Sentence = ()
    padded = [*found, *[empty] * max(len(truth) - len(found), 0)]
    gain = [[rouge1(f, t) + 1e-3 * rouge2(f, t) for f in padded] for t in truth]
    _, chosen = linear_sum_assignment(gain, maximize=True)
    return [padded[j] for j in chosen]


def score_texts(found: Sequence[Sentence], truth: Sequence[Sentence]) -> dict[str, list[float]]:
    """Every metric of every true sentence, after matching."""
    pairs = list(zip(match_texts(found, truth), truth, strict=True))
    return {name: [metric(f, t) for f, t in pairs] for name, metric in TEXT_METRICS.items()}


def frequent_words(public: Sequence[Sentence], length: int) -> Sentence:
    """The blind control: the most frequent tokens of public sentences, in order of their frequency."""
    return [token for token, _ in Counter(token for sentence in public for token in sentence).most_common(length)]
