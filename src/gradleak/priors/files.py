"""Folders of diffusers: nothing is unpickled, and nothing that a file says is run."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from gradleak.errors import BadInput, read_json, shortened

Shape = tuple[int, int, int]  # channel, height, width
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
WANTED = (
    "*.json",
    "*/*.json",
    "*/*.txt",
    "*diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "gaussian.safetensors",
    "provenance.safetensors",
)


def diffusers() -> Any:
    """The library. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise BadInput('This needs diffusers: pip install "gradleak[diffusion]".') from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file. Raises BadInput for a file that is none or not there."""
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path} is not a safetensors file ({shortened(str(error))}).") from error


def read_object(path: Path) -> Mapping[str, Any]:
    """A JSON file that holds an object."""
    held = read_json(path)
    if not isinstance(held, dict):
        raise BadInput(f"{path} does not hold a JSON object.")
    return held


def folder_of(name: str) -> Path:
    """The folder of that name, or what the hub has under it: settings, tokenizers, and weights as safetensors."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.suffix in PICKLED:
        raise BadInput(
            f"{folder} is a pickle, which can run code when it is opened: convert it where you trust it, with "
            "diffusers.StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BadInput(f"{shortened(name)} is neither a folder of diffusers nor a name on the hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise BadInput(
            f"{shortened(name)} is no folder, and the hub does not give it ({shortened(str(error))})."
        ) from error


def parts_of(folder: Path) -> dict[str, Path]:
    """The parts of a pipeline, "" for a network without a folder of its own, and the file with the settings of each."""
    parts = {path.parent.name: path for path in folder.glob("*/config.json")}
    if (folder / "config.json").is_file():
        parts[""] = folder / "config.json"
    for place in (folder / "scheduler", folder):
        if (path := place / "scheduler_config.json").is_file():
            parts.setdefault("scheduler", path)
    return parts


def part_of(folder: Path, known: Sequence[str]) -> Any:
    """The network in a folder, of one of these classes of diffusers. Raises BadInput for any other, and for pickled weights."""
    kind = read_object(folder / "config.json").get("_class_name")
    if not isinstance(kind, str) or kind not in known:
        raise BadInput(f"{folder} holds a {shortened(str(kind))}: known are {', '.join(known)}.")
    if not any(folder.glob("*.safetensors")):
        pickled = next((path for path in sorted(folder.iterdir()) if path.suffix in PICKLED), None)
        if pickled is None:
            raise BadInput(f"{folder} holds no weights (diffusion_pytorch_model.safetensors).")
        raise BadInput(
            f"{pickled} is a pickle, which can run code when it is opened: convert it where you trust it, with "
            f"diffusers.{kind}.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(FOLDER)."
        )
    library = diffusers()
    try:
        model = getattr(library, kind).from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, safetensors.SafetensorError) as error:
        raise BadInput(f"{folder} does not hold a {kind} that diffusers can read ({shortened(str(error))}).") from error
    return model.eval().requires_grad_(False)


def by(shape: Sequence[int]) -> str:
    """3x32x32."""
    return "x".join(map(str, shape))
