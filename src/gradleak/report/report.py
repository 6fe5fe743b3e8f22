"""An audit in one's hands: look at it, save it, count with it."""

import html as escaping
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from gradleak.errors import BadInput
from gradleak.report import html, record
from gradleak.report.files import finish
from gradleak.report.private import private
from gradleak.report.record import Record, Verdict
from gradleak.report.redaction import redacted
from gradleak.report.scores import samples
from gradleak.report.sheet import save_sheet


class Report:
    """The record of an audit, and what can be done with it. In a notebook it shows its page, on a terminal its table.

    record  all of it, as plain data (`gradleak.Record`)
    found   {attack: Reconstruction} of the attacks that ran; empty where the report was read from a file
    """

    def __init__(self, record: Record, found: Mapping[str, Any] | None = None) -> None:
        self.record, self.found = record, dict(found or {})

    @classmethod
    def read(cls, path: str | Path) -> "Report":
        """The report of record.json, or of the folder that holds it. Raises BadInput for what is no record."""
        place = Path(path)
        return cls(record.read(place / "record.json" if place.is_dir() else place))

    @property
    def verdict(self) -> Verdict:
        """Level and sentence."""
        return self.record["verdict"]

    def redacted(self) -> "Report":
        """The same with hashes in place of private data."""
        return Report(redacted(self.record))

    def show(self) -> None:
        """Print the table of the attacks and the verdict; in a notebook, the page."""
        from rich.console import Console

        if (console := Console()).is_jupyter:
            from IPython.display import display

            display(self)  # type: ignore[no-untyped-call]
        else:
            console.print(self)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame, a row for each attack and private sample (`samples.csv`). Raises BadInput without pandas."""
        try:
            pandas: Any = import_module("pandas")
        except ImportError as error:
            raise BadInput("to_dataframe needs pandas: install it (pip install pandas).") from error
        return pandas.DataFrame(samples(self.record))

    def save_html(self, path: str | Path) -> Path:
        """Write the page, readable by its owner only; returns where it is."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with private():
            place.write_text(html.render(self.record), encoding="utf-8")
        return place

    def save(self, folder: str | Path) -> Path:
        """Write what `gradleak audit` writes: record.json, report.html, summaries, pictures.png; returns the folder."""
        place = Path(folder)
        finish(self.record, place, self.record.get("redacted", False))
        if not self.record.get("redacted", False):
            with private():
                save_sheet(self.record, place / "pictures.png")
        return place

    def __rich__(self) -> Any:
        from gradleak.report.terminal import Shown

        return Shown(self.record)

    def __repr__(self) -> str:
        from gradleak.report.terminal import text

        return text(self.record)

    def _repr_html_(self) -> str:
        page = escaping.escape(html.render(self.record), quote=True)
        return f'<iframe srcdoc="{page}" title="gradleak report" style="width: 100%; height: 40em; border: 1px solid"></iframe>'
