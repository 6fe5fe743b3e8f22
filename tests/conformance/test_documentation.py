"""The site is built without a warning, and its notebooks run as they stand: each in less than a minute on a machine that does nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def opened(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def executed(path: Path, folder: Path) -> list[dict[str, Any]]:
    """All that its cells put out; an error in a cell is an error here."""
    notebook = opened(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


# What each has to show; the recovered text is the first of the embedded test split.
SAID = {
    "adapter": ("4 of 4", "the number of samples has to be told"),
    "federated_round": ("1 of 1", "mean image"),
    "own_attack": ("early-layers", "dlg"),
    "text": ("a quiet song surprised the whole crowd from start to end",),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_says(path: Path, tmp_path: Path) -> None:
    outputs = executed(path, tmp_path)
    shown = "".join(json.dumps(output.get("data", {}) | {"text": output.get("text", "")}) for output in outputs)
    for words in SAID[path.stem]:
        assert words in shown
    pages = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("<iframe srcdoc=" in page for page in pages)  # the report, as a page


def test_notebooks_are_kept_without_what_they_put_out() -> None:
    for path in NOTEBOOKS:
        cells = [cell for cell in opened(path).cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in cells), path.name


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".cache"))
    for name in ("mkdocs.yml", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of a successor of mkdocs, which is not about these pages
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=quiet, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    start = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert start.count('role="dialog"') == start.count('role="dialog" aria-label="Search"') == 1
    page = (tmp_path / "site/reference/python/index.html").read_text(encoding="utf-8")
    assert "run_audit" in page
    assert "gradleak audit" in (tmp_path / "site/reference/commands/index.html").read_text(encoding="utf-8")
