"""Weights that an adapter was merged into after training (PEFT's `merge_and_unload`), as folder of a model or as file: beside the weights
before, what lies between is an adapter without its recipe, if it has a low rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gradleak.errors import read_json
from gradleak.formats.adapter_files import is_adapter
from gradleak.formats.language_folder import is_language_model, read_weights
from gradleak.formats.model_folder import read_model, read_with
from gradleak.formats.plain_file import change_to, shortest, trained
from gradleak.modalities.language_models import Task
from gradleak.observations.adapter import UNKNOWN
from gradleak.observations.merged import was_merged
from gradleak.observations.observation import Observation
from gradleak.observations.training import Recipe

TASKS: dict[str, Task] = {"CausalLM": "causal-lm", "LMHeadModel": "causal-lm", "MaskedLM": "masked-lm"}


def is_model(path: Path) -> bool:
    """Whether this is the folder of a whole model, and none of an adapter."""
    about = (path / name for name in ("config.json", "gradleak.json"))
    return path.is_dir() and any(file.is_file() for file in about) and not is_adapter(path)


def read_model_and_base(
    path: Path,
    base: str | Path,
    *,
    factory: str | None = None,
    task: Task | None = None,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
) -> Observation[Any]:
    """The change from the model `base`, a folder or a name on the hub, to that in the folder `path`: by a recipe, or without one as the
    adapter that was merged. What the base lacks (a head) is that of `path`."""
    task = task or task_of(path)
    ended = read_model(path, factory=factory, task=task).parameters
    brought = {name.removeprefix("network."): tensor for name, tensor in ended.items()}
    model, names = read_with(base, brought, factory=factory, task=task)
    given = {name: tensor for name, tensor in ended.items() if name not in names}
    change = change_to(given, model, recipe or UNKNOWN, batch_size or 1, str(path))
    seen = trained(replace(change, precision=shortest(read_weights(path))), recipe, batch_size)
    if names and was_merged(seen):
        seen = replace(seen, release=replace(seen.adapter, known_at_end=names))
    return seen


def task_of(folder: Path) -> Task | None:
    """What a language model was trained for, where its config says so."""
    about = read_json(folder / "config.json") if is_language_model(folder) else None
    names = about.get("architectures") if isinstance(about, dict) else None
    known = [str(name) for name in names] if isinstance(names, list) else []
    return next((task for ending, task in TASKS.items() if any(name.endswith(ending) for name in known)), None)
