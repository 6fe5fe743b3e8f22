"""How well do priors clean pictures that they have not seen? docs/findings/priors.md.

python benchmarks/denoisers.py --data CIFAR10 --priors gaussian ffdnet diffusion:FOLDER
"""

import time
from dataclasses import dataclass
from typing import cast

import torch
import tyro
from torch import Tensor

from gradleak.modalities.pictures import load, public_pool
from gradleak.priors.named import load_prior
from gradleak.priors.prior import Denoiser


@dataclass(frozen=True)
class Settings:
    """White noise on pictures of a test split; PSNR on average over pictures, with intervals."""

    data: str
    """A data set with the splits train and test."""
    priors: tuple[str, ...] = ("gaussian", "ffdnet")
    """As `load_prior` takes them; the first is the control, and what others gain over it is told too."""
    first: int = 0
    """The first row of test."""
    count: int = 128
    """Pictures, one after the other."""
    public: int = 20_000
    """Pictures of train, at random, that the Gaussian is fitted to."""
    levels: tuple[float, ...] = (5, 12.75, 25.5, 51, 127.5, 255)
    """Standard deviations of the noise, of 255."""
    seed: int = 0


def main(settings: Settings) -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    images = load(settings.data, "test", indices=range(settings.first, settings.first + settings.count)).images
    channel, height, width = images.shape[1:]
    public = (
        public_pool(settings.data, shape=(channel, height, width), limit=settings.public).images
        if "gaussian" in settings.priors
        else None
    )
    shape = channel, height, width
    priors = {text: cast(Denoiser, load_prior(text, shape, public)) for text in settings.priors}
    print(
        "| sigma x 255 | noisy |",
        " | ".join(f"{text}" for text in priors),
        "|\n|---" + "|---" * (1 + len(priors)) + "|",
    )
    seconds = dict.fromkeys(priors, 0.0)
    for level in settings.levels:
        generator = torch.Generator().manual_seed(settings.seed)
        noisy = images + level / 255 * torch.randn(images.shape, generator=generator)
        row, control = [f"{float(psnr(noisy, images).mean()):.2f}"], None
        for text, prior in priors.items():
            begun = time.process_time()
            with torch.no_grad():
                found = torch.cat([prior.denoise(some, torch.tensor(level / 255)) for some in torch.split(noisy, 64)])
            seconds[text] += time.process_time() - begun
            here = psnr(found, images)
            gain = "" if control is None else f" ({told(here - control)})"
            row.append(f"{told(here)}{gain}")
            control = here if control is None else control
        print(f"| {level:g} |", " | ".join(row), "|", flush=True)
    each = {text: 1000 * spent / len(settings.levels) / len(images) for text, spent in seconds.items()}
    print("CPU-ms per picture: " + ", ".join(f"{text} {ms:.1f}" for text, ms in each.items()))


def psnr(found: Tensor, true: Tensor) -> Tensor:
    """Of each picture, clamped to [0, 1], in dB."""
    return -10 * (found.clamp(0, 1) - true).square().flatten(1).mean(1).log10()


def told(values: Tensor) -> str:
    """The mean and its 95 % interval."""
    return f"{float(values.mean()):.2f} ± {1.96 * float(values.std()) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main(tyro.cli(Settings))
