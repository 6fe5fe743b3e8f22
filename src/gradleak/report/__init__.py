"""What an attack run leaves behind: a JSON record (`record`) and a page drawn from it (`html`). Imports no torch."""

from gradleak.report.html import render
from gradleak.report.record import SCHEMA, Flag, Record, Result, Revealed, Verdict, new_record, read, write

__all__ = ["SCHEMA", "Flag", "Record", "Result", "Revealed", "Verdict", "new_record", "read", "render", "write"]
