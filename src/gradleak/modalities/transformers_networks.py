"""The structure of an image classifier of the transformers library, from the folder that save_pretrained has written.

Only config.json and preprocessor_config.json are read here: no weights, and no code that a folder may bring along.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from gradleak.errors import BadInput, checked, read_json
from gradleak.modalities.networks import Architecture, ImageTransformer, Normalise

NOT_OF_THE_MODEL = ("architectures", "dtype", "id2label", "label2id", "transformers_version", "_name_or_path")
# What transformers, and the torch beneath it, say to a config or to weights that make no sense.
BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError, ImportError)


class Preprocessor(TypedDict, total=False):
    """What matters in preprocessor_config.json: pixels in [0, 1] become (x - mean) / std per channel."""

    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]


def structure(folder: Path) -> tuple[ImageTransformer, Architecture]:
    """An image classifier of transformers from config.json alone: freshly initialised, no weights read, no code imported."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            size, channels = getattr(config, "image_size", 224), config.num_channels
            height, width = (size, size) if isinstance(size, int) else size
            network = AutoModelForImageClassification.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )
            architecture = Architecture(str(folder), (channels, height, width), config.num_labels)
    except (*BROKEN, StrictDataclassError) as error:
        raise BadInput(f"{folder} holds no image classifier that transformers can build: {one_line(error)}.") from error
    module = ImageTransformer(network, _normalise(folder, channels))
    return module, replace(architecture, name="vit") if _is_our_vit(module, architecture) else architecture


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Neither progress bars nor log messages of transformers inside; whatever the caller had chosen outside."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    if bars:
        theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]


def _normalise(folder: Path, channels: int) -> Normalise:
    """The first layer: preprocessor_config.json's constants when there, else ours."""
    layer, path = Normalise(channels), folder / "preprocessor_config.json"
    if not path.is_file():
        return layer
    about = checked(read_json(path), Preprocessor, f"{path} does not describe a normalisation")
    constants = {"image_mean": [0.0] * channels, "image_std": [1.0] * channels}
    if about.get("do_normalize", True):
        constants |= {"image_mean": about["image_mean"]} if "image_mean" in about else {}
        constants |= {"image_std": about["image_std"]} if "image_std" in about else {}
    mean, std = constants["image_mean"], constants["image_std"]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise BadInput(f"{path} needs a mean and a standard deviation above zero for each of {channels} channels.")
    layer.mean, layer.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return layer


def _is_our_vit(module: ImageTransformer, architecture: Architecture) -> bool:
    """Whether config and constants are those that `MODELS["vit"]` would have been built with."""
    shape = architecture.input_shape
    if shape[1] != shape[2] or shape[1] % 8 or shape[0] not in (1, 3):
        return False
    own = cast(ImageTransformer, replace(architecture, name="vit").build(seed=0))
    configs = [cast(Any, m.network).config.to_dict() for m in (module, own)]
    same = all(configs[0].get(k) == v for k, v in configs[1].items() if k not in NOT_OF_THE_MODEL)
    first, other = (m.normalise for m in (module, own))
    return same and torch.equal(first.mean, other.mean) and torch.equal(first.std, other.std)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
