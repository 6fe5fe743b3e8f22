"""A record in its files: record.json, the page drawn from it, the summaries."""

from pathlib import Path

from gradleak.report import html, record, summary
from gradleak.report.private import private
from gradleak.report.redaction import redacted


def finish(written: record.Record, out: Path, redact: bool = False) -> None:
    """record.json, report.html from it, and the summaries, which hold no private data in any case."""
    handed_on = redacted(written)
    told = handed_on if redact else written
    with private():
        record.write(told, out / "record.json")
        (out / "report.html").write_text(html.render(told), encoding="utf-8")
        summary.save(handed_on, out)
