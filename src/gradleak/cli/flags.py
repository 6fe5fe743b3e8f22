"""The arguments of every command, as frozen dataclasses: the strings under the fields are the command line's help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from gradleak.attacks import ATTACKS
from gradleak.modalities.language_models import Task
from gradleak.observations.training import Optimizer


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    out: Path
    """Folder for the results; must not hold other results."""
    seed: int = 0
    """Seed of all randomness."""
    device: str = "cpu"
    """Where attacks run: cpu, cuda, cuda:1, ..."""
    threads: int = 1
    """CPU threads. More pay for wide convolutions only, and cost small models a factor of ten on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Victim(Common):
    """What every capture takes."""

    model: str = "lenet"
    """A model of `gradleak list`, package.module:factory of your own, or the folder of a transformers language model with its
    tokenizer; --data are texts then, and "pictures" below means texts."""
    weights: Path | None = None
    """Start from these parameters (safetensors) in place of a random initialisation."""
    epochs: int = 0
    """First train for so many epochs on 2,000 pictures of the training split; cached."""
    data: str = "embedded"
    """embedded, digits, a folder (parquet or images), or a name on the Hugging Face hub."""
    split: str = "test"
    """Split of the data that holds the private pictures."""
    indices: tuple[int, ...] = (0,)
    """Rows of the private pictures: the batch."""
    resize: tuple[int, int] | None = None
    """Height and width to bring the pictures to."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of what is shared."""
    task: Task = "classification"
    """Where --model is the folder of a transformers language model: what it is trained for."""
    reveal_labels: bool = False
    """Tell the attacker the labels."""
    hide_batch_size: bool = False
    """Withhold the number of pictures."""


@dataclass(frozen=True, kw_only=True)
class Capture(Victim):
    """Play the victim: train a model on private pictures for one step (or one federated round), keep what is shared."""

    mode: Literal["eval", "train"] = "eval"
    """BatchNorm by running statistics (eval) or by those of the batch (train)."""
    hide_buffers: bool = False
    """Withhold BatchNorm's running statistics."""


@dataclass(frozen=True, kw_only=True)
class CaptureUpdate(Capture):
    """Play a client of federated averaging: local SGD on private pictures, then share the change of the parameters."""

    learning_rate: float = 1e-2
    """Of the local SGD."""
    local_steps: int = 5
    """Number of local SGD steps."""
    local_batch_size: int = 1
    """Pictures per local step."""


@dataclass(frozen=True, kw_only=True)
class CaptureAdapter(Victim):
    """Fine-tune a LoRA adapter on private pictures with the PEFT library, keep the folder that it saves."""

    model: str = "vit"
    """A model of `gradleak list`, package.module:factory of your own, or the folder of a trained transformers model: of
    pictures, or with its tokenizer of texts."""
    epochs: int = 5
    """Before that, train the base model for so many epochs on 5,000 pictures of the training split; cached."""
    rank: int = 8
    """Rank of the adapter."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank; 1 unless this is given."""
    target_modules: str = "all-linear"
    """all-linear, all (convolutions too), or the ends of modules' names with commas between, like q_proj,v_proj."""
    init: Literal["default", "gaussian", "pissa", "olora", "lora_ga"] = "default"
    """How PEFT initialises the adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    optimizer: Optimizer = "sgd"
    """sgd, momentum (0.9), adam or adamw, with torch's defaults."""
    lr: float = 1e-2
    """Learning rate of the fine-tuning."""
    steps: int = 1
    """Number of its steps."""
    local_batch_size: int | None = None
    """Pictures per step; all of them unless this is given."""


@dataclass(frozen=True, kw_only=True)
class CaptureWeights(Common):
    """Train a network on the first pictures of two classes, all at once, until little changes; keep its weights."""

    model: str = "homogeneous1000"
    """A fully connected ReLU network of `gradleak list`, or package.module:factory of your own."""
    data: str = "digits"
    """embedded, digits, a folder (parquet or images), or a name on the Hugging Face hub."""
    split: str = "train"
    """Split of the data that holds the private pictures."""
    per_class: int = 10
    """Private pictures per class: the first odd and even labels; of CIFAR-10, vehicles and animals."""
    resize: tuple[int, int] | None = None
    """Height and width to bring the pictures to."""
    epochs: int = 20_000
    """Steps of gradient descent on all pictures, at most. Begun training in --out is gone on with."""
    lr: float = 0.2
    """Learning rate; with --loss-based, the step in the logarithm of the loss."""
    loss: float = 0.0
    """Loss at which training ends."""
    weight_decay: float = 0.0
    """Times the parameters, added to the gradient."""
    loss_based: bool = False
    """Steps in inverse proportion to the loss: exponentially faster once all pictures are classified (try --lr 0.1)."""
    precision: Literal["float64", "float32"] = "float64"
    """Number format of training and weights."""
    reveal_initial: bool = False
    """Tell the attacker the parameters that training started from."""
    reveal_labels: bool = False
    """Tell the attacker the labels."""
    hide_batch_size: bool = False
    """Withhold the number of pictures."""


