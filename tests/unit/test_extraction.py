"""What language models give back: probabilities against loops over single tokens, tries against the definition."""

import math
import random

import pytest
import torch

from gradleak.audit.extraction import (
    Cut,
    Sampling,
    candidates_table,
    candidates_verdict,
    check_causal,
    cut,
    gain,
    log_p,
    records_table,
    records_verdict,
    tries,
)
from gradleak.audit.sample_losses import alignments, losses
from gradleak.errors import BadInput
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import LanguageModel
from trained import language_model

TEXTS = load_texts("embedded", indices=[0, 3, 5]).texts
ROUNDING = 1e-4  # nats, of float32 logits that were added up in batches of another size


def model() -> LanguageModel:
    return language_model("gpt2", "causal-lm", width=32)


def by_token(tokens: tuple[int, ...], prefix: int, temperature: float, top_k: int | None) -> float:
    """One token after the other, one text at a time: softmax over what is kept."""
    total = 0.0
    for t in range(prefix, len(tokens)):
        logits = (model().logits({}, (tokens[:t],))[0, -1].double() / temperature).tolist()
        kept = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
        if tokens[t] not in kept:
            return -math.inf
        total += logits[tokens[t]] - math.log(sum(math.exp(logits[i]) for i in kept))
    return total


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.0, 200), (2.0, 400)])
def test_p_z_is_the_product_over_single_tokens(temperature: float, top_k: int | None) -> None:
    cuts = [one for one in cut(model(), TEXTS, 4, 6) if one is not None]
    assert len(cuts) == len(TEXTS)
    found = log_p(model(), cuts, Sampling(temperature, top_k))
    for value, one in zip(found, cuts, strict=True):
        assert value == pytest.approx(by_token(one.tokens, 4, temperature, top_k), abs=ROUNDING)


def test_greedy_is_one_or_nothing() -> None:
    """What the model itself continues with comes out with certainty, anything else never."""
    start = model().architecture.encode(TEXTS[:1])[0][:4]
    tokens = start
    for _ in range(5):
        tokens = (*tokens, int(model().logits({}, (tokens,))[0, -1].argmax()))
    other = (*tokens[:-1], (tokens[-1] + 1) % 400)
    assert log_p(model(), [Cut(tokens, 4), Cut(other, 4)], Sampling(top_k=1)) == [0.0, -math.inf]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("p_z", [0.9, 0.3, 1e-3, 1e-9])
def test_tries_are_the_least_that_reach_the_probability(p_z: float, p: float) -> None:
    n = tries(math.log(p_z), p)
    assert n == int(n)
    reached = [-math.expm1(k * math.log1p(-p_z)) for k in (n - 1, n)]
    assert reached[1] >= p * (1 - 1e-9) > reached[0] * (1 - 2e-9)  # 1e-9: p_z went through a logarithm and back


def test_tries_at_the_ends() -> None:
    assert tries(0.0, 0.5) == 1
    assert tries(-math.inf, 0.5) == math.inf
    # p_z below the rounding of 1 - p_z: n p_z = -log(1 - p)
    assert tries(-100.0, 0.5) == pytest.approx(math.log(2) * math.exp(100.0))
    assert tries(-2000.0, 0.5) == math.inf
    assert tries(math.log(0.5), 0.75) == 2  # exactly


