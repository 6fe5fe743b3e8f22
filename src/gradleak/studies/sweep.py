"""A study of one's own, from a TOML file or from Python: attacks x parameters x victims or observations x defenses x seeds.

A list stands for one value after another, all combinations of them; so does a list of lists, for what is a list itself.

    question = "How much noise hides a digit?"
    seeds = [0, 1]

    [victim]                       # settings of `gradleak capture KIND`
    kind = "gradient"
    data = "digits"
    model = ["lenet", "mlp"]
    pictures = 20                  # the first twenty rows, each by itself; or indices = [[0], [1], ...]
    defense = [[], ["noise:1e-4"], ["noise:1e-3"]]   # a list itself, like indices

    [attacks.inverting-gradients]  # its parameters
    steps = 300

In place of a victim: [[observations]], each with `file` and `secret`.
"""

import contextlib
import io
import itertools
import math
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import torch

from gradleak.attacks import ATTACKS
from gradleak.attacks.attack import refusal
from gradleak.attacks.parameters import built
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.loop import evidence, others, prepared, score
from gradleak.audit.privacy import spent
from gradleak.audit.scoring import SCORING
from gradleak.errors import BadInput, near, shortened
from gradleak.formats.model_folder import folder_of, is_language_model
from gradleak.formats.observation_file import load_observation
from gradleak.formats.secret_file import Secret, load_secret
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.modalities.networks import Architecture
from gradleak.observations.observation import Observation
from gradleak.observations.releases import RELEASES
from gradleak.report.record import Result as AuditRow
from gradleak.report.record import new_result
from gradleak.studies.findings import Findings
from gradleak.studies.plots import bars, panels
from gradleak.studies.study import Bench, Result, Row, Study, silent
from gradleak.studies.table import Table, word
from gradleak.victims import VICTIMS

Pairs = tuple[tuple[str, Any], ...]
KNOWN = ("name", "question", "seeds", "metrics", "victim", "observations", "attacks")
FIXED = ("kind", "pictures", "first")  # of a victim: what is no setting of `gradleak capture`
MOST = 100_000  # cells a seed
CACHE = 2**24  # bytes of released tensors that are attacked at once


@dataclass(frozen=True)
class Setting:
    """One attack on one observation.

    source: the victim's kind and settings, or the observation's files; each: the settings that name the private samples, which the table
    averages over; shown: what varies.
    """

    attack: str
    parameters: Pairs
    source: Pairs
    each: Pairs
    shown: Pairs

    def columns(self) -> Row:
        """What varies; the table averages over the rows of private data."""
        return {"attack": self.attack, **{name: word(value) for name, value in (*self.shown, *self.each)}}


@dataclass(frozen=True)
class Sweep:
    """What a file says.

    victim: settings of `gradleak capture`, its kind among them; observations: {file, secret} each; attacks: {name: parameters};
    metrics: the columns to keep, or none for all.
    """

    attacks: Mapping[str, Mapping[str, Any]]
    victim: Mapping[str, Any] | None = None
    observations: Sequence[Mapping[str, str]] = ()
    seeds: Sequence[int] = (0,)
    metrics: Sequence[str] = ()
    name: str = "sweep"
    question: str = ""

    def study(self) -> Study[Setting]:
        """The study; BadInput for an unknown attack, a setting that is none, or one that no attack can run."""
        settings = list(itertools.islice(self.settings(), MOST + 1))
        check(settings, self.metrics)
        return Study(
            name=self.name,
            question=self.question,
            settings=lambda data, size: settings,
            cell=Audited(tuple(self.metrics)).one,
            many=Audited(tuple(self.metrics)),
            together=lambda setting: (setting.attack, setting.parameters, setting.source),
            over=("indices",),
            depends=depends,
            tell=tell,
            anywhere=True,
        )

    def settings(self) -> Iterator[Setting]:
        """Every combination, in the order of the file."""
        if (self.victim is None) == (not self.observations) or not self.attacks:
            raise BadInput("A study needs [attacks.NAME], and either [victim] or [[observations]].")
        for attack, given in self.attacks.items():
            for parameters, varied in combinations(given, f"the attack {attack}"):
                for source, each, shown in self.victims() if self.victim is not None else self.files():
                    yield Setting(attack, parameters, source, each, (*varied, *shown))

    def victims(self) -> Iterator[tuple[Pairs, Pairs, Pairs]]:
        """(source, each, shown) of every combination of a victim's settings."""
        assert self.victim is not None
        given, kind = dict(self.victim), self.victim.get("kind", "gradient")
        if kind not in VICTIMS:
            raise BadInput(
                f"Unknown kind of victim {shortened(str(kind))!r}{near(str(kind), VICTIMS)} ({', '.join(VICTIMS)})."
            )
        hints = get_type_hints(settings_of(kind))
        if "pictures" in given:
            first, count = given.get("first", 0), given["pictures"]
            if not all(isinstance(n, int) and 0 <= n <= MOST for n in (first, count)):
                raise BadInput("pictures and first are numbers of rows.")
            given["indices"] = [[row] for row in range(first, first + count)]
        if unknown := [name for name in given if name not in hints and name not in FIXED]:
            raise BadInput(
                f"A victim of kind {kind} has no setting {shortened(unknown[0])!r}{near(unknown[0], hints)}."
            )
        given = {name: value for name, value in given.items() if name not in FIXED}
        for values, varied in combinations(given, "the victim", [n for n, hint in hints.items() if is_list(hint)]):
            source = (("kind", kind), *((n, v) for n, v in values if n != "indices"))
            yield source, tuple(p for p in values if p[0] == "indices"), tuple(p for p in varied if p[0] != "indices")

    def files(self) -> Iterator[tuple[Pairs, Pairs, Pairs]]:
        """(source, each, shown) of every observation."""
        for entry in self.observations:
            if set(entry) != {"file", "secret"}:
                raise BadInput("Each of [[observations]] has a `file` and a `secret`.")
            yield tuple(entry.items()), (), (("observation", entry["file"]),)


