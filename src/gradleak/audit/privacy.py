"""What differential privacy says of an audit: attack <= truth <= bound, by the audit's own measure of success.

An audit of pictures asks whether the true sample is the nearest of n candidates. Without the sample in the training that happens with
probability 1 / n, whatever the attack, for then the candidates are alike; with it at most with 1 - f(1 / n). Neighbours differ by one sample
that is added or removed; epsilon is told for one in the place of another, too. Clipping alone, noise alone, and noise without an accountant have no epsilon; that is said.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradleak.audit.bound import van_trees
from gradleak.audit.explanations import flag
from gradleak.audit.line_up import MOST_NUMBERS, signals, success
from gradleak.audit.privacy_loss import epsilon, most
from gradleak.errors import BadInput
from gradleak.formats.secret_file import Secret
from gradleak.observations.defenses import GaussianNoise
from gradleak.observations.mechanism import LEAST_NOISE, MOST_NOISE, Mechanism
from gradleak.observations.observation import Observation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.report.record import Flag, Result

Privacy = Mechanism | str | None
RANK = "identification_rank"
SUSPICIOUS = 0.01  # as unlikely as that, more right answers than the bound allows are no chance
MOST_PIXELS = 800  # of a picture for which the least squared error is asked
MOST_RELEASED = 2**20  # numbers, as many rows of a Jacobian
LOOKS = 8  # pictures of the prior at which the information is averaged


def mechanism_of(observation: Observation[Any], told: Mechanism | None) -> Privacy:
    """What the release says of itself, or what the flags say; a sentence where there is no epsilon."""
    own = observation.release.privacy()
    if isinstance(own, Mechanism) and told is not None:
        raise BadInput(
            f"What was shared says itself how private the training was ({own}): leave out --noise-multiplier."
        )
    if told is not None and isinstance(own, str) and not observation.defenses:
        raise BadInput("What was shared says itself that no noise was added to it: leave out --noise-multiplier.")
    if told is not None:
        return replace(told, certain=observation.release.certain)
    if own is None and any(defense.random for defense in observation.defenses or ()):
        return "Noise was added to what was not cut to a norm: there is no epsilon, and no bound for any attack."
    return own


def spent(observation: Observation[Any]) -> dict[str, float]:
    """{"epsilon": at delta 1e-5} where a step of DP-SGD was shared: what its accountant says, else of this one step, which the samples are in;
    nothing of others."""
    known, step = observation.release.privacy(), getattr(observation.release, "private", None)
    if not isinstance(known, Mechanism):
        if step is None or not LEAST_NOISE <= step.noise_multiplier <= MOST_NOISE:
            return {}
        known = Mechanism(noise_multiplier=step.noise_multiplier, sample_rate=1.0, steps=1, certain=1)
    return {"epsilon": epsilon(known, 1e-5)}


def of_observation(observation: Observation[Any], mechanism: Privacy, secret: Secret | None, decoys: Any) -> list[Flag]:
    """Epsilon, or why there is none; the most that any attack may have, and how much of that the likeliest candidate has."""
    if mechanism is None:
        return []
    if isinstance(mechanism, str):
        return [flag("no_epsilon", "info", mechanism)]
    count = 100 if decoys is None else len(decoys.labels) + 1
    bound = most(mechanism, 1 / count)
    said = (
        f"Epsilon is {epsilon(mechanism):.3g} at delta {mechanism.delta:g} where neighbours differ by one sample that is added or removed, "
        f"and {epsilon(mechanism, replacing=True):.3g} where one stands in the place of another ({mechanism}). By the first, no attack names a "
        f"true sample among {count} candidates with a probability above {bound:.1%}, where blind guessing has {1 / count:.1%}."
    )
    return [{**flag("privacy_bound", "info", said), "most": bound}, *line_up(observation, mechanism, secret, decoys)]


def line_up(observation: Observation[Any], mechanism: Mechanism, secret: Secret | None, decoys: Any) -> list[Flag]:
    """How often the likeliest candidate is the true sample, of a single step whose noise is known."""
    deviation = noise_of(observation)
    if secret is None or decoys is None or deviation is None or not isinstance(secret.inputs, Tensor):
        return []
    count = len(decoys.labels) + 1
    if (count + len(secret)) * sum(tensor.numel() for tensor in observation.released.values()) > MOST_NUMBERS:
        return []
    others = signals(observation, decoys.images, decoys.labels % observation.model.architecture.classes)
    shares = []
    for own in signals(observation, secret.inputs, secret.labels):
        every = torch.cat([own[None], others])
        shares.append(success(every @ every.T, deviation, 0))
    share = sum(shares) / len(shares)
    said = (
        f"Who knows the mechanism, and all samples but one, names that one among {count} candidates with probability {share:.1%} by its "
        f"likelihood, over the noise: of {most(mechanism, 1 / count):.1%} that the mechanism allows at most."
    )
    return [flag("line_up", "info", said)]


def of_result(row: Result, mechanism: Privacy) -> list[Flag]:
    """How often this attack has named the true sample, beside the most that any may."""
    ranks = [rank for rank in row["scores"].get(RANK, []) if rank is not None]
    if not isinstance(mechanism, Mechanism) or not ranks or "decoys" not in row:
        return []
    from scipy.stats import binom

    count, right = row["decoys"] + 1, sum(rank == 1 for rank in ranks)
    bound = most(mechanism, 1 / count)
    said = f"This attack names {right} of {len(ranks)} true samples among {count} candidates; no attack names more than {bound:.1%} on average"
    if float(binom.sf(right - 1, len(ranks), bound)) < SUSPICIOUS:
        return [
            flag(
                "above_bound",
                "warning",
                f"{said}: the training is less private than it says, or this secret is not what it was trained on.",
            )
        ]
    return [flag("below_bound", "info", f"{said}, and blind guessing {1 / count:.1%}.")]


def noise_of(observation: Observation[Any]) -> float | None:
    """The deviation of the Gaussian noise on each released number, where that is all that was done; None elsewhere."""
    defenses = observation.defenses or ()
    if not defenses or not all(isinstance(defense, GaussianNoise) and defense.std > 0 for defense in defenses):
        return None
    total = sum(defense.std**2 for defense in defenses if isinstance(defense, GaussianNoise))
    return float(total**0.5)


def least_error(observation: Observation[Any], secret: Secret, public: Any) -> list[Flag]:
    """The least mean squared error that any estimate of one picture has under the noise, if pictures are Gaussian."""
    deviation, images = noise_of(observation), secret.inputs
    if deviation is None or secret.labels is None or not isinstance(images, Tensor) or not observation.release.replays:
        return []
    if images[0].numel() > MOST_PIXELS or sum(t.numel() for t in observation.released.values()) > MOST_RELEASED:
        return []
    shape: Any = tuple(images.shape[1:])
    prior = (None if public is None else GaussianPrior.of_public(public.images)) or GaussianPrior.smooth(shape)
    try:
        least = van_trees(observation, secret.labels[:1], prior, deviation, looks=LOOKS)
    except BadInput:  # no forward-mode derivative
        return []
    return [flag("least_error", "info", least.sentence())]
