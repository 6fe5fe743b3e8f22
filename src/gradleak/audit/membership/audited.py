"""The owner's audit: her samples and fresh ones go through every score, and what an attacker would know of them is written down."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.membership import SCORES
from gradleak.attacks.membership.certificate import certificate
from gradleak.attacks.membership.evidence import Evidence
from gradleak.attacks.search.descend import OnStep
from gradleak.audit.explanations import flag
from gradleak.audit.membership.rates import auc, auc_interval, rate, roc
from gradleak.audit.membership.told_apart import told_apart
from gradleak.audit.membership.words import judged
from gradleak.audit.scoring import SCORING
from gradleak.audit.scoring.scoring import Candidates
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.sources import named_split
from gradleak.observations.observation import Observation
from gradleak.report.membership import Certificate, Exposed, Membership, Score
from gradleak.report.record import Flag

MOST = 2_000  # samples of either kind
GALLERY = 20_000  # samples where only the certificate is asked, which looks at the first layer alone
FEWEST = 20  # fresh samples, and members beside them
RATES = (0.01, 0.001)  # of false alarms
LEVEL = 0.05
PROOF = 1e-6  # false-alarm rate of the certificate
SHOWN = 10  # most exposed samples
VOID, SUSPECT = 0.6, 0.5  # lower end of the AUC without the model, from which on its numbers are void, or to be doubted


@dataclass(frozen=True)
class Pool:
    """Members first, then fresh samples. reference: places of those by which scores are calibrated, the first of the fresh ones."""

    every: Candidates
    members: int
    reference: Tensor
    flags: list[Flag]

    @property
    def fresh(self) -> slice:
        """Where those are that scores are measured by."""
        return slice(self.members + len(self.reference), None)


def membership(
    observation: Observation[Any],
    members: str,
    fresh: str | None,
    *,
    seed: int = 0,
    limit: int | None = None,
    redacted: bool = False,
    on_step: Callable[[str], OnStep] | None = None,
) -> Membership:
    """Members and fresh samples by source, "DATA" or "DATA:split"; without fresh ones only the certificate says something.

    limit: how many of each are looked at, at most, drawn by the seed. redacted: the most exposed samples are named by their rows and not shown. Raises BadInput for samples that the model cannot take, for
    too few, and for the same samples on both sides.
    """
    scoring, model = SCORING[observation.model.architecture.modality], observation.model
    pool = pooled(observation, members, fresh, seed, limit)
    m, flags = pool.members, pool.flags
    step = None if on_step is None else on_step("membership")
    scores, not_run = scored(Evidence(observation, pool.every.inputs, pool.every.labels, pool.reference, step), pool)
    share = LEVEL / max(
        len(scores), 1
    )  # Bonferroni: the intervals hold for all scores at once, the best one among them
    told = {name: measured(values[:m], values[pool.fresh], share) for name, values in scores.items()}
    best = max(told, key=lambda name: told[name]["auc"], default="")
    proof, p, reason = proofs(observation, pool)
    not_run |= {"certificate": reason} if reason else {}
    apart = None
    if fresh is not None:
        area = told_apart(scoring.features(pool.every.inputs, model), [i < m for i in range(len(pool.every))], seed)
        apart = dict(zip(("auc", "low", "high"), area, strict=True))
        flags += differing(*area)
    found: Membership = {
        "members": m,
        "fresh": max(len(pool.every) - m - len(pool.reference), 0),
        "reference": len(pool.reference),
        "best": best,
        "level": 1 - LEVEL,
        "scores": told,
        "not_run": not_run,
        "certificate": proof,
        "apart": apart,  # type: ignore[typeddict-item]
        "exposed": exposed(scores.get(best), p, pool, None if redacted else model.architecture.show),
        "media": scoring.media,  # type: ignore[typeddict-item]
        "flags": flags,
        "verdict": "unscored",
        "sentence": "",
    }
    return judged(found)


def pooled(observation: Observation[Any], members: str, fresh: str | None, seed: int, limit: int | None) -> Pool:
    """Both kinds of samples side by side, none twice, with what a reader has to know of them."""
    scoring, model, flags = SCORING[observation.model.architecture.modality], observation.model, list[Flag]()
    most = GALLERY if fresh is None else MOST
    if limit is not None and limit < (1 if fresh is None else FEWEST):
        raise BadInput(f"--limit {limit} is too small: give at least {1 if fresh is None else FEWEST} of each kind.")
    own = scoring.candidates(*named_split(members, ("train",)), model, most, seed)
    sides = [some_of(own, limit, seed)]
    if fresh is not None:
        other = scoring.candidates(*named_split(fresh, ("test", "validation")), model, MOST, seed + 1)
        if own.classes and other.classes and own.classes != other.classes:
            names = " and ".join(", ".join(side.classes[:4]) for side in (own, other) if side.classes)
            raise BadInput(f"The classes of {members} and {fresh} are not the same: {names}.")
        known = set(scoring.keys(own.inputs))
        kept = [i for i, key in enumerate(scoring.keys(other.inputs)) if key not in known]
        if not kept:
            raise BadInput(f"All samples of {fresh} are among those of {members}: none is fresh.")
        if twice := len(other) - len(kept):
            flags.append(flag("overlap", "warning", f"{twice} fresh samples are among the members, and were left out."))
        other = other.some(kept)
        if min(len(own), len(other)) < FEWEST:
            few = f"{len(own)} members and {len(other)} fresh samples are too few to measure rates"
            raise BadInput(f"{few}: give {FEWEST} of each, or the members alone for the certificate.")
        sides.append(some_of(other, limit, seed))
    for side, name in zip(sides, (members, fresh), strict=False):
        if side.left_out:
            flags.append(flag("left_out", "info", f"{side.left_out} samples of {name} are empty or too long."))
        if len(side) == min(most, limit or most) < side.of:
            flags.append(flag("sampled", "info", f"{len(side):,} of the {side.of:,} samples of {name} were drawn."))
    every = joined(sides)
    if not every.labelled and every.labels is not None:
        labels = predicted(observation, every.inputs)
        sentence = (
            "Not all samples come with labels: the class that the model prefers stands in, as its confidence does."
        )
        every, flags = Candidates(**{**vars(every), "labels": labels}), [*flags, flag("labels", "info", sentence)]
    m = len(sides[0])
    return Pool(every, m, torch.arange(m, m + (len(every) - m) // 4), flags)


def some_of(every: Candidates, limit: int | None, seed: int) -> Candidates:
    """At most so many of them, at random, in their order."""
    if limit is None or len(every) <= limit:
        return every
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:limit]
    return every.some(sorted(drawn.tolist()))


def joined(sides: Sequence[Candidates]) -> Candidates:
    """Candidates one after another."""
    first = sides[0]
    inputs: Any = [side.inputs for side in sides]
    inputs = torch.cat(inputs) if isinstance(first.inputs, Tensor) else sum(inputs, ())
    labels = None if first.labels is None else padded([side.labels for side in sides if side.labels is not None])
    rows = [row for side in sides for row in side.rows]
    return Candidates(inputs, labels, rows, all(side.labelled for side in sides), first.classes, 0, len(rows))


def padded(labels: Sequence[Tensor]) -> Tensor:
    """Labels one after another; those of tokens are padded by what counts for nothing."""
    if labels[0].ndim == 1:
        return torch.cat(list(labels))
    longest = max(part.shape[1] for part in labels)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=-100) for part in labels])


def predicted(observation: Observation[Any], inputs: Any) -> Tensor:
    """(n,) the classes that the trained model prefers."""
    start, end = observation.ends()
    tensors = observation.release.merged(observation.model, end or start or {})
    with torch.no_grad():
        rows = [observation.model.logits(tensors, inputs[i : i + 1])[0].argmax() for i in range(len(inputs))]
    return torch.stack(rows)


def scored(seen: Evidence, pool: Pool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({score: (n,)}, {score: why there is none}); all of the second kind where there are no fresh samples."""
    if not len(pool.reference):
        return {}, dict.fromkeys(SCORES, "It needs fresh samples, which took no part in the training: --non-members.")
    found, reasons = dict[str, Tensor](), dict[str, str]()
    for name, score in SCORES.items():
        try:
            found[name] = score(seen).nan_to_num(-torch.inf)
        except NotObserved as reason:
            reasons[name] = str(reason)
    return found, reasons


