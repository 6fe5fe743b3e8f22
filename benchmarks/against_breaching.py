"""gradleak and breaching 0.1.2 (PyPI) in one run: same weights, same CIFAR-10 pictures, one thread each, in turns.

Every measurement is a process of its own that prints one line of JSON; this file is also that process, for both sides,
so it must run where gradleak is missing. A case is an .npz file that both read: images (n, 3, 32, 32) in [0, 1], labels
(n,), the model's state in order, and the gradient at the first image, which the peer has to reproduce before it starts.
Rates are per CPU second, children included: a shared machine slows the clock on the wall more than these.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = dict[str, Any]
Worker = Callable[..., Run]
Section = Callable[[argparse.Namespace, dict[str, Worker], Worker], Run]
Stamps = list[tuple[int, float]]  # (iteration, CPU seconds)

CIFAR = (3, 32, 32), 10
NAME_OF_PEER = {"lenet": "lenet_zhu", "convnet64": "convnet", "resnet20": "resnet20", "resnet20-4": "resnet20-4"}
RATE_STEPS = {"lenet": 2000, "convnet64": 40, "resnet20": 300, "resnet20-4": 20}  # about ten CPU seconds of the peer
VARIANTS: dict[str, tuple[int, Run]] = {  # name: (pictures side by side, options of InvertingGradients)
    "gradleak": (1, {}),
    "gradleak, objective as the peer (centre=False)": (1, {"centre": False}),
    "gradleak, compiled": (1, {"compiled": True}),
    "gradleak, 16 side by side": (16, {}),
}
SECTIONS = ("rates", "psnr", "dlg", "labels", "import")


# --- both workers ---------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """User and system time of this process and of the children that it waited for (the C++ compiler is one)."""
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in use)


def measured(start: float, stamps: Stamps, end: float) -> Run:
    """CPU seconds in all; iterations per CPU second after the first fifth; CPU seconds before the first iteration."""
    run: Run = {"cpu_s": end - start, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if len(stamps) > 2:
        (first, since), (last, until) = stamps[len(stamps) // 5], stamps[-1]
        rate = (last - first) / max(until - since, 1e-9)
        run |= {"rate": rate, "setup_s": max(stamps[0][1] - start - stamps[0][0] / rate, 0.0), "iterations": last}
    return run


def psnr_db(images: Array, truth: Array) -> list[float]:
    """-10 log10 of the mean squared error of each picture, pixels clamped to [0, 1]. (n, c, h, w) twice -> n numbers."""
    error = ((images.clip(0, 1).astype(np.float64) - truth) ** 2).mean(axis=(1, 2, 3))
    return [float(-10 * np.log10(max(e, 1e-20))) for e in error]


def fill(module: Any, case: Any) -> Any:
    """The module with the state of the case, matched by order; the shapes must agree."""
    import torch

    names, arrays = list(module.state_dict()), [case[key] for key in case.files if key.startswith("state")]
    for name, tensor, array in zip(names, module.state_dict().values(), arrays, strict=True):
        if tuple(tensor.shape) != array.shape:
            raise SystemExit(f"{name} is {tuple(tensor.shape)}, the case has {array.shape}: architectures differ.")
    module.load_state_dict({name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)})
    return module.eval()


def counts_right(found: Sequence[int], labels: Array) -> int:
    """How many labels of the batch are in the multiset that was found."""
    return sum(min(list(found).count(c), labels.tolist().count(c)) for c in set(found))


def batches(count: int, size: int) -> list[slice]:
    return [slice(i * size, (i + 1) * size) for i in range(count)]


# --- gradleak -------------------------------------------------------------------------------------------------------


def ours(job: Run) -> Run:
    """One job with gradleak."""
    import torch

    from gradleak import DLG, Architecture, Gradient, InvertingGradients, Pictures, data, recover_labels
    from gradleak.victims.gradient import capture_gradient

    torch.set_num_threads(1)
    architecture = Architecture(job["model"], *CIFAR)

    def observe(module: torch.nn.Module, images: Array, labels: Array, *, reveal_labels: bool = True) -> Gradient:
        pictures = Pictures(torch.from_numpy(images), torch.from_numpy(labels), (), "cifar10", "test")
        return capture_gradient(module, architecture, pictures, reveal_labels=reveal_labels)[0]

    if job["kind"] == "case":
        module = architecture.build(job["seed"]).eval()
        pictures = data.load(job["data"], "test", indices=range(job["row"], job["row"] + job["count"]))
        images, labels = pictures.images.numpy(), pictures.labels.numpy()
        released = observe(module, images[:1], labels[:1]).released
        stored = {f"state{i:04d}": t.numpy() for i, t in enumerate(module.state_dict().values())}
        stored |= {f"gradient{i:04d}": released[name].numpy() for i, (name, _) in enumerate(module.named_parameters())}
        np.savez(job["case"], images=images, labels=labels, **cast(Any, stored))
        flat = np.broadcast_to(images.mean(axis=(2, 3), keepdims=True), images.shape)
        return {"mean_colour_db": psnr_db(flat, images), "torch": torch.__version__}

    case = np.load(job["case"])
    images, labels = case["images"], case["labels"]
    module = fill(architecture.build(0), case)
    generator, stamps = torch.Generator().manual_seed(job["seed"]), Stamps()

    def on_step(step: int, _steps: int, _value: float) -> None:
        stamps.append((step, cpu_seconds()))

    if job["kind"] == "labels":
        right: dict[int, list[int]] = {size: [] for size in job["sizes"]}
        for size in right:
            for rows in batches(job["count"], size):
                found = recover_labels(observe(module, images[rows], labels[rows], reveal_labels=False))
                right[size].append(counts_right(found.tolist(), labels[rows]))
        return {"right": right}
    known = job["kind"] == "invert"
    attack = InvertingGradients(steps=job["steps"], **job.get("options", {})) if known else DLG()
    ones = batches(job.get("count", 1), 1)
    seen = [observe(module, images[one], labels[one], reveal_labels=known) for one in ones]
    start = cpu_seconds()
    found_images = [r.images[0] for r in attack.many(seen, generator=generator, on_step=on_step)]
    end = cpu_seconds()
    return measured(start, stamps, end) | {
        "psnr_db": psnr_db(torch.stack(found_images).numpy(), images[: len(seen)]),
        "torch": torch.__version__,
    }


# --- breaching ------------------------------------------------------------------------------------------------------


def peer(job: Run) -> Run:
    """One job with breaching, its attacks and configurations unmodified."""
    import torch

    # torchvision's wheel fails to import beside a CPU build of torch, for want of two operators that nothing here calls.
    library = cast(Any, torch.library).Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

    import breaching
    from breaching.cases.models.model_preparation import construct_model

    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    case = np.load(job["case"])
    truth, labels = case["images"], torch.from_numpy(case["labels"])
    facts = breaching.get_config(overrides=["case/data=CIFAR10"]).case.data
    # The constants in gradleak's models, rounded to four digits, for both: the functions must be the same.
    facts.mean, facts.std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    mean, std = (torch.tensor(list(v))[:, None, None] for v in (facts.mean, facts.std))
    module, loss = construct_model(NAME_OF_PEER[job["model"]], facts, pretrained=False)
    module = fill(module, case)
    images = (torch.from_numpy(truth) - mean) / std

    def released(rows: slice) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss(module(images[rows]), labels[rows]), list(module.parameters())))

    expected = [torch.from_numpy(case[key]) for key in case.files if key.startswith("gradient")]
    pairs = list(zip(released(slice(0, 1)), expected, strict=True))
    error = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    if error > 1e-5:
        raise SystemExit(f"The gradients of the two models differ by {error:.1e}: they are not the same function.")

    def prepared(config: Any, rows: slice, known: bool) -> tuple[Any, list[Run], list[Run]]:
        server = {"parameters": list(module.parameters()), "buffers": list(module.buffers()), "metadata": facts}
        metadata = {"num_data_points": len(labels[rows]), "labels": labels[rows] if known else None}
        user = {"gradients": released(rows), "buffers": None, "metadata": metadata | {"local_hyperparams": None}}
        where = {"device": torch.device("cpu"), "dtype": torch.float}
        return breaching.attacks.prepare_attack(module, loss, config, where), [server], [user]

    if job["kind"] == "labels":
        config, right = breaching.get_attack_config("invertinggradients"), Run()
        for size in job["sizes"]:
            right[str(size)] = []
            for rows in batches(job["count"], size):
                attacker, server, user = prepared(config, rows, False)
                found = attacker.prepare_attack(server, user)[1].tolist()
                right[str(size)].append(counts_right(found, case["labels"][rows]))
        return {"right": right, "gradient_error": error}

    stamps = Stamps()

    class Clock(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # "| It: 41 | Rec. loss: ..."
            words = record.getMessage().split()
            if words[:2] == ["|", "It:"]:
                stamps.append((int(words[2]), cpu_seconds()))

    logging.getLogger("breaching").setLevel(logging.INFO)
    logging.getLogger("breaching").addHandler(Clock())
    known = job["kind"] == "invert"
    steps = [f"optim.max_iterations={job['steps']}", f"optim.callback={max(job['steps'] // 100, 1)}"]
    config = breaching.get_attack_config("invertinggradients" if known else "deepleakage", overrides=steps)
    attacker, server, user = prepared(config, slice(0, 1), known)
    start = cpu_seconds()
    result, _ = attacker.reconstruct(server, user, {}, dryrun=False)
    end = cpu_seconds()
    run = measured(start, stamps, end) | {"psnr_db": psnr_db((result["data"] * std + mean).numpy(), truth[:1])}
    return run | {"gradient_error": error, "torch": torch.__version__}


# --- the parent -----------------------------------------------------------------------------------------------------


def process(python: str, side: str, **job: Any) -> Run:
    """The result of one job in a fresh interpreter; compiled code is not kept from one run to the next."""
    with tempfile.TemporaryDirectory() as cache:
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        inductor = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment = os.environ | threads | inductor
        if side == "peer":
            environment.pop("PYTHONPATH", None)
        command = [python, __file__, "--worker", side, json.dumps(job)]
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
            rows.append([side, len(found), median(scores), share, fmean(r["cpu_s"] for r in found), listed])
    header = ("", "pictures", "median dB", "share above 30 dB", "CPU-s per picture", "each dB")
    table("DLG, lenet, labels unknown", header, rows)
    return {"lenet": runs}


def labels(options: argparse.Namespace, sides: dict[str, Worker], case: Worker) -> Run:
    """Label counts of batches of 4 and 8 from the last layer's gradient, five untrained models."""
    sizes, models, runs, rows = (4, 8), ("lenet", "convnet64"), Run(), []
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
    table("Labels recovered", ("model", "batch", "", "batches", "share of labels", "share of batches, all right"), rows)
    return runs


