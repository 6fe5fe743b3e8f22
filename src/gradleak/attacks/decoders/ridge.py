"""Two closed-form decoders of an adapter's sketches S = M F^T: the pseudo-inverse and ridge regression.

Ridge: the rows of a layer's gradients M are taken as draws from N(0, C). Their mean given S is the linear map
    M^ = S (F C F^T)^-1 F C,    C = sum_i M_i^T M_i + shrinkage I over public pictures i, each of unit norm,
which satisfies M^ F^T = S, and of which only F C = sum_i S_i^T M_i is ever needed. C differs from picture to picture, so public pictures are grouped by
what can be seen of theirs, the Gram matrices S_i^T S_i of all layers (k-means), and C is taken from the groups nearest
to the observation. The layer that makes the logits also obeys the softmax's equation (readout.py).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.decoders import readout, storage
from gradleak.attacks.decoders.pairs import (
    as_observation,
    batches,
    check_identity,
    check_pictures,
    identity,
    key,
    sketched_moment,
)
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Sketch, weight_shaped
from gradleak.observations.tensors import Tensors

SEEN = 16  # columns of S that enter the grouping
SHARPNESS = 16.0  # a group at squared distance d has the weight exp(-SHARPNESS d / batch size); features have unit norm
SHRINKAGE = 1e-6  # of C towards the identity
SHARED = 0.02  # of C comes from all public pictures


@dataclass(frozen=True)
class PseudoInverse:
    """The gradient of least norm that explains the sketches: needs no pictures, and knows nothing."""

    @classmethod
    def fit(
        cls,
        adapter: PictureObservation,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        on_step: OnStep | None = None,
    ) -> Self:
        """Nothing to fit."""
        return cls()

    def __call__(self, adapter: PictureObservation) -> PictureObservation:
        """The adapter's gradient, over the adapted weights."""
        return as_observation(adapter, adapter.as_gradient())


