"""A progress bar on whatever takes long; none when the output is no terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

OnStep = Callable[[int, int, float], None]


@contextmanager
def progress() -> Iterator[Callable[[str], OnStep]]:
    """Inside the block, `start("name")` opens a bar and returns its callback (step, steps, objective)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:

        def start(name: str) -> OnStep:
            task = bars.add_task(name, total=None)

            def on_step(step: int, steps: int, value: float) -> None:
                bars.update(task, completed=step, total=steps, description=f"{name} {value:.3g}")

            return on_step

        yield start
