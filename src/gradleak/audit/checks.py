"""Can this number be trusted? Every check returns flags; the report always prints them, and an error voids the verdict.

A flag is {"name", "level": "info" | "warning" | "error", "sentence"}.
"""

import typing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.bound import identifiability
from gradleak.audit.explanations import flag, of_release
from gradleak.audit.jacobian import MOST_UNKNOWNS
from gradleak.audit.scoring.scoring import Scoring
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.losses import CrossEntropy
from gradleak.observations.distances import relative_residual
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors, flatten
from gradleak.priors.provenance import overlap
from gradleak.report.record import Flag

# Relative rounding error of a release in each format, with room for another summation order.
REPLAY_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
UNRELATED = 1.0  # relative error that unrelated data of the same size leave: above it, not even the direction is right
AGAINST = (
    2**0.5
)  # that of a direction at a right angle: by another training than the one assumed, the truth may leave less
FEW_UNKNOWNS = 3_100  # pixels up to which a bound is worth its minutes although it does not count all
WEAK = 0.5  # of the observation: a reconstruction that leaves more unexplained explains little


def check_observation(observation: Observation[Any]) -> list[Flag]:
    """What can be said before any attack, without the secret: vanishing or contradictory gradients, dropout, a defense."""
    flags = []
    if observation.defenses is None:
        flags.append(flag("defense_unknown", "warning", "A defense may stand between, and nobody says which."))
    elif observation.defenses:
        names = ", ".join(map(str, observation.defenses))
        flags.append(flag("defense", "info", f"The release was defended: {names}."))
    if observation.model.mode == "train" and any(
        isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in observation.model.module.modules()
    ):
        flags.append(
            flag(
                "dropout",
                "warning",
                "The model was training with dropout, whose masks were not observed: attacks assume none.",
            )
        )
    flags += [flag(*reservation) for reservation in observation.reservations()]
    try:
        gradient = observation.as_gradient()
    except NotObserved:
        return flags
    size = float(flatten(gradient).norm())
    if size < 1e-6:
        flags.append(
            flag(
                "vanishing_gradient",
                "warning",
                f"The gradient's norm is {size:.1e}: the model has already fitted these data, and little is left to invert.",
            )
        )
    zero = [name for name, tensor in gradient.items() if not bool(tensor.any())]
    if zero:
        flags.append(
            flag(
                "zero_tensors",
                "info",
                f"{len(zero)} of {len(gradient)} released tensors are zero throughout, first {zero[0]}.",
            )
        )
    flags += of_release(observation, gradient)
    bias, criterion = _last_bias(observation, gradient), observation.model.criterion
    known = isinstance(criterion, CrossEntropy) and criterion.plain
    if known and bias is not None and float(bias.sum().abs()) > 1e-2 * float(bias.abs().sum()) + 1e-12:
        flags.append(
            flag(
                "not_cross_entropy",
                "warning",
                "The last bias gradient does not sum to zero, as that of a softmax cross entropy does: another loss, or a defense.",
            )
        )
    return flags


def replay(
    observation: Observation[Any], inputs: Any, labels: Tensor | None, *, buffers: Tensors | None = None
) -> list[Flag]:
    """Does the model give this release for these data? To be asked before an attack, of data that you know.

    If it does not, the other mode, the other reduction and the other `buffers` (for example those saved after the
    forward pass) are tried, and the sentence names what fits. One flag: level "info" if all is well, "error" if it is not;
    "warning" where training or a defense leaves room for the difference. None where a release cannot be replayed.
    """
    if not observation.release.replays:
        return []
    tolerance, error = REPLAY_TOLERANCE[observation.precision], replay_error(observation, inputs, labels)
    if error <= tolerance:
        sentence = f"The model reproduces the release from the truth (relative error {error:.1e})."
        return [flag("replay", "info", sentence)]
    for release in observation.release.shuffled(len(inputs)):
        if replay_error(replace(observation, release=release), inputs, labels) <= tolerance:
            said = next(row["detail"] for row in release.facts() if "shuffled" in str(row["detail"]))
            sentence = f"The model reproduces the release from the truth once the samples are shuffled: {said}. Say so with --shuffle."
            return [flag("replay", "info", sentence)]
    doubts = [observation.release.inexact()] if observation.release.inexact() else []
    if observation.defenses is None or any(defense.blurs for defense in observation.defenses):
        doubts.append("a defense stands between")
    if doubts and error <= (UNRELATED if not observation.release.guessed() else AGAINST):
        sentence = (
            f"The model reproduces the release from the truth up to {error:.2g} of its size: {', and '.join(doubts)}."
        )
        return [flag("replay", "warning", sentence)]
    beliefs: list[tuple[str, Model[Any]]] = []
    criterion = observation.model.criterion
    for mode in typing.get_args(Mode):
        for reduction in ("mean", "sum"):
            other_loss = replace(criterion, reduction=reduction) if isinstance(criterion, CrossEntropy) else criterion
            other = observation.model.assume(mode=mode, criterion=other_loss)
            beliefs.append((f"{mode} mode, {reduction} reduction", other))
            if buffers is not None and mode == "eval":
                beliefs.append(
                    (f"{mode} mode, {reduction} reduction, the other buffers", other.assume(buffers=buffers))
                )
    fits = [
        name for name, other in beliefs if replay_error(replace(observation, model=other), inputs, labels) <= tolerance
    ]
    advice = (
        f"but it does in {' or '.join(fits)}"
        if fits
        else "in either mode: it is another secret, or weights, buffers, loss or preprocessing differ"
    )
    sentence = f"The model does not reproduce the release from the truth (relative error {error:.2g}), {advice}."
    return [flag("replay", "error", sentence)]


