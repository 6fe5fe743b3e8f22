"""The arguments that tell an observation, and those of every command that makes results: the strings under the fields are the command
line's help, `GROUP` is the heading that a class has in it. Importing this costs nothing."""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from gradleak.modalities.words import Optimizer, Task

PRESENTED = (
    "config",
    "quiet",
    "verbose",
    "resume",
    "overwrite",
)  # how a command is run, which changes nothing that it finds


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes that makes results."""

    GROUP: ClassVar[str] = "output"

    out: Path
    """Folder for the results; must not hold other results."""
    seed: int = 0
    """Seed of all randomness."""
    threads: int = 1
    """CPU threads. More pay for wide convolutions only, and cost small models a factor of ten on a busy machine."""
    quiet: Annotated[bool, arg(aliases=["-q"])] = False
    """Print errors only, and what --json asks for."""
    config: Path | None = None
    """A TOML file with flags of this command (lr = 1e-2), those of an attack in a table of its name; flags win over it, and it wins over
    the table [tool.gradleak.COMMAND] of pyproject.toml in the current folder."""


@dataclass(frozen=True, kw_only=True)
class Kept(Common):
    """What commands take besides whose results may be there already."""

    GROUP: ClassVar[str] = "output"

    resume: bool = False
    """Go on with what the same command has left in --out, be it finished or killed; begin where there is nothing."""
    overwrite: bool = False
    """Remove what gradleak has left in --out, once the new results come."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How something was trained that somebody shares, as far as the attacker is told."""

    GROUP: ClassVar[str] = "training"

    lr: float | None = None
    """For an adapter or a change of weights: the learning rate; of an adapter without it what a checkpoint tells counts, else one step is
    assumed, and directions are compared."""
    steps: int | None = None
    """For an adapter or a change of weights: optimiser steps; unless this is given, what a checkpoint tells, else 1."""
    optimizer: Optimizer | None = None
    """For an adapter or a change of weights: sgd (the default), momentum, adam or adamw."""
    schedule: Literal["linear", "cosine"] | None = None
    """For an adapter or a change of weights: how the learning rate falls from --lr to 0, as in transformers; unless this is given, what a
    checkpoint tells, else it stays."""
    warmup: int | None = None
    """With --schedule: steps in which the learning rate rises from 0; none unless this is given."""
    planned_steps: int | None = None
    """With --schedule: steps after which the learning rate is 0; those that were taken unless this is given."""
    shuffle: tuple[Literal["loader", "global", "accelerate"], int] | None = None
    """For an adapter or a change of weights: how its samples were shuffled in each epoch, and the seed: by a DataLoader with a generator, by
    one after torch.manual_seed, or by accelerate (the Trainer: accelerate 42)."""
    weight_decay: float | None = None
    """For an adapter or a change of weights: unless this is given, 0.01 of adamw and 0 of the others."""
    local_batch_size: int | None = None
    """For a change of weights: samples per step; all unless this is given."""
    proximal: float | None = None
    """For a change of weights: mu of FedProx; 0 unless this is given."""
    clip: float | None = None
    """For a change of weights: norm to which the gradient of each step was cut; not cut unless this is given."""
    clients: int | None = None
    """For a change of weights: over how many clients it is the mean, each with as many samples; one unless this is given."""
    seeds: str | None = None
    """For adapters, merged or not: which seeds may have drawn it, besides the usual ones: N for 0 to N - 1, or START:END; of 4294967296. Ctrl-C
    ends the search, says where to go on, and goes on with what is known."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that something was taken from."""

    GROUP: ClassVar[str] = "model"

    model: str | None = None
    """package.module:factory, when the architecture is none of ours; for plain files also a name of `gradleak list`, or the
    folder of a language model."""
    base: str | None = None
    """For an adapter, or a model that one was merged into: the base model, as a folder of `save_pretrained` or `gradleak capture adapter`, or a name on the Hugging Face
    hub; unless this is given, the one that its config names."""
    weights: Path | None = None
    """The parameters it was taken at: checked against the provenance; needed for plain files of gradients."""
    task: Task | None = None
    """Where the model is a language model: what it was trained for, classification (the default, where an adapter's config says nothing
    else), causal-lm or masked-lm."""
    mode: Literal["eval", "train"] | None = None
    """The mode it was taken in: checked against the provenance; eval if nothing says so."""
    input_shape: tuple[int, int, int] | None = None
    """For plain files: channel, height and width of a picture; 3 32 32 unless this is given."""
    classes: int | None = None
    """For plain files: number of classes; 10 unless this is given."""
    loss: tuple[Literal["cross-entropy", "binary-cross-entropy", "focal"], ...] | None = None
    """For plain files: the loss, or several that are added up; cross-entropy unless this is given. Others are values in Python."""
    loss_weights: tuple[float, ...] | None = None
    """With several losses: the factor of each; 1 unless this is given."""
    class_weights: tuple[float, ...] | None = None
    """For plain files: of the cross entropy, a factor for each class."""
    reduction: Literal["mean", "sum"] | None = None
    """For plain files: of the loss over the batch; mean unless this is given."""
    label_smoothing: float | None = None
    """For plain files: of the cross entropy; 0 unless this is given."""


@dataclass(frozen=True, kw_only=True)
class Seen(Trained, Model):
    """What is needed to understand what was shared."""

    GROUP: ClassVar[str] = "observation"

    observation: Path | None = None
    """What was shared."""
    before: Path | None = None
    """The parameters before training, the same as --weights."""
    after: Path | None = None
    """The parameters after training, in place of a file with their change: needs --before, and --lr unless a LoRA adapter was merged into
    them."""
    initial: Path | None = None
    """For an adapter: the folder of the adapter before training, where its start is not zero."""
    batch_size: int | None = None
    """For plain files and adapters: number of private samples; unless this is given, what the ranks of a gradient or the adapter of a
    fully connected network tell, else 1."""
    data: str = "embedded"
    """Public data of the same kind, for priors; in audits also for controls and decoys."""
    public_split: str = "train"
    """Split of the public data."""


@dataclass(frozen=True, kw_only=True)
class Observed(Seen, Kept):
    """What commands take that read an observation."""

    GROUP: ClassVar[str] = "observation"

    observation: Positional[Path | None] = None
    """observation.safetensors of `gradleak capture`; a file of yours, as safetensors, .npz, .npy, parquet, JSON or fobs ({name: gradient} with
    --weights, a change of weights with --lr too, a trained model's weights without both); or a LoRA adapter: the folder that PEFT
    saves, a Trainer's checkpoint, a file of kohya or diffusers; or the folder of a model that one was merged into, with --base. Left out
    with --after."""


def with_common(victim: type) -> type:
    """A victim's settings, as the arguments of a command."""
    command = make_dataclass(victim.__name__, [], bases=(victim, Kept), kw_only=True, frozen=True)
    command.__doc__ = victim.__doc__
    return command
