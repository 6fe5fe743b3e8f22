"""For every folder of tests: oracles.py becomes importable (pytest puts the folder of a conftest on the path), and commands are run as their
users run them."""

import math
import os
from collections.abc import Callable

import pytest

from gradleak.cli.app import main  # which imports no torch

# Read when torch is first imported, and inherited by subprocesses. The models here are so small that a second thread
# costs more waiting than it saves, ten times as much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# One that takes pictures of another size than the tests' stops a study of priors.
os.environ.pop("GRADLEAK_DENOISER", None)

Run = Callable[..., str]


@pytest.fixture
def ok(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that must succeed; returns what it printed. Without progress, which comes by the clock, on slow machines only."""
    monkeypatch.setattr("gradleak.audit.progress.EVERY", math.inf)

    def run(*argv: object) -> str:
        code = main([str(part) for part in argv])
        printed = capsys.readouterr()
        assert (code, printed.err) == (0, "")
        return printed.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must end with exit code 2 and one line, which is returned."""

    def run(*argv: object) -> str:
        assert main([str(part) for part in argv]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        return printed.err

    return run