@dataclass(frozen=True, kw_only=True)
class Observed(Common):
    """What `attack` and `audit` take to understand the observation."""

    observation: Positional[Path]
    """observation.safetensors of `gradleak capture`, a plain safetensors file of yours ({name: gradient} with --weights, a
    trained model's weights without), or the folder of a LoRA adapter as PEFT saves it."""
    base: str | None = None
    """For the folder of an adapter: its base model, as a folder of `save_pretrained` or `gradleak capture adapter`, or a
    name on the Hugging Face hub."""
    lr: float | None = None
    """For the folder of an adapter: its learning rate; without it one step is assumed, and directions are compared."""
    steps: int = 1
    """For the folder of an adapter: optimiser steps."""
    optimizer: Optimizer = "sgd"
    """For the folder of an adapter: sgd, momentum, adam or adamw."""
    initial: Path | None = None
    """For the folder of an adapter: the folder of the adapter before training, where its start is not zero."""
    model: str | None = None
    """package.module:factory, when the architecture is none of ours; for plain files also a name of `gradleak list`."""
    weights: Path | None = None
    """The parameters it was taken at: checked against the provenance; needed for plain files of gradients."""
    task: Task = "classification"
    """For the folder of an adapter of a language model: what it was trained for."""
    mode: Literal["eval", "train"] | None = None
    """The mode it was taken in: checked against the provenance; eval if nothing says so."""
    input_shape: tuple[int, int, int] = (3, 32, 32)
    """For plain files: channel, height and width of a picture."""
    classes: int = 10
    """For plain files: number of classes."""
    batch_size: int | None = 1
    """For plain files and adapters: number of pictures."""
    data: str = "embedded"
    """Public pictures, for priors; in audits also for controls and decoys."""
    public_split: str = "train"
    """Split of the public pictures."""


@dataclass(frozen=True, kw_only=True)
class Attack(Observed):
    """Reconstruct the private pictures with one attack. Sees no secret."""

    attack: str
    """A name of `gradleak list`; its parameters are flags too (try --attack dlg --help)."""
    start: Path | None = None
    """reconstruction.safetensors of another attack on the same observation: where the search begins."""


@dataclass(frozen=True, kw_only=True)
class Audit(Observed):
    """Run every applicable attack, score it against controls if the secret is given, and write a report."""

    secret: Path | None = None
    """secret.safetensors of `gradleak capture`: only this command opens it."""
    attacks: tuple[str, ...] = tuple(ATTACKS)
    """Names of `gradleak list`; parameters of these attacks are flags too."""


@dataclass(frozen=True, kw_only=True)
class CapturePairs(Observed):
    """Make pairs (public pictures, the gradient of the observed model) for learned attacks; an interrupted run goes on."""

    count: int = 10_000
    """Number of pairs."""
    pair_batch: int = 1
    """Pictures in each pair's batch."""
    leak: Literal["none", "sign", "top-k"] = "none"
    """What is shared of each gradient: all, signs, or the largest hundredth."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise on each gradient (with --leak none)."""


@dataclass(frozen=True, kw_only=True)
class Train(CapturePairs):
    """Train a generator for the observed model on pairs: generator.safetensors, for `gradleak attack --generator`."""

    pairs: Path | None = None
    """Folder of `gradleak capture pairs`; without it pairs are made while training and not kept."""
    training_epochs: int = 8
    """How often each pair is seen."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Render a record again."""

    record: Positional[Path]
    """record.json"""
    out: Path
    """The HTML file to write."""


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """Run the command of a record again, with the same seed and parameters."""

    record: Positional[Path]
    """record.json"""
    out: Path
    """Folder for the new results."""
    model: str | None = None
    """Allow the record to import this package.module:factory."""


@dataclass(frozen=True, kw_only=True)
class Reproduce(Common):
    """Run a published experiment: record.json, table and plots."""

    name: Positional[str]
    """A recipe of `gradleak list`."""
    data: str = "embedded"
    """embedded, a folder, or a name on the Hugging Face hub."""
    size: Literal["small", "paper"] = "small"
    """small fits two cores; paper is as published."""


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """The main job on embedded pictures: capture a gradient, attack it, write the report."""

    out: Path = Path("demo")
    """Folder for the results; must not hold other results."""


@dataclass(frozen=True)
class List:
    """Attacks, what each needs and recovers; recipes; models."""
