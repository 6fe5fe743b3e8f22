"""What the owner takes home of membership: one level and one sentence. "Not found" is not "safe"."""

from gradleak.report.membership import Membership, Rate
from gradleak.report.record import Level, Record, Verdict

CHANCE = 0.5


def judged(found: Membership) -> Membership:
    """The same with its verdict and its sentence."""
    proof, void = found["certificate"], any(flag["level"] == "error" for flag in found["flags"])
    proven = proof is not None and proof["proven"] > 0
    tells = bool(found["best"]) and found["scores"][found["best"]]["low"] > CHANCE
    level = (
        "void" if void and not proven else "members" if proven or tells else "nothing" if found["best"] else "unscored"
    )
    parts = [compared(found, void), certified(found)]
    return {**found, "verdict": level, "sentence": " ".join(part for part in parts if part)}  # type: ignore[typeddict-item]


def compared(found: Membership, void: bool) -> str:
    """How well the best score tells members from fresh samples."""
    if not found["best"]:
        if found["fresh"]:
            return "Membership: no score reads this release."
        return f"Membership: {found['members']} samples and none that took no part: how well an attacker tells them from others cannot be said."
    if void:
        reason = next(flag["sentence"] for flag in found["flags"] if flag["level"] == "error")
        return f"Membership: void. {reason}"
    score, count = found["scores"][found["best"]], len(found["scores"])
    area = f"AUC {score['auc']:.2f} ({score['low']:.2f} to {score['high']:.2f})"
    chosen = f"{found['best']}, the best of {count} scores, whose intervals hold for all of them at once"
    if score["low"] <= CHANCE:
        return (
            f"Membership: no score tells your samples from fresh ones for certain; the best has {area} ({chosen}). "
            "Not found is not safe: another attack may tell them."
        )
    return (
        f"Membership: an attacker who has your samples among others tells them from fresh ones with {area}, {at(score['rates'][0])}, by "
        f"{chosen}."
    )


def headline(found: Membership) -> str:
    """The same in one sentence for everybody."""
    proof, best = found["certificate"], found["scores"].get(found["best"])
    if proof is not None and proof["proven"]:
        return f"{proof['proven']} of your {found['members']} samples are proven to have been trained on, by what was shared alone."
    if found["verdict"] == "members" and best is not None:
        true, low, high = (100 * best["rates"][0][key] for key in ("true", "low", "high"))
        false = 100 * (best["rates"][0]["false"] if best["rates"][0]["resolved"] else best["rates"][0]["false_high"])
        return (
            f"Of 100 of your samples, whoever has them on a list picks out {true:.0f} ({low:.0f} to {high:.0f}, 95 % interval) as trained on, "
            f"and accuses at most {max(false, 1):.0f} of 100 others wrongly."
        )
    if found["verdict"] == "nothing":
        return f"None of your {found['members']} samples can be told from fresh ones for certain by the scores that were tried."
    if found["verdict"] == "void":
        return "No number on this page can be relied on: a check failed."
    return "Which of your samples were trained on cannot be said: there was nothing to compare them with."


def at(rate: Rate) -> str:
    """The true positives at a rate of false alarms."""
    true, low, high, false = (percent(rate[key]) for key in ("true", "low", "high", "false"))
    told = f"{true} of them ({low} to {high}) at {false} false alarms"
    return (
        told
        if rate["resolved"]
        else f"{told} (or up to {percent(rate['false_high'])}: fresh samples are too few to tell)"
    )


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def certified(found: Membership) -> str:
    """How many members are proven."""
    proof, total = found["certificate"], found["members"]
    if proof is None:
        alone = not found["best"] and not found["fresh"]
        return f"No member is proven: {found['not_run']['certificate']}" if alone else ""
    return (
        f"Proven members by certificate: {proof['proven']} of {total}, at most {proof['expected']:.1g} false alarms expected"
        + (f"; {proof['alarms']} fresh samples passed too." if proof["alarms"] else ".")
    )


def with_membership(record: Record, found: Membership) -> None:
    """Put what was found into a record, beside the verdict of its attacks, if any ran."""
    record["membership"] = found
    said: Verdict = {"level": found["verdict"], "headline": headline(found), "sentence": found["sentence"]}
    if not record["results"]:
        record["verdict"] = said
        return
    order: tuple[Level, ...] = ("recovered", "void", "partial", "members", "nothing", "unscored", "absent")
    attacks = record["verdict"]
    level = min((attacks["level"], said["level"]), key=order.index)
    both = {key: f"{said.get(key, '')} {attacks.get(key, '')}".strip() for key in ("headline", "sentence")}
    record["verdict"] = {**attacks, "level": level, **both}  # type: ignore[typeddict-item]
