"""What `extract` does."""

from pathlib import Path
from typing import Any

import torch

from gradleak.audit import extraction
from gradleak.audit.progress import progress
from gradleak.audit.sample_losses import losses
from gradleak.audit.written import finish
from gradleak.cli import owner_flags
from gradleak.cli.commands import new_record
from gradleak.cli.folders import fresh_folder
from gradleak.cli.inputs import check_device
from gradleak.cli.tables import keep_table
from gradleak.errors import BadInput
from gradleak.formats.canary_folder import read_lines
from gradleak.formats.tuned import files_of, read_trained
from gradleak.observations.model import Model
from gradleak.report.record import Verdict


def extract(args: owner_flags.Extract) -> None:
    """Write table.csv, record.json and report.html."""
    check_device(args.device)
    given = check(args)
    out, every = fresh_folder(args.out), read_lines(given)
    texts = every[: args.limit]
    sampling = extraction.Sampling(args.temperature, args.top_k)
    before, after = read_trained(args.release, args.base, task=args.task)
    extraction.check_causal(after)
    where = torch.device(args.device)
    after, before = after.to(where), None if before is None else before.to(where)
    written = new_record("extract", args, {}, [*files_of(args.release, args.base), given])
    if args.records is not None:
        rows, verdict = of_records(args, texts, before, after, sampling)
        if len(texts) < len(every):
            verdict["sentence"] += f" (The first {len(texts)} of {len(every):,} records were asked for.)"
    else:
        rows, verdict = of_candidates(args, texts, before, after)
    written["verdict"] = verdict
    keep_table(rows, written, out)
    finish(written, out)
    print(written["verdict"]["sentence"], f"See {out / 'report.html'}.", sep="\n")


def check(args: owner_flags.Extract) -> Path:
    """The file that is asked about; BadInput for none or two, and for numbers that make no sense."""
    given = args.records or args.candidates
    if given is None or (args.records is not None and args.candidates is not None):
        raise BadInput("Give your texts with --records, or what a secret may be with --candidates.")
    if args.template is not None and (args.candidates is None or args.template.count("{}") != 1):
        raise BadInput("--template goes with --candidates, and has one {} where they stand.")
    if args.limit is not None and (args.candidates is not None or args.limit < 1):
        raise BadInput("--limit goes with --records, and is 1 or more: candidates are ranked among all.")
    if args.tries < 1 or not 0 < args.probability < 1:
        raise BadInput(
            f"A record comes out in 1 try or more with a probability between 0 and 1, not in {args.tries} with {args.probability:g}."
        )
    return given


def of_records(
    args: owner_flags.Extract,
    texts: tuple[str, ...],
    before: Model[Any] | None,
    after: Model[Any],
    sampling: extraction.Sampling,
) -> tuple[list[dict[str, Any]], Verdict]:
    """The table of the records, and its verdict."""
    cuts = extraction.cut(after, texts, args.prefix_tokens, args.suffix_tokens)
    asked = [one for one in cuts if one is not None]
    with progress() as start:
        now = extraction.log_p(after, asked, sampling, start("records")) if asked else []
        then = None if before is None else extraction.log_p(before, asked, sampling, start("base")) if asked else []
    n, p = args.tries, args.probability
    rows = extraction.records_table(texts, cuts, now, then, n, p)
    return rows, extraction.records_verdict(rows, n, p, sampling)


def of_candidates(
    args: owner_flags.Extract, given: tuple[str, ...], before: Model[Any] | None, after: Model[Any]
) -> tuple[list[dict[str, Any]], Verdict]:
    """The table of the candidates, and its verdict."""
    if len(set(given)) != len(given):
        raise BadInput(f"{args.candidates} names a candidate twice: each has one rank.")
    texts = [(args.template or "{}").replace("{}", candidate) for candidate in given]
    tokens = after.architecture.encode(texts)
    with progress() as start:
        now = losses(after, tokens, None, start("candidates"))
        then = None if before is None else losses(before, tokens, None, start("base")).tolist()
    rows = extraction.candidates_table(given, now.tolist(), then)
    return rows, extraction.candidates_verdict(rows, before is not None)
