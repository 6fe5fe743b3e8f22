"""What each command does. Results go to a folder of their own, the record first, everything else from it."""

import inspect
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from gradleak.attacks import ATTACKS
from gradleak.attacks.attack import refusal
from gradleak.attacks.parameters import built
from gradleak.attacks.search.start import Given
from gradleak.attacks.seed import with_start_recovered
from gradleak.audit.loop import Audited
from gradleak.audit.loop import audit as run_audit
from gradleak.audit.plan import plan_of
from gradleak.audit.scoring import SCORING
from gradleak.audit.verdict import judged
from gradleak.audit.written import describe, finish, keep_shown, untried, written_audit
from gradleak.cli import flags
from gradleak.cli.informed import informed
from gradleak.cli.inputs import check_device, file_hash, fresh_folder, observed_files
from gradleak.cli.progress import progress
from gradleak.errors import BadInput, near, shortened
from gradleak.formats.observation_file import load_observation, usable_labels
from gradleak.formats.reconstruction_file import load_reconstruction, save_reconstruction
from gradleak.formats.secret_file import Secret, load_secret
from gradleak.modalities.networks import MODELS
from gradleak.observations.observation import Observation
from gradleak.report import html, record
from gradleak.victims.demo import DEMO


def attack(args: flags.Attack, options: dict[str, dict[str, Any]]) -> None:
    """Write reconstruction.safetensors, what it shows, and record.json, from the observation alone."""
    check_device(args.device)
    check_named([args.attack], options)
    out, observation = fresh_folder(args.out), informed(args)
    [(name, chosen)] = built(options).items()
    if reason := refusal(chosen, observation):
        raise BadInput(f"{name} cannot run here. {reason} {reading(observation)}")
    public = public_data(args, observation)
    inputs = observed_files(args)
    if args.start is not None:
        chosen, inputs = started(name, chosen, args.start, observation), [*inputs, args.start]
    written = new_record("attack", args, options, inputs)
    describe(written, observation, "")
    with progress() as start:
        for done in run_audit(observation, {name: chosen}, public, seed=args.seed, device=args.device, on_step=start):
            if done.reconstruction is None:
                raise BadInput(done.result["status"].removeprefix("Not run: "))
            written["results"].append(done.result)
            save_reconstruction(done.reconstruction, out / "reconstruction.safetensors")
            keep_shown(done, out)
            judged(written, {})
            finish(written, out)
            print(said(done), f"See {out / 'report.html'}.", sep="\n")


def audit(args: flags.Audit, options: dict[str, dict[str, Any]]) -> None:
    """Write record.json, report.html and what was recovered; after each attack, so that an interrupt loses one at most."""
    check_device(args.device)
    if args.attacks is not None:
        check_named(args.attacks, options)
    out, observation = fresh_folder(args.out), informed(args)
    attacks = built(options)
    if args.attacks is None:
        modality = observation.model.architecture.modality
        attacks = {n: a for n, a in attacks.items() if a.modality == modality and not getattr(a, "by_name_only", False)}
    secret = load_secret(args.secret) if args.secret else None
    if secret is not None and args.secret is not None:
        SCORING[observation.model.architecture.modality].check(secret.inputs, observation.model)
        usable_labels(secret.labels, observation.model, len(secret), args.secret)
    inputs = [*observed_files(args), *([args.secret] if args.secret else [])]
    written = new_record("audit", args, {name: options[name] for name in attacks}, inputs)
    public, named = public_data(args, observation), args.attacks is not None
    plan = plan_of(observation, attacks, public, named=named, scored=secret is not None, device=args.device)
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is told by itself
    print(plan.sentence(), flush=True)
    skipped, device = plan.skipped, args.device
    audit_one(observation, attacks, public, secret, written, {}, out, args.seed, device, skipped=skipped)
    print(written["verdict"]["sentence"], f"See {out / 'report.html'}.", sep="\n")


def demo(args: flags.Demo) -> None:
    """One embedded photograph, a LoRA adapter and a gradient made of it, an adapter of eight, attacks on all, one report."""
    from gradleak.cli.capture import kept

    check_device(args.device)
    out = fresh_folder(args.out)
    written = new_record("demo", args, {}, [])
    left: dict[str, list[str]] = {}
    for name, (victim, names) in DEMO.items():
        with progress() as start:
            kept(*victim(out / name, args.seed, start), out / name)
        observation = with_start_recovered(load_observation(out / name / "observation.safetensors"))
        secret = load_secret(out / name / "secret.safetensors")
        public = SCORING[observation.model.architecture.modality].public("embedded", "train", observation.model)
        attacks = {attack: ATTACKS[attack]() for attack in names}
        audit_one(observation, attacks, public, secret, written, left, out, args.seed, args.device, name)
    print(written["verdict"]["sentence"], f"Open {out / 'report.html'} in a browser.", sep="\n")


