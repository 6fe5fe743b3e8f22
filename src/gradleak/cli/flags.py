"""The arguments of every command that is no victim's, as frozen dataclasses: the strings under the fields are the command line's
help, `GROUP` is the heading that a class has in it. Importing this costs nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from gradleak.cli.seen_flags import Common as Common
from gradleak.cli.seen_flags import Kept as Kept
from gradleak.cli.seen_flags import Observed as Observed
from gradleak.cli.seen_flags import Seen as Seen


@dataclass(frozen=True, kw_only=True)
class Attacked(Observed):
    """What `attack` and `audit` may be told besides."""

    GROUP: ClassVar[str] = "attack"

    defense: UseAppendAction[tuple[str, ...]] = ()
    """What was done to the release before it was shared, in this order, each as NAME:NUMBER, in place of what the file says: top-k:0.1,
    noise:0.01, ... (see `gradleak list`); unknown, for an attacker who does not know."""
    refine: str | None = None
    """Clean up this attack's pictures by a denoiser that is trained on its results for public pictures (the attack guide)."""
    prior: str | None = None
    """What is known of pictures, in place of --data, for attacks that take it: gaussian, tv, ffdnet, or diffusion:FOLDER for a model of diffusers,
    which may be a name on the hub, or of `gradleak train denoiser`. An audit shows the same attack under a Gaussian, and the prior alone, beside it."""
    device: str = "cpu"
    """Where attacks run: cpu, cuda, cuda:1, ..."""
    verbose: Annotated[bool, arg(aliases=["-v"])] = False
    """Print besides which attacks did not run, and what the checks say."""


@dataclass(frozen=True, kw_only=True)
class Attack(Attacked):
    """Reconstruct the private data with one attack. Sees no secret."""

    GROUP: ClassVar[str] = "attack"

    attack: str
    """A name of `gradleak list`, or package.module:Class of your own; its parameters are flags with its name before them (try
    --attack dlg --help)."""
    start: Path | None = None
    """reconstruction.safetensors of another attack on the same observation: where the search begins."""


@dataclass(frozen=True, kw_only=True)
class Private:
    """A differentially private training (DP-SGD), where what was shared does not say itself how private it was."""

    GROUP: ClassVar[str] = "private training"

    noise_multiplier: float | None = None
    """Of a differentially private training (DP-SGD), where what was shared does not say so itself; with --sample-rate and --dp-steps."""
    sample_rate: float | None = None
    """Of a private training: the probability with which a sample is drawn in each step."""
    dp_steps: int | None = None
    """Of a private training: how many steps were taken."""
    delta: float | None = None
    """Of a private training: at which epsilon is told; 1e-5 unless this is given."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """Whose membership is asked for."""

    GROUP: ClassVar[str] = "membership"

    members: str | None = None
    """The samples that it was trained on: data as for --data, DATA:SPLIT (train unless the split is given), or a file .txt, .jsonl or .csv
    of texts."""
    non_members: str | None = None
    """With --members: samples of the same kind that took no part (test or validation unless the split is given). Without them only the
    certificate says something."""
    limit: int | None = None
    """With --members: look at so many of each kind, drawn by --seed, for a first answer; 2,000 unless this is given."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How an audit is told."""

    GROUP: ClassVar[str] = "output"

    fail_on: str | None = None
    """For jobs: exit code 1 where a private sample came back whole (recovered), or also in part (partly), or where more than a share of
    the members is told from others at 1 % false alarms (TPR>0.05); 3 where nothing could run or nothing can be said; else 0."""
    json: bool = False
    """Print summary.json in place of sentences, which go to stderr."""
    pdf: bool = False
    """Print the report to report.pdf, by the Chromium or Chrome of this machine."""
    redact: bool = False
    """Hashes stand in record and report in place of private data, the most exposed samples are named by their rows, and nothing that was
    recovered is kept."""


@dataclass(frozen=True, kw_only=True)
class Audit(Attacked, Private, Members, Gate):
    """Run every applicable attack, score it against controls if the secret is given, and write a report. With --members: tell which of
    your samples an attacker tells from fresh ones, and run only the attacks that --attacks names."""

    GROUP: ClassVar[str] = "attack"

    secret: Path | None = None
    """secret.safetensors of `gradleak capture`: only this command opens it."""
    attacks: tuple[str, ...] | None = None
    """Names of `gradleak list`, or package.module:Class; all that recover such data unless this or --members is given. Parameters are
    flags with the attack's name
    before them: --dlg.restarts 5."""
    repeats: int = 1
    """Under how many seeds each attack runs, from --seed on: the run that explains most is shown, as an attacker would keep it, and all are told."""
    lpips: Path | None = None
    """Measure LPIPS too, with the weights in this file: safetensors, of the package lpips, net="alex" (in place of GRADLEAK_LPIPS)."""


@dataclass(frozen=True, kw_only=True)
class CapturePairs(Observed):
    """Make pairs (public pictures, the gradient of the observed model) for learned attacks; an interrupted run goes on."""

    GROUP: ClassVar[str] = "pairs"

    count: int = 10_000
    """Number of pairs."""
    pair_batch: int = 1
    """Pictures in each pair's batch."""
    defense: UseAppendAction[tuple[str, ...]] = ()
    """What is done to each gradient, in this order, each as NAME:NUMBER, like top-k:0.1 or noise:0.01 (see `gradleak list`)."""


@dataclass(frozen=True, kw_only=True)
class Train(CapturePairs):
    """Train a generator for the observed model on pairs: generator.safetensors, for `gradleak attack`."""

    GROUP: ClassVar[str] = "pairs"

    pairs: Path | None = None
    """Folder of `gradleak capture pairs`; without it pairs are made while training and not kept."""


@dataclass(frozen=True, kw_only=True)
class TrainByDescent(Train):
    """Train a generator for the observed model on pairs: generator.safetensors, for `gradleak attack`."""

    GROUP: ClassVar[str] = "pairs"

    training_epochs: int = 8
    """How often each pair is seen."""


@dataclass(frozen=True, kw_only=True)
class TrainDenoiser(Kept):
    """Train a denoiser on public pictures, a prior for `diffusion:FOLDER`; an interrupted training goes on."""

    GROUP: ClassVar[str] = "denoiser"

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
    """The file to write: HTML, or a .pdf, which the Chromium or Chrome of this machine prints."""


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
class Study(Kept):
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


@dataclass(frozen=True, kw_only=True)
class List(Seen):
    """Attacks, what each needs and recovers; defenses; studies; models. With --for: which attacks read a file, why others do not, and what
    they cost."""

    GROUP: ClassVar[str] = "list"

    what: Positional[Literal["everything", "attacks", "defenses", "studies", "models"]] = "everything"
    """What to list."""
    observation: Annotated[Path | None, arg(name="for")] = None
    """What was shared, as `audit` takes it; which attacks apply is told of it."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print a script that completes commands, flags and names: source it, or put it where your shell looks for such scripts."""

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """Which shell."""
