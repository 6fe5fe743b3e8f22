"""Can this number be trusted? Every check returns flags; the report always prints them.

A flag is {"name", "level": "info" | "warning" | "error", "sentence"}.
"""

import typing
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.formats.secret_file import Secret
from gradleak.modalities.losses import Reduction
from gradleak.observations.distances import relative_residual
from gradleak.observations.model import Mode, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import STATIONARY, Adapter, Weights
from gradleak.observations.tensors import Tensors, flatten
from gradleak.report.record import Flag

# Relative rounding error of a release in each format, with room for another summation order.
REPLAY_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


def flag(name: str, level: typing.Literal["info", "warning", "error"], sentence: str) -> Flag:
    """One line of the report's list of reservations."""
    return {"name": name, "level": level, "sentence": sentence}


def check_observation(observation: PictureObservation) -> list[Flag]:
    """What can be said before any attack, without the secret: vanishing or contradictory gradients, dropout."""
    if isinstance(observation, Weights):
        return check_weights(observation)
    flags = []
    gradient = observation.as_gradient()
    size = float(flatten(gradient).norm())
    if size < 1e-6:
        flags.append(
            flag(
                "vanishing_gradient",
                "warning",
                f"The gradient's norm is {size:.1e}: the model has already fitted these images, and little is left to invert.",
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
    if isinstance(observation, Adapter) and (reason := inexact(observation)):
        flags.append(flag("not_exact", "warning", f"The adapter is no exact linear sketch of one gradient: {reason}."))
    bias = _last_bias(observation)
    if bias is not None and float(bias.sum().abs()) > 1e-2 * float(bias.abs().sum()) + 1e-12:
        flags.append(
            flag(
                "not_cross_entropy",
                "warning",
                "The last bias gradient does not sum to zero, as that of a softmax cross entropy does: another loss, or a defense.",
            )
        )
    return flags


def check_weights(weights: Weights) -> list[Flag]:
    """Whether the theory of trained weights applies: a homogeneous network, near stationarity."""
    flags, done = [], weights.stationarity
    if not weights.network().homogeneous:
        sentence = "The network has biases after its first layer: it is not homogeneous, as the theory asks for."
        flags.append(flag("not_homogeneous", "warning", sentence))
    if done is not None and done.kkt_residual > STATIONARY:
        sentence = f"The training is not near stationarity: at the true data {done.kkt_residual:.2f} of the first layer is unexplained."
        flags.append(flag("not_stationary", "warning", sentence))
    return flags


def inexact(adapter: Adapter) -> str:
    """Why what is read off an adapter's factors is not exact; nothing for one step of SGD from a known start."""
    if adapter.dropout > 0:
        return f"it may have been trained with dropout {adapter.dropout:g}, whose masks nobody knows"
    if adapter.recipe is None:
        return "its recipe is unknown, one step of SGD is assumed"
    if adapter.recipe.optimizer in ("adam", "adamw"):
        return f"{adapter.recipe.optimizer} keeps little of a gradient but its signs"
    return f"{adapter.recipe.steps} steps were taken, and their mean stands in" if adapter.recipe.steps > 1 else ""


def replay(observation: PictureObservation, images: Tensor, labels: Tensor, *, buffers: Tensors | None = None) -> list[Flag]:
    """Does the model give this release for these images? To be asked before an attack, of data that you know.

    If it does not, the other mode, the other reduction and the other `buffers` (for example those saved after the
    forward pass) are tried, and the sentence names what fits. One flag: level "info" if all is well, else "error".
    """
    tolerance = REPLAY_TOLERANCE[observation.precision]
    error = replay_error(observation, observation.model, images, labels)
    if error <= tolerance:
        sentence = f"The model reproduces the release from the true images (relative error {error:.1e})."
        return [flag("replay", "info", sentence)]
    beliefs: list[tuple[str, PictureModel]] = []
    for mode in typing.get_args(Mode):
        for reduction in typing.get_args(Reduction):
            other = observation.model.assume(mode=mode, reduction=reduction)
            beliefs.append((f"{mode} mode, {reduction} reduction", other))
            if buffers is not None and mode == "eval":
                beliefs.append(
                    (f"{mode} mode, {reduction} reduction, the other buffers", other.assume(buffers=buffers))
                )
    fits = [name for name, other in beliefs if replay_error(observation, other, images, labels) <= tolerance]
    advice = (
        f"but it does in {' or '.join(fits)}"
        if fits
        else "in either mode: weights, buffers, loss or preprocessing differ"
    )
    sentence = f"The model does not reproduce the release from the true images (relative error {error:.2g}), {advice}."
    return [flag("replay", "error", sentence)]


def replay_error(observation: PictureObservation, model: PictureModel, images: Tensor, labels: Tensor) -> float:
    """||simulate(images, labels) - released|| / ||released||, had the model been `model`."""
    with torch.no_grad():
        simulated = replace(observation, model=model).simulate(images, labels)
    return float(relative_residual(simulated, observation.released))


def check_result(
    observation: PictureObservation,
    result: Reconstruction,
    secret: Secret,
    *,
    psnr_db: Tensor,
    blind_psnr_db: Tensor,
    public: Tensor,
) -> list[Flag]:
    """What the secret says about a result: both PSNR are (batch,), of the attack and of the best blind control."""
    flags = []
    truth = replay_error(observation, observation.model, secret.images, secret.labels)
    # Weights have more candidates than there were images, and a residual for the layers that the attack explains.
    if (
        not isinstance(observation, Weights)
        and result.residual < 0.9 * truth
        and truth > REPLAY_TOLERANCE[observation.precision]
    ):
        sentence = f"The reconstruction explains the observation better ({result.residual:.2g}) than the truth does ({truth:.2g}): the model in use is not the victim's, or a defense stands between."
        flags.append(flag("better_than_truth", "error", sentence))
    ahead = int((psnr_db > blind_psnr_db).sum())
    if ahead < len(psnr_db):
        sentence = f"{len(psnr_db) - ahead} of {len(psnr_db)} images are no closer to the truth than a control that never saw the observation."
        flags.append(flag("no_better_than_blind", "warning", sentence))
    known = (torch.cdist(secret.images.flatten(1), public.flatten(1)) < 1e-3).any(dim=1)
    if bool(known.any()):
        sentence = (
            f"{int(known.sum())} private images are in the public pool: priors and controls have seen the secret."
        )
        flags.append(flag("secret_is_public", "error", sentence))
    if not result.residual <= 0.5:  # NaN too
        sentence = f"The reconstruction explains little of what was observed (relative residual {result.residual:.2f})."
        flags.append(flag("unexplained", "warning", sentence))
    return flags


def _last_bias(observation: PictureObservation) -> Tensor | None:
    gradient, classes = observation.as_gradient(), observation.model.architecture.classes
    name = list(observation.model.parameters)[-1]
    return gradient[name] if name in gradient and gradient[name].shape == (classes,) else None