def test_losses_are_sums_over_tokens_and_alignments_their_derivative() -> None:
    """Against the model's own mean loss of each text, and a central difference: 1e-3 of its size is what float32 leaves of one."""
    known, tokens = model(), model().architecture.encode(TEXTS)
    found = losses(known, tokens, None)
    for value, row in zip(found.tolist(), tokens, strict=True):
        assert value == pytest.approx(float(known.loss({}, (row,), None)) * (len(row) - 1), rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    towards = {name: torch.randn(t.shape, generator=generator) * 0.01 for name, t in known.parameters.items()}
    wide = known.to(torch.float64)
    ends = [
        losses(
            wide.__class__(
                **{
                    **vars(wide),
                    "parameters": {n: t + s * 1e-4 * towards[n].double() for n, t in wide.parameters.items()},
                }
            ),
            tokens,
            None,
        )
        for s in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / 2e-4
    assert torch.allclose(
        alignments(known, towards, tokens, None), slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max())
    )


def test_records_that_are_too_short_are_told_and_not_called_safe() -> None:
    cuts = cut(model(), ["a", *TEXTS[:1]], 4, 6)
    assert cuts[0] is None
    rows = records_table(["a", TEXTS[0]], cuts, [math.log(0.2)], [math.log(1e-6)], 100, 0.5)
    assert rows[0]["status"] == "too short to be asked"
    assert rows[1]["extractable"] is True
    assert rows[1]["extractable_of_base"] is False
    assert rows[1]["gain_bits"] == pytest.approx(math.log2(0.2 / 1e-6))
    said = records_verdict(rows, 100, 0.5, Sampling())
    assert said["level"] == "recovered"
    assert "1 of 1 records come out in 100 tries with probability 0.5" in said["sentence"]
    assert "1 records are too short" in said["sentence"]
    none = records_table(["a"], [None], [], None, 100, 0.5)
    assert records_verdict(none, 100, 0.5, Sampling())["level"] == "unscored"


def test_what_the_base_says_too_is_no_find() -> None:
    cuts = cut(model(), TEXTS[:1], 4, 6)
    rows = records_table(TEXTS[:1], cuts, [math.log(0.2)], [math.log(0.2)], 100, 0.5)
    said = records_verdict(rows, 100, 0.5, Sampling(top_k=1))
    assert said["level"] == "nothing"
    assert "1 of them out of the base model too" in said["sentence"]
    alone = records_verdict(records_table(TEXTS[:1], cuts, [math.log(0.2)], None, 100, 0.5), 100, 0.5, Sampling())
    assert "without --base nobody knows" in alone["sentence"]
    not_out = records_verdict(records_table(TEXTS[:1], cuts, [-100.0], None, 100, 0.5), 100, 0.5, Sampling())
    assert not_out["level"] == "nothing"
    assert "no proof of safety" in not_out["sentence"]
    assert gain(-math.inf, -math.inf) == 0.0


def test_one_candidate_stands_out_and_noise_does_not() -> None:
    """200 normal scores: the adjusted p-value of the first is below .05 in 5 % of lists, so that more than 6 of 40 have a
    probability below 2 %. A score 8 deviations above (p = 6e-16) is named, at rank 1 with log2 200 bits of exposure."""
    generator, wrong = random.Random(0), 0
    names, flat = [str(i) for i in range(200)], [0.0] * 200

    def nats(scores: list[float]) -> list[float]:
        return [-score * 0.1 * math.log(2) for score in scores]  # a tenth: no share of the likelihood becomes large

    for _ in range(40):
        scores = [generator.gauss() for _ in names]
        wrong += candidates_table(names, nats(scores), flat)[0]["p_adjusted"] < 0.05
    assert wrong <= 6
    scores[17] = 8.0
    rows = candidates_table(names, nats(scores), flat)
    assert (rows[0]["candidate"], rows[0]["rank"]) == ("17", 1)
    assert rows[0]["exposure_bits"] == pytest.approx(math.log2(200))
    assert rows[-1]["exposure_bits"] == 0.0
    said = candidates_verdict(rows, True)
    assert said["level"] == "recovered"
    assert "'17'" in said["sentence"]
    assert "common knowledge" in candidates_verdict(rows, False)["sentence"]
    scores[17] = 0.0
    nothing = candidates_verdict(candidates_table(names, nats(scores), flat), True)
    assert nothing["level"] == "nothing"
    assert "one always comes first" in nothing["sentence"]


def test_a_candidate_that_the_model_hardly_ever_replaces_stands_out() -> None:
    """Losses as of digits that share prefixes: the score's spread is wide and says nothing, and 90 % of the likelihood is one candidate's."""
    names = [f"{i:02}" for i in range(100)]
    after = [20.0 - 3.0 * (i // 10 == 4) - 3.0 * (i % 10 == 2) - 5.0 * (i == 42) for i in range(100)]
    row = candidates_table(names, after, [20.0] * 100)[0]
    assert row["candidate"] == "42"
    weights = [math.exp(-loss) for loss in after]
    assert row["share"] == pytest.approx(weights[42] / sum(weights))
    assert row["share_of_base"] == pytest.approx(0.01)
    assert candidates_verdict([row], True)["level"] == "recovered"
    known = candidates_table(names, after, after)  # the base model said so before: nothing that training did
    assert candidates_verdict(known, True)["level"] == "nothing"


def test_candidates_that_are_all_alike_do_not_stand_out() -> None:
    rows = candidates_table([str(i) for i in range(20)], [1.0] * 20)
    assert all(row["p_adjusted"] == 1.0 for row in rows)


def test_what_makes_no_sense_is_refused() -> None:
    for values in ((0.0, None), (math.inf, None), (1.0, 0)):
        with pytest.raises(BadInput, match="temperature above 0"):
            Sampling(*values)
    with pytest.raises(BadInput, match="together at most"):
        cut(model(), TEXTS, 60, 60)
    with pytest.raises(BadInput, match="takes 20 or more, not 3"):
        candidates_table(["a", "b", "c"], [1.0] * 3)
    with pytest.raises(BadInput, match="causal language models"):
        check_causal(language_model("bert", "classification", width=32))
