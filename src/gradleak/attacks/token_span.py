"""Token span: the exact picture out of the first attention layer of a vision transformer, every patch in its place.
The span check is that of DAGER (Petrov et al., NeurIPS 2024, arXiv:2405.15586), which tests words of a vocabulary; here
the tokens are affine in the unknown patch, and the check becomes a linear system. No label enters.

Sees      Gradient of the query, key and value weights, one picture, tokens < width; or an Adapter of them with
          rank > tokens. Position embeddings and their gradients are not needed
Recovers  images (1, channel, height, width) in [0, 1], labels
Solves    dL/dW_q = Delta^T X, its rows lie in the span of the tokens x_t = gamma * (u_t - mean u_t) / s_t + beta,
          u_t = E p_t + b + e_t. With N (width, width - tokens) orthogonal to that span,
              N^T (gamma * (E p_t + b + e_t)^centred) + s_t N^T beta = 0          linear in the patch p_t and s_t,
          for each position t by least squares. An adapter's sketch Delta^T X A^T has the span of the A x_t: N -> A^T N.
Differs   DAGER enumerates tokens and decides by a threshold; nothing is enumerated or thresholded here. Exact in float64;
          float32 rounding hides the weakest token directions, and noise all of them
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
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update


@dataclass(frozen=True, kw_only=True)
class TokenSpan:
    """No hyperparameters: a closed form."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved where the model is no vision transformer of the transformers library, more than one picture
        took part, or the tokens fill the space in which they were seen."""
        check_sees(self, observation)
        observation = observation.to(torch.device("cpu"))
        network = observation.model.module
        if not isinstance(network, ImageTransformer) or not hasattr(network.network, "vit"):
            raise NotObserved("The model is no vision transformer: there are no tokens to look for.")
        if observation.batch_size not in (None, 1):
            raise NotObserved(
                f"The batch has {observation.batch_size} images: their tokens fill the space in which they were seen."
            )

        def parameter(name: str) -> Tensor:
            return observation.model.parameters[f"network.vit.{name}"].double()

        E = parameter("embeddings.patch_embeddings.projection.weight")  # (width, channel, patch, patch)
        positions = parameter("embeddings.position_embeddings")[0]  # (tokens, width), the first is the class token's
        N = outside(observation, tokens=len(positions), unknowns=E[0].numel() + 1)  # (equations, width)
        gamma, beta = (parameter(f"layers.0.layernorm_before.{part}") for part in ("weight", "bias"))
        N_gamma = N * gamma
        N_gamma = N_gamma - N_gamma.mean(1, keepdim=True)  # = N diag(gamma) (I - 1 1^T / width)
        known = parameter("embeddings.patch_embeddings.projection.bias") + positions[1:]  # (patches, width)
        system = torch.cat([N_gamma @ E.flatten(1), (N @ beta)[:, None]], dim=1)  # (equations, pixels of a patch + 1)
        patches = torch.linalg.lstsq(system, -N_gamma @ known.T, driver="gelsd").solution[
            :-1
        ]  # (pixels of a patch, patches)
        size, patch = observation.model.architecture.input_shape[1:], E.shape[-2:]
        normalised = F.fold(patches[None], size, patch, stride=patch)
        images = (normalised * network.normalise.std + network.normalise.mean).clamp(0, 1).float()
        labels, residual = with_best_label(observation, images)
        status = f"{len(N)} equations for each of {len(known)} patches; relative residual {residual:.2g}."
        return Reconstruction(images, labels, residual, status, outcome_of(residual))


def outside(observation: PictureObservation, *, tokens: int, unknowns: int) -> Tensor:
    """Directions orthogonal to every token of the first attention layer: (equations, width). NotObserved if too few."""
    released = views(observation)
    if not released:
        raise NotObserved("Neither query, key nor value of the first attention layer was released.")
    unseen, most = [], max(len(factor) for factor, _ in released)
    for factor, sketches in released:  # all that was seen through one factor (r, width) spans one space
        stacked = torch.cat([S / S.norm() for S in sketches])  # (rows, r)
        unseen.append(torch.linalg.svd(stacked).Vh[tokens:] @ factor)
    N = torch.cat(unseen)
    if len(N) < unknowns:
        raise NotObserved(
            f"{tokens} tokens were seen through {most} directions, which leaves {len(N)} equations for {unknowns} unknowns "
            "of a patch: the closed form needs a larger rank, or a whole gradient."
        )
    return N


def views(observation: PictureObservation) -> list[tuple[Tensor, list[Tensor]]]:
    """(factor (r, width), the matrices whose rows lie in the span of factor @ tokens), in float64; whole gradients together."""
    names = [f"network.vit.layers.0.attention.{part}_proj" for part in "qkv"]
    sketches = [s for s in observation.sketches(names) if s.side == "right" and bool(s.measured.any())]
    whole = [s.measured.double() for s in sketches if s.factor is None]
    through_factors = [(s.factor.double(), [s.measured.double()]) for s in sketches if s.factor is not None]
    return [(torch.eye(whole[0].shape[1], dtype=torch.float64), whole)] if whole else through_factors
