"""Training images out of a converged LoRA adapter: compose W0 + s B A, and extract as from any trained weights.

The adapter is trained and saved by the PEFT library on a network that has learnt nothing yet, rank after rank, beside the
training of all weights; two images, then ten. What the images' gradients G should add up to is asked in three ways: the
composed weights W0 + s B A, the change s B A (the base model is known), and s B (A - A0) (PEFT's random start of A is known
too, as to anybody who knows the seed). Controls: the mean image, and the extraction from an adapter of other images.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from gradleak.attacks.weights.kkt import KKT
from gradleak.audit.metrics import ssim
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.fully_connected import FullyConnected, cone, explained
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Weights, product
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe
from gradleak.studies.data_sets import shape_of
from gradleak.studies.findings import Findings, Row, Size, Start, opening, rectangular
from gradleak.studies.kkt import diverged, extracted, halves, mean_of, nearest, scores, two_class_source
from gradleak.victims.adapter import fine_tune
from gradleak.victims.weights import FullBatch, first_of_each, publish_weights, slope

RANKS = (1, 2, 4, 8, 16, 32, 64)
# pictures per class, ranks, steps of training, steps of the extraction
SIZES: dict[Size, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "smoke": ((1,), (2,), 60, 40),
    "small": ((1, 5), RANKS, 2_000, 600),
    "paper": ((1, 5), RANKS, 20_000, 1_500),
}
RATE = 0.3
FIRST_LAYER = (1.0, 0.0, 0.0)  # what is explained of each layer


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every extraction; the findings so far."""
    source, (counts, ranks, steps, search) = two_class_source(data), SIZES[size]
    attack, rows, before = KKT(steps=search, first_layer=True), list[Row](), opening(data, size, used=source)
    for per_class in counts:
        both = first_of_each(source, "train", 2 * per_class)
        private, others = halves(both)
        truth, mean = private.images, mean_of(source, per_class)
        architecture = Architecture("homogeneous1000", shape_of(both), 2)
        for rank in (*ranks, None):
            about: Row = {"images": 2 * per_class, "rank": rank or "full"}
            try:
                released, factors = sides(architecture, private, rank, steps, seed)
                wrong, _ = sides(architecture, others, rank, steps, seed)
            except BadInput as reason:
                rows.append({**about, "note": str(reason)})
                yield Findings(rectangular(rows), sentence(rows)).after(before)
                continue
            for name, seen in released.items():
                on_step = start(f"{2 * per_class} images, rank {rank or 'full'}, {name}")
                extraction = extracted(attack, seen, seed, on_step)
                blind = extracted(attack, wrong[name], seed, on_step)
                score, another, middle = (
                    ssim(nearest(images, truth), truth) for images in (extraction.value, blind.value, mean)
                )
                rows.append(
                    {
                        **about,
                        "left_hand_side": name,
                        **training(seen, private),
                        "factors_truth_residual": factors,
                        "residual": extraction.residual,
                        **scores(score),
                        "mean_image_ssim": float(middle.mean()),
                        "another_adapter_ssim": float(another.mean()),
                        "another_adapter_over_0.4": scores(another)["over_0.4"],
                        "note": diverged(extraction),
                    }
                )
                yield Findings(rectangular(rows), sentence(rows)).after(before)


def sides(
    architecture: Architecture, pictures: Pictures, rank: int | None, steps: int, seed: int
) -> tuple[dict[str, PictureObservation], float | None]:
    """Left-hand sides by name, of an adapter, or of the training of all weights where the rank is None; and `in_factors`."""
    if rank is None:
        recipe = FullBatch(learning_rate=RATE, epochs=steps)
        model = Model.of(architecture.build(seed).double(), architecture)
        seen, _ = publish_weights(model, pictures, recipe, reveal_initial=True)
        return {"W": beginning_at(seen, None), "W - W0": seen}, None
    adapter, first = (adapted(architecture, pictures, rank, many, seed) for many in (steps, 1))
    # The first step moves B alone, which is zero before it: what it leaves of A is where A started.
    A = {name: tensor for name, tensor in first.adapter.start.items() if name.endswith("lora_A")}
    began = replace(adapter, release=replace(adapter.adapter, start={**adapter.adapter.start, **A}))
    seen, known = composed(adapter), composed(began)
    base = {name: adapter.model.parameters[name].double() for name in seen.released}
    views = {"W0 + BA": seen, "BA": beginning_at(seen, base), "B(A - A0)": beginning_at(seen, known.released)}
    network = seen.expect(Weights).network(seen.model, seen.released)
    return views, in_factors(adapter, began, network, pictures)


