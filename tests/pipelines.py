"""Pipelines of diffusers in small, with random weights, saved as diffusers saves them."""

from pathlib import Path
from typing import Any

import pytest
import torch

BLOCKS: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}


def save_latent_pipeline(folder: Path, side: int, width: int | None = None) -> Path:
    """An autoencoder of 3 x side x side pixels, and a U-Net of its 4 x side/2 x side/2 latents; width: of the tokens that it is told, as Stable
    Diffusion is."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(**BLOCKS, **kinds, latent_channels=4, sample_size=side)
    latents: dict[str, Any] = {"sample_size": side // 2, "in_channels": 4, "out_channels": 4}
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    crossed = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    network = (
        diffusers.UNet2DModel(**BLOCKS, **plain, **latents)
        if width is None
        else diffusers.UNet2DConditionModel(
            **BLOCKS, **crossed, **latents, cross_attention_dim=width, attention_head_dim=2
        )
    )
    for part, model in (("vae", vae), ("unet", network), ("scheduler", diffusers.DDIMScheduler())):
        model.save_pretrained(folder / part)
    return folder
