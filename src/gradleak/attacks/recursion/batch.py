"""A few pictures taken apart: what each of them gives the last layer, out of the gradient of all; then each by itself.

The last layer's gradient is batch [dW, db] = D^T [H, 1] with D = softmax([H, 1] [W, b]^T) - Y: of fewer pictures than classes, whose labels Y
are known or read, these are more equations than H (batch, features) has unknowns in the row space of [dW, db] (label_equations/).
"""

import math

import torch
from torch import Tensor, nn

from gradleak.attacks.label_equations.equations import ROUNDING
from gradleak.attacks.label_equations.label_equations import MOST, SOLVED
from gradleak.attacks.labels import equations_of, known_or_recovered, last_layer, solvable, trained_on
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.recursion.feature_search import invert_features
from gradleak.attacks.recursion.inverses import EXACT
from gradleak.attacks.recursion.linear_systems import DENSE, Belief
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.observations.observation import PictureObservation
from gradleak.observations.sequence import layers_of

RANK = 10 * ROUNDING  # singular values below that, of the largest, are rounding


def each_alone(observation: PictureObservation, evaluations: int, on_step: OnStep | None) -> Reconstruction:
    """Each picture from its own features at the last layer, as far as these tell it: the gradient below, of all pictures, is not used."""
    observation = observation.to(torch.device("cpu"))
    labels, features, left = taken_apart(observation)
    layers = layers_of(observation.model.solid().requires_grad_(False))
    if not isinstance(layers[-1][1], nn.Linear) or math.prod(observation.model.architecture.input_shape) > DENSE:
        raise NotObserved(
            f"From features to several pictures leads a search, in a sequence of layers and of pictures of {DENSE:,} numbers at most."
        )
    below = nn.Sequential(*(layer for _, layer in layers[:-1]))
    exact = Belief(features, torch.full_like(features, EXACT))
    found, done, trace = invert_features(observation, labels, {}, below, exact, evaluations, on_step)
    images = found.clamp(0, 1).float()
    residual = observation.residual(images.to(next(iter(observation.released.values()))), labels)
    status = (
        f"{len(images)} images taken apart at the last layer (its equations keep {left:.1g}), {done} evaluations of a search for "
        f"pictures with these features, relative residual {residual:.2g}."
    )
    return Reconstruction(images, labels, residual, status, outcome_of(residual), iterations=done, trace=trace)


def taken_apart(observation: PictureObservation) -> tuple[Tensor, Tensor, float]:
    """Labels (batch,), features (batch, features) in float64, and the squared error that the equations keep, in units of their singular values.

    Raises NotObserved where several pictures cannot be taken apart.
    """
    batch = observation.batch_size
    grey = torch.full((1, *observation.model.architecture.input_shape), 0.5).to(
        next(iter(observation.released.values()))
    )
    last = last_layer(observation, grey)
    if batch is None or not solvable(observation, last, batch):
        raise NotObserved(
            f"The batch has {batch} images: the recursion is for one, or for up to {MOST[0]} that are fewer than the classes (at most "
            f"{MOST[1]}) behind one exact gradient without a defense."
        )
    labels, equations = known_or_recovered(observation).cpu(), equations_of(observation, last)
    if float(equations.S[-1]) < RANK * float(equations.S[0]):
        raise NotObserved(
            f"The last layer's gradient is of lower rank than {batch} images give: two of them are alike, or there are fewer."
        )
    found = equations.tried(labels[None], trained_on(observation), torch.Generator().manual_seed(0))
    if (left := float(found.error[0])) > SOLVED:
        raise NotObserved(
            f"The equations of the last layer do not take the {batch} images apart: they keep an error of {left:.1g}."
        )
    return labels, equations.features(found.K[0]), left
