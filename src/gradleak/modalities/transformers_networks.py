"""The structure of an image classifier of the transformers library, from the folder that save_pretrained has written.

Only config.json and preprocessor_config.json are read here: no weights, and no code that a folder may bring along.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from safetensors import SafetensorError

from gradleak.errors import BadInput, checked, read_json, shortened
from gradleak.modalities.networks import Architecture, ImageTransformer, Normalise

NOT_OF_THE_MODEL = ("architectures", "dtype", "id2label", "label2id", "transformers_version", "_name_or_path")
# What transformers, and the torch beneath it, say to a config or to weights that make no sense.
BROKEN = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, ImportError),
    *(AssertionError, MemoryError, SafetensorError),
)
MOST_LAYERS = 1_000
LARGEST = 2**24  # a number in a configuration above which nothing of it can be meant
MOST_NUMBERS = 2**31  # of parameters that an image classifier is built with


class Preprocessor(TypedDict, total=False):
    """What matters in preprocessor_config.json: pixels in [0, 1] become (x - mean) / std per channel."""

    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]


def structure(folder: Path, classes: int | None = None) -> tuple[ImageTransformer, Architecture]:
    """An image classifier of transformers from config.json alone: freshly initialised, no weights read, no code imported.

    classes: of a new head; None: as config.json has them.
    """
    from transformers import AutoModelForImageClassification

    sentence = f"{folder} holds no image classifier that transformers can build"
    config = read_config(folder, sentence)
    with refusing(sentence):
        if classes is not None:
            config.num_labels = classes
        size, channels = getattr(config, "image_size", 224), config.num_channels
        height, width = (size, size) if isinstance(size, int) else size
        architecture = Architecture(str(folder), (channels, height, width), config.num_labels)
        settings: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32, "trust_remote_code": False}
        with torch.device("meta"):
            outline = AutoModelForImageClassification.from_config(config, **settings)  # type: ignore[no-untyped-call]
        if sum(p.numel() for p in outline.parameters()) > MOST_NUMBERS:
            raise BadInput(f"{folder} holds a configuration of an impossible size: more than {MOST_NUMBERS:,} numbers.")
        network = AutoModelForImageClassification.from_config(config, **settings)  # type: ignore[no-untyped-call]
    module = ImageTransformer(network, _normalise(folder, channels))
    return module, replace(architecture, name="vit") if _is_our_vit(module, architecture) else architecture


def read_config(folder: Path, sentence: str) -> Any:
    """The configuration of a folder of transformers; BadInput that begins with this sentence where it makes no sense. No code is
    imported."""
    from transformers import AutoConfig

    try:
        check_sizes(
            checked(read_json(folder / "config.json"), dict[str, Any], f"{folder} has no configuration"), str(folder)
        )
    except BadInput as error:
        raise BadInput(f"{sentence}: {error}") from error
    with refusing(sentence):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def check_sizes(settings: dict[str, Any], where: str) -> None:
    """BadInput for a configuration whose sizes nobody means, before anything of that size is made."""
    for key, value in settings.items():
        few = "layer" in key or "depth" in key
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, int) and abs(n) > (MOST_LAYERS if few else LARGEST) for n in numbers):
            raise BadInput(
                f"{where} holds an impossible configuration: {shortened(key)} is {shortened(json.dumps(value))}."
            )
        if isinstance(value, dict):
            check_sizes(value, where)


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """Quiet transformers, with random numbers of their own; what they do not understand is BadInput that begins so."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            yield
    except BadInput:
        raise
    except (*BROKEN, StrictDataclassError) as error:
        raise BadInput(f"{sentence}: {one_line(error)}.") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, log messages or warnings of transformers inside; whatever the caller had chosen outside."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    if bars:
        theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
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
    network = cast(ImageTransformer, replace(architecture, name="vit").build(seed=0))
    configs = [cast(Any, m.network).config.to_dict() for m in (module, network)]
    same = all(configs[0].get(k) == v for k, v in configs[1].items() if k not in NOT_OF_THE_MODEL)
    first, other = (m.normalise for m in (module, network))
    return same and torch.equal(first.mean, other.mean) and torch.equal(first.std, other.std)


def one_line(error: BaseException) -> str:
    """What an exception of a library says, as a part of a sentence."""
    return shortened(str(error)).rstrip(".") or type(error).__name__
