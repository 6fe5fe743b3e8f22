"""The record of a run: versioned JSON, complete enough to render a report from and to run the attacks again.

The classes below are the schema: `write` and `read` check every record against them, so a record that cannot be read
is never written. Unknown keys are kept, so a later gradleak may add some without a new version.

Strict JSON has no NaN or infinity. `write` turns every non-finite number into null, on purpose: null reads "there is
no number here" in every language, where a large stand-in would pass for a measurement. An attack that diverged shows
a null score, and its status sentence says what happened.
"""

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from msgspec import Meta

from gradleak.errors import BadInput, checked, shortened
from gradleak.report.membership import Membership
from gradleak.report.old_record import OLD, modern

FAMILY, VERSION = "gradleak/record/", 2
SCHEMA = f"{FAMILY}{VERSION}"
CORE = ["torch", "numpy", "scipy", "safetensors", "datasets", "scikit-image", "scikit-learn", "pillow"]
EXTRA = ["transformers", "peft", "diffusers", "opacus", "flwr", "ray"]
LARGEST = 2**30  # bytes of a record that are read

Numbers = Sequence[float | None]  # one number per sample; null where there is none
Scores = Mapping[str, Numbers]  # metric -> one number per sample: {"psnr_db": [31.2, null], "ssim": [0.94, 0.11]}
Level = Literal["recovered", "partial", "members", "nothing", "absent", "unscored", "void"]


class Command(TypedDict):
    """The command, as data: its name, the value of every argument, the parameters of every attack, and the SHA-256 of every
    file that it read."""

    name: str
    arguments: Mapping[str, Any]
    attacks: NotRequired[Mapping[str, Mapping[str, Any]]]
    inputs: NotRequired[Mapping[str, str]]


class Revealed(TypedDict):
    """One row of the threat model: an item that the attacker of an observation saw, or did not; of all of them, if none is named."""

    observation: NotRequired[str]
    item: str
    revealed: bool
    detail: str


class Verdict(TypedDict):
    """What a reader in a hurry takes home.

    recovered  private samples came back, each of them; partial: some, or parts
    members    none did, but who was in the training data can be told
    nothing    none did, which proves nothing
    absent     none did, and the release does not hold the information
    unscored   there was no secret to compare with, and nothing is proven
    void       a check says that the numbers mean nothing

    headline: the same in one sentence for everybody; untried: attacks that read such a release and were not asked for.
    """

    level: Level
    sentence: str
    headline: NotRequired[str]
    untried: NotRequired[Sequence[str]]
    observation: NotRequired[str]


class Remedy(TypedDict):
    """A change to what is shared, what it does to attackers who know of it and what it costs, both as measured, and where."""

    change: str
    effect: str
    cost: str
    source: str


class Flag(TypedDict):
    """A reason to trust, or not to trust, the numbers of a result; most: of a bound, the probability of success that it leaves to any attack."""

    name: str
    level: Literal["info", "warning", "error"]
    sentence: str
    most: NotRequired[float]


class Labels(TypedDict):
    """Class labels; `true` when the secret was given. The report compares them in whatever order."""

    recovered: Sequence[int | str]
    true: NotRequired[Sequence[int | str]]


class Count(TypedDict):
    """A number of samples; `true` when the secret was given."""

    recovered: int
    true: NotRequired[int]


class Metric(TypedDict):
    """How a metric is written; better says whether more or less of it is; meaning: what a reader has to know of it."""

    label: str
    unit: str
    better: Literal["higher", "lower", "unknown"]
    decimals: Annotated[int, Meta(ge=0, le=12)]
    meaning: NotRequired[str]


class Control(TypedDict):
    """How a control is called; blind: it has seen neither observation nor truth; meaning: what it is."""

    label: str
    blind: bool
    meaning: NotRequired[str]


class Plot(TypedDict):
    """A finished figure, as a `data:image/png;base64,` URI; words: what it shows, for those who do not see it."""

    title: str
    image: str
    words: NotRequired[str]


class Seen(TypedDict, total=False):
    """What was attacked: name, kind of release, and more; `revealed` is what of the threat model the attacker had."""

    name: str
    revealed: Sequence[str]


class Repeat(TypedDict):
    """The same attack under another seed: means of its scores, and how many samples came back whole, and in part or whole."""

    seed: int
    residual: float | None
    scores: Mapping[str, float | None]
    recovered: NotRequired[int]
    partly: NotRequired[int]


class Result(TypedDict):
    """One attack run, or of several seeds the one that explains most. Every list that is "per sample" is in matched order: entry i is about true sample i.

    `identification_rank` counts from 1: 1 says that the true sample was the nearest of all candidates. `controls` and `shown`
    use the same names; `shown` has truth and reconstruction besides, each a list of `data:image/png;base64,` URIs or of
    texts, as `media` says. `leads`: by how much the attack is ahead of the best blind control, by the first metric.
    `intervals`: of 95 %, of the mean of a metric, and of the leads.
    """

    attack: str
    parameters: Mapping[str, Any]
    observation: Mapping[str, Any]  # a `Seen`, and more
    defense: Mapping[str, Any] | None
    status: str
    residual: float | None  # distance between the observation and the re-simulated one
    seconds: float
    iterations: int
    scores: Scores  # empty without a secret
    controls: Mapping[str, Scores]
    flags: Sequence[Flag]
    ran: NotRequired[bool]
    outcome: NotRequired[str]
    leads: NotRequired[Numbers]
    recovered: NotRequired[Sequence[bool]]
    partly: NotRequired[Sequence[bool]]
    intervals: NotRequired[Mapping[str, tuple[float, float]]]
    repeats: NotRequired[Sequence[Repeat]]
    proven: NotRequired[Sequence[bool]]
    trace: NotRequired[Sequence[tuple[int, float | None]]]  # (iteration, objective)
    media: NotRequired[Literal["image/png", "text/plain"]]
    shown: NotRequired[Mapping[str, Sequence[str]]]
    decoys: NotRequired[int]  # public samples in the identification line-up, beside the truth
    labels: NotRequired[Labels]
    count: NotRequired[Count]


