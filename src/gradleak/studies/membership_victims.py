"""Who trains everyday adapters in the study of membership: base models, and samples of one split at random."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import public_pool
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import Model
from gradleak.studies.data_sets import beside, blueprint, rows_of
from gradleak.studies.study import Size
from gradleak.studies.text_victims import model_of, sources
from gradleak.victims.training import prepare_model

PERCEPTRON, TRANSFORMER, DECODER = "perceptron", "vision transformer", "small gpt2"
OF_PICTURES = {
    PERCEPTRON: ("mlp", 1),
    TRANSFORMER: ("vit", 3),
}  # what it is built as, and epochs on public pictures before


@dataclass(frozen=True)
class Setting:
    """candidates: all members, or half of them. control: none, another adapter (of other samples), classes (permuted)."""

    model: str
    data: str
    epochs: int = 3
    samples: int = 200
    start: str = "unknown"  # or recovered
    candidates: str = "all"
    control: str = "none"


@lru_cache(maxsize=2)
def victim(setting: Setting, data: str, size: Size, seed: int) -> tuple[Model[Any], Any, Tensor | None]:
    """The base model, and samples of one split at random: members, fresh ones, others."""
    count, place = 3 * setting.samples, str(beside(data, setting.data) or setting.data)
    if setting.model in OF_PICTURES:
        name, epochs = OF_PICTURES[setting.model]
        architecture = Architecture(name, *blueprint(place, size))
        pool = public_pool(place, "train", shape=architecture.input_shape, limit=count + 2_000, seed=seed)
        module = prepare_model(architecture, seed=seed, train_on=rows_of(pool, count, 2_000), epochs=epochs)
        return Model.of(module, architecture), pool.images[:count], pool.labels[:count]
    place = sources(data)[setting.data]
    language = model_of(setting.model, "causal-lm" if setting.model == DECODER else "classification", place, size, seed)
    every = load_texts(place, "train")
    chosen = torch.randperm(len(every.texts), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    some = replace(every, texts=tuple(every.texts[i] for i in chosen), labels=every.labels[chosen])
    return language, *language.architecture.feed(some)