def read(path: Path) -> Sweep:
    """The sweep of a file; BadInput for anything that it should not say."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"Cannot read {shortened(str(path))}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # TOML's own errors are values, bad UTF-8 too
        raise BadInput(f"{path} is not TOML ({shortened(str(error))}).") from error
    if unknown := [name for name in said if name not in KNOWN]:
        raise BadInput(
            f"{path} says {shortened(unknown[0])!r}{near(unknown[0], KNOWN)}; a study knows {', '.join(KNOWN)}."
        )
    try:
        return msgspec.convert({"name": path.stem} | said, Sweep)
    except msgspec.ValidationError as error:
        raise BadInput(f"{path} is no study ({shortened(str(error))}).") from error


def combinations(given: Mapping[str, Any], what: str, lists: Sequence[str] = ()) -> Iterator[tuple[Pairs, Pairs]]:
    """(all, those that vary) for every combination of values. lists: names whose value is itself a list."""
    choices: dict[str, list[Any]] = {}
    for name, value in given.items():
        vary = isinstance(value, list) and (name not in lists or (bool(value) and isinstance(value[0], list)))
        choices[name] = [frozen(one) for one in (value if vary else [value])]
        if not choices[name]:
            raise BadInput(f"There is no value of {name} of {what}.")
    varied = [name for name, values in choices.items() if len(values) > 1]
    for values in itertools.product(*choices.values()):
        pairs = tuple(zip(choices, values, strict=True))
        yield pairs, tuple(pair for pair in pairs if pair[0] in varied)


def frozen(value: Any) -> Any:
    """A list as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def is_list(hint: Any) -> bool:
    """Whether a setting of that type takes several values at once."""
    return any("tuple" in str(kind) for kind in (hint, *get_args(hint)))


def settings_of(kind: str) -> Any:
    """The class of a victim's settings."""
    module, _, name = VICTIMS[kind][0].partition(":")
    return getattr(import_module(module), name)


def check(settings: Sequence[Setting], metrics: Sequence[str]) -> None:
    """BadInput for the first setting that cannot be run, before anything is."""
    if len(settings) > MOST:
        raise BadInput(f"A study has at most {MOST:,} cells a seed: split this one.")
    known = {metric.name for scoring in SCORING.values() for metric in scoring.metrics} | set(MADE)
    if unknown := [name for name in metrics if name not in known]:
        raise BadInput(
            f"Unknown metric {shortened(unknown[0])!r}{near(unknown[0], known)} ({', '.join(sorted(known))})."
        )
    attacks: dict[Any, Any] = {}
    read = cache(load_observation)  # by many settings each
    for setting in settings:
        key = setting.attack, setting.parameters
        if key not in attacks:
            attacks[key] = built({setting.attack: dict(setting.parameters)})[setting.attack]
        if reason := unreadable(attacks[key], setting, read):
            raise BadInput(f"No cell has run: {setting.attack} cannot run here. {reason}")


def unreadable(attack: Any, setting: Setting, read: Callable[[Path], Observation[Any]]) -> str:
    """Why the attack does not read what this setting observes, as a sentence; nothing where it does."""
    source = dict(setting.source)
    if "file" in source:
        return refusal(attack, read(Path(source["file"])))
    played, kind = victim(setting), RELEASES[source["kind"]]
    folder = folder_of(played.model) if hasattr(played, "model") else None
    has = (LanguageArchitecture if folder is not None and is_language_model(folder) else Architecture).modality
    if attack.modality != has:
        return f"It recovers {attack.modality}, and the victim has {has}."
    return "" if issubclass(kind, attack.sees) else f"It does not read what a victim of kind {kind.name} releases."


def depends(setting: Setting) -> tuple[Any, ...]:
    """The attack, the victim, and the files and folders that are named."""
    source = dict(setting.source)
    named = (Path(value) for value in source.values() if isinstance(value, str))
    classes = (ATTACKS[setting.attack], *((settings_of(source["kind"]),) if "kind" in source else ()))
    return (*classes, *(path for path in named if path.exists()))


