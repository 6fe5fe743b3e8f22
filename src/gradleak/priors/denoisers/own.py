"""The denoiser that is trained here: EDM preconditioning (Karras et al. 2022, equation 7), but around the posterior mean of a
Gaussian prior instead of around a multiple of the noisy picture:

    D(x, s) = W_s x + c(s) F([x / sqrt(s^2 + 1/4), 2 W_s x], ln(s) / 4),   pixels in [-1, 1], s in the same units,

with W_s the Wiener filter of a stationary Gaussian (independent waves of a cosine transform, in decorrelated colours) and c(s)^2
its posterior variance per pixel. F learns what a Gaussian cannot say, and a network that says nothing is that Gaussian.
F is a UNet2DModel of diffusers on 2x2 pixels folded into channels (FFDNet, Zhang et al. 2018): a quarter of the positions.
"""

from pathlib import Path
from typing import Self

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.priors.files import diffusers, part_of, read_tensors
from gradleak.priors.gaussian import cosines
from gradleak.priors.provenance import Provenance

GAUSSIAN = "gaussian.safetensors"
UNFOLDED = 2  # pixels folded into channels, each way
INDEX = {  # what DiffusionPipeline.from_pretrained reads; to sample, its network needs the Gaussian around it
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "EDMEulerScheduler"],
}
WIDTHS = (48, 96)  # channels at half and a quarter of the size


class Stationary(nn.Module):
    """A Gaussian prior of pictures in [-1, 1] whose covariance is diagonal in the waves of a cosine transform."""

    colour: Tensor  # (channel,) the mean
    mixes: Tensor  # (channel, channel) orthonormal columns: decorrelated colours
    power: Tensor  # (channel, height, width) the variance of each wave
    down: Tensor  # (height, height) the waves
    across: Tensor  # (width, width)

    def __init__(self, colour: Tensor, mixes: Tensor, power: Tensor) -> None:
        super().__init__()
        for name, value in (("colour", colour), ("mixes", mixes), ("power", power)):
            self.register_buffer(name, value)
        for name, side in zip(("down", "across"), power.shape[1:], strict=True):
            self.register_buffer(name, cosines(side).float(), persistent=False)

    @classmethod
    def fit(cls, images: Tensor) -> Self:
        """To pictures (n, channel, height, width) in [-1, 1]."""
        colour = images.mean((0, 2, 3))
        apart = images - colour[:, None, None]
        mixes = torch.linalg.eigh(torch.cov(apart.movedim(1, 0).flatten(1)).reshape(len(colour), -1))[1]
        down, across = (cosines(side).float() for side in images.shape[2:])
        waves = down @ torch.einsum("cd,ncyx->ndyx", mixes, apart) @ across.T
        return cls(colour, mixes, waves.square().mean(0))

    def forward(self, images: Tensor, variance: Tensor) -> Tensor:
        """The posterior mean under white noise of this variance (batch, 1, 1, 1)."""
        waves = torch.einsum("cd,ncyx->ndyx", self.mixes, images - self.colour[:, None, None])
        kept = (self.down @ waves @ self.across.T) * (self.power / (self.power + variance))
        return torch.einsum("cd,ndyx->ncyx", self.mixes, self.down.T @ kept @ self.across) + self.colour[:, None, None]

    def spread(self, variance: Tensor) -> Tensor:
        """The posterior standard deviation, root mean square over pixels: (batch, 1, 1, 1)."""
        return (self.power * variance / (self.power + variance)).mean((1, 2, 3), keepdim=True).sqrt()


class TrainedDenoiser(nn.Module):
    """`Denoiser`: the network F, a UNet2DModel, around the filter of a Gaussian."""

    def __init__(self, gaussian: Stationary, unet: nn.Module, provenance: Provenance | None = None) -> None:
        super().__init__()
        self.provenance = provenance
        self.gaussian = gaussian
        self.unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __str__(self) -> str:
        return f"a denoiser of {self.provenance or 'pictures that nobody names'}"

    @classmethod
    def begun(cls, images: Tensor) -> Self:
        """Untrained, for pictures (n, channel, height, width) in [-1, 1]: it denoises as the Gaussian does."""
        channel, height, width = images.shape[1:]
        if height % UNFOLDED or width % UNFOLDED:
            raise BadInput(
                f"Pictures of {height}x{width} pixels do not fold 2x2: take pictures with even sides (--shape)."
            )
        size = height // UNFOLDED, width // UNFOLDED
        halvings = next(
            k for k in range(len(WIDTHS)) if k + 1 == len(WIDTHS) or any(side % 2 ** (k + 1) for side in size)
        )
        widths = WIDTHS[: halvings + 1]
        unet = diffusers().UNet2DModel(
            sample_size=size,
            in_channels=2 * UNFOLDED**2 * channel,
            out_channels=UNFOLDED**2 * channel,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
        )
        for name, weight in unet.named_parameters():  # every residual begins at zero
            if name.endswith("conv2.weight") or name.startswith("conv_out."):
                nn.init.zeros_(weight)
        return cls(Stationary.fit(images), unet)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote. Raises BadInput for anything else."""
        held = read_tensors(folder / GAUSSIAN)
        channel = held["colour"].shape if "colour" in held else ()
        if set(held) != {"colour", "mixes", "power"} or len(channel) != 1 or held["mixes"].shape != channel * 2:
            raise BadInput(f"{folder / GAUSSIAN} is not the Gaussian of a trained denoiser.")
        unet = part_of(folder / "unet", ("UNet2DModel",))
        return cls(Stationary(**held), unet, Provenance.load(folder)).eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write the network in diffusers' own format (model_index.json, unet, scheduler), and the Gaussian beside it."""
        self.unet.save_pretrained(folder / "unet", safe_serialization=True)
        scheduler = diffusers().EDMEulerScheduler(sigma_min=0.02, sigma_max=4.0, sigma_data=0.5)
        scheduler.save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_bytes(msgspec.json.format(msgspec.json.encode(INDEX)))
        if self.provenance is not None:
            self.provenance.save(folder)
        save_file({name: value.contiguous() for name, value in self.gaussian.state_dict().items()}, folder / GAUSSIAN)

    @property
    def shape(self) -> tuple[int, int, int]:
        channel, height, width = self.gaussian.power.shape
        return channel, height, width

    def forward(self, images: Tensor, sigma: Tensor) -> Tensor:
        """D(images, sigma), pixels in [-1, 1]; sigma (batch,)."""
        s = sigma[:, None, None, None]
        smooth: Tensor = self.gaussian(images, s**2)
        seen = torch.cat([images / (s**2 + 0.25).sqrt(), 2 * smooth], 1)
        folded = F.pixel_unshuffle(seen, UNFOLDED).contiguous(memory_format=torch.channels_last)
        learned: Tensor = F.pixel_shuffle(self.unet(folded, sigma.log() / 4).sample, UNFOLDED)
        return smooth + self.gaussian.spread(s**2) * learned

    def denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        """`Denoiser.denoise`."""
        noise = 2 * sigma.to(self.gaussian.power).expand(len(images))
        found: Tensor = self((2 * images - 1).to(noise), noise)
        return ((found + 1) / 2).to(images)
