"""How the denoiser is trained: mean squared error in units of the Gaussian's posterior (`own`), flips, log-normal noise levels,
convolutions by Muon (Jordan et al. 2024), the rest by AdamW, a rate that falls with the time left, averaged weights.

With every checkpoint the folder holds a denoiser, what it was trained on, and `training.safetensors` to go on from.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.priors.denoisers.own import TrainedDenoiser
from gradleak.priors.provenance import Provenance, Told, fingerprinted

STATE = "training.safetensors"
BATCH = 32
MUON, ADAM = 0.02, 2e-3  # rates
WARM = 50  # steps until the rate is whole
LEVEL, WIDTH = 0.3, 1.0  # noise in pixels of [-1, 1]: its median, and its spread in natural logarithms
LOWEST, HIGHEST = 0.02, 4.0
CHECKPOINT = 60.0  # CPU seconds between two
FITTED = 5_000  # pictures that the Gaussian is fitted to


@dataclass(frozen=True)
class Progress:
    """Where a training stands."""

    steps: int = 0
    seconds: float = 0.0  # CPU
    loss: float = 1.0  # of the last steps, in units of the Gaussian's


def train(
    images: Tensor,
    out: Path,
    *,
    source: str,
    split: str,
    minutes: float,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] = lambda step, steps, value: None,
) -> TrainedDenoiser:
    """images (n, channel, height, width) uint8, those of a split of a source; minutes of CPU.

    Writes the denoiser to `out`, once per checkpoint. Raises BadInput where `out` holds a training on others, or of another length.
    """
    torch.manual_seed(seed)
    denoiser = TrainedDenoiser.begun(scaled(images[torch.randperm(len(images))[:FITTED]]))
    sha256, prints = fingerprinted(images)
    denoiser.provenance = Provenance(Told(source, split, len(images), sha256), prints)
    key = f"{sha256} {seed} {minutes:g}"
    weights = dict(denoiser.unet.named_parameters())
    state = {f"{kind}|{name}": torch.zeros_like(w) for name, w in weights.items() for kind in ("first", "second")}
    state |= {f"mean|{name}": w.detach().clone() for name, w in weights.items()}
    at = resumed(out, key, state, weights)
    generator, begun = torch.Generator(), time.process_time() - at.seconds
    written = at.seconds - CHECKPOINT
    while at.seconds < 60 * minutes:
        if at.seconds - written >= CHECKPOINT:
            write(denoiser, out, key, at, state, weights)
            written = at.seconds
        generator.manual_seed(seed + 1_000_003 * (at.steps + 1))  # one that goes on draws what it would have drawn
        loss = step_loss(denoiser, images, generator)
        denoiser.unet.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        used = at.seconds / (60 * minutes)
        rate = min(1, (at.steps + 1) / WARM) * (0.51 + 0.49 * math.cos(math.pi * used))
        with torch.no_grad():
            descend(weights, state, at.steps, rate)
            kept = min(0.999, 1 - 8 / (8 + at.steps + 1))
            for name, weight in weights.items():
                state[f"mean|{name}"].lerp_(weight, 1 - kept)
        at = Progress(at.steps + 1, time.process_time() - begun, 0.98 * at.loss + 0.02 * float(loss.detach()))
        on_step(int(at.seconds), int(60 * minutes), at.loss)
    write(denoiser, out, key, at, state, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state[f"mean|{name}"])
    return denoiser.eval().requires_grad_(False)


def scaled(images: Tensor) -> Tensor:
    """Bytes as pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def step_loss(denoiser: TrainedDenoiser, images: Tensor, generator: torch.Generator) -> Tensor:
    """The squared error of a batch, relative to what the Gaussian leaves."""
    clean = scaled(images[torch.randint(len(images), (BATCH,), generator=generator)])
    flipped = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
    clean = torch.where(flipped, clean.flip(-1), clean)
    sigma = (math.log(LEVEL) + WIDTH * torch.randn(BATCH, generator=generator)).exp().clamp(LOWEST, HIGHEST)
    s = sigma[:, None, None, None]
    noisy = clean + s * torch.randn(clean.shape, generator=generator)
    found: Tensor = denoiser(noisy, sigma)
    return ((found - clean) / denoiser.gaussian.spread(s**2)).square().mean()


def descend(weights: dict[str, Tensor], state: dict[str, Tensor], steps: int, rate: float) -> None:
    """One step: orthogonalised momentum for inner convolutions, AdamW for all else."""
    for name, weight in weights.items():
        gradient, first, second = weight.grad, state[f"first|{name}"], state[f"second|{name}"]
        assert gradient is not None
        if weight.ndim == 4 and weight.shape[-1] > 1 and not name.startswith(("conv_in", "conv_out")):
            first.lerp_(gradient, 0.05)
            move = orthogonal(gradient.lerp(first, 0.95).flatten(1)).view_as(weight)
            weight.sub_(MUON * rate * move)
            continue
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.01)
        size = (second / (1 - 0.99 ** (steps + 1))).sqrt() + 1e-8
        weight.mul_(1 - 1e-2 * ADAM * rate).sub_(ADAM * rate / (1 - 0.9 ** (steps + 1)) * first / size)


def orthogonal(matrix: Tensor) -> Tensor:
    """The closest matrix with singular values near 1, by five Newton-Schulz steps (Jordan et al. 2024); tall ones a little longer."""
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.T if tall else matrix
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    found: Tensor = (X.T if tall else X) * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
    return found


def resumed(out: Path, key: str, state: dict[str, Tensor], weights: dict[str, Tensor]) -> Progress:
    """Where the training in `out` stands, its state copied; the beginning where there is none."""
    path = out / STATE
    if not path.is_file():
        return Progress()
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
    held = load_file(path)
    if told.get("key") != key or set(held) != set(state) | {f"weight|{name}" for name in weights}:
        raise BadInput(f"{out} holds a training on other pictures or with other flags: take another folder.")
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(held[name])
        for name, weight in weights.items():
            weight.copy_(held[f"weight|{name}"])
    return Progress(int(told["steps"]), float(told["seconds"]), float(told["loss"]))


def write(
    denoiser: TrainedDenoiser, out: Path, key: str, at: Progress, state: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    """The state to go on from, whole or not at all; then the denoiser, with averaged weights."""
    own = {name: weight.detach().clone() for name, weight in weights.items()}
    out.mkdir(parents=True, exist_ok=True)
    held = {name: value.contiguous() for name, value in (state | {f"weight|{n}": w for n, w in own.items()}).items()}
    partial = out / f"{STATE}.partial"
    save_file(held, partial, {"key": key, "steps": str(at.steps), "seconds": repr(at.seconds), "loss": repr(at.loss)})
    os.replace(partial, out / STATE)
    assert denoiser.provenance is not None
    told = msgspec.structs.replace(denoiser.provenance.told, minutes=round(at.seconds / 60, 2), steps=at.steps)
    denoiser.provenance = replace(denoiser.provenance, told=told)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state[f"mean|{name}"])
        denoiser.save(out)
        for name, weight in weights.items():
            weight.copy_(own[name])