def beginning_at(seen: PictureObservation, initial: Tensors | None) -> PictureObservation:
    """The same weights, with another start known, or none."""
    return replace(seen, release=replace(seen.expect(Weights), initial=initial))


def adapted(architecture: Architecture, pictures: Pictures, rank: int, steps: int, seed: int) -> PictureObservation:
    """What PEFT saves after so many full steps of gradient descent."""
    recipe, model = Recipe(learning_rate=RATE, steps=steps), Model.of(architecture.build(seed), architecture)
    with tempfile.TemporaryDirectory() as folder:
        adapter, _ = fine_tune(model, pictures, rank=rank, recipe=recipe, out=Path(folder), seed=seed)
    return adapter


def composed(adapter: PictureObservation) -> PictureObservation:
    """W0 + s B A as trained weights in float64, whose biases were not trained."""
    exact, start, scaling = adapter.to(torch.float64), adapter.adapter.start, adapter.adapter.scaling
    factors = {name: tensor.double() + exact.released.get(name, 0) for name, tensor in start.items()}
    weights = {
        f"{module}.weight": exact.model.parameters[f"{module}.weight"]
        + s * product(factors[f"{module}.lora_A"], factors[f"{module}.lora_B"])
        for module, s in scaling.items()
    }
    frozen = tuple(name for name in exact.model.parameters if name not in weights)
    model = replace(exact.model, parameters={**exact.model.parameters, **weights}, frozen=frozen)
    return Observation(model=model, release=Weights(), released=weights, batch_size=adapter.batch_size)


def in_factors(
    adapter: PictureObservation, began: PictureObservation, network: FullyConnected, private: Pictures
) -> float:
    """What the true images leave unexplained of A - A0 in the first layer, where it is asked to be sum_i lambda_i s B^T G_i.

    That is the stationarity of what was trained: A moves along dL/dA = s B^T dL/dW (Hu et al. 2021), W itself does not.
    """
    module = network.names[0].removesuffix(".weight")
    name = f"{module}.lora_A"
    moved = (adapter.adapter.start[name] - began.adapter.start[name]).double()  # (rank, in)
    B = adapter.adapter.scaling[module] * adapter.released[f"{module}.lora_B"].double()  # (out, rank)
    x, delta = network.margins(private.images, private.labels)
    z = network.forward(x)
    for at in range(len(z) - 1, 0, -1):
        delta = (delta @ network.weights[at]) * (z[at - 1] > 0)
    signal = delta @ B  # (n, rank)
    K, t = (signal @ signal.T) * (x @ x.T), (signal * (x @ moved.T)).sum(1)
    share, size = cone(K, t), moved.square().sum()
    return float(((size - 2 * share @ t + share @ K @ share) / size).clamp_min(0).sqrt())


def training(seen: PictureObservation, private: Pictures) -> Row:
    """The loss, what the true images leave unexplained of the first layer, and how far its row space lies in their span.

    inside: root mean square cosine between the two leading right singular vectors of what training made of the first layer,
    of all that there are as many of as images for `all_inside`, and the span of the images.
    """
    weights = seen.expect(Weights)
    network, learned = (of(seen.model, seen.released) for of in (weights.network, weights.learned))
    x = network.inputs(private.images)
    rows, C = network.margins(private.images, private.labels)
    span = torch.linalg.qr(x.T).Q  # (in, n)
    V = torch.linalg.svd(learned.weights[0], full_matrices=False).Vh[: len(x)]
    inside = (V @ span).square().sum(1)
    return {
        "loss": float(slope(network.forward(x)[-1], private.labels)[1]),
        "truth_residual": explained(network, rows, C, weights.target(seen.model, seen.released, FIRST_LAYER))[0],
        "two_inside": float(inside[:2].mean().sqrt()),
        "all_inside": float(inside.mean().sqrt()),
    }


def sentence(rows: list[Row]) -> str:
    """Mean SSIM by rank."""
    parts = [
        f"{row['images']} images, rank {row['rank']}, "
        + (row["note"].rstrip(".") or f"{row['left_hand_side']}: {row['mean_ssim']:.2f}")
        for row in rows
    ]
    blind = next((f" (mean image {row['mean_image_ssim']:.2f})" for row in rows[::-1] if "mean_ssim" in row), "")
    return f"Mean SSIM of images out of composed adapters{blind}. " + "; ".join(parts) + "."
