"""Progress on whatever takes long: a bar where somebody looks at a terminal or a notebook, else a line a minute on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

OnStep = Callable[[int, int, float], None]
EVERY = 60.0  # seconds between two lines


@contextmanager
def progress() -> Iterator[Callable[[str], OnStep]]:
    """Inside the block, `start("name")` begins something and returns its callback (step, steps, objective)."""
    console = Console(stderr=True)
    if not (console.is_jupyter or sys.stderr.isatty()):
        yield lines(time.monotonic)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:

        def start(name: str) -> OnStep:
            task = bars.add_task(name, total=None)

            def on_step(step: int, steps: int, value: float) -> None:
                bars.update(task, completed=step, total=steps, description=f"{name} {value:.3g}")

            return on_step

        yield start


def lines(now: Callable[[], float]) -> Callable[[str], OnStep]:
    """`start` of `progress`, in lines, `EVERY` seconds one: "dlg: step 120 of 1,350, 0.0123, 3 min left". now: a clock, in seconds."""
    last = now()

    def start(name: str) -> OnStep:
        begun = now()

        def on_step(step: int, steps: int, value: float) -> None:
            nonlocal last
            if (moment := now()) - last < EVERY:
                return
            last = moment
            left = (moment - begun) / step * (steps - step) if step else None
            told = "" if left is None else f", {left / 60:.0f} min left" if left >= 60 else f", {left:.0f} s left"
            print(f"{name}: step {step:,} of {steps:,}, {value:.3g}{told}", file=sys.stderr, flush=True)

        return on_step

    return start
