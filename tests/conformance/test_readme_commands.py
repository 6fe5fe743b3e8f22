"""Every command of the README, typed in its order in the root of a clone, without network: each ends with exit code 0."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradleak.cli import app

ROOT = Path(__file__).parents[2]


def statements() -> Iterator[str]:
    """What a reader types, one command after the other; a document that a command reads (<<'END') belongs to it. `make` is left out: it
    sets up the environment in which this runs."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    lines = iter("".join(blocks).replace("\\\n", " ").splitlines())
    for line in lines:
        if line.startswith("make ") or not line.strip():
            continue
        document = [line]
        if "<<'END'" in line:
            while document[-1] != "END":
                document.append(next(lines))
        yield "\n".join(document)


def run(statement: str, patch: pytest.MonkeyPatch) -> int:
    """Those of gradleak here, which spares the import of torch each time; all others as a shell does."""
    words = shlex.split(statement, comments=True) if "\n" not in statement else []
    if "gradleak" not in words:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(["bash", "-c", statement], env={**os.environ, "PATH": path}, check=False).returncode
    settings, argv = words[: words.index("gradleak")], words[words.index("gradleak") + 1 :]
    with patch.context() as here:
        for setting in settings:
            name, value = setting.split("=")
            assert name == "PYTHONPATH"
            here.syspath_prepend(value)
        return app.main(argv)


def test_the_commands_of_the_readme_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GRADLEAK_DATA", raising=False)
    typed = list(statements())
    assert len(typed) > 30  # as many as there are; none is found where the page has another form
    for statement in typed:
        assert run(statement, monkeypatch) == 0, statement
