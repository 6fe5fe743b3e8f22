"""What `train denoiser` does."""

import math

import torch

from gradleak.audit.progress import progress
from gradleak.cli import flags
from gradleak.cli.folders import folder_for, is_finished, tell
from gradleak.errors import BadInput
from gradleak.modalities.pictures import load, with_channels
from gradleak.priors.denoisers import training


def train_denoiser(args: flags.TrainDenoiser, name: str) -> None:
    """Write a folder of diffusers with the denoiser, and what it was trained on; one that was killed goes on."""
    if not 0 < args.minutes < math.inf:
        raise BadInput(f"A training takes more than 0 minutes, not {args.minutes:g}.")
    if args.shape is not None and args.shape[0] not in (1, 3):
        raise BadInput(f"Pictures have 1 or 3 channels, not {args.shape[0]}.")
    out = args.out if (args.out / training.STATE).is_file() else folder_for(args)
    if is_finished(name, args):
        print(f"{out} is finished already.")
        return
    pictures = load(args.data, args.split, limit=args.limit, resize=args.shape and args.shape[1:])
    images = pictures.images
    if args.shape is not None and images.shape[1] != args.shape[0]:
        images = torch.stack([with_channels(image, args.shape[0]) for image in images])
    images = (255 * images).round().to(torch.uint8)
    with progress() as start:
        training.train(
            images,
            out,
            source=pictures.source,
            split=args.split,
            minutes=args.minutes,
            seed=args.seed,
            on_step=start("denoiser"),
        )
    tell(name, args)
    (out / training.STATE).unlink()
    print(f"{out}: a denoiser trained on {len(images):,} pictures of {args.data}, as a prior diffusion:{out}")
