"""What takes long to train, once for all tests of a run: generators of learned attacks, small language models."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from gradleak.attacks.exact_git.exact_git import Recovered
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.git import Transcript
from gradleak.attacks.learned.lti import Perceptron
from gradleak.attacks.learned.pairs import Pairs, stream
from gradleak.modalities.language_models import Task
from gradleak.modalities.networks import Architecture, ImageTransformer, Normalise
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import LanguageModel, Model, PictureModel
from gradleak.victims.small_language import Kind, small_model, train_tokenizer

SHAPE = (1, 8, 8)
LENET = Architecture("lenet", SHAPE, 10)
PERCEPTRON = Architecture("gradleak.studies.learned_weights:relu3", SHAPE, 10)
BUILD: dict[str, Callable[..., nn.Module]] = {"git": Transcript, "lti": Perceptron, "exact-git": Recovered}
OPTIONS: dict[str, dict[str, Any]] = {"git": {"width": 8, "hidden": 16}, "lti": {"widths": (150,)}, "exact-git": {}}
EPOCHS = {("git", 1): 2, ("git", 2): 10, ("lti", 1): 8, ("lti", 2): 6, ("exact-git", 1): 0}  # kind, pictures of a batch


@cache
def public() -> Pictures:
    """A thousand digits that are nobody's."""
    return public_pool("digits", "train", shape=SHAPE, limit=1_000)


@cache
def leaked(kind: str) -> PictureModel:
    """The model that a generator of this kind is trained for."""
    architecture = PERCEPTRON if kind == "exact-git" else LENET
    return Model.of(architecture.build(0).eval(), architecture)


def small_transformer(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A vision transformer for 8x8 pictures: 16 patches, width 32, one block."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=shape[1],
        patch_size=shape[1] // 4,
        num_channels=shape[0],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,  # 0.02 at width 32 leaves patches invisible beside what they are added to
    )
    config.num_labels = classes
    config._attn_implementation = "eager"  # the fused kernels have no second derivative
    return ImageTransformer(ViTForImageClassification(config), Normalise(shape[0]))


TRANSFORMER = Architecture("trained:small_transformer", SHAPE, 10)
BLOCK = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
LINEAR = (*(f"network.vit.layers.0.{part}" for part in BLOCK), "network.classifier")  # its linear layers


@cache
def transformer(seed: int = 0) -> PictureModel:
    """At its start."""
    return Model.of(TRANSFORMER.build(seed).eval(), TRANSFORMER)


@cache
def _pairs(name: str, batch: int) -> list[Pairs]:
    model = leaked("exact-git" if name == PERCEPTRON.name else "git")
    return list(stream(model, public(), count=1_000 // batch, batch=batch, shard=200))


@cache
def generator(kind: str, batch: int = 1) -> learned.Generator:
    """A trained generator for `leaked(kind)`."""
    model = leaked(kind)
    return learned.train(
        kind,
        BUILD[kind],
        OPTIONS[kind] | ({"batch": batch} if batch > 1 else {}),
        model,
        lambda: iter(_pairs(model.architecture.name, batch)),
        epochs=EPOCHS[kind, batch],
        generator=torch.Generator().manual_seed(0),
    )


@cache
def language_model(
    kind: Kind, task: Task, *, width: int = 96, layers: int = 2, tokens: int = 420, spread: float = 0.1
) -> LanguageModel:
    """A small transformer at its start, with a tokenizer of the embedded texts."""
    return small_model(kind, tokenizer(kind, tokens), task, width=width, layers=layers, positions=64, spread=spread)


@cache
def tokenizer(kind: Kind, tokens: int = 420) -> Any:
    """Trained on the embedded texts that are public; decoders share one."""
    return train_tokenizer(load_texts("embedded", "train").texts, kind, size=tokens)
