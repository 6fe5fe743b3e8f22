"""Training images out of the change that T steps make to all weights: how long does the linear regime last?

A network trained on public pictures is fine-tuned on two pictures that it has not seen; and, for comparison, one that starts
from tiny random weights, where the first step turns the features and there is no regime to speak of.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.ntk import NTK
from gradleak.data import Pictures, load, public_pool
from gradleak.fully_connected import FullyConnected
from gradleak.metrics import ssim
from gradleak.models import Architecture
from gradleak.observations import Model, Update
from gradleak.optimise import OnStep
from gradleak.recipes.findings import Findings
from gradleak.recipes.kkt import nearest
from gradleak.tensors import flatten
from gradleak.victims.federated import share_update
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.training import prepare_model

STEPS = (1, 2, 5, 10, 20, 50, 100, 500, 1_000)
SIZES = {
    "quick": (1, (1, 5), 100),
    "small": (4, STEPS, 600),
    "paper": (20, STEPS, 1_500),
}  # pairs, T, steps of the search
RATES = (0.01, 0.1)  # learning rates of the fine-tuning
TOGETHER = 2  # pictures in one fine-tuning
TINY = 0.05  # factor on the default random start, in place of training


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every number of steps; the findings so far."""
    pairs, all_steps, search = SIZES["quick" if data in ("embedded", "digits") else size]
    private = load(data, "test", indices=range(pairs * TOGETHER))
    shape = (private.images.shape[1], private.images.shape[2], private.images.shape[3])
    architecture = Architecture("mlp", shape, max(len(private.classes), 2))
    public = public_pool(data, "train", shape=shape, limit=2_000)
    on_step = start("the model before")
    trained = prepare_model(architecture, seed=seed, train_on=public, epochs=3, on_step=on_step)
    tiny = architecture.build(seed)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(TINY)
    mean, rows = public.images.mean(0, keepdim=True), list[dict[str, Any]]()
    for name, module, rate in (*(("trained", trained, rate) for rate in RATES), ("tiny random", tiny, RATES[-1])):
        for steps in all_steps:
            tried = []
            for first in range(0, pairs * TOGETHER, TOGETHER):
                batch = chosen(private, first, TOGETHER)
                update = fine_tuned(module, architecture, batch, rate, steps)
                attack = NTK(steps=search, restarts=2)
                on_step = start(f"{name}, {steps} steps")
                found = attack(update, generator=torch.Generator().manual_seed(seed), on_step=on_step)
                truth = batch.images
                own, blind = (ssim(nearest(images, truth), truth) for images in (found.images, mean))
                tried.append({"ssim": float(own.mean()), "mean_image_ssim": float(blind.mean())} | drift(update, batch))
            means = {key: sum(row[key] for row in tried) / len(tried) for key in tried[0]}
            rows.append({"start": name, "learning_rate": rate, "steps": steps, **means})
            yield Findings(rows, sentence(rows))


def chosen(private: Pictures, first: int, count: int) -> Pictures:
    """So many of the pictures, from `first` on."""
    rows = slice(first, first + count)
    return replace(private, images=private.images[rows], labels=private.labels[rows])


def fine_tuned(module: nn.Module, architecture: Architecture, batch: Pictures, rate: float, steps: int) -> Update:
    """The change of all weights in so many full-batch steps; labels are known."""
    gradient, secret = capture_gradient(module, architecture, batch, reveal_labels=True)
    own = Model.of(module, architecture)
    return share_update(
        gradient, secret, own, learning_rate=rate, local_steps=steps, local_batch_size=len(batch.labels)
    )


def drift(update: Update, batch: Pictures) -> dict[str, float]:
    """How far the linear regime was left: relative weight change, cosine of the features before and after, coefficients.

    A feature is the gradient of label's logit minus the mean logit; coefficients are one-hot label minus softmax.
    """
    before, after = update.model.parameters, {k: v + update.released[k] for k, v in update.model.parameters.items()}
    features, signals = list[list[Tensor]](), list[Tensor]()
    for parameters in (before, after):
        network = FullyConnected.of(update.model.module, parameters, update.model.architecture.input_shape)
        x = network.inputs(batch.images)
        outputs = network.forward(x)[-1]
        one_hot = torch.eye(outputs.shape[1])[batch.labels]
        signals.append(one_hot - outputs.softmax(1))
        C = one_hot - 1 / outputs.shape[1]
        features.append([flatten(network.combination(x[i : i + 1], C[i : i + 1])) for i in range(len(x))])
    cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in zip(*features, strict=True)]
    return {
        "weight_change": float(flatten(update.released).norm() / flatten(before).norm()),
        "feature_cosine": float(torch.stack(cosines).mean()),
        "coefficient_drift": float((signals[1] - signals[0]).norm() / signals[0].norm()),
    }


def sentence(rows: list[dict[str, Any]]) -> str:
    """SSIM after one step, and the number of steps at which it falls under a half."""
    parts = []
    for key in dict.fromkeys((row["start"], row["learning_rate"]) for row in rows):
        own = [row for row in rows if (row["start"], row["learning_rate"]) == key]
        fallen = next((row["steps"] for row in own if row["ssim"] < 0.5), None)
        told = f"under 0.5 from {fallen} steps on" if fallen else f"not under 0.5 within {own[-1]['steps']} steps"
        parts.append(f"{key[0]}, learning rate {key[1]:g}: {own[0]['ssim']:.3f} after {own[0]['steps']} step, {told}")
    return "SSIM of images out of the change of all weights. " + "; ".join(parts) + "."
