"""Training images out of the change that T steps make to weights: how long does the linear regime last?

A network trained on public pictures is fine-tuned on two pictures that it has not seen, or eight, or sixteen; and, for
comparison, one whose first layer starts from tiny random weights, where the first step turns the features. Then the rank:
the change cut off after its largest singular values, layer by layer, and the change that LoRA of a rank makes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.weights.ntk import NTK
from gradleak.audit.metrics import ssim
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.model import Model
from gradleak.observations.releases import Release, Update
from gradleak.observations.tensors import Tensors, flatten
from gradleak.studies.findings import Findings
from gradleak.studies.fine_tuning import ALL, LowRank, Release, Truncated, fine_tuned
from gradleak.studies.kkt import nearest
from gradleak.victims.training import prepare_model

STEPS = (1, 2, 5, 10, 20, 50, 100, 500, 1_000)
SWEPT: tuple[Release, ...] = (*map(Truncated, (1, 2)), *map(LowRank, (1, 8, 64, 256, 784)))
SIZES = {  # fine-tunings per setting, T, T of the rank sweep, steps of the search
    "quick": (1, (1, 5), (5,), 60),
    "small": (4, STEPS, (1, 100), 600),
    "paper": (20, STEPS, (1, 10, 100, 1_000), 1_500),
}
SLOW, FAST = 0.01, 0.1  # learning rates of the fine-tuning
TINY = 1e-4  # standard deviation of the first layer, in place of training


@dataclass(frozen=True)
class Setting:
    """start: "trained" or "tiny random"; images in one fine-tuning, its learning rate and steps; what is released."""

    start: str
    images: int
    rate: float
    steps: int
    release: Release = ALL


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every setting; the findings so far."""
    repeats, all_steps, swept, search = SIZES["quick" if data in ("embedded", "digits") else size]
    private = load(data, "test", indices=range(max(16, 2 * repeats)))
    shape = (private.images.shape[1], private.images.shape[2], private.images.shape[3])
    architecture = Architecture("mlp", shape, max(len(private.classes), 2))
    public = public_pool(data, "train", shape=shape, limit=2_000)
    trained = prepare_model(architecture, seed=seed, train_on=public, epochs=3, on_step=start("the model before"))
    modules = {"trained": trained, "tiny random": tiny(architecture, seed)}
    series = (("trained", 2, SLOW), ("trained", 2, FAST), ("tiny random", 2, FAST), ("trained", 8, FAST))
    settings = [Setting(*one, steps) for one in (*series, ("trained", 16, FAST)) for steps in all_steps]
    settings += [Setting("trained", 2, FAST, steps, release) for steps in swept for release in SWEPT]
    attack = NTK(steps=search, restarts=2)
    mean, rows = public.images.mean(0, keepdim=True), list[dict[str, Any]]()
    for setting in settings:
        on_step = start(f"{setting.start}, {setting.images} images, {setting.steps} steps, {setting.release}")
        tried = []
        for first in range(0, min(repeats * setting.images, len(private.labels)), setting.images):
            batch = chosen(private, first, setting.images)
            tried.append(attacked(attack, setting, modules[setting.start], architecture, batch, mean, seed, on_step))
        means = {key: sum(row[key] for row in tried) / len(tried) for key in tried[0]}
        about = {
            "start": setting.start,
            "images": setting.images,
            "learning_rate": setting.rate,
            "steps": setting.steps,
        }
        rows.append({**about, "released": str(setting.release), "repeats": len(tried), **means})
        yield Findings(rows, sentence(rows))


def attacked(
    attack: NTK,
    setting: Setting,
    module: nn.Module,
    architecture: Architecture,
    batch: Pictures,
    mean: Tensor,
    seed: int,
    on_step: OnStep,
) -> dict[str, float]:
    """SSIM of what is found, also with the true coefficients; the mean image's; and how far the regime was left."""
    model = Model.of(module, architecture)
    update, shares = fine_tuned(model, batch, setting.release, setting.rate, setting.steps, seed)
    found = attack(update, generator=torch.Generator().manual_seed(seed), on_step=on_step).images
    knowing = attack.knowing(update, batch.labels, shares, generator=torch.Generator().manual_seed(seed))
    similar = [float(ssim(nearest(images, batch.images), batch.images).mean()) for images in (found, knowing, mean)]
    names = ("ssim", "ssim_coefficients_known", "mean_image_ssim")
    return dict(zip(names, similar, strict=True)) | drift(update, batch)


def tiny(architecture: Architecture, seed: int) -> nn.Module:
    """Random, with the first layer at N(0, 1e-4^2), as where the weights of Haim et al. (2022) start."""
    module = architecture.build(seed)
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Linear))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_(std=TINY, generator=generator)
    return module


def chosen(private: Pictures, first: int, count: int) -> Pictures:
    """So many of the pictures, from `first` on."""
    rows = slice(first, first + count)
    return replace(private, images=private.images[rows], labels=private.labels[rows])


def drift(update: Update, batch: Pictures) -> dict[str, float]:
    """How far the linear regime was left: relative weight change, cosine of the features before and after, coefficients.

    A feature is the gradient of label's logit minus the mean logit; coefficients are one-hot label minus softmax.
    """
    before: Tensors = update.model.parameters
    after = {name: tensor + update.released.get(name, 0) for name, tensor in before.items()}
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
    parts, whole = [], [row for row in rows if row["released"] == str(ALL)]
    for key in dict.fromkeys((row["start"], row["images"], row["learning_rate"]) for row in whole):
        own = [row for row in whole if (row["start"], row["images"], row["learning_rate"]) == key]
        fallen = next((row["steps"] for row in own if row["ssim"] < 0.5), None)
        told = f"under 0.5 from {fallen} steps on" if fallen else f"not under 0.5 within {own[-1]['steps']} steps"
        one = f"{own[0]['ssim']:.3f} after {own[0]['steps']} step"
        parts.append(f"{key[0]}, {key[1]} images, learning rate {key[2]:g}: {one}, {told}")
    return "SSIM of images out of the change of all weights. " + "; ".join(parts) + "."
