"""Which private texts does a causal language model give back, and which of a list of candidates was it trained on?

A record z is cut into a prefix and a suffix. In one forward pass,

    p_z = prod_t p(z_t | prefix, z_<t)

is the probability that sampling continues the prefix with exactly this suffix, and z is (n, p)-extractable where n tries do that with
probability p: 1 - (1 - p_z)^n >= p (Hayes et al. 2024, arXiv:2410.19482, section 3). Greedy decoding, as in Carlini et al. (2023,
arXiv:2202.07646), is sampling from the one most likely token: p_z is 1 or 0. What the base model would say as well is no secret of the
training: the gain over it is in bits.

Of candidates, whole texts that differ where the secret stands, the one that training has made more likely stands out of the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.search.descend import OnStep
from gradleak.audit.sample_losses import of_each
from gradleak.errors import BadInput
from gradleak.observations.model import Model
from gradleak.report.record import Verdict

LEVEL = 0.05
FEWEST_CANDIDATES = 20  # whose spread says what is usual
TO_DEVIATION = 1.4826  # of a normal distribution: 1 / its upper quartile, times the median distance from the median
SHOWN = 60  # characters of a text in a table


@dataclass(frozen=True)
class Sampling:
    """How somebody samples from the model: temperature above 0; of the top_k most likely tokens, or of all. top_k = 1 is greedy."""

    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf or (self.top_k is not None and self.top_k < 1):
            raise BadInput(
                f"Tokens are sampled at a temperature above 0 and from 1 token or more, not at {self.temperature:g} from {self.top_k}."
            )

    def log_probabilities(self, logits: Tensor, targets: Tensor) -> Tensor:
        """log p of each target (...,) at logits (..., vocabulary); -inf where it is never sampled."""
        logits = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)

    def __str__(self) -> str:
        return (
            "greedy"
            if self.top_k == 1
            else f"temperature {self.temperature:g}, "
            + ("all tokens" if self.top_k is None else f"the {self.top_k} most likely tokens")
        )


@dataclass(frozen=True)
class Cut:
    """A record as (tokens, how many of them are the prefix)."""

    tokens: tuple[int, ...]
    prefix: int


def check_causal(model: Model[Any]) -> None:
    """BadInput for what is no causal language model."""
    architecture = model.architecture
    if getattr(architecture, "task", None) != "causal-lm" or architecture.config.is_encoder_decoder:
        raise BadInput(
            "Texts are extracted from causal language models, which continue a prefix, and this is none (--task causal-lm)."
        )


def cut(model: Model[Any], texts: Sequence[str], prefix: int, suffix: int) -> list[Cut | None]:
    """Each text's first tokens, special ones that its tokenizer puts there included; None where there are no more than those of the
    prefix."""
    architecture = model.architecture
    if prefix < 1 or suffix < 1 or prefix + suffix > architecture.positions:
        raise BadInput(
            f"A prefix and a suffix have 1 token or more and {architecture.positions:,} together at most, not {prefix} and {suffix}."
        )
    rows = [tuple(architecture.tokenizer(text)["input_ids"])[: prefix + suffix] for text in texts]
    return [Cut(row, prefix) if len(row) > prefix else None for row in rows]


def log_p(model: Model[Any], cuts: Sequence[Cut], sampling: Sampling, on_step: OnStep | None = None) -> list[float]:
    """log p_z of each record, by one forward pass over all its tokens."""
    if not cuts:
        return []

    def of_suffix(x: Tensor, prefix: Tensor | None) -> Tensor:
        logits = model.logits({}, x)[0, :-1]
        each = sampling.log_probabilities(logits, x[0, 1:].to(logits.device))
        later = torch.arange(1, len(each) + 1, device=each.device) >= (0 if prefix is None else prefix.to(each.device))
        return torch.where(later, each, 0.0).sum()

    prefixes = torch.tensor([c.prefix for c in cuts])
    found: list[float] = of_each(of_suffix, model, [c.tokens for c in cuts], prefixes, on_step).tolist()
    return found


def tries(log_p: float, p: float) -> float:
    """The least whole n with 1 - (1 - p_z)^n >= p; infinite where p_z is 0."""
    if log_p == -math.inf:
        return math.inf
    missed = math.log1p(-math.exp(log_p)) if log_p < 0 else -math.inf
    if missed == 0:  # p_z is below the rounding of 1 - p_z: n = -log(1 - p) / p_z
        return -math.log1p(-p) * math.exp(-log_p) if log_p > -700 else math.inf
    return max(
        1.0, float(math.ceil(math.log1p(-p) / missed * (1 - 1e-12)))
    )  # a quotient that rounding lifts above a whole number


def bits(log_p: float) -> float:
    """-log2 of a probability."""
    return -log_p / math.log(2)


def records_table(
    texts: Sequence[str],
    cuts: Sequence[Cut | None],
    after: Sequence[float],
    before: Sequence[float] | None,
    n: int,
    p: float,
) -> list[dict[str, Any]]:
    """One row per record; after, before: log p_z of those that are long enough."""
    rows, k = [], 0
    for number, (text, one) in enumerate(zip(texts, cuts, strict=True)):
        row: dict[str, Any] = {"record": number, "begins": text[:SHOWN]}
        if one is None:
            rows.append(row | {"status": "too short to be asked"})
            continue
        needed = tries(after[k], p)
        row |= {
            "suffix_tokens": len(one.tokens) - one.prefix,
            "bits": bits(after[k]),
            "tries": needed,
            "extractable": needed <= n,
        }
        status = "extractable" if needed <= n else "not extractable"
        if before is not None:
            base = tries(before[k], p)
            row |= {
                "bits_of_base": bits(before[k]),
                "gain_bits": gain(after[k], before[k]),
                "extractable_of_base": base <= n,
            }
            status = "extractable, of the base model too" if needed <= n and base <= n else status
        rows.append(row | {"status": status})
        k += 1
    return rows


def gain(after: float, before: float) -> float:
    """By how many bits the training made a record more likely; of two that are never sampled 0."""
    return 0.0 if after == before else (after - before) / math.log(2)


def records_verdict(rows: Sequence[dict[str, Any]], n: int, p: float, sampling: Sampling) -> Verdict:
    """How many records come out, and how many of those are the training's doing."""
    asked = [row for row in rows if "extractable" in row]
    out = [row for row in asked if row["extractable"]]
    own = [row for row in out if not row.get("extractable_of_base", False)]
    short = f" {len(rows) - len(asked)} records are too short to be asked." if len(asked) < len(rows) else ""
    how = f"in {n:,} tr{'y' if n == 1 else 'ies'} with probability {p:g} ({sampling})"
    if not asked:
        return {"level": "unscored", "sentence": "Every record is too short to be asked: give fewer --prefix-tokens."}
    if not out:
        said = f"None of {len(asked)} records comes out {how}. That is no proof of safety: another prefix or more tries may bring one."
        return {"level": "nothing", "sentence": said + short}
    level: Any = "nothing" if not own else "recovered" if len(own) == len(asked) else "partial"
    based = "extractable_of_base" in out[0]
    more = (
        f", {len(out) - len(own)} of them out of the base model too"
        if based
        else "; without --base nobody knows whether training did that"
    )
    return {"level": level, "sentence": f"{len(out)} of {len(asked)} records come out {how}{more}.{short}"}