def replay_error(observation: Observation[Any], inputs: Any, labels: Tensor | None) -> float:
    """||simulate(inputs, labels) - released|| / ||released||, after the defenses where these are certain; infinite where the
    model cannot take the data."""
    try:
        with torch.no_grad():
            return _relative_error(observation, inputs, labels)
    except (BadInput, RuntimeError, ValueError, IndexError):
        return float("inf")


def _relative_error(observation: Observation[Any], inputs: Any, labels: Tensor | None) -> float:
    certain = observation.defenses and not any(defense.blurs for defense in observation.defenses)
    simulated = observation.of_others(inputs, labels).released if certain else observation.simulate(inputs, labels)
    return float(relative_residual(simulated, observation.released))


def check_result(
    observation: Observation[Any],
    scoring: Scoring,
    result: Reconstruction,
    secret: Secret,
    *,
    leads: list[float],
    public: Any,
) -> list[Flag]:
    """What the secret says about a result; leads: over the best blind control, per sample."""
    flags = []
    if observation.release.replays and observation.defenses == () and not observation.release.inexact():
        truth = replay_error(observation, secret.inputs, secret.labels)
        if result.residual < 0.9 * truth and truth > REPLAY_TOLERANCE[observation.precision]:
            sentence = f"The reconstruction explains the observation better ({result.residual:.2g}) than the truth does ({truth:.2g}): the model in use is not the victim's, or a defense stands between."
            flags.append(flag("better_than_truth", "error", sentence))
    ahead = sum(lead > 0 for lead in leads)
    if ahead < len(leads):
        sentence = f"{len(leads) - ahead} of {len(leads)} {observation.model.architecture.secret} are no closer to the truth than a control that never saw the observation."
        flags.append(flag("no_better_than_blind", "warning", sentence))
    known = sum(scoring.is_public(secret.inputs, public, observation.model))
    if known:
        sentence = f"{known} private {observation.model.architecture.secret} are in the public pool: priors and controls have seen the secret."
        flags.append(flag("secret_is_public", "error", sentence))
    return flags + unexplained(result.residual)


def unexplained(residual: float) -> list[Flag]:
    """A flag where a reconstruction leaves most of the release."""
    if residual <= WEAK:  # NaN is not
        return []
    sentence = f"The reconstruction explains little of what was observed (relative residual {residual:.2f})."
    return [flag("unexplained", "warning", sentence)]


def information(observation: Observation[Any], inputs: Any, labels: Tensor | None, where: str) -> list[Flag]:
    """What a low-rank release determines, whether or not an attack finds it (bound.py), as a flag; of others, nothing is asked."""
    if (
        len(observation.alone()) > 1
        or not observation.release.sketched
        or not isinstance(inputs, Tensor)
        or labels is None
        or not len(inputs)
    ):
        return []
    if inputs.numel() > MOST_UNKNOWNS:
        sentence = f"{inputs.numel():,} unknown pixels: too many to ask here what the release determines."
        return [flag("information_unknown", "info", sentence)]
    reason = observation.release.inexact()
    if reason and inputs.numel() > FEW_UNKNOWNS:
        sentence = f"{inputs.numel():,} unknown pixels, and {reason}: what the release determines is not asked here."
        return [flag("information_unknown", "info", sentence)]
    known = identifiability(observation, inputs, labels)
    if reason and known.information() != "present":
        sentence = (
            f"As the sketch of one gradient, this {known.release} is enough for {known.decibels():.1f} dB where a blind guess has "
            f"{known.blind_psnr_db:.1f} dB; but {reason}: what it tells beyond that is not counted. (Linear regime, {where}.)"
        )
        return [flag("information_unknown", "info", sentence)]
    return [flag(f"information_{known.information()}", "info", f"{known.sentence()} (Linear regime, {where}.)")]


def trained_on_secret(attack: Any, secret: Secret) -> list[Flag]:
    """An error if what the attack, its prior, or the attack that it begins at or cleans up after was trained on holds private data; a
    warning where nobody tells."""
    seen = attack.trained_on(secret.inputs) if hasattr(attack, "trained_on") else 0
    sentence = f"{seen} private samples are among those that the attack was trained on: it has seen the secret."
    flags = [flag("secret_in_training", "error", sentence)] if seen else []
    flags += prior_has_seen(getattr(attack, "prior", None), secret)
    others = [other for name in ("start", "after") if (other := getattr(attack, name, None)) is not None]
    return flags + [found for other in others for found in trained_on_secret(other, secret)]


def prior_has_seen(prior: Any, secret: Secret) -> list[Flag]:
    """The same of a prior that was trained."""
    if prior is None or not hasattr(prior, "provenance"):
        return []
    if prior.provenance is None:
        sentence = "Nobody tells what the prior was trained on: it may have seen the secret."
        return [flag("prior_unknown", "warning", sentence)]
    rows = [row for row in overlap(secret.inputs, prior.provenance) if row is not None]
    if not rows:
        return []
    sentence = (
        f"A prior trained on the secret: {len(rows)} of {len(secret.inputs)} private pictures, or near-duplicates of them, are among "
        f"{prior.provenance} (first at row {rows[0]}). Take a prior that has not seen them, or none."
    )
    return [flag("secret_in_prior", "error", sentence)]


def _last_bias(observation: Observation[Any], gradient: Tensors) -> Tensor | None:
    name, classes = list(observation.model.parameters)[-1], observation.model.architecture.classes
    return gradient[name] if classes > 1 and name in gradient and gradient[name].shape == (classes,) else None