def audit_one(
    observation: Observation[Any],
    attacks: dict[str, Any],
    public: Any,
    secret: Secret | None,
    written: record.Record,
    left: dict[str, list[str]],
    out: Path,
    seed: int,
    device: str,
    name: str = "",
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Audit one observation into a record that may hold others, with progress, and say what each attack found."""
    about: Any = {"secret": secret, "left": left, "seed": seed, "device": device, "name": name, "skipped": skipped}
    with progress() as start:
        for done in written_audit(observation, attacks, public, written, out, **about, on_step=start):
            if done.reconstruction is not None:
                print(said(done))


def check_named(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """BadInput where the parameters are not those of the attacks that were asked for."""
    if set(names) != set(options):
        given = ", ".join(map(shortened, options)) or "none"
        raise BadInput(f"Parameters are given of {given}, and what is to run is {', '.join(map(shortened, names))}.")


def reading(observation: Observation[Any]) -> str:
    """Which attacks read such an observation, as a sentence."""
    return f"Attacks that do: {', '.join(untried(observation, {}))}."


def started(name: str, attack: Any, path: Path, observation: Observation[Any]) -> Any:
    """The attack on this observation, beginning at the reconstruction in this file."""
    if "start" not in {field.name for field in fields(attack)}:
        able = [other for other, kind in ATTACKS.items() if "start" in {field.name for field in fields(kind)}]
        raise BadInput(f"{name} is no search and has no start: --start goes with {', '.join(able)}.")
    reconstruction = load_reconstruction(path)
    usable_labels(reconstruction.labels, observation.model, len(reconstruction.value), path)
    return replace(attack, start=Given(reconstruction))


def public_data(args: flags.Observed, observation: Observation[Any]) -> Any:
    """What everybody may know, as the model takes it."""
    model = observation.model
    return SCORING[model.architecture.modality].public(args.data, args.public_split, model)


def study(args: flags.Study) -> None:
    """Run the cells that are missing; tables, plots, record.json and report.html are written again and again as they finish."""
    from gradleak.studies.run import estimate, run

    check_device(args.device)
    chosen, inputs = planned(args)
    if args.dry_run:
        cells, seconds = estimate(chosen)
        for row in cells:
            print("  ".join(str(value) for name, value in row.items() if name != "note" and value is not None))
        missing = sum(row["state"] == "missing" for row in cells)
        hours = f"{seconds / 3600:.1f} CPU-hours" if seconds > 3600 else f"{seconds:.0f} CPU-seconds"
        print(f"{len(cells)} cells, {missing} missing: about {hours}, by the mean of those that are finished.")
        return
    command = new_record("study", args, {}, inputs)["command"]
    with progress() as start:
        table = run(chosen, limit=args.limit, retry=args.retry, command=command, start=start)
    if table.failed and not table.rows:
        raise BadInput(f"No cell could be computed: {table.failed[0]['note']}")
    said = record.read(args.out / "record.json")["verdict"]["sentence"]
    print(said, f"See {args.out / 'report.html'}.", sep="\n")


def planned(args: flags.Study) -> tuple[Any, list[Path]]:
    """The plan of a study, by its name, an old name or from a file; and the files that it read."""
    from gradleak.studies.catalogue import ALIASES, STUDIES
    from gradleak.studies.run import Plan

    path, seeds = Path(args.name), None if args.seeds is None else range(args.seed, args.seed + args.seeds)
    where: dict[str, Any] = {"where": args.where, "workers": args.workers, "threads": args.threads, "gpus": args.gpus}
    plan = partial(Plan, out=args.out, data=args.data, device=args.device, **where)
    if path.suffix == ".toml" or path.is_file():
        from gradleak.studies.sweep import read

        sweep = read(path)
        given = [args.seed + seed for seed in sweep.seeds]
        return plan(study=sweep.study(), size="paper", seeds=seeds or given), [path]
    name = ALIASES.get(args.name, args.name)
    if name not in STUDIES:
        close = near(name, [*STUDIES, *ALIASES])
        raise BadInput(f"Unknown study {shortened(name)!r}{close}. Studies: {', '.join(STUDIES)}.")
    chosen = STUDIES[name]
    usual = range(args.seed, args.seed + chosen.seeds(args.size))
    return plan(study=chosen, size=args.size, seeds=seeds or usual), []


def report(args: flags.Report) -> None:
    """Render record.json again."""
    page = html.render(record.read(args.record))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(args.out)


def rerun(args: flags.Rerun) -> None:
    """The command of a record, again: same input files (by hash), seed and parameters, results to another folder.

    It is rebuilt from the record's fields, each checked against the type that the command has for it. Nothing that a record says
    is parsed as a command line, and it can neither name code to import nor a place to write to.
    """
    from gradleak.cli.app import perform

    stored = record.read(args.record)["command"]
    name, values = stored["name"], dict(stored["arguments"])
    if name not in RERUNNABLE:
        kinds = ", ".join(RERUNNABLE)
        raise BadInput(f"{args.record} was made by {shortened(name)!r}, not by one of {kinds}: it cannot be run again.")
    if "argv" in values:
        raise BadInput(
            f"{args.record} was written by an older gradleak, which kept a command line only: run it by hand."
        )
    for path, digest in stored.get("inputs", {}).items():
        if file_hash(Path(path)) != digest:
            raise BadInput(f"{shortened(path)} is no longer the file that the record was made from.")
    code = values.get("model")
    if isinstance(code, str) and ":" in code and code != args.model:
        raise BadInput(f"The record would import the code {shortened(code)!r}: if you trust it, allow it with --model.")
    options = {attack: dict(given) for attack, given in stored.get("attacks", {}).items()}
    for attack, given in options.items():
        if given.get("folder") is not None:
            raise BadInput(f"The record would let {shortened(attack)} write to a folder: run it by hand.")
    values = {key: value for key, value in values.items() if value is not None} | {"out": str(args.out)}
    kind = RERUNNABLE[name]
    if unknown := [key for key in values if key not in {field.name for field in fields(kind)}]:
        raise BadInput(f"{args.record} does not say how it was made: {name} has no argument {shortened(unknown[0])!r}.")
    try:
        parsed: Any = msgspec.convert(values, kind, dec_hook=lambda kind, value: kind(value))
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise BadInput(f"{args.record} does not say how it was made ({shortened(str(error))}).") from error
    perform(name, parsed, options)


RERUNNABLE: dict[str, type] = {
    "demo": flags.Demo,
    "attack": flags.Attack,
    "audit": flags.Audit,
    "study": flags.Study,
    "reproduce": flags.Study,
}


def list_all(args: flags.List) -> None:
    """Attacks with what their files say they see and recover; studies; models."""
    from gradleak.studies.catalogue import STUDIES

    print("Attacks")
    for name, kind in ATTACKS.items():
        print(f"  {name}")
        header = inspect.getdoc(sys.modules[kind.__module__]) or ""
        for section in re.findall(r"^(?:Sees|Recovers) .*(?:\n +.*)*", header, re.MULTILINE):
            print(textwrap.indent(section, "      "))
    print("Studies", *(f"  {name:32} {study.question}" for name, study in STUDIES.items()), sep="\n")
    print(f"Models\n  {', '.join(MODELS)}, or package.module:factory of your own")


def new_record(
    name: str, args: flags.Common, options: Mapping[str, Mapping[str, Any]], inputs: Sequence[Path]
) -> record.Record:
    """A record that knows its command, with the value of every argument, and its input files by hash."""
    given = {field.name: getattr(args, field.name) for field in fields(RERUNNABLE[name])}
    attacks = plain({attack: dict(values) for attack, values in options.items()})
    files = [*inputs, *(v for o in options.values() for v in o.values() if isinstance(v, Path) and v.is_file())]
    hashes = {str(path): file_hash(path) for path in files if not path.is_dir()}
    command: record.Command = {"name": name, "arguments": plain(given), "attacks": attacks, "inputs": hashes}
    return record.new_record(command, args.seed, [])


def plain(value: Any) -> Any:
    """Arguments as JSON has them: paths are text."""
    return msgspec.to_builtins(value, enc_hook=str)


def said(done: Audited) -> str:
    """An attack's status for the terminal, and the texts that came out."""
    row = done.result
    texts = row["shown"]["reconstruction"] if row.get("media") == "text/plain" and "shown" in row else []
    lines = [f"{row['attack']}: {row['status']}", *(f"  {shortened(text)}" for text in texts)]
    return "\n".join(lines)
