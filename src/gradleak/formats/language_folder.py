"""A language model and its tokenizer from the folder that save_pretrained has written, or from a hub name's local copy.

Weights are read from safetensors only; no code that a folder may bring along is imported.
"""

from pathlib import Path
from typing import Any, cast

import torch

from gradleak.errors import BadInput
from gradleak.formats.json_types import read_json
from gradleak.formats.observation_file import load_tensors
from gradleak.formats.peft import read_factors, zero_at_start
from gradleak.modalities.transformers_networks import BROKEN, one_line, quiet_transformers
from gradleak.observations.text import LanguageModel, Task, TextAdapter
from gradleak.observations.training import Recipe


def is_language_model(folder: Path) -> bool:
    """Whether this is the folder of a transformers model with a tokenizer."""
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def read_language_model(folder: Path, task: Task, *, classes: int = 2, seed: int = 0) -> LanguageModel:
    """The model of a folder with a head for the task; a head that the folder lacks is initialised from the seed.

    Raises BadInput where there is no such folder, transformers cannot build it, weights are pickles or do not fit, or the
    tokenizer belongs to another model.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not is_language_model(folder):
        raise BadInput(f"{folder} holds no language model: it needs config.json, model.safetensors and tokenizer.json.")
    about = read_json(folder / "config.json")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except BROKEN as error:
        raise BadInput(f"{folder} holds no language model that transformers can read: {one_line(error)}.") from error
    if task == "classification" and about.get("architectures", [""])[0].endswith("ForSequenceClassification"):
        classes = config.num_labels
    module, config = build(config, task, classes=classes, tokenizer=tokenizer, seed=seed)
    stored = load_tensors(folder / "model.safetensors")
    own = module.state_dict()
    base = f"{module.base_model_prefix}."
    found = {}
    for name, tensor in stored.items():
        plain = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        key = plain if plain in own else base + plain
        if key in own:
            if own[key].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} in the weights and {tuple(own[key].shape)} in the model"
                raise BadInput(f"Tensor {name} of {folder} is {shapes}: they do not belong together.")
            found[key] = tensor.to(own[key].dtype)
    missing = [name for name, _ in module.named_parameters() if name.startswith(base) and name not in found]
    # A pooler is a head in all but name: encoders that were not trained with one come without it.
    missing = [name for name in missing if ".pooler." not in name]
    if missing:
        raise BadInput(f"The weights of {folder} lack {missing[0]}: they belong to another architecture.")
    module.load_state_dict(found, strict=False)
    return model_of(str(folder), module, config, task, tokenizer)


def read_text_adapter(
    folder: Path, model: LanguageModel, *, recipe: Recipe | None = None, batch_size: int | None = None
) -> TextAdapter:
    """The LoRA adapter in a PEFT folder on its base model; BadInput as `read_adapter`, and where B was not zero at the start.

    Only directions are used of it: B's rows span {A x_t}, whatever the learning rate was.
    """
    factors, scaling, config, precision = read_factors(folder, cast(Any, model), None)
    if zero_at_start(config, folder) != "B=0":
        raise BadInput(f"The adapter in {folder} did not begin at B = 0: its B does not show what its inputs were.")
    B = {name: tensor for name, tensor in factors.items() if name.endswith("lora_B")}
    if not any(bool(tensor.any()) for tensor in B.values()):
        raise BadInput(f"The adapter in {folder} has learnt nothing: every B is still zero.")
    start = {name: torch.zeros_like(tensor) if name in B else tensor for name, tensor in factors.items()}
    return TextAdapter(
        model=model,
        released=B,
        start=start,
        scaling=scaling,
        recipe=recipe,
        batch_size=batch_size,
        precision=precision,
    )


def build(config: Any, task: Task, *, classes: int, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    """(module, config): a freshly initialised network for the task, in eval mode, with attention that can be followed."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
    elif config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id
    kind: Any = {"causal-lm": AutoModelForCausalLM, "masked-lm": AutoModelForMaskedLM}.get(task)
    if task == "classification":
        kind, config.num_labels = AutoModelForSequenceClassification, classes
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = kind.from_config(config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False)
    except BROKEN as error:
        raise BadInput(f"transformers cannot build this model for {task}: {one_line(error)}.") from error
    return module.eval().requires_grad_(False), config


def model_of(name: str, module: Any, config: Any, task: Task, tokenizer: Any) -> LanguageModel:
    """A snapshot of a built network; tied weights appear once."""
    parameters = {key: p.detach().clone() for key, p in module.named_parameters()}
    return LanguageModel(name, config, task, parameters, tokenizer, module)
