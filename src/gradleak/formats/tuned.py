"""A model before and after training on private data: what whoever trained it has, and what was shared."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradleak.errors import BadInput, NotObserved, read_json
from gradleak.formats.adapter_files import is_adapter, is_adapter_file, located_adapter
from gradleak.formats.model_folder import is_language_model, located, read_model
from gradleak.formats.observation_file import load_observation
from gradleak.formats.peft import base_of, read_adapter_and_base
from gradleak.modalities.language_models import Task
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors

ENDINGS: Mapping[str, Task] = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForMaskedLM": "masked-lm"}


@dataclass(frozen=True)
class Tuned:
    """before: the base model. after: as training left it, None where a gradient was shared. towards: {parameter: what a step against
    it would follow}: the gradient, or what training subtracted."""

    before: Model[Any]
    after: Model[Any] | None
    towards: Tensors


def read_tuned(path: Path, base: str | None, *, task: Task | None = None, factory: str | None = None) -> Tuned:
    """What was shared: the folder or file of an adapter, the folder of a whole model beside its --base, or an observation.

    Raises BadInput where a base is needed and not given, where the two models are not of one kind, or where nothing was learnt.
    """
    if path.is_dir() and not is_adapter_folder(path):
        return of_models(path, base, task, factory)
    if path.is_dir() or is_adapter_of_ours(path):
        return of_observation(read_adapter_and_base(path, base, factory=factory, task=task))
    if base is not None:
        raise BadInput(f"{path} says itself which model it belongs to: leave out --base.")
    return of_observation(load_observation(path, factory=factory))


def read_trained(path: Path, base: str | None, *, task: Task | None = None) -> tuple[Model[Any] | None, Model[Any]]:
    """(the base model, the trained one); of a whole model whose base nobody gives, None and itself. BadInput for a gradient."""
    if base is None and path.is_dir() and not is_adapter_folder(path):
        return None, read_model(path, task=task or task_of(path))
    both = read_tuned(path, base, task=task)
    if both.after is None:
        raise BadInput(f"{path} holds a gradient: nothing can be extracted from it as from a trained model.")
    return both.before, both.after


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter, itself or in the one folder that it holds, and no whole model."""
    return is_adapter(path) or not ((path / "config.json").is_file() or (path / "gradleak.json").is_file())


def is_adapter_of_ours(path: Path) -> bool:
    """Whether a file holds LoRA factors, and does not say itself which model they belong to."""
    from gradleak.observations.tensor_file import raw_header

    return "schema" not in raw_header(path) and is_adapter_file(path)


def of_models(path: Path, base: str | None, task: Task | None, factory: str | None) -> Tuned:
    """Two folders of whole models."""
    if base is None:
        raise BadInput(f"{path} holds a whole model: say with --base which one training began with.")
    task = task or task_of(path)
    before, after = (read_model(folder, factory=factory, task=task) for folder in (located(base), path))
    shapes = [{name: tensor.shape for name, tensor in model.parameters.items()} for model in (before, after)]
    if shapes[0] != shapes[1] or before.architecture.modality != after.architecture.modality:
        raise BadInput(
            f"The models in {path} and {base} have parameters of other names or shapes: one is no base of the other."
        )
    return tuned(before, after)


def task_of(folder: Path) -> Task | None:
    """The task of a language model, as its config names its class; None of other models."""
    if not is_language_model(folder):
        return None
    about = read_json(folder / "config.json")
    names = about.get("architectures") if isinstance(about, dict) else None
    kind = str(names[0]) if isinstance(names, list) and names else ""
    return next((task for ending, task in ENDINGS.items() if kind.endswith(ending)), "classification")


def of_observation(observation: Observation[Any]) -> Tuned:
    """What an observation says of the model before and after; of a gradient there is no after."""
    model, release = observation.model, observation.release
    if isinstance(release, Adapter):  # some begin with a product that was subtracted from the base
        model = replace(model, parameters={**model.parameters, **release.merged(model, {})})
    changed = observation.after()
    if changed is None:
        return Tuned(model, None, observation.as_gradient())
    try:
        return replace(
            tuned(model, replace(model, parameters={**model.parameters, **changed})), towards=observation.as_gradient()
        )
    except NotObserved:
        return tuned(model, replace(model, parameters={**model.parameters, **changed}))


def tuned(before: Model[Any], after: Model[Any]) -> Tuned:
    """Of two models of the same parameters."""
    towards = {name: tensor - after.parameters[name] for name, tensor in before.parameters.items()}
    towards = {name: tensor for name, tensor in towards.items() if bool(tensor.any())}
    if not towards:
        raise BadInput("Nothing has changed since the base model: there is nothing to be scored.")
    return Tuned(before, after, towards)


def files_of(path: Path, base: str | None) -> list[Path]:
    """The files that `read_tuned` reads: for a record, which keeps their hashes."""
    if not path.is_dir():
        return [path]
    folders = [path]
    if is_adapter_folder(path):
        folders = [located_adapter(path), located(base_of(path, base))]
    elif base is not None:
        folders.append(located(base))
    return [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors")]
