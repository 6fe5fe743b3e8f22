"""A file of somebody's own, without provenance, as an observation of a model that is known besides: {name: gradient}, weights before
and after training, their difference, or the weights of a trained network. In safetensors, .npz, .npy or parquet."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks.batch_size import with_batch_counted
from gradleak.attacks.merged import with_merged_recovered
from gradleak.errors import BadInput
from gradleak.formats.blueprints import check_state, outline
from gradleak.formats.model_folder import folder_of, is_language_model, read_language_model
from gradleak.formats.observation_file import load_state
from gradleak.formats.own_arrays import kind_of, load_arrays
from gradleak.modalities.language_models import Task
from gradleak.modalities.losses import Loss
from gradleak.modalities.networks import MODELS, Architecture
from gradleak.observations.adapter import UNKNOWN
from gradleak.observations.distances import relative_residual
from gradleak.observations.given import as_tensor, fitted
from gradleak.observations.merged import merged
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import Observation
from gradleak.observations.releases import GRADIENT, Update
from gradleak.observations.tensors import Tensors
from gradleak.observations.trained_weights import Weights
from gradleak.observations.training import Recipe

NEAR = 0.5  # of the weights' length: weights after training lie within, and a gradient has no reason to point along the weights


def language_folder_of(model: str) -> Path | None:
    """The folder of a language model, here or by its name on the hub, which comes with its parameters; None where the model is another."""
    folder = folder_of(model)
    return folder if folder is not None and is_language_model(folder) else None


def known_language_model(folder: Path, task: Task, weights: Path | None) -> Model[Any]:
    """The language model in a folder, at the parameters in a file where one is given."""
    model = read_language_model(folder, task)
    if weights is None:
        return model
    state, _ = fitted(load_arrays(weights), {**model.parameters, **(model.buffers or {})}, model.module)
    for name, tensor in model.parameters.items():
        if name not in state or state[name].shape != tensor.shape:
            raise BadInput(
                f"{weights} holds no {name} as the model in {folder} has it: the two do not belong together."
            )
    return replace(model, parameters={name: state[name].to(tensor) for name, tensor in model.parameters.items()})


def known_network(
    name: str, shape: tuple[int, int, int], classes: int, weights: Path, mode: Mode, criterion: Loss
) -> Model[Any]:
    """A network at the weights in a file; buffers that the file lacks are withheld."""
    architecture = Architecture(name, shape, classes)
    structure = outline(architecture) if name in MODELS else architecture.build(0)
    given = load_arrays(weights)
    state, _ = fitted(given, dict(structure.state_dict(keep_vars=True)), structure)
    buffers = {key for key, _ in structure.named_buffers() if key in structure.state_dict()}
    told = not buffers or bool(buffers & set(state))
    check_state(structure, state, partial=not told)
    module = architecture.build(0) if name in MODELS else structure
    load_state(module, state, partial=not told)
    model = Model.of(module, architecture, mode=mode, criterion=criterion, reveal_buffers=told)
    model.check_works()
    return model


def read_weights(model: Model[Any], batch_size: int | None) -> Observation[Any]:
    """The weights of a trained network, which are all that was released."""
    return Observation(model=model, release=Weights(), released=model.parameters, batch_size=batch_size or 1)


def read_release(path: Path, model: Model[Any], recipe: Recipe | None, batch_size: int | None) -> Observation[Any]:
    """{name: gradient}; with a recipe, the change of the parameters by such a training. A batch size that is not given is counted
    where the release tells it."""
    given, theta = load_arrays(path), model.parameters
    seen = observed(given, model, recipe, batch_size or 1)
    if seen.released.keys() == theta.keys() and float(relative_residual(seen.released, theta)) < NEAR:
        change = change_to(given, model, recipe or UNKNOWN, batch_size or 1, str(path))
        if recipe is None and (known := told_merged(change)) is not None:
            return known
        raise BadInput(
            f"{path} ({kind_of(path)}) holds weights close to those it is said to have been taken at, and neither a gradient nor a "
            "change: if they are those after training, give them with --after, --before and --lr."
        )
    return seen if batch_size else with_batch_counted(seen)


def read_change(after: Path, model: Model[Any], recipe: Recipe | None, batch_size: int | None) -> Observation[Any]:
    """The change from the model's parameters to those in a file, as `trained`."""
    return trained(
        change_to(load_arrays(after), model, recipe or UNKNOWN, batch_size or 1, str(after)), recipe, batch_size
    )


