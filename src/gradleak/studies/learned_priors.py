"""Priors that were learned, as studies of priors name them: "trained here" is the one in a folder that `gradleak train denoiser` has made."""

import os
from pathlib import Path
from typing import Any

from gradleak.priors.named import load_prior

DENOISER = "GRADLEAK_DENOISER"  # names the folder
TRAINED = "trained here"


def learned(*, ffdnet: bool = True) -> list[str]:
    """Those that are there: FFDNet is one of colour pictures."""
    return [*([TRAINED] if DENOISER in os.environ else []), *(["ffdnet"] if ffdnet else [])]


def prior_of(name: str, shape: tuple[int, int, int]) -> Any:
    """The prior of pictures (channel, height, width)."""
    return load_prior(f"diffusion:{os.environ[DENOISER]}" if name == TRAINED else name, shape)


def behind(name: str) -> tuple[Any, ...]:
    """What a cell under this prior depends on."""
    return (load_prior, Path(os.environ[DENOISER])) if name == TRAINED else (load_prior,)