def victim(setting: Setting) -> Any:
    """The settings of `gradleak capture`, checked; BadInput for what they cannot be."""
    values = dict((*setting.source, *setting.each))
    kind = values.pop("kind")
    try:
        return msgspec.convert(values, settings_of(kind), dec_hook=lambda kind, value: kind(value))
    except (msgspec.ValidationError, TypeError) as error:
        raise BadInput(f"A victim of kind {kind} cannot be so ({shortened(str(error))}).") from error


MADE = ("recovered", "identified", "lead", "residual")


@dataclass(frozen=True)
class Audited:
    """A cell of a sweep: play the victim, attack what it shares, score as an audit does.

    The control of somebody else's observation is attacked once for all cells that run side by side.
    """

    metrics: tuple[str, ...]

    def one(self, setting: Setting, bench: Bench) -> Result:
        """One setting by itself."""
        [result] = self([setting], bench)
        return result

    def __call__(self, settings: Sequence[Setting], bench: Bench) -> Iterator[Result]:
        """Settings of one attack and one kind of victim, side by side where the attack can."""
        pairs = [observed(setting, bench.seed) for setting in settings]
        first, secret = pairs[0]
        scoring, where = SCORING[first.model.architecture.modality], torch.device(bench.device)
        data = dict(settings[0].source).get("data", bench.data)
        public = scoring.public(data, "train", first.model)
        decoys, _ = scoring.split(public)
        [attack] = built({settings[0].attack: dict(settings[0].parameters)}).values()
        ready = prepared(attack, first, lambda: scoring.wider(public, first.model, secret.inputs), bench.seed)
        other = others(first, scoring, public, len(secret), bench.seed)
        everything = [observation.to(where) for observation, _ in (*pairs, (other, secret))]
        found = attacked(ready, everything, bench)
        for (observation, secret), reconstruction in zip(pairs, found[:-1], strict=True):
            row = new_result(settings[0].attack, {}, {}) | evidence(reconstruction, 0.0)
            score(row, observation, scoring, reconstruction, found[-1].value, secret, public, decoys)
            yield Result(facts=spent(observation), samples=self.samples(row))

    def samples(self, row: AuditRow) -> list[Row]:
        """One row per private sample: the scores, the blind controls', and what an audit makes of them."""
        columns: dict[str, Sequence[Any]] = dict(row["scores"])
        for name, scores in row["controls"].items():
            columns |= {f"{name}_{metric}": values for metric, values in scores.items()}
        ranks = columns.pop("identification_rank", None)
        columns |= {"lead": row["leads"], "recovered": row["recovered"]}
        columns |= {} if ranks is None else {"identified": [rank == 1 for rank in ranks]}
        columns["residual"] = [row["residual"]] * len(row["leads"])
        chosen = {n: c for n, c in columns.items() if not self.metrics or any(n.endswith(m) for m in self.metrics)}
        return [dict(zip(chosen, values, strict=True)) for values in zip(*chosen.values(), strict=True)]


def attacked(attack: Any, observations: Sequence[Observation[Any]], bench: Bench) -> list[Reconstruction]:
    """Every observation's reconstruction: side by side where the attack can, as many at a time as a processor's cache holds."""
    generator = torch.Generator().manual_seed(bench.seed)
    if not hasattr(attack, "many") or any(d.reads for o in observations for d in o.defenses or ()):
        return [attack(o, generator=generator.manual_seed(bench.seed), on_step=bench.on_step) for o in observations]
    size = sum(tensor.nbytes for tensor in observations[0].released.values())
    parts = math.ceil(len(observations) * size / CACHE)
    each = math.ceil(len(observations) / min(max(parts, 1), len(observations)))
    found = []
    for first in range(0, len(observations), each):
        found += attack.many(observations[first : first + each], generator=generator, on_step=bench.on_step)
    return found


def observed(setting: Setting, seed: int) -> tuple[Observation[Any], Secret]:
    """What a setting's victim shares, and keeps; or what files hold."""
    source = dict(setting.source)
    if "file" in source:
        return load_observation(Path(source["file"])), load_secret(Path(source["secret"]))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        observation, secret = victim(setting)(Path(folder), seed, lambda name: silent)
    return observation, secret


def tell(table: Table) -> Findings:
    """How many came back, and a bar per row of the first metric."""
    first = table.rows[0]
    shown = list(first)[: list(first).index("samples")]
    metric = list(first)[len(shown) + 1]

    def about(row: Row) -> str:
        return ", ".join(str(row[name]) if name == "attack" else f"{name} {row[name]}" for name in shown)

    parts = [
        f"{about(row)}: "
        + (
            f"{row['recovered']:.0%} of {row['samples']} recovered"
            if "recovered" in row
            else f"{metric} {row[metric]:.4g}"
        )
        for row in table.rows
    ]
    figure, [axes] = panels(width=6, height=1 + 0.3 * len(table.rows))
    bars(axes, table.rows, about, metric)
    axes.set(xlabel=metric)
    return Findings(f"{'; '.join(parts)}.", {"What came back": figure})
