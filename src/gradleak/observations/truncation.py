"""SVD truncation of an adapter: what is shared of the factors, and what somebody makes of them who knows where training began."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.observations.defenses import Defense
from gradleak.observations.tensors import Tensors

SILENT = 1e-6  # of the largest singular value: below it are zeros, and the rounding of float32


@dataclass(frozen=True)
class TruncatedRank(Defense):
    """Keep so many directions of each product B A of an adapter's factors, those of the largest singular values (`truncated`)."""

    exact: ClassVar[bool] = False
    reads: ClassVar[bool] = True

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadInput(f"An adapter keeps a rank of 1 or more, not {self.rank}.")

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """Of changes of B from zero beside an A of orthonormal rows, as the truncated factors are: truncating B A is truncating B."""
        if not any(name.endswith("lora_B") for name in released):
            raise BadInput(
                "svd truncates the product of an adapter's factors: `gradleak defend` does it to an adapter's folder."
            )
        return {n: self.nearest(t) if n.endswith("lora_B") else t for n, t in released.items()}

    def nearest(self, B: Tensor) -> Tensor:
        """The nearest of that rank to each of n matrices (n, out, r, ...) (Eckart and Young 1936)."""
        U, s, V = torch.linalg.svd(B.flatten(2).double(), full_matrices=False)
        nearest: Tensor = U[..., : self.rank] * s[:, None, : self.rank] @ V[:, : self.rank]
        return nearest.to(B).view_as(B)

    def seen(self, simulated: Tensors, released: Tensors) -> Tensors:
        """Changes of B as far as they lie in the columns that were kept: of one step from a known start, that is what was shared."""
        return {n: within(t, released[n]) if n.endswith("lora_B") else t for n, t in simulated.items()}

    def __str__(self) -> str:
        return f"products of the factors truncated to rank {self.rank}"


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the same shapes whose product is the best approximation of rank `rank` of B A (Eckart and Young 1936): A (r, in, ...) holds
    orthonormal rows, B (out, r, ...) all sizes, and what is left of the old rank is zero. BadInput where that is no smaller rank."""
    if not rank < len(A):
        raise BadInput(f"svd:{rank} leaves an adapter of rank {len(A)} as it is: give a smaller rank.")
    U, s, V = torch.linalg.svd(B.flatten(1).double() @ A.flatten(1).double(), full_matrices=False)
    new_A, new_B = torch.zeros_like(A.flatten(1)), torch.zeros_like(B.flatten(1))
    new_A[:rank], new_B[:, :rank] = V[:rank].to(A), (U[:, :rank] * s[:rank]).to(B)
    return new_A.view_as(A), new_B.view_as(B)


def untruncated(A: Tensor, B: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Of truncated factors, factors with the same product, as near as there are to those of the training, which began at A = `start`, B = 0.

    B = (B A) start^+: what the product says along the rows of the start, which is all of it after one step. The rest is what moved A, of
    which B sees a part: the least change of A that gives the product. The directions that were cut off stay unknown.
    """
    whole, A_0 = B.flatten(1).double() @ A.flatten(1).double(), start.flatten(1).double()
    new_B = whole @ torch.linalg.pinv(A_0)
    left = whole - new_B @ A_0
    new_A = A_0 + torch.linalg.pinv(new_B, rtol=SILENT) @ left
    return new_A.to(A).view_as(A), new_B.to(B).view_as(B)


def within(B: Tensor, kept: Tensor) -> Tensor:
    """The part of a matrix B (out, r, ...) in the columns of another."""
    U, s, _ = torch.linalg.svd(kept.detach().flatten(1), full_matrices=False)
    U = U[:, s > SILENT * s.max()]
    part: Tensor = U @ (U.T @ B.flatten(1))
    return part.view_as(B)