def imports(options: argparse.Namespace, _sides: dict[str, Worker], _case: Worker) -> Run:
    """CPU seconds of `import gradleak` and `import torch`, 7 times each in turns."""
    seconds: dict[str, list[float]] = {"torch": [], "gradleak": []}
    for _ in range(7):
        for name, found in seconds.items():
            code = f"import time; t = time.process_time(); import {name}; print(time.process_time() - t)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
    ratio = median(a / b for a, b in zip(seconds["gradleak"], seconds["torch"], strict=True))
    rows = [(name, median(found)) for name, found in seconds.items()]
    table("Import (medians of 7)", ("", "CPU-s"), [*rows, ("gradleak / torch", ratio)])
    return seconds | {"ratio": ratio}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as gradleak.data.load reads it, e.g. a parquet folder")
    parser.add_argument("--peer-python", help="interpreter of the environment with breaching; without it, ours alone")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--first-row", type=int, default=2000, help="of the test split")
    parser.add_argument("--rate-models", nargs="*", choices=list(NAME_OF_PEER), default=["lenet", "resnet20"])
    parser.add_argument("--repeats", type=int, default=3, help="of each rate")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps behind a rate")
    parser.add_argument("--psnr-models", nargs="*", choices=list(NAME_OF_PEER), default=["convnet64", "resnet20-4"])
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds per picture")
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of the budget, each a run"
    )
    parser.add_argument("--images", type=int, default=8, help="pictures of the psnr section")
    parser.add_argument("--dlg-images", type=int, default=20)
    parser.add_argument("--peer-dlg", type=int, default=2, help="pictures on which the peer runs deepleakage")
    parser.add_argument("--batches", type=int, default=100, help="of each size in the labels section")
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
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps({"ours": ours, "peer": peer}[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        main()
