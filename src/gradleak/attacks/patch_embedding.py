"""Patch embedding: the exact picture out of the first layer of a vision transformer, whatever its size. That the gradient of the position
embeddings is that of the tokens was seen by Lu et al. (APRIL, CVPR 2022, arXiv:2112.14087, section 3.2), who invert the attention with it;
what follows for the layer below is ours. No label enters.

Sees      Gradient or Update of the weights of the patch embedding and of the position embeddings, one picture
Recovers  images (1, channel, height, width) in [0, 1], labels
Solves    u_t = E p_t + b + e_t, so that dL/de_t = dL/du_t = d_t and dL/dE = sum_t d_t p_t^T: with D (patches, width) and dL/dE known,
              D^T P = dL/dE          linear in the patches P (patches, pixels), by least squares
          in the directions that rounding leaves; in the others the patches stay grey
Differs   APRIL solves the attention for its inputs; here the layer below is solved for the picture, and norms and attention play no part
Errors    what rounding leaves of dL/dE, over the singular values of D: patches that no class depends on are told worst
Misses    several pictures, of which the position embeddings add up; fixed position embeddings; more patches than the width
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.attack import check_sees
from gradleak.attacks.labels import with_best_label
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture, ImageTransformer
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors

PATCH, POSITIONS = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
ROUNDINGS = (
    10.0  # of the format, that a singular value of D has to stand out by: below, a patch's error has the patch's size
)


@dataclass(frozen=True, kw_only=True)
class PatchEmbedding:
    """No hyperparameters: a closed form."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = Architecture.modality

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved where the model is no vision transformer, more than one picture took part, or one of the two gradients
        was not released."""
        check_sees(self, observation)
        observation = observation.to(torch.device("cpu"))
        network = observation.model.module
        if not isinstance(network, ImageTransformer):
            raise NotObserved("The model is no vision transformer: it has no patches.")
        if observation.batch_size not in (None, 1):
            raise NotObserved(
                f"The batch has {observation.batch_size} images: the gradients of their tokens are added up."
            )
        gradient = observation.as_gradient()
        dE, positions = ending(gradient, PATCH), ending(gradient, POSITIONS)
        size, patch = observation.model.architecture.input_shape[1:], dE.shape[-2:]
        count = (size[0] // patch[0]) * (size[1] // patch[1])
        D = positions.double().reshape(-1, len(dE))[-count:]  # (patches, width): class tokens come first
        if len(D) < count or not bool(D.any()):
            raise NotObserved(f"The gradients of {len(positions)} positions tell nothing of {count} patches.")
        grey = (0.5 - network.normalise.mean.double()) / network.normalise.std
        flat = grey.expand(len(grey), *patch).flatten()  # (pixels of a patch,)
        precision = torch.finfo(getattr(torch, observation.precision)).eps
        U, s, Vh = torch.linalg.svd(D.T, full_matrices=False)
        told = s > ROUNDINGS * precision * s[0]
        left = dE.double().flatten(1) - D.sum(0)[:, None] * flat
        P = flat + Vh[told].T @ ((U[:, told].T @ left) / s[told, None])  # (patches, pixels of a patch)
        normalised = F.fold(P.T[None], size, patch, stride=patch)
        images = (normalised * network.normalise.std + network.normalise.mean).clamp(0, 1).float()
        labels, residual = with_best_label(observation, images)
        status = (
            f"{int(told.sum())} equations of {count} patches stand out of rounding; relative residual {residual:.2g}."
        )
        return Reconstruction(images, labels, residual, status, outcome_of(residual))


def ending(gradient: Tensors, name: str) -> Tensor:
    """The gradient of the parameter that is called so in every vision transformer of the transformers library."""
    found = next((tensor for key, tensor in gradient.items() if key.endswith(f".{name}")), None)
    if found is None:
        raise NotObserved(f"The gradient of {name} was not released.")
    return found