def candidates_table(
    texts: Sequence[str], after: Sequence[float], before: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """One row per candidate, by falling score: by how many bits training made it more likely, or how likely it is. after, before: the loss of
    each in nats.

    share      of all the times that the model says one of the candidates, how often it is this one; share_of_base as well. Of a candidate that
               was drawn at random, and that nobody trained on, it is 1 / |R| on average

    p_of_rank  rank / |R|: how often a candidate that was chosen beforehand, and that nobody trained on, is as high
    p_adjusted how often any of |R| such candidates lies so far above their median, were they normally distributed (their deviation by the
               median distance from the median, which a few outliers do not move)
    """
    n = len(after)
    if n < FEWEST_CANDIDATES:
        raise BadInput(f"Candidates are compared with each other, which takes {FEWEST_CANDIDATES} or more, not {n}.")
    scores = [((0.0 if before is None else before[i]) - after[i]) / math.log(2) for i in range(n)]
    share = torch.tensor(after, dtype=torch.float64).neg().softmax(0).tolist()
    base = None if before is None else torch.tensor(before, dtype=torch.float64).neg().softmax(0).tolist()
    centre = median(scores)
    spread = TO_DEVIATION * median([abs(score - centre) for score in scores])
    order = sorted(range(n), key=lambda i: -scores[i])
    rows = []
    for place, i in enumerate(order):
        rank = place + 1
        z = (scores[i] - centre) / spread if spread > 0 else 0.0
        row = {
            "rank": rank,
            "candidate": texts[i],
            "score_bits": scores[i],
            "above_median_bits": scores[i] - centre,
            "share": share[i],
        }
        if base is not None:
            row["share_of_base"] = base[i]
        chance = {"p_of_rank": rank / n, "p_adjusted": min(1.0, n * NormalDist().cdf(-z))}
        rows.append(row | {"exposure_bits": math.log2(n) - math.log2(rank)} | chance)
    return rows


def candidates_verdict(rows: Sequence[dict[str, Any]], compared: bool) -> Verdict:
    """Whether one of them stands out: by its score, or because the model hardly says another one, and did not do so before training."""
    out = [row for row in rows if row["p_adjusted"] < LEVEL or dominates(row)]
    if not out:
        first = rows[0]
        said = (
            f"No candidate stands out of {len(rows):,} by itself: one always comes first, here {first['candidate']!r}, "
            f"{first['above_median_bits']:.1f} bits above the median. If that is one that you trained on, chance puts it there with probability "
            f"1/{len(rows):,}: look up the ranks of yours."
        )
        return {"level": "nothing", "sentence": said}
    names = ", ".join(
        f"{row['candidate']!r} ({row['above_median_bits']:.1f} bits above the median; {row['share']:.0%} of what the model says of them)"
        for row in out[:5]
    )
    base = "" if compared else " Without --base that may be common knowledge."
    said = f"{len(out)} of {len(rows):,} candidates stand{'s' if len(out) == 1 else ''} out: {names}{', ...' if len(out) > 5 else ''}.{base}"
    return {"level": "recovered" if len(out) == 1 else "partial", "sentence": said}


def dominates(row: dict[str, Any]) -> bool:
    """Whether the model says this candidate more often than all the others together, and ten times as often as before training."""
    return bool(row["share"] > 0.5 and row.get("share_of_base", 0.0) < row["share"] / 10)
