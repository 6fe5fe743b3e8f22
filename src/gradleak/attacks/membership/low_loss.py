"""The loss threshold (Yeom et al., CSF 2018, arXiv:1709.01604, adversary 1): a model does better on what it was trained on."""

from torch import Tensor

from gradleak.attacks.membership.evidence import Evidence


def low_loss(seen: Evidence) -> Tensor:
    """-l(x; theta_T): easy samples look like members, whoever they are."""
    return -seen.after
