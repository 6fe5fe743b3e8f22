"""A study whose cells cost nothing, and that leaves a mark for each time one is computed."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradleak.studies.findings import Findings
from gradleak.studies.study import Bench, Result, Study
from gradleak.studies.table import Table


@dataclass(frozen=True)
class Setting:
    """What the cell does: nothing, "fail", "die once" or "die". marks: a folder."""

    number: int
    marks: str = ""
    does: str = ""
    seconds: float = 0.0


def cell(setting: Setting, bench: Bench) -> Result:
    time.sleep(setting.seconds)
    marks = Path(setting.marks)
    seen = 0
    if setting.marks:
        seen = len(list(marks.glob(f"{setting.number}-{bench.seed}-*")))
        (marks / f"{setting.number}-{bench.seed}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if setting.does == "fail" and not (marks / "mended").exists():
        raise ValueError(f"{setting.number} is  no\ngood")
    if setting.does == "die" or (setting.does == "die once" and not seen):
        os.kill(os.getpid(), signal.SIGKILL)
    facts = {"square": setting.number**2, "seed_is": bench.seed}
    samples = [{"value": float(setting.number + i), "hit": i < 2} for i in range(4)]
    return Result(facts, samples, {"dot": b"PNG"}, ("a note",), {"half": 0.5})


def many(settings: Sequence[Setting], bench: Bench) -> Iterator[Result]:
    """Like real numbers computed side by side, each depends on what is beside it."""
    beside = " ".join(str(setting.number) for setting in settings)
    for setting in settings:
        yield Result({**cell(setting, bench).facts, "beside": beside})


def tell(table: Table) -> Findings:
    return Findings(f"{len(table.rows)} rows.")


def toy(settings: Sequence[Setting], **more: object) -> Study[Setting]:
    return Study(
        name="toy",
        question="Does the engine work?",
        settings=lambda data, size: settings,
        cell=cell,
        tell=tell,
        **more,  # type: ignore[arg-type]
    )


if __name__ == "__main__":  # what the tests kill: two hundred cells, here or in two processes
    import sys

    from gradleak.studies.run import Plan, run

    settings = [Setting(n, sys.argv[2], seconds=0.005) for n in range(200)]
    run(Plan(study=toy(settings), out=Path(sys.argv[1]), workers=int(sys.argv[3])))
