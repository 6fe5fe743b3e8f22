"""RMIA, offline (Zarifzadeh, Liu and Shokri, ICML 2024, arXiv:2312.03262, equations 4 and 9), the base model as its one reference.

Differs   the reference is the model before training, and no model trained on other samples (as LoRA-Leak has it)
"""

import torch
from torch import Tensor

from gradleak.attacks.membership.evidence import Evidence

A = 0.3  # what the paper takes for CIFAR-10: how far training on x raises p(x) of models that did not see it


def rmia(seen: Evidence) -> Tensor:
    """Share of the population z that x exceeds: [p_T(x) / p(x)] / [p_T(z) / p(z)] > 1, p(x) = (1 + a) / 2 p_0(x) + (1 - a) / 2."""
    trained, base = torch.exp(-seen.after), torch.exp(-seen.before)
    ratio = trained / ((1 + A) / 2 * base + (1 - A) / 2)
    return (ratio[:, None] > ratio[seen.reference]).double().mean(1)
