"""What the other commands do: studies, reports, running again, lists. Results go to a folder of their own, the record first."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from gradleak.audit.progress import progress
from gradleak.cli import flags, owner_flags
from gradleak.cli.folders import arguments_of, plain
from gradleak.cli.inputs import check_device, file_hash
from gradleak.cli.seen_flags import PRESENTED
from gradleak.errors import BadInput, near, shortened
from gradleak.report import html, record
from gradleak.report.pdf import printed
from gradleak.report.private import private


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
    written = record.read(args.record)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix.lower() == ".pdf":
        printed(html.render(written), args.out)
    else:
        with private():
            args.out.write_text(html.render(written), encoding="utf-8")
    print(args.out)


def rerun(args: flags.Rerun) -> int:
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
    if unknown := [key for key in values if key not in {field.name for field in fields(kind)} - {*PRESENTED}]:
        raise BadInput(f"{args.record} does not say how it was made: {name} has no argument {shortened(unknown[0])!r}.")
    try:
        parsed: Any = msgspec.convert(values, kind, dec_hook=lambda kind, value: kind(value))
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise BadInput(f"{args.record} does not say how it was made ({shortened(str(error))}).") from error
    return perform(name, parsed, options)


RERUNNABLE: dict[str, type] = {
    "demo": flags.Demo,
    "attack": flags.Attack,
    "audit": flags.Audit,
    "canaries score": owner_flags.ScoreCanaries,
    "extract": owner_flags.Extract,
    "study": flags.Study,
    "reproduce": flags.Study,
}


def new_record(
    name: str, args: flags.Common, options: Mapping[str, Mapping[str, Any]], inputs: Sequence[Path]
) -> record.Record:
    """A record that knows its command, with the value of every argument, and its input files by hash."""
    attacks = plain({attack: dict(values) for attack, values in options.items()})
    files = [*inputs, *(v for o in options.values() for v in o.values() if isinstance(v, Path) and v.is_file())]
    hashes = {str(path): file_hash(path) for path in files if not path.is_dir()}
    command: record.Command = {"name": name, "arguments": arguments_of(args), "attacks": attacks, "inputs": hashes}
    return record.new_record(command, args.seed, [])
