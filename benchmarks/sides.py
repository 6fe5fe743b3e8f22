"""One measurement of one side: `python sides.py ours|peer JOB`, JOB in JSON, prints one line of JSON.

against_breaching.py runs it, with the interpreter of either environment, so each side imports its library only.
A case is an .npz file that both read: images (n, 3, 32, 32) in [0, 1], labels (n,), the model's state in order, and the
gradient at the first image, which the peer has to reproduce before it starts.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = dict[str, Any]
Stamps = list[tuple[int, float]]  # (iteration, CPU seconds)

CIFAR = (3, 32, 32), 10
NAME_OF_PEER = {"lenet": "lenet_zhu", "convnet64": "convnet", "resnet20": "resnet20", "resnet20-4": "resnet20-4"}


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


def drawn(count: int, size: int, seed: int, rows: int) -> list[Array]:
    """As many batches of rows at random: stored rows rotate through the classes, so that consecutive ones tell their own labels."""
    return [np.random.default_rng((seed, i)).choice(rows, size, replace=False) for i in range(count)]


# --- gradleak -------------------------------------------------------------------------------------------------------


def ours(job: Run) -> Run:
    """One job with gradleak."""
    import torch

    from gradleak import DLG, Architecture, InvertingGradients, Model, Observation, Pictures, load, recover_labels
    from gradleak.victims.gradient import capture_gradient

    torch.set_num_threads(1)
    architecture = Architecture(job["model"], *CIFAR)

    def observe(
        model: Model[Architecture], images: Array, labels: Array, *, reveal_labels: bool = True
    ) -> Observation[Architecture]:
        pictures = Pictures(torch.from_numpy(images), torch.from_numpy(labels), (), "cifar10", "test")
        return capture_gradient(model, pictures, reveal_labels=reveal_labels)[0]

    if job["kind"] == "case":
        module = architecture.build(job["seed"]).eval()
        pictures = load(job["data"], "test", indices=range(job["row"], job["row"] + job["count"]))
        images, labels = pictures.images.numpy(), pictures.labels.numpy()
        released = observe(Model.of(module, architecture), images[:1], labels[:1]).released
        stored = {f"state{i:04d}": t.numpy() for i, t in enumerate(module.state_dict().values())}
        stored |= {f"gradient{i:04d}": released[name].numpy() for i, (name, _) in enumerate(module.named_parameters())}
        np.savez(job["case"], images=images, labels=labels, **cast(Any, stored))
        flat = np.broadcast_to(images.mean(axis=(2, 3), keepdims=True), images.shape)
        return {"mean_colour_db": psnr_db(flat, images), "torch": torch.__version__}

    case = np.load(job["case"])
    images, labels = case["images"], case["labels"]
    model = Model.of(fill(architecture.build(0), case), architecture)
    generator, stamps = torch.Generator().manual_seed(job["seed"]), Stamps()

    def on_step(step: int, _steps: int, _value: float) -> None:
        stamps.append((step, cpu_seconds()))

    if job["kind"] == "labels":
        right: dict[int, list[int]] = {size: [] for size in job["sizes"]}
        guess: dict[int, list[int]] = {size: [] for size in job["sizes"]}
        for size in right:
            for rows in drawn(job["count"], size, job["seed"], len(labels)):
                found = recover_labels(observe(model, images[rows], labels[rows], reveal_labels=False))
                right[size].append(counts_right(found.tolist(), labels[rows]))
                guess[size].append(counts_right(range(size), labels[rows]))  # as many of each class, as far as they go
        return {"right": right, "guess": guess}
    known = job["kind"] == "invert"
    attack = InvertingGradients(steps=job["steps"], **job.get("options", {})) if known else DLG()
    ones = batches(job.get("count", 1), 1)
    seen = [observe(model, images[one], labels[one], reveal_labels=known) for one in ones]
    start = cpu_seconds()
    found_images = [r.value[0] for r in attack.many(seen, generator=generator, on_step=on_step)]
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

    def released(rows: slice | Array) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss(module(images[rows]), labels[rows]), list(module.parameters())))

    expected = [torch.from_numpy(case[key]) for key in case.files if key.startswith("gradient")]
    pairs = list(zip(released(slice(0, 1)), expected, strict=True))
    error = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    if error > 1e-5:
        raise SystemExit(f"The gradients of the two models differ by {error:.1e}: they are not the same function.")

    def prepared(config: Any, rows: slice | Array, known: bool) -> tuple[Any, list[Run], list[Run]]:
        server = {"parameters": list(module.parameters()), "buffers": list(module.buffers()), "metadata": facts}
        metadata = {"num_data_points": len(labels[rows]), "labels": labels[rows] if known else None}
        user = {"gradients": released(rows), "buffers": None, "metadata": metadata | {"local_hyperparams": None}}
        where = {"device": torch.device("cpu"), "dtype": torch.float}
        return breaching.attacks.prepare_attack(module, loss, config, where), [server], [user]

    if job["kind"] == "labels":
        config, right = breaching.get_attack_config("invertinggradients"), Run()
        for size in job["sizes"]:
            right[str(size)] = []
            for rows in drawn(job["count"], size, job["seed"], len(labels)):
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


if __name__ == "__main__":
    print(json.dumps({"ours": ours, "peer": peer}[sys.argv[1]](json.loads(sys.argv[2]))))
