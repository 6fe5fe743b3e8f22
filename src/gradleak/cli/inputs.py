"""What a command is given: an observation in any form, a folder to write to, a device, input files with their hashes."""

import hashlib
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from gradleak.cli import flags
from gradleak.cli.rounds import round_files
from gradleak.errors import BadInput, shortened
from gradleak.formats.adapter_files import is_adapter_file, located_adapter
from gradleak.formats.defended_adapter import chosen_of
from gradleak.formats.merged_weights import is_model, read_model_and_base
from gradleak.formats.model_folder import folder_of, located
from gradleak.formats.observation_file import check_provenance, has_provenance, load_observation
from gradleak.formats.own_arrays import kind_of
from gradleak.formats.peft import base_of, read_adapter_and_base
from gradleak.formats.plain_file import (
    known_language_model,
    known_network,
    language_folder_of,
    read_change,
    read_release,
    read_weights,
)
from gradleak.formats.trainer_state import Trainer, read_trainer
from gradleak.modalities.losses import LOSSES
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.observation import Observation
from gradleak.observations.orders import scheduled
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import behind

LARGEST = 2**40  # bytes of an input file
OF_TRAINING = ("lr", "steps", "optimizer", "weight_decay", "schedule", "warmup", "planned_steps", "shuffle")
OF_ADAPTERS = ("base", "initial", *OF_TRAINING)
OF_UPDATES = (*OF_TRAINING, "local_batch_size", "proximal", "clip", "clients", "after")
OF_FILES = ("weights", "before", "mode")
OF_PLAIN_FILES = ("input_shape", "classes", "loss", "loss_weights", "class_weights", "reduction", "label_smoothing")
EVERY = (*dict.fromkeys((*OF_ADAPTERS, *OF_UPDATES, *OF_FILES, *OF_PLAIN_FILES)), "model", "task", "batch_size")


def observed(args: flags.Seen) -> Observation[Any]:
    """The observation of a file, with provenance checked, of an adapter's folder or file, of a model's folder beside --base, or of a plain
    file of tensors.

    A plain file is a gradient at --weights, or of the language model in the folder --model; with --lr, a change of weights, as is
    what lies between --before and --after, where an adapter that was merged needs no --lr; where neither weights nor --lr are given, it holds the weights of a trained network.
    Raises BadInput for flags that say nothing about such an observation.
    """
    path = args.observation
    if (path is None) == (args.after is None):
        raise BadInput(
            "Give one file or folder that was shared; or the weights --before and --after training, without it."
        )
    if path is not None and is_model(path):
        if args.base is None:
            raise BadInput(f"{path} holds a whole model: say with --base which one it was made from.")
        of_update = OF_UPDATES if args.lr is not None else ()
        refuse_others(args, "a model beside its base", ("base", "model", "task", "batch_size", *of_update))
        known: Any = {"factory": args.model, "task": args.task, "recipe": told(args), "batch_size": args.batch_size}
        return read_model_and_base(path, args.base, **known)
    if path is not None and is_of_adapter(path):
        refuse_others(args, "an adapter", (*OF_ADAPTERS, "model", "task", "batch_size"))
        return observed_adapter(args, path)
    if path is not None and kind_of(path) == "safetensors" and has_provenance(path):
        refuse_others(args, "a file that says itself how it was taken", ("weights", "mode", "model"))
        observation = load_observation(path, factory=args.model)
        check_provenance(observation, weights=args.weights, mode=args.mode)
        return observation
    if args.model is None:
        raise BadInput(
            f"{path or args.after} carries no provenance: say with --model and --weights what this gradient was taken from, "
            "or with --model alone whose trained weights these are; of a language model, name its folder with --model."
        )
    return observed_plain(args, path)


