"""A record in its files: record.json, the page drawn from it, the summaries."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradleak.report import html, record, summary
from gradleak.report.redaction import redacted


def finish(written: record.Record, out: Path, redact: bool = False) -> None:
    """record.json, report.html from it, and the summaries, which hold no private data in any case."""
    handed_on = redacted(written)
    told = handed_on if redact else written
    with private():
        record.write(told, out / "record.json")
        (out / "report.html").write_text(html.render(told), encoding="utf-8")
        summary.save(handed_on, out)


@contextmanager
def private() -> Iterator[None]:
    """Files that are made meanwhile are their owner's alone: what was recovered is as private as the data."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
