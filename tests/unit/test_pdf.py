"""The report as a PDF: printed where there is a browser, one sentence where there is none."""

import re
import shutil
import stat
from pathlib import Path

import pytest

from gradleak.errors import BadInput
from gradleak.report import pdf


def test_without_a_browser_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="No Chromium or Chrome is on the PATH to print a PDF with: open"):
        pdf.printed("<p>So.</p>", tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir())


def test_a_browser_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chromium").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "chromium").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(BadInput, match="did not print the report"):
        pdf.printed("<p>So.</p>", tmp_path / "report.pdf")
    assert not (tmp_path / "report.pdf").exists()


@pytest.mark.skipif(not any(map(shutil.which, pdf.BROWSERS)), reason="no chromium or google-chrome on the PATH")
def test_a_page_is_printed_for_its_owner_alone(tmp_path: Path) -> None:
    pdf.printed("<title>So</title><p>So.</p>", tmp_path / "report.pdf")
    made = tmp_path / "report.pdf"
    assert made.read_bytes().startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", made.read_bytes())) == 1
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