def measured(members: Tensor, fresh: Tensor, alpha: float) -> Score:
    """What a score tells, with intervals that fail with probability alpha."""
    area = auc(members, fresh)
    low, high = auc_interval(area, len(members), len(fresh), alpha)
    rates = [rate(members, fresh, false, alpha) for false in RATES]
    return {"auc": area, "low": low, "high": high, "rates": rates, "roc": roc(members, fresh)}


def proofs(observation: Observation[Any], pool: Pool) -> tuple[Certificate | None, Tensor | None, str]:
    """Members proven by the certificate, all p-values, and why there are none."""
    m = pool.members
    try:
        p = certificate(observation, pool.every.inputs)
    except NotObserved as reason:
        return None, None, str(reason)
    proven, alarms = int((p[:m] < PROOF).sum()), int((p[m:] < PROOF).sum())
    return {"level": PROOF, "proven": proven, "alarms": alarms, "expected": m * PROOF}, p, ""


def exposed(
    scores: Tensor | None, p: Tensor | None, pool: Pool, show: Callable[[Any], list[str]] | None
) -> list[Exposed]:
    """The members that an attacker is surest of: proven ones first, then by the best score."""
    if scores is None and p is None:
        return []
    m, none = pool.members, torch.zeros(len(pool.every), dtype=torch.float64)
    values, chance = (none if part is None else part for part in (scores, p))
    order = sorted(range(m), key=lambda i: (p is None or float(chance[i]) >= PROOF, -float(values[i])))[:SHOWN]
    if scores is None:
        order = [i for i in order if float(chance[i]) < PROOF]
    shown = [""] * len(order) if show is None else show(pool.every.some(order).inputs) if order else []
    rows: list[Exposed] = [
        {
            "row": pool.every.rows[i],
            "score": None if scores is None else float(scores[i]),
            "above": None if scores is None else int((scores[pool.fresh] >= scores[i]).sum()),
            "p": None if p is None else float(p[i]),
        }
        for i in order
    ]
    return rows if show is None else [{**row, "shown": text} for row, text in zip(rows, shown, strict=True)]


def differing(area: float, low: float, high: float) -> list[Flag]:
    """What it means that members and fresh samples differ without the model."""
    if low <= SUSPECT:
        return []
    level: Any = "error" if low > VOID else "warning"
    sentence = (
        f"Members and fresh samples are told apart without the model, by the samples alone: AUC {area:.2f} ({low:.2f} to {high:.2f}). "
        "What separates them may be their source and not the training: take fresh samples from where the members come from."
    )
    return [flag("apart", level, sentence)]