def observed_plain(args: flags.Seen, path: Path | None) -> Observation[Any]:
    """What a plain file says of the model --model."""
    name, before, batch = str(args.model), args.before or args.weights, args.batch_size
    shared = path or args.after
    update = args.lr is not None or args.after is not None
    of_update = ("after",) if args.lr is None and update else OF_UPDATES if update else ()
    if args.before is not None and args.weights is not None:
        raise BadInput("--before and --weights say the same: the parameters before training. Give one of them.")
    if (folder := language_folder_of(name)) is not None:
        refuse_others(
            args, "a plain file of a language model", ("model", "task", "batch_size", "weights", "before", *of_update)
        )
        model = known_language_model(folder, args.task or "classification", before)
        batch = batch or 1
    else:
        files = OF_FILES if before or update else ()
        refuse_others(args, "a plain file", ("model", "batch_size", *OF_PLAIN_FILES, *files, *of_update))
        if update and before is None:
            raise BadInput("A change of weights needs the weights it began at: give them with --before.")
        shape, classes = args.input_shape or (3, 32, 32), args.classes or 10
        mode = args.mode or "eval"
        state = before or shared
        assert state is not None  # one of the two was given
        model = known_network(name, shape, classes, state, mode, loss_of(args))
        if before is None:
            return read_weights(model, batch)
    assert shared is not None  # as above
    if args.after is not None:
        seen = read_change(shared, model, told(args), batch)
    else:
        seen = read_release(shared, model, told(args), batch)
    if args.clients is None:
        return seen
    averaged: Any = seen.release
    return replace(seen, release=replace(averaged, clients=args.clients))


def loss_of(args: flags.Seen) -> Any:
    """The loss that the flags say."""
    names = args.loss or ("cross-entropy",)
    given: dict[str, Any] = {"reduction": args.reduction, "label_smoothing": args.label_smoothing}
    given["class_weights"] = args.class_weights
    kind: Any = LOSSES[names[0] if len(names) == 1 else "sum"]
    settings = {name: value for name, value in given.items() if value is not None}
    if unknown := [name for name in settings if name not in {field.name for field in fields(kind)}]:
        raise BadInput(
            f"--{unknown[0].replace('_', '-')} says nothing about the loss {' + '.join(names)}: leave it out."
        )
    if args.loss_weights is not None and (len(names) < 2 or len(args.loss_weights) != len(names)):
        raise BadInput(
            f"--loss-weights has one factor for each of several losses, not {len(args.loss_weights)} for {len(names)}."
        )
    if len(names) > 1:
        settings["terms"] = tuple(zip(args.loss_weights or (1.0,) * len(names), names, strict=True))
    return kind(**settings)


def told(args: flags.Seen) -> Recipe | None:
    """The training that the flags say, where they say its learning rate."""
    return None if args.lr is None else trained_by(args)


def trained_by(args: flags.Seen, steps: int | None = None) -> Recipe:
    """The training that the flags say; steps: where they do not."""
    count, rates = args.steps or steps or 1, tuple[float, ...]()
    if args.schedule is not None:
        warmup, planned = args.warmup or 0, args.planned_steps
        rates = scheduled(args.schedule, args.lr or 0.0, count, warmup=warmup, planned=planned)
    elif args.warmup is not None or args.planned_steps is not None:
        raise BadInput("--warmup and --planned-steps belong to a --schedule of the learning rate.")
    return Recipe(
        optimizer=args.optimizer or "sgd",
        learning_rate=args.lr or 0.0,
        steps=count,
        rates=rates,
        shuffle=args.shuffle,
        batch_size=args.local_batch_size,
        weight_decay=args.weight_decay,
        proximal=args.proximal or 0.0,
        clip=args.clip,
    )


def is_of_adapter(path: Path) -> bool:
    """Whether this is a folder of no whole model, which can only be that of an adapter, or a file with LoRA factors in it."""
    if path.is_dir():
        return not is_model(path)
    return kind_of(path) == "safetensors" and not has_provenance(path) and is_adapter_file(path)


