"""What a command is given: an observation in any form, a folder to write to, a device, input files with their hashes."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks.unmixing.span import with_samples_counted
from gradleak.cli import flags
from gradleak.errors import BadInput, shortened
from gradleak.formats.model_folder import read_model
from gradleak.formats.observation_file import check_provenance, has_provenance, load_observation
from gradleak.formats.peft import is_adapter, read_adapter
from gradleak.formats.plain_file import has_folder, read_of_language_model, read_of_network
from gradleak.observations.observation import Observation
from gradleak.observations.training import Recipe

LARGEST = 2**40  # bytes of an input file
OF_ADAPTERS = ("base", "lr", "steps", "optimizer", "initial")
OF_FILES = ("weights", "mode")
OF_PLAIN_FILES = ("input_shape", "classes")
EVERY = (*OF_ADAPTERS, *OF_FILES, *OF_PLAIN_FILES, "model", "task", "batch_size")


def observed(args: flags.Observed) -> Observation[Any]:
    """The observation of a file, with provenance checked, of an adapter's folder, or of a plain file of tensors.

    A plain file is a gradient at --weights, or of the language model in the folder --model; where neither is given, it holds the
    weights of a trained network. Raises BadInput for flags that say nothing about such an observation.
    """
    if args.observation.is_dir():
        refuse_others(args, "the folder of an adapter", (*OF_ADAPTERS, "model", "task", "batch_size"))
        return observed_adapter(args)
    if has_provenance(args.observation):
        refuse_others(args, "a file that says itself how it was taken", (*OF_FILES, "model"))
        observation = load_observation(args.observation, factory=args.model)
        check_provenance(observation, weights=args.weights, mode=args.mode)
        return observation
    if args.model is None:
        raise BadInput(
            f"{args.observation} carries no provenance: say with --model and --weights what this gradient was taken from, "
            "or with --model alone whose trained weights these are."
        )
    size = args.batch_size or 1
    if has_folder(args.model):
        refuse_others(args, "a plain file of a language model", ("model", "task", "batch_size"))
        return read_of_language_model(args.observation, Path(args.model), args.task or "classification", size)
    used = ("model", "weights", "batch_size", *OF_PLAIN_FILES, *(("mode",) if args.weights else ()))
    refuse_others(args, "a plain file", used)
    shape, classes = args.input_shape or (3, 32, 32), args.classes or 10
    mode = args.mode or "eval"
    return read_of_network(args.observation, args.model, shape, classes, args.weights, mode, size)


def observed_adapter(args: flags.Observed) -> Observation[Any]:
    """The adapter in a PEFT folder, on its base model."""
    if not is_adapter(args.observation):
        raise BadInput(f"{args.observation} is no folder of a LoRA adapter: it has no adapter_config.json.")
    if args.base is None:
        raise BadInput(f"{args.observation} holds an adapter: say with --base which model it belongs to.")
    model = read_model(args.base, factory=args.model, task=args.task)
    recipe = None
    if args.lr is not None:
        recipe = Recipe(optimizer=args.optimizer or "sgd", learning_rate=args.lr, steps=args.steps or 1)
    elif args.steps is not None or args.optimizer is not None:
        raise BadInput("--steps and --optimizer say how the adapter was trained, which needs its --lr too.")
    adapter = read_adapter(
        args.observation, model, recipe=recipe, batch_size=args.batch_size or 1, initial=args.initial
    )
    return adapter if args.batch_size else with_samples_counted(adapter)


def seed_range(text: str | None) -> range | None:
    """The seeds of --seeds: "N" for 0 to N - 1, "START:END" for START to END - 1; BadInput for anything else."""
    if text is None:
        return None
    start, _, end = text.rpartition(":")
    if not re.fullmatch(r"(\d{1,10}:)?\d{1,10}", text, re.ASCII) or not int(start or 0) < int(end) <= 2**32:
        raise BadInput(f"--seeds is N or START:END, of seeds from 0 to 4,294,967,295, not {shortened(text)!r}.")
    return range(int(start or 0), int(end))


def refuse_others(args: flags.Observed, what: str, read: tuple[str, ...]) -> None:
    """BadInput for the first flag that was given and says nothing about such an observation."""
    for name in EVERY:
        if name not in read and getattr(args, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')} says nothing about {what}: leave it out.")


def observed_files(args: flags.Observed) -> list[Path]:
    """The files that the observation was read from, of a folder those in it, and what it needed beside: weights, a base model, the
    adapter before training."""
    beside = [
        Path(path).expanduser() for path in (args.weights, args.base, args.initial, args.model) if path is not None
    ]
    folders = [path for path in (args.observation, *beside) if path.is_dir()]
    files = [path for path in (args.observation, args.weights) if path is not None and not path.is_dir()]
    for folder in folders:
        files += sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return files


def fresh_folder(path: Path) -> Path:
    """BadInput if the folder holds anything: results are never overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"{path} holds other results already: choose another --out.")
    return path


def check_device(name: str) -> None:
    """BadInput if torch cannot compute there, before anything runs."""
    try:
        torch.zeros(1, device=name).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"Device {shortened(name)!r} cannot be used here: {shortened(reason)}.") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file; BadInput when it is not there, or cannot be read."""
    try:
        if not path.is_file():
            raise BadInput(f"There is no file {shortened(str(path))}.")
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{shortened(str(path))} is too large to be an input.")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"Cannot read {shortened(str(path))}: {shortened(str(error))}.") from error
