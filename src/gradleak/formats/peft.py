"""Adapters as releases: what lies in their files (`adapter_files`), fitted to the base model that they belong to.

What is in the folder is where training ended. What it gives away is the change since it began, so the start has to be
known: PEFT's default, "gaussian" and "eva" begin with B = 0, "mica" with A = 0; "pissa", "olora", "corda" and "lora_ga"
begin with neither, and subtract the product of their start from the base model's weights, which give that of the first two.


What was trained beside the factors (heads, biases, embeddings) began as the base model has it, or is known only as it ended.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gradleak.errors import BadInput, shortened
from gradleak.formats.adapter_files import (
    AdapterFiles,
    Config,
    located_adapter,
    read_config,
    read_files,
)
from gradleak.formats.adapter_files import is_adapter as is_adapter
from gradleak.formats.adapter_fitting import Fitted
from gradleak.formats.model_folder import read_with
from gradleak.formats.trained_beside import listed, trained_beside
from gradleak.modalities.language_models import Task
from gradleak.modalities.networks import Architecture
from gradleak.observations.adapter import Adapter, Origin, decay, product
from gradleak.observations.layers import oriented
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.release import Reservation
from gradleak.observations.starts import FROM_WEIGHTS, computed, converted, why_unknown
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe

Start = Literal["B=0", "A=0"]

STARTS: dict[str, Start] = {"True": "B=0", "gaussian": "B=0", "eva": "B=0", "mica": "A=0"}  # by init_lora_weights
SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")  # W + s B A is the base model's weight at the start
TASKS: dict[str, Task] = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}  # by task_type


def read_adapter(
    path: Path,
    model: Model[Any],
    *,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    labels: Tensor | None = None,
    start: Start | None = None,
    initial: Path | None = None,
    brought: Collection[str] = (),
) -> Observation[Any]:
    """The adapter in a folder of PEFT or a single file, as an observation of the base model that it was trained on.

    start    which factor began at zero; None: what the config says. The other factor is taken to have begun where it
             ended (less AdamW's decay), which is exact for one step
    initial  folder of the adapter before training: the changes of both factors are then known exactly
    brought  parameters that the model has from this adapter, because the base lacks them (see `read_adapter_and_base`)

    What was trained as a whole beside the factors is trained along by `simulate`, from where the model has it; what is not
    simulated, or not known, is told. Raises BadInput for what is no LoRA adapter, is damaged, contradicts its config, does not fit the
    model or has learnt nothing.
    """
    files = read_files(located_adapter(path))
    first = None if initial is None else read_files(located_adapter(initial))
    return adapter_of(
        files, first, model, recipe=recipe, batch_size=batch_size, labels=labels, start=start, brought=brought
    )


def adapter_of(
    files: AdapterFiles,
    first: AdapterFiles | None,
    model: Model[Any],
    *,
    recipe: Recipe | None,
    batch_size: int | None,
    labels: Tensor | None = None,
    start: Start | None = None,
    brought: Collection[str] = (),
) -> Observation[Any]:
    """`read_adapter` of files that were read: those after training, and those before it where they are there."""
    path, fitted = files.path, Fitted.of(files, model)
    factors, before, origin = known_start(files, first, fitted, model, start)
    beside = trained_beside(files, model, fitted.config, first=first, brought=brought if first is None else ())
    init = fitted.config.init
    if before is not None:
        changed = {name: tensor - before[name] for name, tensor in factors.items()}
        if init.startswith(SUBTRACTED) or (first is None and origin == "given"):
            model = _subtracted(model, before, fitted.scaling)
    else:
        zero = "lora_B" if zero_at_start(fitted.config, path, start) == "B=0" else "lora_A"
        left = decay(recipe)
        before = {k: torch.zeros_like(v) if k.endswith(zero) else (v.double() / left).to(v) for k, v in factors.items()}
        changed = {k: v for k, v in factors.items() if k.endswith(zero)}
    if not any(bool(change.any()) for change in changed.values()):
        raise BadInput(f"The adapter in {path} has learnt nothing: no factor has left its start.")
    release = Adapter(
        start=before,
        scaling=fitted.scaling,
        recipe=recipe,
        dropout=fitted.config.lora_dropout,
        origin=origin,
        init=shortened(init),
        beside=beside.trained,
        changed=beside.changed,
        held=(*fitted.unread, *beside.held),
        embedded=beside.embedded,
        known_at_end=beside.known_at_end,
        remarks=(*unread_remarks(fitted), *beside.remarks),
    )
    return Observation(
        model=replace(model, parameters={**model.parameters, **beside.start}),
        release=release,
        released=changed,
        batch_size=batch_size,
        labels=labels,
        precision=files.precision,
    )


def known_start(
    files: AdapterFiles, first: AdapterFiles | None, fitted: Fitted, model: Model[Any], start: Start | None
) -> tuple[Tensors, Tensors | None, Origin]:
    """(factors at the end, factors at the start or None, how these are known): from the adapter before training, from the base model's
    weights, or from factors that hold both."""
    factors, scaling, init = fitted.factors, fitted.scaling, fitted.config.init
    if first is not None:
        began = Fitted.of(first, model)
        shapes = [{k: v.shape for k, v in each.items()} for each in (began.factors, factors)]
        if shapes[0] != shapes[1] or began.scaling != scaling:
            raise BadInput(f"The initial adapter {first.path} has other modules, ranks or scalings than {files.path}.")
        return factors, began.factors, "given"
    if init in FROM_WEIGHTS and start is None:
        try:
            return factors, computed(init, model, factors, scaling), "recovered"
        except BadInput as error:
            raise BadInput(
                f"The config in {files.path} contradicts {error}; give the adapter before training, or the base it began with."
            ) from error
    if init == "True" and start is None and (both := converted(model, factors, scaling)):
        return *both, "given"
    return factors, None, "unknown"


def read_adapter_and_base(
    path: Path,
    base: str | Path | None,
    *,
    factory: str | None = None,
    task: Task | None = None,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    initial: Path | None = None,
) -> Observation[Any]:
    """`read_adapter` on a base model that is read for it: what the base lacks of what the adapter brings (a head with its number of classes,
    a vocabulary with added tokens) is the adapter's.

    base     a folder or a name on the hub; None: what the adapter's config names
    factory  of your own architecture
    task     of a language model; None: what the adapter's config says, else classification
    """
    files = read_files(located_adapter(path))
    first = None if initial is None else read_files(located_adapter(initial))
    kind = None if files.config is None else files.config.task_type
    model, brought = read_with(
        base_of(path, base),
        (first or files).whole,
        factory=factory,
        task=task,
        usual=TASKS.get(kind or "", "classification"),
        beside=files.path if files.path.is_dir() else None,
    )
    adapter = adapter_of(files, first, model, recipe=recipe, batch_size=batch_size, brought=brought)
    if kind is None or kind in TASKS or task is not None or isinstance(model.architecture, Architecture):
        return adapter
    sentence = (
        f"The adapter was trained for {shortened(kind)[:40]}, and is read as one for classification: what depends on the loss, as residuals "
        "do, is not right; spans and words are."
    )
    release = replace(adapter.adapter, remarks=(*adapter.adapter.remarks, ("task", "warning", sentence)))
    return replace(adapter, release=release)


def base_of(path: Path, base: str | Path | None) -> str | Path:
    """The base model that was given, or that the adapter's config names; BadInput where neither says it."""
    if base is not None:
        return base
    config = read_config(located_adapter(path))
    if config is None or not config.base_model_name_or_path:
        raise BadInput(f"{path} holds an adapter: say with --base which model it belongs to.")
    return config.base_model_name_or_path


def unread_remarks(fitted: Fitted) -> tuple[Reservation, ...]:
    """What a reader has to know of modules that are adapted, and not read."""
    if not fitted.unread:
        return ()
    sentence = (
        f"The adapter changes {listed(fitted.unread)} too, which is not read here: it may tell more than is found."
    )
    return (("not_read", "warning", sentence),)


def zero_at_start(config: Config, folder: Path, asked: Start | None = None) -> Start:
    """Which factor was zero before training; BadInput where neither was, or the config does not say."""
    init = config.init
    if start := asked or STARTS.get(init):
        return start
    if init == "False":
        raise BadInput(
            f"The config in {folder} does not say where training began (init_lora_weights is false): "
            'say which factor was zero, start="B=0" or start="A=0", or give the adapter before training.'
        )
    reason = f" ({reason})" if (reason := why_unknown(init, 0)) else ""
    raise BadInput(
        f"The adapter in {folder} began at {shortened(init)[:60]!r}, where neither factor is zero{reason}: what it learnt is "
        "known only beside its start, so give the folder of the adapter as it was saved before training."
    )


def _subtracted(model: Model[Any], start: Tensors, scaling: dict[str, float]) -> Model[Any]:
    """The base model as those initialisations leave it: W - s B A of the start."""
    weights = {
        f"{module}.weight": model.parameters[f"{module}.weight"]
        - oriented(model, module, s * product(start[f"{module}.lora_A"], start[f"{module}.lora_B"]))
        for module, s in scaling.items()
    }
    return replace(model, parameters={**model.parameters, **weights})