def observed_adapter(args: flags.Seen, given: Path) -> Observation[Any]:
    """The adapter in a folder or file, on its base model; with the recipe of the flags, else what a checkpoint tells of it."""
    path = located_adapter(given)
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
    used = args.lr is None and told is not None and bool(told.course)
    remarks = () if told is None else told.remarks(path, used=used, optimizer=args.optimizer)
    adapter = replace(adapter, release=replace(adapter.release, remarks=(*adapter.adapter.remarks, *remarks)))
    return behind(adapter, chosen_of(path).known)


def recipe_of(args: flags.Seen, told: Trainer | None) -> Recipe | None:
    """How an adapter was trained: as flags say; where they do not, as its checkpoint says, by AdamW without decay, the Trainer's default."""
    if args.lr is not None:
        return trained_by(args, None if told is None else told.global_step)
    if told is not None and told.course:
        steps, size = args.steps or told.global_step, None if told.per_epoch == 1 else told.train_batch_size
        rates = told.course[:steps] if len(set(told.course)) > 1 else ()
        recipe = Recipe(
            optimizer=args.optimizer or "adam",
            learning_rate=max(told.course),
            steps=len(rates) or steps,
            batch_size=size,
            shuffle=args.shuffle,
        )
        return replace(recipe, rates=rates)
    if any(getattr(args, name) is not None for name in OF_TRAINING):
        raise BadInput(
            "--steps, --optimizer, --weight-decay and --schedule say how the adapter was trained, which needs its --lr too."
        )
    return None


def private_training(args: flags.Audit) -> Mechanism | None:
    """The private training that the flags tell; BadInput where they tell a part of one."""
    given = {
        "--noise-multiplier": args.noise_multiplier,
        "--sample-rate": args.sample_rate,
        "--dp-steps": args.dp_steps,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and args.delta is None:
        return None
    if args.noise_multiplier is None or args.sample_rate is None or args.dp_steps is None:
        raise BadInput(
            f"A private training is told by its noise, its sample rate and its steps: give {' and '.join(missing)} too."
        )
    delta = 1e-5 if args.delta is None else args.delta
    return Mechanism(
        noise_multiplier=args.noise_multiplier, sample_rate=args.sample_rate, steps=args.dp_steps, delta=delta
    )


def seed_range(text: str | None) -> range | None:
    """The seeds of --seeds: "N" for 0 to N - 1, "START:END" for START to END - 1; BadInput for anything else."""
    if text is None:
        return None
    start, _, end = text.rpartition(":")
    if not re.fullmatch(r"(\d{1,10}:)?\d{1,10}", text, re.ASCII) or not int(start or 0) < int(end) <= 2**32:
        raise BadInput(f"--seeds is N or START:END, of seeds from 0 to 4,294,967,295, not {shortened(text)!r}.")
    return range(int(start or 0), int(end))


def refuse_others(args: flags.Seen, what: str, read: tuple[str, ...]) -> None:
    """BadInput for the first flag that was given and says nothing about such an observation."""
    for name in EVERY:
        if name not in read and getattr(args, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')} says nothing about {what}: leave it out.")


def observed_files(args: flags.Seen) -> list[Path]:
    """The files that the observation was read from, of a folder those in it, and what it needed beside: weights, a base model, the
    adapter before training."""
    if rounds := round_files(args):
        return [*rounds.values(), *(path for path in (args.weights, args.before) if path is not None)]
    given = (args.observation, args.after, args.before, args.weights)
    beside = [Path(path).expanduser() for path in (*given, args.base, args.initial) if path is not None]
    beside += [] if args.model is None or (folder := folder_of(args.model)) is None else [folder]
    if args.observation is not None and is_of_adapter(args.observation):
        seen = located_adapter(args.observation)
        beside += [seen, located(base_of(seen, args.base))]
    elif args.observation is not None and args.base is not None and is_model(args.observation):
        beside.append(located(args.base))
    folders = list(dict.fromkeys(path for path in beside if path.is_dir()))
    files = [path for path in given if path is not None and not path.is_dir()]
    for folder in folders:
        files += sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return files


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
