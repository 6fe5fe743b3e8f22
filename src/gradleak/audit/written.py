"""An audit written down while it runs: the record and the report, after each attack, so that an interrupt loses one at most."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradleak.attacks import ATTACKS
from gradleak.attacks.attack import refusal
from gradleak.attacks.search.descend import OnStep
from gradleak.audit.loop import Audited, audit
from gradleak.audit.scoring import SCORING
from gradleak.audit.scoring.scoring import legend
from gradleak.audit.verdict import judged
from gradleak.formats.secret_file import Secret
from gradleak.formats.shown_files import save_shown
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.observation import Observation
from gradleak.observations.remedies import remedies
from gradleak.report import record
from gradleak.report.files import finish as finish
from gradleak.report.private import private as private
from gradleak.report.sheet import save_sheet


def written_audit(
    observation: Observation[Any],
    attacks: Mapping[str, Any],
    public: Any | None,
    written: record.Record,
    out: Path,
    *,
    secret: Secret | None = None,
    left: dict[str, list[str]] | None = None,
    seed: int = 0,
    repeats: int = 1,
    device: str = "cpu",
    name: str = "",
    on_step: Callable[[str], OnStep] | None = None,
    bound: bool = True,
    redact: bool = False,
    told: Mechanism | None = None,
    skipped: Mapping[str, str] | None = None,
) -> Iterator[Audited]:
    """`audit`, with record.json, report.html and what was recovered written to `out` after each attack.

    written: the record, which may hold other observations, and rows of this one, whose attacks are not run again. left: {observation: attacks that were not asked for} of those before it,
    which are judged again with it. redact: hashes stand in the files in place of private data, and nothing that was recovered is kept.
    skipped: attacks that are not tried, and why; verdicts name them.
    """
    left = {} if left is None else left
    describe(written, observation, name)
    left[name or observation.name] = untried(observation, set(attacks) - set(skipped or {}))
    about: Any = {
        "secret": secret,
        "seed": seed,
        "repeats": repeats,
        "device": device,
        "name": name,
        "on_step": on_step,
        "bound": bound,
    }
    finished = finished_in(written, name or observation.name)
    missing = {title: attack for title, attack in attacks.items() if title not in finished}
    if finished:
        judged(written, left)
        finish(written, out, redact)
    for done in audit(observation, missing, public, **about, told=told, skipped=skipped) if missing else ():
        written["results"].append(done.result)
        judged(written, left)
        finish(written, out, redact)
        if not redact:
            with private():
                keep_shown(done, out)
                save_sheet(written, out / "pictures.png")
        yield done


def finished_in(written: record.Record, name: str) -> set[str]:
    """The attacks on an observation that a record has rows of."""
    return {row["attack"] for row in written["results"] if row["observation"]["name"] == name}


def untried(observation: Observation[Any], attacks: Collection[str]) -> list[str]:
    """The attacks that read such an observation and were not asked for."""
    return [name for name, kind in ATTACKS.items() if name not in attacks and not refusal(kind, observation)]


def describe(written: record.Record, observation: Observation[Any], name: str) -> None:
    """Put an observation's threat model into the record, which changes would help, and how its metrics and controls are called."""
    title = name or observation.name
    rows = [{"observation": title, **row} for row in observation.threat_model()]
    modality = observation.model.architecture.modality
    metrics, controls = legend(SCORING[modality])
    changes: Any = [asdict(remedy) for remedy in remedies(observation.release.name, modality)]
    written["remedies"] = {**written.get("remedies", {}), title: changes}
    others = [row for row in written["threat_model"] if row.get("observation") != title]
    written["threat_model"] = [*others, *rows]  # type: ignore[list-item]
    written["metrics"] = {**written.get("metrics", {}), **metrics}
    written["controls"] = {**written.get("controls", {}), **controls}


def keep_shown(done: Audited, out: Path) -> None:
    """What an attack returned, in files to look at."""
    row, found = done.result, done.reconstruction
    if found is not None and "shown" in row:
        save_shown(row["attack"], row["shown"]["reconstruction"], row["media"], found, out)
