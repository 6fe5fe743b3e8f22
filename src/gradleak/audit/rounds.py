"""Several rounds of one client: whether they share their private data, which is what an attack on all of them takes for granted."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.explanations import flag
from gradleak.errors import BadInput
from gradleak.observations.observation import Observation
from gradleak.observations.rounds import Rounds
from gradleak.report.record import Flag

LEVELS = ("error", "warning", "info")
EXPLAINED = 0.3  # of a round, beyond its noise: a tenth of its energy may be left
APART = 3.0  # times what is left of the middle one of the rounds: more is no chance


def of_each(check: Callable[[Observation[Any]], Sequence[Flag]], observation: Observation[Any]) -> list[Flag]:
    """What a check says of an observation; of several rounds the gravest of each kind, with the round that it is said of."""
    if not isinstance(observation, Rounds):
        return list(check(observation))
    gravest = dict[str, Flag]()
    for number, one in observation.alone().items():
        for found in check(one):
            before = gravest.get(found["name"])
            if before is None or LEVELS.index(found["level"]) < LEVELS.index(before["level"]):
                sentence = f"Round {number}: {found['sentence']}"
                gravest[found["name"]] = {**found, "sentence": sentence}
    return list(gravest.values())


def attacked_as(observation: Observation[Any], attack: Any) -> list[Flag]:
    """Which rounds these are, and whether the attack took them as one; only that stands in a verdict."""
    if not isinstance(observation, Rounds):
        return []
    which = f"Rounds {observation.numbers} of one client were attacked"
    if getattr(attack, "joint", False):
        return [flag("rounds", "info", f"{which} jointly.")]
    return [flag("each_round", "info", f"{which} one by one, and what each gave was put together.")]


def left(observation: Observation[Any], found: Reconstruction) -> dict[int, float]:
    """{round: what a reconstruction does not explain of it, over its size, beyond its noise}; empty where nothing can be replayed."""
    value, labels = found.value, None if found.labels is None else found.labels.cpu()
    if isinstance(value, int) or not len(value):
        return {}
    each = observation.to(torch.device("cpu")).alone()
    if isinstance(value, Tensor):
        if labels is None or len(labels) != len(value):
            return {}
        value = value.to(next(iter(observation.released.values())).dtype).cpu()
    try:
        with torch.no_grad():
            residuals = {number: one.residual(value, labels) for number, one in each.items()}
    except BadInput:  # what the model cannot take
        return {}
    return {n: max(r**2 - noise_share(each[n]), 0.0) ** 0.5 for n, r in residuals.items()}


def noise_share(one: Observation[Any]) -> float:
    """The energy of the noise in what was released, over the whole of it."""
    noise, released = one.noise(), one.released
    added = sum(float(noise[name]) ** 2 * tensor.numel() for name, tensor in released.items() if name in noise)
    return added / max(sum(float(tensor.double().square().sum()) for tensor in released.values()), 1e-300)


def apart(rest: Mapping[int, float]) -> tuple[int, ...]:
    """The rounds that something else than the others' explanation is needed for; none where most rounds are not explained at all."""
    middle = median(rest.values()) if rest else 0.0
    odd = tuple(n for n, value in rest.items() if value > max(EXPLAINED, APART * middle))
    return odd if 2 * len(odd) < len(rest) else ()


def fit(observation: Observation[Any], found: Reconstruction) -> list[Flag]:
    """Whether one reconstruction explains all rounds, as a flag where it does not."""
    rest = left(observation, found) if isinstance(observation, Rounds) else {}
    if odd := apart(rest):
        most = max(value for number, value in rest.items() if number not in odd)
        which = ", ".join(map(str, odd))
        sentence = (
            f"Round {which} is not explained by what explains the others ({min(rest[n] for n in odd):.2f} of its size is left beyond the "
            f"noise, of theirs at most {most:.2f}): it is of other data, or damaged."
        )
        return [flag("rounds_apart", "warning", sentence)]
    return []


def shared(together: Mapping[int, float], alone: Mapping[int, float]) -> list[Flag]:
    """What the rounds one by one say beside all of them together: {round: what is left of it} of both."""
    most, whole = max(alone.values()), max(together.values())
    if most <= EXPLAINED:
        sentence = (
            f"The rounds do not fit together: jointly up to {whole:.2f} of one is left unexplained beyond its noise, and at most {most:.2f} one by "
            "one. They are of other data, or the joint search ended too early: what counts are the rounds one by one."
        )
        return [flag("rounds_differ", "warning", sentence)]
    sentence = (
        f"Whether the rounds share their data is not known: the attack explains them neither jointly (up to {whole:.2f} of one is left beyond "
        f"its noise) nor one by one (up to {most:.2f})."
    )
    return [flag("rounds_unsure", "warning", sentence)]
