"""Training images out of the change that T steps make to weights: how long does the linear regime last?

A network trained on public pictures is fine-tuned on two pictures that it has not seen, or eight, or sixteen; and, for
comparison, one whose first layer starts from tiny random weights, where the first step turns the features. Then the rank:
the change cut off after its largest singular values, layer by layer, and the change that LoRA of a rank makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.weights.ntk import NTK
from gradleak.audit.metrics import ssim
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors, flatten
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings, Row, Size, Start, opening, rectangular
from gradleak.studies.fine_tuning import ALL, LowRank, Released, Truncated, fine_tuned
from gradleak.studies.kkt import diverged, nearest
from gradleak.victims.training import prepare_model

STEPS = (1, 2, 5, 10, 20, 50, 100, 500, 1_000)
SWEPT: tuple[Released, ...] = (*map(Truncated, (1, 2)), *map(LowRank, (1, 8, 64, 256, 784)))
# fine-tunings per setting, T, T of the rank sweep, what it releases, steps of the search
SIZES: dict[Size, tuple[int, tuple[int, ...], tuple[int, ...], tuple[Released, ...], int]] = {
    "smoke": (1, (1,), (5,), (Truncated(1), LowRank(8)), 10),
    "small": (4, STEPS, (1, 100), SWEPT, 600),
    "paper": (20, STEPS, (1, 10, 100, 1_000), SWEPT, 1_500),
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
    released: Released = ALL


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every setting; the findings so far."""
    repeats, all_steps, swept_steps, swept, search = SIZES[size]
    shape, classes = blueprint(data, size)
    private, architecture = unseen(data, 0, max(16, 2 * repeats), shape), Architecture("mlp", shape, classes)
    public = public_pool(data, "train", shape=shape, limit=2_000)
    trained = prepare_model(architecture, seed=seed, train_on=public, epochs=3, on_step=start("the model before"))
    modules = {"trained": trained, "tiny random": tiny(architecture, seed)}
    models = {name: Model.of(module, architecture) for name, module in modules.items()}
    series = (("trained", 2, SLOW), ("trained", 2, FAST), ("tiny random", 2, FAST), ("trained", 8, FAST))
    settings = [Setting(*one, steps) for one in (*series, ("trained", 16, FAST)) for steps in all_steps]
    settings += [Setting("trained", 2, FAST, steps, released) for steps in swept_steps for released in swept]
    attack = NTK(steps=search, restarts=2)
    mean, rows = public.images.mean(0, keepdim=True), list[Row]()
    for setting in settings:
        rows.append(row(attack, setting, models[setting.start], private, repeats, mean, seed, start))
        yield Findings(rectangular(rows), sentence(rows)).after(opening(data, size, shrunk(shape, size)))


def row(
    attack: NTK,
    setting: Setting,
    model: PictureModel,
    private: Pictures,
    repeats: int,
    mean: Tensor,
    seed: int,
    start: Start,
) -> Row:
    """Means over the fine-tunings that did not diverge; of the others the reason as `note`."""
    on_step = start(f"{setting.start}, {setting.images} images, {setting.steps} steps, {setting.released}")
    measured, notes = list[dict[str, float]](), list[str]()
    for first in range(0, min(repeats * setting.images, len(private.labels)), setting.images):
        batch = rows_of(private, first, setting.images)
        try:
            update, shares = fine_tuned(model, batch, setting.released, setting.rate, setting.steps, seed)
        except BadInput as reason:
            notes.append(str(reason))
            continue
        scores, note = attacked(attack, update, batch, shares, mean, seed, on_step)
        measured.append(scores)
        notes.append(note)
    return {
        "start": setting.start,
        "images": setting.images,
        "learning_rate": setting.rate,
        "steps": setting.steps,
        "released": str(setting.released),
        "repeats": len(measured),
        **{key: sum(scores[key] for scores in measured) / len(measured) for key in (measured or [{}])[0]},
        "note": " ".join(dict.fromkeys(note for note in notes if note)),
    }


def attacked(
    attack: NTK,
    update: PictureObservation,
    batch: Pictures,
    shares: Tensor,
    mean: Tensor,
    seed: int,
    on_step: OnStep,
) -> tuple[dict[str, float], str]:
    """SSIM of what is found, also with the true coefficients; the mean image's; how far the regime was left; and a note."""
    reconstruction = attack(update, generator=torch.Generator().manual_seed(seed), on_step=on_step)
    knowing = attack.knowing(update, batch.labels, shares, generator=torch.Generator().manual_seed(seed))
    images = {"ssim": reconstruction.value, "ssim_coefficients_known": knowing, "mean_image_ssim": mean}
    similar = {key: float(ssim(nearest(made, batch.images), batch.images).mean()) for key, made in images.items()}
    return similar | drift(update, batch), diverged(reconstruction)


def tiny(architecture: Architecture, seed: int) -> nn.Module:
    """Random, with the first layer at N(0, 1e-4^2), as where the weights of Haim et al. (2022) start."""
    module = architecture.build(seed)
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Linear))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_(std=TINY, generator=generator)
    return module


def drift(update: PictureObservation, batch: Pictures) -> dict[str, float]:
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


def sentence(rows: list[Row]) -> str:
    """SSIM after one step, and the number of steps at which it falls under a half."""
    parts, whole = [], [row for row in rows if row["released"] == str(ALL)]
    for key in dict.fromkeys((row["start"], row["images"], row["learning_rate"]) for row in whole):
        series = [row for row in whole if (row["start"], row["images"], row["learning_rate"]) == key]
        finite, diverged = (
            [row for row in series if "ssim" in row],
            [row["steps"] for row in series if "ssim" not in row],
        )
        fallen = next((row["steps"] for row in finite if row["ssim"] < 0.5), None)
        words = [f"{row['ssim']:.3f} after {row['steps']} step" for row in finite[:1]]
        words += [f"under 0.5 from {fallen} steps on"] if fallen else []
        words += [f"not under 0.5 within {finite[-1]['steps']} steps"] if finite and not fallen else []
        words += [f"training diverged within {diverged[0]} steps"] if diverged else []
        parts.append(f"{key[0]}, {key[1]} images, learning rate {key[2]:g}: {', '.join(words)}")
    return "SSIM of images out of the change of all weights. " + "; ".join(parts) + "."