def trained(change: Observation[Any], recipe: Recipe | None, batch_size: int | None) -> Observation[Any]:
    """A change of weights by a recipe, or as the adapter that was merged, where nothing else makes such a change, or there is no recipe.
    A batch size that is not given is counted where it shows."""
    if recipe is None:
        return as_merged(change)
    found = merged(change, recipe)
    if found is not None and found.sure:
        return found.observation
    return change if batch_size else with_batch_counted(change)


def as_merged(seen: Observation[Any]) -> Observation[Any]:
    """A change of weights as the adapter that was merged into them; BadInput where it is none."""
    if (known := told_merged(seen)) is None:
        raise BadInput(
            "The weights did not change as a merged LoRA adapter changes them, by a low rank, so a training of all of them lies between: "
            "say its learning rate with --lr."
        )
    return known


def told_merged(seen: Observation[Any]) -> Observation[Any] | None:
    """The adapter that was merged, where its rank shows, or a usual seed drew it; None for any other change."""
    found = merged(seen, None)
    if found is None or found.plain:
        return None if found is None else found.observation
    known = with_merged_recovered(found.observation)
    return known if known.adapter.origin == "recovered" else None


def change_to(given: Any, model: Model[Any], recipe: Recipe, batch_size: int, where: str) -> Observation[Any]:
    """The change from the model's parameters to these arrays, as `fitted` takes them. Parameters that did not move were not trained.

    where: what the arrays are called in sentences. Raises BadInput where they are of another model, or nothing has changed.
    """
    known = {**model.parameters, **(model.buffers or {})}
    state, _ = fitted(given, known, model.module)
    precision = shortest(given)
    if unknown := [name for name in state if name not in known]:
        raise BadInput(f"{where} holds {unknown[0]}, which the model does not have: it is of another architecture.")
    for name, tensor in state.items():
        if tensor.shape != known[name].shape:
            raise BadInput(f"{where} and the weights before it differ in the shape of {name}: they are of two models.")
    change: Tensors = {name: (t.double() - known[name].double()).float() for name, t in state.items()}
    return change_by(change, model, recipe, batch_size, where, precision)


def change_by(
    given: Any, model: Model[Any], recipe: Recipe, batch_size: int, where: str, precision: str | None = None
) -> Observation[Any]:
    """The change of the model's parameters, after - before, by such a training; as `change_to`. precision: None: that of the arrays."""
    precision = precision or shortest(given)
    change, _ = fitted(given, {**model.parameters, **(model.buffers or {})}, model.module)
    still = [name for name, tensor in change.items() if name in model.parameters and not bool(tensor.any())]
    moved = {name: tensor for name, tensor in change.items() if name not in still}
    if not moved.keys() & model.parameters.keys():
        raise BadInput(f"{where} holds the weights before training: nothing has changed.")
    seen = observed(moved, model, recipe, batch_size)
    return replace(seen, precision=precision, beside=(*seen.beside, *still))


def observed(given: Any, model: Model[Any], recipe: Recipe | None, batch_size: int) -> Observation[Any]:
    """The observation of what was given, in float32."""
    release = GRADIENT if recipe is None else Update(recipe=recipe)
    seen = Observation(model=model, release=release, released=given, batch_size=batch_size)
    return replace(seen, released={name: tensor.float() for name, tensor in seen.released.items()})


def shortest(arrays: Any) -> str:
    """The number format of the shortest floating-point numbers, as torch calls it."""
    values = arrays.values() if isinstance(arrays, Mapping) else arrays
    formats = [as_tensor(array, "an array").dtype for array in values if array is not None]
    floating = [kind for kind in formats if kind.is_floating_point]
    return str(min(floating, key=lambda kind: kind.itemsize, default=torch.float32)).removeprefix("torch.")
