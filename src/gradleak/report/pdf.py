"""The page on paper: printed to PDF by the Chromium or Chrome of this machine, which fetches nothing and runs no script for it."""

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from gradleak.errors import BadInput
from gradleak.report.private import private

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
QUIET = ("--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--no-pdf-header-footer")
PATIENCE = 120  # seconds


def browser() -> str:
    """The browser's path; BadInput where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise BadInput(
            "No Chromium or Chrome is on the PATH to print a PDF with: open report.html in any browser and print it there."
        )
    return found


def printed(page: str, out: Path) -> None:
    """Print a page of HTML to this file, its owner's alone; BadInput where there is no browser, or none that prints."""
    command = [browser(), *QUIET, *(["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else [])]
    with TemporaryDirectory() as folder, private():
        drawn, made = Path(folder) / "report.html", Path(folder) / "report.pdf"
        drawn.write_text(page, encoding="utf-8")
        command += [f"--user-data-dir={folder}/profile", f"--print-to-pdf={made}", drawn.as_uri()]
        try:
            subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
            shutil.copyfile(made, out)
        except (OSError, subprocess.SubprocessError) as error:
            raise BadInput(
                f"{command[0]} did not print the report: open report.html in any browser and print it there."
            ) from error
