"""gradleak and breaching 0.1.2 (PyPI) in one run: same weights, same CIFAR-10 pictures, one thread each, in turns.

Every measurement is a process of its own (sides.py). Rates are per CPU second, children included: a shared machine
slows the clock on the wall more than these. Nothing but the tables and --json is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

Run = dict[str, Any]
Worker = Callable[..., Run]
Section = Callable[[argparse.Namespace, dict[str, Worker], Worker], Run]

RATE_STEPS = {"lenet": 2000, "convnet64": 40, "resnet20": 300, "resnet20-4": 20}  # about ten CPU seconds of the peer
VARIANTS: dict[str, tuple[int, Run]] = {  # name: (pictures side by side, options of InvertingGradients)
    "gradleak": (1, {}),
    "gradleak, objective as the peer (centre=False)": (1, {"centre": False}),
    "gradleak, compiled": (1, {"compiled": True}),
    "gradleak, 16 side by side": (16, {}),
    "gradleak, 16 side by side, compiled": (16, {"compiled": True}),
}
SECTIONS = ("rates", "psnr", "dlg", "labels", "import")


def process(python: str, side: str, **job: Any) -> Run:
    """The result of one job in a fresh interpreter; compiled code is not kept from one run to the next."""
    with tempfile.TemporaryDirectory() as cache:
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        inductor = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment = os.environ | threads | inductor
        if side == "peer":
            environment.pop("PYTHONPATH", None)
        command = [python, str(Path(__file__).with_name("sides.py")), side, json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}, {job}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    run: Run = json.loads(done.stdout.splitlines()[-1])
    brief = {k: round(v, 2) for k, v in run.items() if isinstance(v, float) and k != "gradient_error"}
    print(f"  {side} {job['kind']} {job['model']} {brief}", file=sys.stderr, flush=True)
    return run


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Plain text, columns as wide as their widest cell."""
    cells = [list(header)] + [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def rates(options: argparse.Namespace, sides: dict[str, Worker], case: Worker) -> Run:
    """Iterations x pictures per CPU second of Inverting Gradients, each side `--repeats` times in turns."""
    runs: Run = {}
    for model in options.rate_models:
        path, steps = case(model, options.first_row, 16)["case"], max(int(RATE_STEPS[model] * options.scale), 10)
        todo: list[tuple[str, Worker, int, Run]] = [
            (name, sides["gradleak"], count, {"options": chosen}) for name, (count, chosen) in VARIANTS.items()
        ]
        todo += [("breaching", sides["breaching"], 1, {})] if "breaching" in sides else []
        found: dict[str, list[Run]] = {name: [] for name, *_ in todo}
        for _ in range(options.repeats):
            for name, worker, count, chosen in todo:
                length = steps if count == 1 else max(steps // 8, 10)
                job = {"kind": "invert", "model": model, "case": path, "seed": 0, "steps": length, "count": count}
                run = worker(**job, **chosen)
                found[name].append(run | {"picture_rate": run["rate"] * count})
        reference = [r["picture_rate"] for r in found["breaching"]] if "breaching" in found else []
        rows = []
        for name, measurements in found.items():
            pace, setup, memory = (
                median(r[k] for r in measurements) for k in ("picture_rate", "setup_s", "peak_rss_mb")
            )
            ratio = (
                median(r["picture_rate"] / p for r, p in zip(measurements, reference, strict=True))
                if reference
                else "-"
            )
            rows.append([name, pace, ratio, setup, round(memory)])
        header = ("", "iterations x pictures / CPU-s", "times the peer", "set-up CPU-s", "peak RSS MB")
        table(f"Rates, {model}: Inverting Gradients (medians of {options.repeats})", header, rows)
        runs[model] = found
    return runs


def fitted(worker: Worker, job: Run, budget: float, pace: Run) -> Run:
    """A run of as many iterations as fill the budget at the latest pace, which it renews; once more if 5 % off."""
    for _ in range(2):
        run = worker(**job, steps=max(int((budget - pace["setup_s"]) * pace["rate"]), 10))
        pace.update({key: run[key] for key in ("setup_s", "rate")})
        if abs(run["cpu_s"] / budget - 1) <= 0.05:
            break
    return run


def psnr(options: argparse.Namespace, sides: dict[str, Worker], case: Worker) -> Run:
    """PSNR of Inverting Gradients after equal CPU time, set-up included: one untrained model per picture."""
    runs: Run = {}
    for model in options.psnr_models:
        found: list[Run] = []
        paces: dict[str, Run] = {}
        for image in range(options.images):
            made = case(model, options.first_row + image, 1, image)
            job = {"kind": "invert", "model": model, "case": made["case"], "seed": image}
            for fraction in options.fractions:
                row: Run = {"row": options.first_row + image, "fraction": fraction, "mean": made["mean_colour_db"][0]}
                for side, worker in sides.items():
                    if side not in paces:
                        paces[side] = worker(**job, steps=max(RATE_STEPS[model] // 2, 10))
                    row[side] = fitted(worker, job, options.budget * fraction, paces[side])
                found.append(row)
        for fraction in options.fractions:
            rows = [
                [
                    r["row"],
                    r["mean"],
                    *(v for s in sides for v in (r[s]["psnr_db"][0], r[s]["iterations"], r[s]["cpu_s"])),
                ]
                for r in found
                if r["fraction"] == fraction
            ]
            rows.append(["mean", *(fmean(column) for column in list(zip(*rows, strict=True))[1:])])
            header = ["row", "own mean colour dB", *(f"{s} {what}" for s in sides for what in ("dB", "steps", "CPU-s"))]
            table(f"PSNR, {model}, at {options.budget * fraction:g} CPU-s", header, rows)
        runs[model] = found
    return runs


def dlg(options: argparse.Namespace, sides: dict[str, Worker], case: Worker) -> Run:
    """DLG on LeNet, labels unknown, one fresh model per picture; the peer runs 300 outer steps on the first few."""
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    for image in range(options.dlg_images):
        path = case("lenet", options.first_row + image, 1, image)["case"]
        for side, worker in sides.items():
            if side == "gradleak" or image < options.peer_dlg:
                runs[side].append(worker(kind="dlg", model="lenet", case=path, seed=image, steps=300))
    rows = []
    for side, found in runs.items():
        if found:
            scores = [r["psnr_db"][0] for r in found]
            share = sum(s > 30 for s in scores) / len(scores)
            listed = " ".join(f"{s:.1f}" for s in scores)
            cpu, memory = fmean(r["cpu_s"] for r in found), max(round(r["peak_rss_mb"]) for r in found)
            rows.append([side, len(found), median(scores), share, cpu, memory, listed])
    header = ("", "pictures", "median dB", "share above 30 dB", "CPU-s per picture", "peak RSS MB", "each dB")
    table("DLG, lenet, labels unknown", header, rows)
    return {"lenet": runs}


def labels(options: argparse.Namespace, sides: dict[str, Worker], case: Worker) -> Run:
    """Label counts of batches of 4 and 8 from the last layer's gradient, five untrained models; a guess beside: as many of each class."""
    sizes, models, runs, rows = (4, 8), options.label_models, Run(), []
    each = max(options.batches // 5, 1)
    for model in models:
        runs[model] = {side: [] for side in sides}
        for seed in range(5):
            path = case(model, options.first_row + seed * each * max(sizes), each * max(sizes), seed)["case"]
            for side, worker in sides.items():
                runs[model][side].append(
                    worker(kind="labels", model=model, case=path, seed=seed, sizes=sizes, count=each)
                )
        for size in sizes:
            for side in sides:
                right = [n for run in runs[model][side] for n in run["right"][str(size)]]
                exact = sum(n == size for n in right) / len(right)
                rows.append([model, size, side, len(right), sum(right) / len(right) / size, exact])
            guess = [n for run in runs[model]["gradleak"] for n in run["guess"][str(size)]]
            rows.append(
                [
                    model,
                    size,
                    "a guess",
                    len(guess),
                    sum(guess) / len(guess) / size,
                    sum(n == size for n in guess) / len(guess),
                ]
            )
    table("Labels recovered", ("model", "batch", "", "batches", "share of labels", "share of batches, all right"), rows)
    return runs


def imports(options: argparse.Namespace, _sides: dict[str, Worker], _case: Worker) -> Run:
    """CPU seconds of `import torch`, and of what captures and attacks a gradient, 7 times each in turns."""
    seconds: dict[str, list[float]] = {"torch": [], "gradleak": []}
    # `import gradleak` itself imports nothing.
    needed = {"torch": "import torch", "gradleak": "from gradleak import DLG, capture_gradient"}
    for _ in range(7):
        for name, found in seconds.items():
            code = f"import time; t = time.process_time(); {needed[name]}; print(time.process_time() - t)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
    ratio = median(a / b for a, b in zip(seconds["gradleak"], seconds["torch"], strict=True))
    rows = [(name, median(found)) for name, found in seconds.items()]
    table("Import (medians of 7)", ("", "CPU-s"), [*rows, ("gradleak / torch", ratio)])
    return seconds | {"ratio": ratio}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="CIFAR-10 as gradleak.modalities.pictures.load reads it, e.g. a parquet folder"
    )
    parser.add_argument("--peer-python", help="interpreter of the environment with breaching; without it, ours alone")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--first-row", type=int, default=2000, help="of the test split")
    parser.add_argument("--rate-models", nargs="*", choices=list(RATE_STEPS), default=["lenet", "resnet20"])
    parser.add_argument("--repeats", type=int, default=3, help="of each rate")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps behind a rate")
    parser.add_argument("--psnr-models", nargs="*", choices=list(RATE_STEPS), default=["convnet64", "resnet20-4"])
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds per picture")
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of the budget, each a run"
    )
    parser.add_argument("--images", type=int, default=8, help="pictures of the psnr section")
    parser.add_argument("--dlg-images", type=int, default=20)
    parser.add_argument("--peer-dlg", type=int, default=2, help="pictures on which the peer runs deepleakage")
    parser.add_argument("--batches", type=int, default=100, help="of each size in the labels section")
    parser.add_argument("--label-models", nargs="+", choices=list(RATE_STEPS), default=["lenet", "convnet64"])
    parser.add_argument("--json", type=Path, help="write every measurement here, after each section")
    return parser.parse_args()


def main() -> None:
    options = parsed()

    def side(python: str, name: str) -> Worker:
        return lambda **job: process(python, name, **job)

    sides = {"gradleak": side(sys.executable, "ours")}
    if options.peer_python:
        sides["breaching"] = side(options.peer_python, "peer")
    else:
        print("No --peer-python: gradleak alone, nothing is compared.")
    sections: dict[str, Section] = {"rates": rates, "psnr": psnr, "dlg": dlg, "labels": labels, "import": imports}
    flags = {k: v for k, v in vars(options).items() if k not in ("data", "peer_python", "json")}
    record: Run = {"date": time.strftime("%Y-%m-%d"), "machine": [platform.machine(), os.cpu_count()], "flags": flags}
    with tempfile.TemporaryDirectory() as folder:

        def case(model: str, row: int, count: int, seed: int = 0) -> Run:
            path = str(Path(folder) / f"{model}-{seed}-{row}-{count}.npz")
            job = {"kind": "case", "data": options.data, "model": model, "case": path, "seed": seed}
            return sides["gradleak"](**job, row=row, count=count) | {"case": path}

        for name in options.only:
            record[name] = sections[name](options, sides, case)
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