class Record(TypedDict):
    """Everything about one run of a command; `table`, `costs` (CPU seconds) and `plots` come from the
    studies.

    `verdict` is about all of it; `verdicts` has one for each observation, where there are several.
    """

    schema: str
    gradleak: str
    created: str  # ISO 8601, UTC
    command: Command
    seed: int | None
    environment: Mapping[str, Any]
    threat_model: Sequence[Revealed]
    verdict: Verdict
    results: list[Result]
    verdicts: NotRequired[Sequence[Verdict]]
    remedies: NotRequired[Mapping[str, Sequence[Remedy]]]  # of each observation
    redacted: NotRequired[bool]  # hashes stand where pictures and texts stood
    metrics: NotRequired[Mapping[str, Metric]]
    controls: NotRequired[Mapping[str, Control]]
    table: NotRequired[Sequence[Mapping[str, Any]]]
    costs: NotRequired[Sequence[Mapping[str, Any]]]
    plots: NotRequired[Sequence[Plot]]
    membership: NotRequired[Membership]


def new_result(
    attack: str, parameters: Mapping[str, Any], observation: Mapping[str, Any], flags: Sequence[Flag] = ()
) -> Result:
    """The row of an attack that has not run yet."""
    return {
        "attack": attack,
        "parameters": parameters,
        "observation": observation,
        "defense": None,
        "status": "",
        "residual": None,
        "seconds": 0.0,
        "iterations": 0,
        "scores": {},
        "controls": {},
        "flags": list(flags),
    }


def new_record(command: Command, seed: int | None, threat_model: Sequence[Revealed]) -> Record:
    """A record with no results yet, stamped with the time, the gradleak version and the environment of this process."""
    return {
        "schema": SCHEMA,
        "gradleak": _version("gradleak") or "not installed",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "packages": {name: version for name in CORE + EXTRA if (version := _version(name))},
            "revision": revision(),
        },
        "threat_model": threat_model,
        "verdict": {"level": "unscored", "sentence": "No reconstruction has been scored."},
        "results": [],
    }


def write(record: Record, path: Path) -> None:
    """Write the record as strict JSON, all of it or nothing: when this fails, an older file at `path` is untouched.

    Non-finite numbers become null (see the top of this file). The folder is made when it is missing.

    Raises:
        BadInput: the record does not have the shape of `Record`; the sentence names the place.
        TypeError: the record holds something that JSON has no word for, such as a tensor.
    """
    plain = finite(record)
    fitting(plain, "This record cannot be written")
    text = json.dumps(plain, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> Record:
    """Read a record; BadInput, with what is wrong, for anything else and for a schema that this version does not know."""
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{path} is too large for a record.")
        if not path.is_file():
            raise BadInput(f"Cannot read the record {shortened(str(path))}: it is no file.")
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"Cannot read the record {shortened(str(path))}: {error.strerror}.") from error
    try:  # not `parsed`: a text that was recovered may hold half a surrogate pair
        value = finite(json.loads(text.decode(), parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number of thousands of digits
        reason = shortened(str(error))
        raise BadInput(f"{path} is not JSON ({reason}); give a record.json that gradleak wrote.") from error
    if not isinstance(value, dict) or not isinstance(schema := value.get("schema"), str):
        raise BadInput(f"{path} is not a gradleak record: it has no schema; give a record.json that gradleak wrote.")
    if schema == OLD:
        value = modern(value, path)
    elif schema != SCHEMA:
        version = re.fullmatch(re.escape(FAMILY) + "([1-9][0-9]{0,8})", schema)
        if version and int(version[1]) > VERSION:
            raise BadInput(f"{path} was written by a newer gradleak: upgrade, for this one reads only {SCHEMA!r}.")
        raise BadInput(f"{path} has the unknown schema {shortened(schema)[:60]!r}; this gradleak reads {SCHEMA!r}.")
    return fitting(value, f"{path} is not a valid {SCHEMA!r}")


def fitting(value: Any, what: str) -> Record:
    """The record itself; BadInput where it does not have the shape of `Record`."""
    for row in checked(value, Record, what)["results"]:
        checked(row["observation"], Seen, what)
    return cast(Record, value)


def revision() -> str | None:
    """The commit that this gradleak was checked out at, "dirty" where files have changed since; None outside a checkout."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    """The installed version of a package, which is not imported for that; None when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def finite(value: Any) -> Any:
    """A copy in JSON's own types: tuples become lists, non-finite floats None."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
