"""What a release may be that is not what was said: another factor, clipped, signs, another optimizer. Each is a flag with one sentence.

Some show in the release itself; others at a reconstruction, where what is left unexplained has a shape.
"""

import math
import typing
from dataclasses import replace
from typing import Any

import torch

from gradleak.attacks.batch_size import batch_size
from gradleak.attacks.factor import named
from gradleak.attacks.reconstruction import CLOSE, SOLVED, Reconstruction
from gradleak.errors import BadInput
from gradleak.modalities.losses import CrossEntropy
from gradleak.observations.distances import relative_residual
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors, flatten
from gradleak.report.record import Flag

ROUND = (1.0, 2.0, 2.5, 3.0, 5.0)  # times a power of ten: norms that people cut gradients to
NEAR = 2e-5  # float32, and the 1e-6 that clip_grad_norm_ adds to a norm: one of 20,000 other norms is as near
ALIKE, MOST_ALIKE = 0.01, 0.5  # entries within 1 % of one magnitude, and the share of them that no gradient has
BETTER = 2.0  # times less of the release unexplained: then another belief is named


def flag(name: str, level: typing.Literal["info", "warning", "error"], sentence: str) -> Flag:
    """One line of the report's list of reservations."""
    return {"name": name, "level": level, "sentence": sentence}


def of_release(observation: Observation[Any], gradient: Tensors) -> list[Flag]:
    """What shows in the release itself; gradient: what it is in units of a gradient."""
    flags = []
    if observation.beside:
        names = ", ".join(observation.beside[:3]) + (", ..." if len(observation.beside) > 3 else "")
        sentence = f"{names} came with the release and are not read; BatchNorm's statistics tell means and variances of the batch."
        flags.append(flag("beside", "info", sentence))
    if observation.factor != 1:
        flags.append(factor_flag(observation.factor, observation.batch_size, "used"))
    if observation.defenses != ():
        return flags
    size = float(flatten(gradient).double().norm()) * abs(observation.factor)
    for base in ROUND if size > 0 else ():
        bound = base * 10.0 ** round(math.log10(size / base))
        if abs(size / bound - 1) < NEAR:
            sentence = f"The release has the norm {bound:g}, as gradients do that were clipped to it: its length tells nothing."
            flags.append(flag("clipped", "warning", sentence))
    entries = flatten(gradient).abs()
    entries = entries[entries > 0]
    if len(entries) > 100 and not observation.release.inexact():
        middle = entries.median()
        share = float(((entries / middle - 1).abs() < ALIKE).float().mean())
        if share > MOST_ALIKE:
            sentence = f"{100 * share:.0f} % of the entries have one magnitude: signs, as the first step of Adam leaves them, or signSGD."
            flags.append(flag("signs", "warning", sentence))
    return [*flags, *beyond_bounds(observation, gradient), *more_samples(observation)]


def more_samples(observation: Observation[Any]) -> list[Flag]:
    """The gradient of a layer that sees one row per sample has a rank of at most their number."""
    said, counted = observation.batch_size, None if observation.release.inexact() else batch_size(observation)
    if counted is None or said is None or counted[0] <= said:
        return []
    sentence = f"The release is of at least {counted[0]} samples, by the rank of a layer's gradient, and not of {said}, as was said."
    return [flag("more_samples", "warning", sentence)]


def beyond_bounds(observation: Observation[Any], gradient: Tensors) -> list[Flag]:
    """The gradient of a softmax cross entropy by the last bias is p - y: its entries add up to 2 at most per sample, and each
    negative one needs a sample of its class."""
    model, criterion = observation.model, observation.model.criterion
    name = list(model.parameters)[-1]
    if not isinstance(criterion, CrossEntropy) or not criterion.plain or observation.release.inexact():
        return []
    if name not in gradient or gradient[name].shape != (model.architecture.classes,):
        return []
    bias, batch = gradient[name], observation.batch_size or math.inf
    above, below = (
        int((sign * bias > 1e-4 * bias.abs().max()).sum()) for sign in (1, -1)
    )  # differences round smaller ones
    if below > batch >= above > 0 and observation.factor == 1:
        sentence = (
            f"{below} classes have a negative bias gradient, and {batch} samples have {batch} labels at most: it points the other way, as "
            "a difference of weights (after - before) does that is taken for a gradient. Give --lr with it, or turn its sign."
        )
        return [flag("sign", "warning", sentence)]
    most = 2.0 * ((observation.batch_size or math.inf) if criterion.reduction == "sum" else 1)
    size = float(bias.abs().sum())
    if size <= 1.05 * most:  # bfloat16 leaves a hundredth
        return []
    sentence = (
        f"The last bias gradient adds up to {size:.3g}, and that of a {criterion.reduction} of cross entropies to {most:g} at most: "
        "a sum in place of a mean, a loss scale, another learning rate, or another loss."
    )
    return [flag("scale", "warning", sentence)]


def added(a: Tensors, b: Tensors) -> float:
    """The inner product over all entries, tensor by tensor: nothing of the model's size is made in float64."""
    return sum(float(a[name].double().flatten() @ b[name].double().flatten()) for name in b)


def factor_flag(factor: float, batch: int | None, what: str) -> Flag:
    """The sentence about a factor; what: whether it was used, or only fits."""
    name = "scaled" if factor > 0 else "sign"
    then = "It was divided by that." if what == "used" else "Divide it by that, and run again."
    sentence = f"The release is {factor:.4g} times what was said: {named(factor, batch)}. {then}"
    return flag(name, "warning", sentence)


def at_reconstruction(observation: Observation[Any], found: Reconstruction) -> list[Flag]:
    """What a reconstruction says of the release that it does not explain: another factor, or another training, would."""
    inputs, labels, residual = found.value, found.labels, found.residual
    if (
        len(observation.alone()) > 1
        or not observation.release.replays
        or not SOLVED < residual < math.inf
        or observation.defenses != ()
    ):
        return []
    try:
        with torch.no_grad():
            simulated = observation.simulate(inputs, labels)
            size, inner = added(simulated, simulated), added(simulated, observation.released)
            if not 0 < size < math.inf:
                return []
            factor = inner / size
            scaled = {name: factor * tensor for name, tensor in simulated.items()}
            rest = float(relative_residual(scaled, observation.released))
            flags = []
            if rest <= CLOSE and residual > BETTER * rest and observation.factor == 1:
                flags.append(factor_flag(factor, observation.batch_size, "fits"))
            others = observation.release.others(observation.model, observation.released, simulated)
            fits = [(replace(observation, release=other).residual(inputs, labels), other) for other in others]
    except (BadInput, RuntimeError, ValueError, IndexError):  # a guess that the model cannot take
        return []
    left, other = min(fits, key=lambda fit: fit[0], default=(math.inf, None))
    if other is not None and left <= CLOSE and min(residual, rest) > BETTER * left:
        recipe = next(str(row["detail"]) for row in other.facts())
        sentence = (
            f"At this reconstruction another training explains the release better: {recipe} (relative residual {left:.2g} against "
            f"{residual:.2g}). Say so, and run again."
        )
        flags.append(flag("training", "warning", sentence))
    return flags
