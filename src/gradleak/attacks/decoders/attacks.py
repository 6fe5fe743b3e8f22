"""An adapter decoded into the gradient behind it, and that gradient inverted: the bridge as attacks, one per decoder.

Sees      Adapter of linear and convolutional layers, and public pictures that the decoder is fitted on (not for the
          pseudo-inverse); labels optional
Recovers  images (batch, channel, height, width) in [0, 1], labels
Solves    M^ = decoder(S) with M^ F^T = S for every sketch S of the adapter, then what map_inversion.py solves for a gradient
Differs   the residual is that of the adapter itself, not of the gradient that was decoded
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from gradleak.attacks.attack import check_sees
from gradleak.attacks.decoders.mlp import MLP
from gradleak.attacks.decoders.ridge import PseudoInverse, Ridge
from gradleak.attacks.decoders.unet import UNet
from gradleak.attacks.labels import known_or_recovered
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release

Decoder = PseudoInverse | Ridge | MLP | UNet
PAIRS = 1_000  # public pictures that a decoder is fitted on, at most


@dataclass(frozen=True, kw_only=True)
class DecodePseudoInverse:
    """The gradient of least norm, inverted.

    evaluations  of the inversion, at each prior weight
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = Architecture.modality
    by_name_only: ClassVar[bool] = True  # map-inversion does better at the same cost: docs/findings/lora_bridge.md

    evaluations: int = 75
    inversion: MapInversion | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a prior of the public pictures."""
        return replace(self, inversion=inversion(self.evaluations, observation, public, generator))

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved as map-inversion does."""
        return invert(self, PseudoInverse(), observation, self.inversion, generator, on_step)


@dataclass(frozen=True, kw_only=True)
class DecodeRidge:
    """Ridge regression, inverted.

    groups       of public pictures, at most
    evaluations  of the inversion, at each prior weight
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = Architecture.modality
    by_name_only: ClassVar[bool] = True

    groups: int = 64
    evaluations: int = 75
    decoder: Ridge | None = field(default=None, repr=False)
    inversion: MapInversion | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """Fitted on the public pictures."""
        images, labels = pairs(observation, public)
        decoder = Ridge.fit(observation, images, labels, generator=generator, groups=self.groups)
        return replace(self, decoder=decoder, inversion=inversion(self.evaluations, observation, public, generator))

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved without public pictures, and as map-inversion does."""
        return invert(self, self.decoder, observation, self.inversion, generator, on_step)


@dataclass(frozen=True, kw_only=True)
class DecodeMLP:
    """A trained multi-layer perceptron, inverted.

    steps        of its training
    width        of its hidden layers
    evaluations  of the inversion, at each prior weight
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = Architecture.modality
    by_name_only: ClassVar[bool] = True

    steps: int = 300
    width: int = 128
    evaluations: int = 75
    decoder: MLP | None = field(default=None, repr=False)
    inversion: MapInversion | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """Trained on the public pictures."""
        images, labels = pairs(observation, public)
        decoder = MLP.fit(observation, images, labels, generator=generator, steps=self.steps, width=self.width)
        return replace(self, decoder=decoder, inversion=inversion(self.evaluations, observation, public, generator))

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved without public pictures, and as map-inversion does."""
        return invert(self, self.decoder, observation, self.inversion, generator, on_step)


@dataclass(frozen=True, kw_only=True)
class DecodeUNet:
    """A trained U-Net, inverted.

    steps        of its training
    width        channels at full size
    evaluations  of the inversion, at each prior weight
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = Architecture.modality
    by_name_only: ClassVar[bool] = True

    steps: int = 100
    width: int = 8
    evaluations: int = 75
    decoder: UNet | None = field(default=None, repr=False)
    inversion: MapInversion | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """Trained on the public pictures."""
        images, labels = pairs(observation, public)
        decoder = UNet.fit(observation, images, labels, generator=generator, steps=self.steps, width=self.width)
        return replace(self, decoder=decoder, inversion=inversion(self.evaluations, observation, public, generator))

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved without public pictures, and as map-inversion does."""
        return invert(self, self.decoder, observation, self.inversion, generator, on_step)


def inversion(
    evaluations: int, observation: PictureObservation, public: Pictures, generator: torch.Generator
) -> MapInversion:
    """The attack on the decoded gradient, with a prior of the public pictures."""
    return MapInversion(evaluations=evaluations, pairs=0).prepared(observation, public, generator=generator)


def pairs(observation: PictureObservation, public: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Public pictures, with labels that the model has."""
    return public.images[:PAIRS], public.labels[:PAIRS] % observation.model.architecture.classes


def invert(
    attack: Any,
    decoder: Decoder | None,
    observation: PictureObservation,
    inversion: MapInversion | None,
    generator: torch.Generator,
    on_step: OnStep | None,
) -> Reconstruction:
    """The reconstruction from the decoded gradient, with the residual that it leaves of the adapter."""
    check_sees(attack, observation)
    if decoder is None:
        raise NotObserved("A decoder is fitted on public pictures, and there are none.")
    observation = observation.to(torch.device("cpu"))
    gradient = replace(decoder(observation), labels=known_or_recovered(observation))
    inverted = (inversion or MapInversion(pairs=0))(gradient, generator=generator, on_step=on_step)
    residual = observation.residual(inverted.value, inverted.labels)
    status = f"Decoded, then inverted: relative residual {residual:.2g} of the adapter, {inverted.residual:.2g} of the gradient."
    return replace(inverted, residual=residual, status=status, outcome=outcome_of(residual))
