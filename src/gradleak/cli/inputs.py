"""What a command is given: an observation in any form, a folder to write to, a device, input files with their hashes."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks.unmixing.span import with_samples_counted
from gradleak.cli import flags
from gradleak.errors import BadInput, shortened
from gradleak.formats.adapter_files import is_adapter_file, located_adapter
from gradleak.formats.model_folder import located
from gradleak.formats.observation_file import check_provenance, has_provenance, load_observation
from gradleak.formats.peft import base_of, read_adapter_and_base
from gradleak.formats.plain_file import has_folder, read_of_language_model, read_of_network
from gradleak.formats.trainer_state import Trainer, read_trainer
from gradleak.observations.observation import Observation
from gradleak.observations.training import Recipe

LARGEST = 2**40  # bytes of an input file
OF_ADAPTERS = ("base", "lr", "steps", "optimizer", "initial")
OF_FILES = ("weights", "mode")
OF_PLAIN_FILES = ("input_shape", "classes")
EVERY = (*OF_ADAPTERS, *OF_FILES, *OF_PLAIN_FILES, "model", "task", "batch_size")


def observed(args: flags.Observed) -> Observation[Any]:
    """The observation of a file, with provenance checked, of an adapter's folder or file, or of a plain file of tensors.

    A plain file is a gradient at --weights, or of the language model in the folder --model; where neither is given, it holds the
    weights of a trained network. Raises BadInput for flags that say nothing about such an observation.
    """
    if is_of_adapter(args.observation):
        refuse_others(args, "an adapter", (*OF_ADAPTERS, "model", "task", "batch_size"))
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


def is_of_adapter(path: Path) -> bool:
    """Whether this is a folder, which can only be that of an adapter, or a file with LoRA factors in it."""
    return path.is_dir() or (not has_provenance(path) and is_adapter_file(path))


def observed_adapter(args: flags.Observed) -> Observation[Any]:
    """The adapter in a folder or file, on its base model; with the recipe of the flags, else what a checkpoint tells of it."""
    path = located_adapter(args.observation)
    told = read_trainer(path)
    adapter = read_adapter_and_base(
        path,
        args.base,
        factory=args.model,
        task=args.task,
        recipe=recipe_of(args, told),
        batch_size=args.batch_size or (None if told is not None and told.several else 1),
        initial=args.initial,
    )
    used = args.lr is None and told is not None and told.rate is not None
    remarks = () if told is None else told.remarks(path, used=used, optimizer=args.optimizer)
    adapter = replace(adapter, release=replace(adapter.release, remarks=(*adapter.adapter.remarks, *remarks)))
    return adapter if args.batch_size else with_samples_counted(adapter)


def recipe_of(args: flags.Observed, told: Trainer | None) -> Recipe | None:
    """How an adapter was trained: as flags say; where they do not, as its checkpoint says, by AdamW without decay, the Trainer's default."""
    if args.lr is not None:
        steps = args.steps or (1 if told is None else told.global_step)
        return Recipe(optimizer=args.optimizer or "sgd", learning_rate=args.lr, steps=steps)
    if told is not None and told.rate is not None:
        steps, size = args.steps or told.global_step, None if told.per_epoch == 1 else told.train_batch_size
        return Recipe(optimizer=args.optimizer or "adam", learning_rate=told.rate, steps=steps, batch_size=size)
    if args.steps is not None or args.optimizer is not None:
        raise BadInput("--steps and --optimizer say how the adapter was trained, which needs its --lr too.")
    return None


def refuse_others(args: flags.Observed, what: str, read: tuple[str, ...]) -> None:
    """BadInput for the first flag that was given and says nothing about such an observation."""
    for name in EVERY:
        if name not in read and getattr(args, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')} says nothing about {what}: leave it out.")


def observed_files(args: flags.Observed) -> list[Path]:
    """The files that the observation was read from, of a folder those in it, and what it needed beside: weights, a base model, the
    adapter before training."""
    seen, beside = args.observation, [Path(p).expanduser() for p in (args.weights, args.model) if p is not None]
    if is_of_adapter(seen):
        seen = located_adapter(seen)
        beside += [located(base_of(seen, args.base))]
        beside += [] if args.initial is None else [located_adapter(args.initial)]
    files = [path for path in (seen, args.weights) if path is not None and not path.is_dir()]
    for folder in [path for path in (seen, *beside) if path.is_dir()]:
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
