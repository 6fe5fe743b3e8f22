"""Any diffusers pipeline as a denoiser: of pixels, or through the autoencoder of latents. Weights are safetensors, classes are
those named here, and nothing that a folder says is run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.priors.denoisers.own import GAUSSIAN, TrainedDenoiser
from gradleak.priors.denoisers.schedules import Clean, Network, schedule
from gradleak.priors.files import Shape, by, folder_of, part_of, parts_of, read_object
from gradleak.priors.provenance import Provenance

NETWORKS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


@dataclass(frozen=True, eq=False)
class PixelDiffusion:
    """`Denoiser`: a network that was trained on pixels in [-1, 1]."""

    network: Network = field(repr=False)
    clean: Clean = field(repr=False)
    shape: Shape
    name: str
    provenance: Provenance | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.name

    def denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        """`Denoiser.denoise`."""
        noisy = 2 * images.float() - 1
        return ((self.clean(self.network, noisy, 2 * sigma.to(noisy).expand(len(images))) + 1) / 2).to(images)


@dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """`Denoiser`, roughly: the expected latent, decoded (Rombach et al. 2022). What the noise of pixels is in latents is measured:
    as much again is added, and encoded. `encode`, `decode` and `clean` are there for searches among latents."""

    network: Network = field(repr=False)
    clean: Clean = field(repr=False)
    vae: nn.Module = field(repr=False)
    shape: Shape
    name: str
    provenance: Provenance | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.name

    def encode(self, images: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width) in [0, 1] -> latents in the units of the network."""
        vae: Any = self.vae
        latents: Tensor = vae.encode(2 * images - 1).latent_dist.mean
        scaled: Tensor = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        return scaled

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels in [0, 1], not clamped."""
        vae: Any = self.vae
        pixels: Tensor = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
        return (pixels + 1) / 2

    def denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        """`Denoiser.denoise`."""
        noisy = images.float()
        noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0)).to(noisy)
        level = sigma.to(noisy).expand(len(noisy))
        latents = self.encode(noisy)
        with torch.no_grad():
            moved = self.encode(noisy + level[:, None, None, None] * noise) - latents
        s = moved.flatten(1).square().mean(1).sqrt().clamp_min(1e-6)
        return self.decode(self.clean(self.network, latents, s)).to(images)


AnyDiffusion = TrainedDenoiser | PixelDiffusion | LatentDiffusion


def load(name: str, shape: Shape | None = None, prompt: str = "") -> AnyDiffusion:
    """A folder, or a name on the hub. shape: of the pictures to denoise, where it is not the pipeline's own; prompt: what a model of
    texts is told that they show.

    Raises BadInput for pickled weights, for a network, a scheduler or a size that does not fit, and where diffusers is missing.
    """
    folder = folder_of(name)
    if (folder / GAUSSIAN).is_file():
        trained = TrainedDenoiser.load(folder)
        fitting(trained.shape, shape, folder, None)
        return trained
    parts = parts_of(folder)
    inner = next((part for part in ("unet", "transformer", "") if part in parts), None)
    if inner is None or "scheduler" not in parts:
        lacking = "scheduler" if inner is not None else "unet or transformer"
        raise BadInput(f"{folder} holds no {lacking}: a pipeline that diffusers saved has one.")
    clean = schedule(read_object(parts["scheduler"]))
    model = part_of(parts[inner].parent, NETWORKS)
    network, config = called(model, folder, prompt), model.config
    side = config.sample_size or 0
    height, width = (side, side) if isinstance(side, int) else side
    step = 2 ** (len(config.block_out_channels) - 1) if "block_out_channels" in config else None
    if "vae" not in parts:
        own = config.in_channels, height, width
        return PixelDiffusion(network, clean, *fitting(own, shape, folder, step), Provenance.load(folder))
    vae = part_of(parts["vae"].parent, ("AutoencoderKL",))
    if vae.config.latent_channels != config.in_channels:
        raise BadInput(
            f"The vae of {folder} makes latents of {vae.config.latent_channels} channels, its network takes {config.in_channels}."
        )
    finer = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent, each way
    own = vae.config.in_channels, finer * height, finer * width
    used, said = fitting(own, shape, folder, step and finer * step)
    return LatentDiffusion(network, clean, vae, used, said, Provenance.load(folder))


def fitting(own: Shape, asked: Shape | None, folder: Path, step: int | None) -> tuple[Shape, str]:
    """The shape to use, and what to call it. step: other sizes are convolved too if they are multiples of it; None: they are not.

    Raises BadInput for a shape that the pipeline cannot take."""
    name = f"diffusion in {folder}"
    if asked is None and 0 in own:
        raise BadInput(f"The pipeline in {folder} does not say of what size its pictures are: say so.")
    if asked is None or asked == own:
        return own, name
    channel, height, width = asked
    if channel != own[0] or step is None or height % step or width % step:
        more = "" if step is None else f" (or of {own[0]} channels with sides that are multiples of {step})"
        raise BadInput(
            f"The pipeline in {folder} is of {by(own)} pictures{more}, not of {by(asked)}: take another, or resize."
        )
    return asked, f"{name}, made for {own[1]}x{own[2]} pixels, used at {height}x{width}"


def called(model: Any, folder: Path, prompt: str) -> Network:
    """x_t and time -> what the network predicts, without the variance that some predict beside it."""
    config, extra = model.config, {}
    if type(model).__name__ == "DiTTransformer2DModel":
        extra["class_labels"] = torch.tensor([config.num_embeds_ada_norm])  # the label of "no class"
    elif config.class_embed_type is not None or getattr(config, "num_class_embeds", None) is not None:
        raise BadInput(f"The network in {folder} wants to be told a class: take one without classes.")
    elif type(model).__name__ == "UNet2DConditionModel":
        if config.addition_embed_type is not None:
            raise BadInput(f"The network in {folder} wants more than a prompt: take one as in Stable Diffusion 1 or 2.")
        extra["encoder_hidden_states"] = meaning(folder, prompt)

    def network(x: Tensor, time: Tensor) -> Tensor:
        more = {name: value.expand(len(x), *value.shape[1:]) for name, value in extra.items()}
        said: Tensor = model(x, time, **more).sample
        return said[:, : x.shape[1]]

    return network


def meaning(folder: Path, prompt: str) -> Tensor:
    """What a pipeline's text encoder makes of a prompt: (1, tokens, width)."""
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", use_safetensors=True, local_files_only=True
        )
        tokens = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        with torch.no_grad():
            states: Tensor = encoder(torch.tensor([tokens["input_ids"]])).last_hidden_state
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise BadInput(f"{folder} holds no tokenizer and CLIP text encoder in safetensors for its prompt.") from error
    return states
