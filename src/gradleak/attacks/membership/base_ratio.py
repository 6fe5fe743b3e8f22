"""The loss against that of the base model (LoRA-Leak, arXiv:2507.18302: the base model calibrates how hard a sample is)."""

from torch import Tensor

from gradleak.attacks.membership.evidence import Evidence


def base_ratio(seen: Evidence) -> Tensor:
    """l(x; theta_0) - l(x; theta_T): by how much training has helped."""
    return seen.before - seen.after
