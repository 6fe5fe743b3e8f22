"""What `canaries make` and `canaries score` do."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gradleak.audit import canaries as audited
from gradleak.audit.one_run import one_run
from gradleak.audit.progress import progress
from gradleak.audit.written import finish
from gradleak.cli import owner_flags
from gradleak.cli.commands import new_record
from gradleak.cli.folders import fresh_folder
from gradleak.cli.inputs import check_device
from gradleak.cli.tables import keep_table
from gradleak.errors import BadInput
from gradleak.formats.canary_folder import About, Coins, read_canaries, read_coins, write_canaries
from gradleak.formats.tuned import Tuned, files_of, read_tuned
from gradleak.modalities.texts import Texts
from gradleak.victims.canaries import Template, flipped, random_pictures, random_texts, template_of

FEWEST = 8
MOST = 1_000_000
MOST_ENUMERATED = 10_000  # fillings of a template, all of which are scored for the exposure


def make(args: owner_flags.MakeCanaries) -> None:
    """Write the folder of canaries, the coins readable by their owner only."""
    out = fresh_folder(args.out)
    if not FEWEST <= args.count <= MOST:
        raise BadInput(f"A bound takes {FEWEST} to {MOST:,} canaries, not {args.count:,}: 1,000 are usual.")
    about, data = About(args.kind), None
    if args.kind == "text":
        if args.png:
            raise BadInput("--png says nothing about texts: leave it out.")
        template = template_of(args.template or "{words:12}", args.data, args.split)
        texts = random_texts(template, args.count, args.seed)
        about = About(args.kind, template.text, template.words)
        data = Texts(tuple(texts), torch.zeros(args.count, dtype=torch.int64), 1, "canaries", "train")
    elif args.template is not None:
        raise BadInput("--template says nothing about pictures: leave it out, or take --kind text.")
    coins = Coins(flipped(args.count), about)
    chosen = data or random_pictures(args.kind, args.data, args.split, args.count, args.seed)
    train, candidates, hidden = write_canaries(chosen, coins, out, png=args.png)
    print(
        f"{train}: {int(coins.included.sum())} canaries to add to what you train on, once each",
        f"{candidates}: all {args.count}",
        f"{hidden}: which are included; keep it from whoever trains",
        f"Now train, and then: gradleak canaries score RELEASE --base BASE --canaries {out} --out ...",
        sep="\n",
    )


def score(args: owner_flags.ScoreCanaries) -> None:
    """Write table.csv, bounds.json, record.json and report.html."""
    check_device(args.device)
    out, coins = fresh_folder(args.out), read_coins(args.canaries)
    tuned = read_tuned(args.release, args.base, task=args.task, factory=args.model)
    if args.score == "loss" and tuned.after is None:
        raise BadInput("What was shared holds no trained model, so that no loss has fallen: take --score alignment.")
    by = args.score or ("alignment" if tuned.after is None else "loss")
    where = torch.device(args.device)
    tuned = replace(tuned, before=tuned.before.to(where), after=None if tuned.after is None else tuned.after.to(where))
    tuned = replace(tuned, towards={name: tensor.to(where) for name, tensor in tuned.towards.items()})
    architecture = tuned.before.architecture
    data = read_canaries(args.canaries, architecture, len(coins.included))
    inputs, labels = architecture.feed(data, seed=args.seed)
    with progress() as start:
        values = audited.scores(tuned, inputs, labels, by, start("canaries")).tolist()
        included = coins.included.tolist()
        bound = one_run(values, included, delta=args.delta, guesses=args.guesses)
        exposed = exposures(tuned, coins.about, data, values, by, args.seed, start("candidates"))
    written = new_record("canaries score", args, {}, [*files_of(args.release, args.base), *files_in(args.canaries)])
    shown = data.texts if isinstance(data, Texts) else [f"label {data.classes[i]}" for i in data.labels.tolist()]
    written["verdict"] = audited.verdict(bound)
    keep_table(audited.table(shown, values, included, bound.guesses, exposed), written, out)
    (out / "bounds.json").write_text(json.dumps({"score": by, **asdict(bound)}, indent=1) + "\n", encoding="utf-8")
    finish(written, out)
    print(written["verdict"]["sentence"], f"See {out / 'report.html'}.", sep="\n")


def exposures(
    tuned: Tuned, about: About, data: Any, values: list[float], by: str, seed: int, on_step: Any
) -> list[float] | None:
    """The exposure of each canary in bits, where all that it could have been can be scored."""
    template = None if about.template is None else Template(about.template, about.words)
    if template is None or template.count > MOST_ENUMERATED:
        return None
    every = tuple(template.filled(number) for number in range(template.count))
    known = replace(data, texts=every, labels=torch.zeros(len(every), dtype=torch.int64))
    inputs, labels = tuned.before.architecture.feed(known, seed=seed)
    everything = audited.scores(tuned, inputs, labels, by, on_step)
    return [audited.exposure(value, everything) for value in values]


def files_in(folder: Path) -> list[Path]:
    """The files of a folder of canaries."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