@dataclass(frozen=True)
class Ridge:
    """A fitted ridge decoder.

    fitted   identity of the base model and adapter start
    moments  {sketch: F C of each group (groups, rank, columns)}
    whiten   {sketch: (mean of S^T S over public pictures)^-1/2 on the first `SEEN` columns}
    centres  (groups, features)
    sizes    (groups,) public pictures in each
    last     {MODULE/mean (features,), MODULE/covariance}: the features that the logits are made of; may be empty
    """

    fitted: str
    moments: Tensors = field(repr=False)
    whiten: Tensors = field(repr=False)
    centres: Tensor = field(repr=False)
    sizes: Tensor = field(repr=False)
    last: Tensors = field(repr=False)

    @classmethod
    def fit(
        cls,
        adapter: PictureObservation,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        on_step: OnStep | None = None,
        groups: int = 64,
        softmax: bool = True,
    ) -> Self:
        """Fit on public pictures (n, channel, height, width) in [0, 1] with labels (n,), in two passes over them.

        groups: at most, and no more than one for 16 pictures; groups=1 with softmax=False is plain ridge regression.
        Raises BadInput for pictures that do not fit the model and for layers that cannot be decoded.
        """
        check_pictures(adapter, images, labels)
        n, groups = len(images), max(1, min(groups, len(images) // 16))
        module = readout.find(adapter, images[:2]) if softmax else ""
        grams: dict[str, list[Tensor]] = {key(s): [] for s in adapter.sketches()}
        energy, read = images.new_zeros(n), []
        for rows, found in batches(adapter, images, labels):
            for sketch, S, (X, delta) in found:
                grams[key(sketch)].append(S[..., :SEEN].mT @ S[..., :SEEN])
                energy[rows] += S.square().sum((1, 2))
                if sketch.module == module:
                    read.append((X if sketch.side == "right" else delta).flatten(0, 1))
            if on_step is not None:
                on_step(min(rows.stop, n), 2 * n, torch.nan)
        weight = 1 / energy.clamp_min(torch.finfo(energy.dtype).tiny)  # (n,)
        seen = {name: torch.cat(parts) for name, parts in grams.items()}  # (n, seen, seen)
        whiten = {name: _inverse_root((weight[:, None, None] * gram).mean(0)) for name, gram in seen.items()}
        centres, owner = k_means(_features(seen, whiten), groups, generator)
        moments: Tensors = {}
        for rows, found in batches(adapter, images, labels):
            for sketch, S, pair in found:
                each = weight[rows, None, None] * sketched_moment(S, pair)
                total = moments.setdefault(key(sketch), each.new_zeros(groups, *each.shape[1:]))
                total.index_add_(0, owner[rows], each)
            if on_step is not None:
                on_step(n + min(rows.stop, n), 2 * n, torch.nan)
        last = {}
        if module:
            h = torch.cat(read)
            last = {f"{module}/mean": h.mean(0), f"{module}/covariance": torch.cov(h.T.double(), correction=0).to(h)}
        return cls(identity(adapter), moments, whiten, centres, torch.bincount(owner, minlength=groups), last)

    def __call__(self, adapter: PictureObservation) -> PictureObservation:
        """The adapter's gradient, over the adapted weights; BadInput if the decoder was fitted to another adapter."""
        check_identity(self.fitted, adapter)
        share = self.nearest(adapter)
        decoded: Tensors = {}
        for sketch in adapter.sketches():
            name = f"{sketch.module}.weight"
            shape = adapter.model.parameters[name].shape
            known = decoded.get(name, sketch.measured.new_zeros(shape)).flatten(1)
            known = known if sketch.side == "right" else known.T
            # Where both factors are released, the second explains what the first has left: exact for both.
            S = sketch.measured - known @ sketch.through.T
            FC = torch.tensordot(share, self.moments[key(sketch)], 1)  # (rank, columns)
            exact = self._from_softmax(adapter, sketch)
            M = known + ridge(S, sketch.through, FC) if exact is None else exact
            decoded[name] = weight_shaped(adapter.model, sketch, M)
        return as_observation(adapter, decoded)

    def nearest(self, adapter: PictureObservation) -> Tensor:
        """(groups,): by how much each group's sum enters C for this observation."""
        seen = {key(s): (s.measured[:, :SEEN].T @ s.measured[:, :SEEN])[None] for s in adapter.sketches()}
        distance = (_features(seen, self.whiten) - self.centres).square().sum(1)
        sharpness = SHARPNESS / (adapter.batch_size or 1)  # a batch is like several groups at once
        near = torch.exp(-sharpness * (distance - distance.min()))
        return near / (near @ self.sizes.to(near)) + SHARED / self.sizes.sum()

    def _from_softmax(self, adapter: PictureObservation, sketch: Sketch) -> Tensor | None:
        module, recipe = sketch.module, adapter.adapter.recipe
        if f"{module}/mean" not in self.last or sketch.side == "left" or recipe is None or recipe.steps > 1:
            return None
        W = adapter.adapter.merged(adapter.model, {})[f"{module}.weight"]
        b = adapter.model.parameters.get(f"{module}.bias", W.new_zeros(len(W)))
        return readout.decode(sketch, W, b, self.last[f"{module}/mean"], self.last[f"{module}/covariance"])

    def save(self, path: Path) -> None:
        """Write the decoder as safetensors."""
        tensors = {f"moments/{name}": t for name, t in self.moments.items()}
        tensors |= {f"whiten/{name}": t for name, t in self.whiten.items()}
        tensors |= {f"last/{name}": t for name, t in self.last.items()}
        tensors |= {"centres": self.centres, "sizes": self.sizes}
        storage.write(path, "ridge", self.fitted, tensors)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a decoder back; BadInput if the file is something else."""
        fitted, tensors = storage.read(path, "ridge", "centres", "sizes")
        moments, whiten, last = (storage.group(tensors, prefix) for prefix in ("moments", "whiten", "last"))
        return cls(fitted, moments, whiten, tensors["centres"], tensors["sizes"], last)


def ridge(S: Tensor, factor: Tensor, FC: Tensor) -> Tensor:
    """S (F C F^T)^-1 F C, with C shrunk a little towards a multiple of the identity. Solved in float64.

    S (rows, rank), F (rank, columns), F C (rank, columns) -> M^ (rows, columns), with M^ F^T = S.
    """
    U, s, Vh = torch.linalg.svd(factor.double(), full_matrices=False)
    kept = s > 1e-10 * s[0]  # dependent rows of F measure nothing new
    solve = U[:, kept] / s[kept]
    S_, F_, FC_ = S.double() @ solve, Vh[kept], solve.T @ FC.double()  # the same equation for an F of orthonormal rows
    isotropic = (FC_ * F_).sum() / len(F_)  # the variance that C gives to the directions of F
    # Directions that no public gradient has are left to the pseudo-inverse; all of them, if none reached this layer.
    FC_ = FC_ + (SHRINKAGE * isotropic + torch.finfo(S.dtype).tiny) * F_
    M: Tensor = S_ @ torch.linalg.solve(FC_ @ F_.T, FC_)
    return M.to(S.dtype)


def k_means(points: Tensor, groups: int, generator: torch.Generator, rounds: int = 15) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random points: centres (groups, features) and the group of each point (n,)."""
    centres = points[torch.randperm(len(points), generator=generator)[:groups].to(points.device)]
    owner = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for _ in range(rounds):
        owner = (points @ centres.T - centres.square().sum(1) / 2).argmax(1)
        sizes = torch.bincount(owner, minlength=groups)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres, owner


def _features(grams: Tensors, whiten: Tensors) -> Tensor:
    """{sketch: S^T S (n, seen, seen)} -> (n, features) of unit norm: whitened, each layer with the same weight."""
    parts = [(whiten[name] @ gram @ whiten[name]).flatten(1) for name, gram in grams.items()]
    return torch.cat([F.normalize(part, dim=1) for part in parts], 1) / math.sqrt(len(parts))


def _inverse_root(gram: Tensor) -> Tensor:
    """gram^-1/2 for a symmetric matrix, bounded where it is singular."""
    values, vectors = torch.linalg.eigh(gram.double())
    root = values.clamp_min(1e-9 * float(values[-1]) + torch.finfo(gram.dtype).tiny).rsqrt()
    result: Tensor = ((vectors * root) @ vectors.T).to(gram.dtype)
    return result
