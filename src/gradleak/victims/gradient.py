"""A client that shares what one private batch makes of its model: the gradient, or the change by local training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from gradleak.errors import BadInput
from gradleak.formats.secret_file import Secret
from gradleak.modalities.modality import Blueprint
from gradleak.observations.defenses import Defense, defended
from gradleak.observations.layers import calls
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe

A = TypeVar("A", bound=Blueprint)


def capture_gradient(
    model: Model[A],
    private: Any,
    *,
    precision: torch.dtype = torch.float32,
    defenses: Sequence[Defense] = (),
    told: bool = True,
    reveal_labels: bool = False,
    reveal_buffers: bool = True,
    reveal_batch_size: bool = True,
    reveal_last_layer: bool = True,
    seed: int = 0,
) -> tuple[Observation[A], Secret]:
    """The gradient of the loss over `private` (Pictures or Texts), and the secret behind it.

    The model is a snapshot from before the forward pass, so that train mode's update of BatchNorm's buffers is not in it.
    precision: the number format of the release. defenses: applied before that, with noise from the seed, which also chooses
    what is masked. told: whether the attacker knows them, those included that are a part of the training.
    Raises BadInput when the model cannot take these data.
    """
    secret = keep_secret(model, private, seed=seed)
    revealed = model if reveal_buffers else model.without_buffers()
    release, left = trained_with(Gradient(), defenses, len(secret))
    names = model.trained if reveal_last_layer else without_last_layer(model, secret)
    seen = Observation(
        model=revealed,
        release=release if told else Gradient(),
        released=share(model, release, names, secret, precision, left, seed),
        batch_size=len(secret) if reveal_batch_size else None,
        labels=revealable(secret) if reveal_labels else None,
        precision=str(precision).removeprefix("torch."),
        defenses=left if told else None,
    )
    return seen, secret


def share_update(
    gradient: Observation[A],
    secret: Secret,
    recipe: Recipe,
    *,
    model: Model[A] | None = None,
    defenses: Sequence[Defense] | None = None,
    seed: int = 0,
) -> Observation[A]:
    """What the client of `gradient` would have shared after local training by this recipe.

    model: the client's own, where the observation withholds its buffers. Everything that `gradient` withholds stays withheld.
    defenses: those that were applied, where `gradient` does not tell them.
    Raises BadInput when the training diverges.
    """
    precision, plain, seen = getattr(torch, gradient.precision), Update(recipe=recipe), gradient.expect(Gradient)
    whole = model or gradient.model
    mixed = replace(plain, clients=seen.clients, mixup=seen.mixup)
    release, left = trained_with(mixed, gradient.defenses or () if defenses is None else defenses, len(secret))
    released = share(whole, release, gradient.released, secret, precision, left, seed)
    if not all(bool(tensor.isfinite().all()) for tensor in released.values()):
        raise BadInput(f"Local training diverged at learning rate {recipe.learning_rate:g}: choose a smaller one.")
    return replace(gradient, release=plain if gradient.defenses is None else release, released=released)


def without_last_layer(model: Model[Any], secret: Secret) -> Tensors:
    """The trained parameters but those of the layer that runs last; BadInput where nothing would be left."""
    last = calls(model, secret.inputs)[-1].name
    rest = {name: tensor for name, tensor in model.trained.items() if not name.startswith(f"{last}.")}
    if not rest:
        raise BadInput(f"Without its last layer {last} the model shares nothing.")
    return rest


def share(
    model: Model[Any],
    release: Release,
    names: Tensors,
    secret: Secret,
    precision: torch.dtype,
    defenses: Sequence[Defense],
    seed: int,
) -> Tensors:
    """What leaves the client: computed, defended, and rounded to the number format, in float32 again where it is shorter."""
    exact = {k: t.detach() for k, t in release.simulate(model, names, secret.inputs, secret.labels).items()}
    here = [defense.bound(model, secret.inputs) for defense in defenses]
    return rounded(defended(exact, here, torch.Generator().manual_seed(seed)), precision)


def trained_with(release: Release, defenses: Sequence[Defense], samples: int) -> tuple[Release, tuple[Defense, ...]]:
    """The release, with those defenses in it that are a part of the training, and the others; BadInput where one of the former comes
    after one of the latter."""
    left = list[Defense]()
    for defense in defenses:
        before, (release, rest) = release, defense.training(release, samples)
        if release is not before and left:
            raise BadInput("What is a part of the training comes before every other defense: give it first.")
        left += rest
    return release, tuple(left)


def behind(observation: Observation[A], known: Sequence[Defense] | None) -> Observation[A]:
    """The observation to somebody who knows that these defenses stand before it; None: that some may. BadInput for those of another
    release."""
    if known is None:
        return replace(observation, defenses=None)
    release, left = trained_with(observation.release, known, observation.batch_size or 1)
    return replace(observation, release=release, defenses=left)


def keep_secret(model: Model[Any], private: Any, *, seed: int = 0) -> Secret:
    """Private data as the model is fed with them; BadInput for data or labels that it cannot take."""
    inputs, labels = model.architecture.feed(private, seed=seed)
    model.check_takes(inputs)
    names = private.names if len(private.names) == model.architecture.classes else ()
    return Secret(inputs, labels, f"{private.source} {private.split}", names)


def revealable(secret: Secret) -> torch.Tensor:
    """The labels as they may be revealed; BadInput where there are none, or they are the private data themselves."""
    if secret.labels is None:
        raise BadInput("A causal language model has no labels that could be revealed: its text is all that it reads.")
    if secret.labels.ndim > 1:
        raise BadInput("The labels of a masked language model are its text: they cannot be revealed.")
    return secret.labels


def rounded(tensors: Tensors, precision: torch.dtype) -> Tensors:
    """The tensors as a number format keeps them, in float32 again where it is a shorter one."""
    return {name: t.to(precision).to(torch.promote_types(precision, torch.float32)) for name, t in tensors.items()}
