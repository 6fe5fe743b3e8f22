"""What a command is given: an observation in either form, a folder to write to, a device."""

import hashlib
from pathlib import Path

import torch

from gradleak.cli import flags as arguments
from gradleak.errors import BadInput
from gradleak.formats import observation_file as files
from gradleak.formats.base_folder import read_base
from gradleak.formats.peft import is_adapter, read_adapter
from gradleak.modalities.networks import Architecture
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Gradient, Weights
from gradleak.observations.training import Recipe
from gradleak.victims.training import prepare_model


def observed(args: arguments.Observed) -> PictureObservation:
    """The observation of a file, with provenance checked, of an adapter's folder, or of a plain file of tensors.

    A plain file is a gradient at --weights, or where none are given the weights of a trained network.
    """
    if args.observation.is_dir():
        return observed_adapter(args)
    if files.has_provenance(args.observation):
        observation = files.load_observation(args.observation, factory=args.model)
        files.check_provenance(observation, weights=args.weights, mode=args.mode)
        return observation
    if args.model is None:
        raise BadInput(
            f"{args.observation} carries no provenance: say with --model and --weights what this gradient was taken from, "
            "or with --model alone whose trained weights these are."
        )
    architecture = Architecture(args.model, args.input_shape, args.classes)
    if args.weights is None:
        trained = Model.of(prepare_model(architecture, weights=args.observation), architecture)
        return Weights(model=trained, released=trained.parameters, batch_size=args.batch_size)
    module = prepare_model(architecture, weights=args.weights)
    model = Model.of(module, architecture, mode=args.mode or "eval")
    released = files.load_tensors(args.observation)
    precision = min(
        (tensor.dtype for tensor in released.values()), key=lambda dtype: dtype.itemsize, default=torch.float32
    )
    if not precision.is_floating_point:
        raise BadInput(f"{args.observation} holds {precision} numbers, which are no gradient.")
    return Gradient(
        model=model,
        released={name: tensor.float() for name, tensor in released.items()},
        batch_size=args.batch_size,
        precision=str(precision).removeprefix("torch."),
    )


def observed_adapter(args: arguments.Observed) -> PictureObservation:
    """The adapter in a PEFT folder, on its base model."""
    if not is_adapter(args.observation):
        raise BadInput(f"{args.observation} is no folder of a LoRA adapter: it has no adapter_config.json.")
    if args.base is None:
        raise BadInput(f"{args.observation} holds an adapter: say with --base which model it belongs to.")
    model = Model.of(*read_base(args.base, factory=args.model))
    recipe = None
    if args.lr is not None:
        recipe = Recipe(optimizer=args.optimizer, learning_rate=args.lr, steps=args.steps)
    return read_adapter(args.observation, model, recipe=recipe, batch_size=args.batch_size, initial=args.initial)


def observed_files(args: arguments.Observed) -> list[Path]:
    """The files that the observation was read from; of an adapter, those of its folder."""
    if not args.observation.is_dir():
        return [args.observation]
    return sorted(path for path in args.observation.iterdir() if path.suffix in (".json", ".safetensors"))


def fresh_folder(path: Path) -> Path:
    """BadInput if the folder holds anything: results are never overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"{path} holds other results already: choose another --out.")
    return path


def check_device(name: str) -> None:
    """BadInput if torch cannot compute there, before anything runs."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"Device {name!r} is not to be had here: {reason}.") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file; BadInput when it is not there."""
    if not path.is_file():
        raise BadInput(f"There is no file {path}.")
    return hashlib.sha256(path.read_bytes()).hexdigest()
