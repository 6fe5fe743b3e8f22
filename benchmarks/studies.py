"""What the engine of studies costs, and what it survives.

python benchmarks/studies.py overhead     # seconds per cell of nothing: here, in two processes, through a local Ray
python benchmarks/studies.py listing      # seconds to read ten thousand finished cells
python benchmarks/studies.py sweep        # 120 cells of a sweep over digits: one worker against two
python benchmarks/studies.py kills        # thirty kills -9 of a study of two hundred cells
python benchmarks/studies.py scale        # a simulation of up to a thousand nodes, with the costs that `overhead` measured
"""

import heapq
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gradleak.studies.results import SCHEMA, Owner, Results
from gradleak.studies.run import Plan, run
from gradleak.studies.study import Bench, Done, Result, Study
from gradleak.studies.sweep import Sweep

CELLS, LISTED, KILLS = 1_000, 10_000, 30


@dataclass(frozen=True)
class Setting:
    """A cell of nothing, or of so many seconds of sleep."""

    number: int
    seconds: float = 0.0


def cell(setting: Setting, bench: Bench) -> Result:
    """Eight numbers, as a picture's scores."""
    time.sleep(setting.seconds)
    return Result(samples=[{f"score_{i}": float(setting.number * i) for i in range(8)}])


def study(count: int, seconds: float = 0.0) -> Study[Setting]:
    """So many cells."""
    settings = [Setting(number, seconds) for number in range(count)]
    return Study(name="nothing", question="", settings=lambda data, size: settings, cell=cell)


def overhead() -> None:
    """Wall seconds per cell, beyond those of a study of one cell (starting processes, writing tables)."""
    torch.set_num_threads(1)
    for where, options in (("here", {}), ("two processes", {"workers": 2}), ("local Ray", {"where": "ray"})):
        seconds = []
        for count in (2, 2, CELLS):  # the first starts Ray
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                run(Plan(study=study(count), out=Path(folder) / "out", **options))
                seconds.append(time.perf_counter() - began)
        each = 1e3 * (seconds[2] - seconds[1]) / (CELLS - 2)
        print(f"{where:14} start {seconds[1]:6.2f} s   each cell {each:6.2f} ms", flush=True)


def listing() -> None:
    """Wall seconds, with the files in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder) / "out", Owner(schema=SCHEMA, study="nothing", data="", size=""))
        for number in range(LISTED):
            sample = {f"score_{i}": float(number * i) for i in range(8)}
            results.keep(Done(id=f"{number:024x}", setting={"number": number}, samples=[sample]))
        size = sum(file.stat().st_size for file in results.cells.iterdir()) / LISTED
        began = time.perf_counter()
        found = results.finished()
        print(f"{len(found):,} cells of {size:.0f} bytes read in {time.perf_counter() - began:.2f} s")


def sweep() -> None:
    """CPU and wall seconds of twenty digits x three noise levels x two models, as a fresh process runs them."""
    noise = Sweep(
        victim={"data": "digits", "model": ["lenet", "mlp"], "pictures": 20, "noise": [0.0, 1e-4, 1e-3]},
        attacks={"inverting-gradients": {"steps": 1000}},
    )
    torch.set_num_threads(1)
    walls = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            before, began = cpu_seconds(), time.perf_counter()
            table = run(Plan(study=noise.study(), out=Path(folder) / "out", workers=workers))
            walls.append(time.perf_counter() - began)
            print(
                f"{workers} workers: {walls[-1]:.1f} s, {cpu_seconds() - before:.1f} CPU-s, {len(table.samples)} cells"
            )
    print(f"two workers are {walls[0] / walls[1]:.2f} times as fast")


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def kills() -> None:
    """Kill the study at random moments until it has been killed thirty times; then let it end, and compare."""
    moments, tables, lost = random.Random(0), list[bytes](), 0
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("killed", KILLS), ("calm", 0)):
            finished = set[str]()
            for _ in range(count):
                process = subprocess.Popen([sys.executable, __file__, "victim", f"{folder}/{name}"])
                while len(there := cells(f"{folder}/{name}")) <= len(finished) and process.poll() is None:
                    time.sleep(0.05)
                time.sleep(moments.random())
                process.send_signal(signal.SIGKILL)
                process.wait()
                there = cells(f"{folder}/{name}")
                lost += len(finished - there)
                finished = there
                print(f"{len(finished)} finished", flush=True)
            subprocess.run([sys.executable, __file__, "victim", f"{folder}/{name}"], check=True)
            tables.append(Path(folder, name, "table.csv").read_bytes() + Path(folder, name, "samples.csv").read_bytes())
    print(f"{KILLS} kills: {lost} finished cells lost; tables {'identical' if tables[0] == tables[1] else 'DIFFER'}")


def cells(folder: str) -> set[str]:
    """The finished ones on disk."""
    return {file.name for file in Path(folder, "cells").glob("*.json")}


def victim() -> None:
    """What is killed."""
    run(Plan(study=study(200, 0.1), out=Path(sys.argv[2])))


def scale(
    cells: int = 1_000_000, spread: float = 0.5, driver: float = 4e-3, dispatch: float = 1.5e-3, size: int = 2_000
) -> None:
    """A simulation: one driver, which takes `driver` seconds to receive and write a cell and `dispatch` to send one out; nodes of 16
    CPUs. Cells take lognormal times. Printed: how busy the nodes are, by their number and the mean time of a cell."""
    print("nodes   seconds per cell   cells per second   nodes busy   driver busy   results")
    for seconds in (1.0, 10.0, 100.0):
        for nodes in (1, 10, 100, 1_000):
            count, workers = min(cells, 40 * 16 * nodes), 16 * nodes
            draws = random.Random(0)
            ends = [0.0] * workers
            heapq.heapify(ends)
            clock = 0.0  # of the driver
            for _ in range(count):
                free = heapq.heappop(ends)
                clock = max(clock, free) + driver + dispatch
                heapq.heappush(ends, clock + seconds * draws.lognormvariate(-(spread**2) / 2, spread))
            wall = max(ends)
            busy, driving = count * seconds / (workers * wall), count * (driver + dispatch) / wall
            rate, total = count / wall, cells * size / 1e9
            print(f"{nodes:5} {seconds:18.0f} {rate:18.1f} {busy:12.0%} {driving:13.0%}   {total:.0f} GB a million")


if __name__ == "__main__":
    {f.__name__: f for f in (overhead, listing, sweep, kills, victim, scale)}[sys.argv[1]]()
