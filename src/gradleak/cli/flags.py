"""The arguments of every command that is no victim's, as frozen dataclasses: the strings under the fields are the command line's
help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from gradleak.modalities.language_models import Task
from gradleak.observations.training import Optimizer


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes that makes results."""

    out: Path
    """Folder for the results; must not hold other results."""
    seed: int = 0
    """Seed of all randomness."""
    threads: int = 1
    """CPU threads. More pay for wide convolutions only, and cost small models a factor of ten on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Observed(Common):
    """What `attack` and `audit` take to understand the observation."""

    observation: Positional[Path | None] = None
    """observation.safetensors of `gradleak capture`; a file of yours, as safetensors, .npz, .npy, parquet, JSON or fobs ({name: gradient} with
    --weights, a change of weights with --lr too, a trained model's weights without both); or a LoRA adapter: the folder that PEFT
    saves, a Trainer's checkpoint, a file of kohya or diffusers; or the folder of a model that one was merged into, with --base. Left out
    with --after."""
    before: Path | None = None
    """The parameters before training, the same as --weights."""
    after: Path | None = None
    """The parameters after training, in place of a file with their change: needs --before, and --lr unless a LoRA adapter was merged into
    them."""
    base: str | None = None
    """For an adapter, or a model that one was merged into: the base model, as a folder of `save_pretrained` or `gradleak capture adapter`, or a name on the Hugging Face
    hub; unless this is given, the one that its config names."""
    lr: float | None = None
    """For an adapter or a change of weights: the learning rate; of an adapter without it what a checkpoint tells counts, else one step is
    assumed, and directions are compared."""
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
    steps: int | None = None
    """For an adapter or a change of weights: optimiser steps; unless this is given, what a checkpoint tells, else 1."""
    optimizer: Optimizer | None = None
    """For an adapter or a change of weights: sgd (the default), momentum, adam or adamw."""
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
    initial: Path | None = None
    """For an adapter: the folder of the adapter before training, where its start is not zero."""
    model: str | None = None
    """package.module:factory, when the architecture is none of ours; for plain files also a name of `gradleak list`, or the
    folder of a language model."""
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
    batch_size: int | None = None
    """For plain files and adapters: number of private samples; unless this is given, what the ranks of a gradient or the adapter of a
    fully connected network tell, else 1."""
    seeds: str | None = None
    """For adapters, merged or not: which seeds may have drawn it, besides the usual ones: N for 0 to N - 1, or START:END; of 4294967296. Ctrl-C
    ends the search, says where to go on, and goes on with what is known."""
    data: str = "embedded"
    """Public data of the same kind, for priors; in audits also for controls and decoys."""
    public_split: str = "train"
    """Split of the public data."""


@dataclass(frozen=True, kw_only=True)
class Attacked(Observed):
    """What `attack` and `audit` may be told besides."""

    defense: UseAppendAction[tuple[str, ...]] = ()
    """What was done to the release before it was shared, in this order, each as NAME:NUMBER, in place of what the file says: top-k:0.1,
    noise:0.01, ... (see `gradleak list`); unknown, for an attacker who does not know."""
    refine: str | None = None
    """Clean up this attack's pictures by a denoiser that is trained on its results for public pictures (the attack guide)."""
    prior: str | None = None
    """What is known of pictures, in place of --data, for attacks that take it: gaussian, tv, ffdnet, or diffusion:FOLDER for a model of diffusers,
    which may be a name on the hub, or of `gradleak train denoiser`. An audit shows the same attack under a Gaussian, and the prior alone, beside it."""


@dataclass(frozen=True, kw_only=True)
class Attack(Attacked):
    """Reconstruct the private data with one attack. Sees no secret."""

    attack: str
    """A name of `gradleak list`, or package.module:Class of your own; its parameters are flags with its name before them (try
    --attack dlg --help)."""
    start: Path | None = None
    """reconstruction.safetensors of another attack on the same observation: where the search begins."""
    device: str = "cpu"
    """Where it runs: cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class Audit(Attacked):
    """Run every applicable attack, score it against controls if the secret is given, and write a report. With --members: tell which of
    your samples an attacker tells from fresh ones, and run only the attacks that --attacks names."""

    secret: Path | None = None
    """secret.safetensors of `gradleak capture`: only this command opens it."""
    noise_multiplier: float | None = None
    """Of a differentially private training (DP-SGD), where what was shared does not say so itself; with --sample-rate and --dp-steps."""
    sample_rate: float | None = None
    """Of a private training: the probability with which a sample is drawn in each step."""
    dp_steps: int | None = None
    """Of a private training: how many steps were taken."""
    delta: float | None = None
    """Of a private training: at which epsilon is told; 1e-5 unless this is given."""
    attacks: tuple[str, ...] | None = None
    """Names of `gradleak list`, or package.module:Class; all that recover such data unless this or --members is given. Parameters are
    flags with the attack's name
    before them: --dlg.restarts 5."""
    members: str | None = None
    """The samples that it was trained on: data as for --data, DATA:SPLIT (train unless the split is given), or a file .txt, .jsonl or .csv
    of texts."""
    non_members: str | None = None
    """With --members: samples of the same kind that took no part (test or validation unless the split is given). Without them only the
    certificate says something."""
    device: str = "cpu"
    """Where attacks run: cpu, cuda, cuda:1, ..."""
    fail_on: str | None = None
    """For jobs: exit code 1 where a private sample came back whole (recovered), or also in part (partly), or where more than a share of
    the members is told from others at 1 % false alarms (TPR>0.05); 3 where nothing could run or nothing can be said; else 0."""
    json: bool = False
    """Print summary.json in place of sentences, which go to stderr."""
    redact: bool = False
    """Hashes stand in record and report in place of private data, the most exposed samples are named by their rows, and nothing that was
    recovered is kept."""


@dataclass(frozen=True, kw_only=True)
class CapturePairs(Observed):
    """Make pairs (public pictures, the gradient of the observed model) for learned attacks; an interrupted run goes on."""

    count: int = 10_000
    """Number of pairs."""
    pair_batch: int = 1
    """Pictures in each pair's batch."""
    defense: UseAppendAction[tuple[str, ...]] = ()
    """What is done to each gradient, in this order, each as NAME:NUMBER, like top-k:0.1 or noise:0.01 (see `gradleak list`)."""


@dataclass(frozen=True, kw_only=True)
class Train(CapturePairs):
    """Train a generator for the observed model on pairs: generator.safetensors, for `gradleak attack`."""

    pairs: Path | None = None
    """Folder of `gradleak capture pairs`; without it pairs are made while training and not kept."""


@dataclass(frozen=True, kw_only=True)
class TrainByDescent(Train):
    """Train a generator for the observed model on pairs: generator.safetensors, for `gradleak attack`."""

    training_epochs: int = 8
    """How often each pair is seen."""


@dataclass(frozen=True, kw_only=True)
class TrainDenoiser(Common):
    """Train a denoiser on public pictures, a prior for `diffusion:FOLDER`; an interrupted training goes on."""

    data: str
    """Public pictures: embedded, digits, or a folder or name of Hugging Face."""
    split: str = "train"
    """The split to train on."""
    shape: tuple[int, int, int] | None = None
    """Channels (1 or 3), height and width that the pictures are brought to; their own where it is not given."""
    limit: int | None = None
    """At most so many pictures, the first."""
    minutes: float = 40.0
    """CPU time; the rate falls to its end."""


@dataclass(frozen=True, kw_only=True)
class Defend:
    """Defend a release that is at hand: the same release with noise, with fewer bits, entries or directions, to be audited again."""

    release: Positional[Path]
    """observation.safetensors of a gradient or an update, or the folder of a PEFT adapter."""
    with_: Annotated[UseAppendAction[tuple[str, ...]], arg(name="with")] = ()
    """The defenses, in this order, each as NAME:NUMBER: top-k:0.1, bits:8, noise:0.01, svd:4, ... (see `gradleak list`); unknown as the last
    withholds from the attacker those before it."""
    out: Path
    """Folder for the defended release; must not hold other results."""
    seed: int = 0
    """Seed of noise."""


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
class Study(Common):
    """Run a study of `gradleak list`, or one of your own from a TOML file. Started again, it goes on where it was interrupted."""

    name: Positional[str]
    """A study of `gradleak list`, or a file: attacks, victims or observations, defenses, seeds."""
    data: str = "embedded"
    """embedded, a folder, or a name on the Hugging Face hub; of a file's study only for observations."""
    size: Literal["smoke", "small", "paper"] = "small"
    """smoke shows that it runs, small fits two cores, paper is as published; a file says all of that itself."""
    seeds: int | None = None
    """How many seeds, from --seed on; as many as the study has unless this is given."""
    device: str = "cpu"
    """Where cells compute: cpu, cuda, cuda:1, ..., for studies that can choose."""
    where: str = "here"
    """here, ray (a cluster on this machine, or the one that RAY_ADDRESS names), or ray://host:port."""
    workers: int = 1
    """Processes of this machine (with --where here)."""
    gpus: float = 0.0
    """GPUs that a task needs (with --where ray); a half lets two tasks share one."""
    limit: int | None = None
    """Compute at most so many cells now."""
    retry: bool = False
    """Compute those cells again that failed."""
    dry_run: bool = False
    """List the cells, and how long they will take. Where none is finished yet, the first is computed for that, with those that are
    computed beside it, and kept."""


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """The main job on embedded pictures: capture an adapter and a gradient, attack both, write the report."""

    out: Path = Path("demo")
    """Folder for the results; must not hold other results."""
    device: str = "cpu"
    """Where attacks run: cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True)
class List:
    """Attacks, what each needs and recovers; studies; models."""
