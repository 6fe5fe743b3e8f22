"""Training images out of a converged LoRA adapter: compose W0 + s B A, and extract as from any trained weights.

The adapter is trained and saved by the PEFT library on a network that has learnt nothing yet, rank after rank, beside the
training of all weights; two images, then ten. What the images' gradients G should add up to is asked in three ways: the
composed weights W0 + s B A, the change s B A (the base model is known), and s B (A - A0) (PEFT's random start of A is known
too, as to anybody who knows the seed). Controls: the mean image, and the extraction from an adapter of other images.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.weights.kkt import KKT
from gradleak.audit.metrics import ssim
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.fully_connected import FullyConnected, Target, cone, explained
from gradleak.observations.releases import Adapter, Weights, product
from gradleak.observations.training import Recipe
from gradleak.studies.findings import Findings
from gradleak.studies.kkt import extracted, halves, mean_of, nearest, scores
from gradleak.victims.adapter import fine_tune
from gradleak.victims.weights import FullBatch, first_of_each, publish_weights, slope

RANKS = (1, 2, 4, 8, 16, 32, 64)
SIZES = {  # pictures per class, ranks, steps of training, steps of the extraction
    "quick": ((1,), (2,), 60, 40),
    "small": ((1, 5), RANKS, 2_000, 600),
    "paper": ((1, 5), RANKS, 20_000, 1_500),
}
RATE = 0.3
FIRST = Target(layers=(1.0, 0.0, 0.0))


def run(data: str, size: str, *, seed: int, device: str, start: Callable[[str], OnStep]) -> Iterator[Findings]:
    """Yields after every extraction; the findings so far."""
    source, size = ("digits", "quick") if data in ("embedded", "digits") else (data, size)
    counts, ranks, steps, search = SIZES[size]
    attack = KKT(steps=search, first_layer=True)
    rows = list[dict[str, Any]]()
    for per_class in counts:
        both = first_of_each(source, "train", 2 * per_class)
        private, others = halves(both)
        truth, mean = private.images, mean_of(source, per_class)
        shape = (both.images.shape[1], both.images.shape[2], both.images.shape[3])
        architecture = Architecture("homogeneous1000", shape, 2)
        for rank in (*ranks, None):
            (released, factors), (wrong, _) = (
                sides(architecture, pictures, rank, steps, seed) for pictures in (private, others)
            )
            for name, seen in released.items():
                on_step = start(f"{2 * per_class} images, rank {rank or 'full'}, {name}")
                found = extracted(attack, seen, seed, on_step)
                blind = extracted(attack, wrong[name], seed, on_step)
                own, another, middle = (
                    ssim(nearest(images, truth), truth) for images in (found.images, blind.images, mean)
                )
                rows.append(
                    {
                        "images": 2 * per_class,
                        "rank": rank or "full",
                        "left_hand_side": name,
                        **told(seen, private),
                        "factors_truth_residual": factors,
                        "residual": found.residual,
                        **scores(own),
                        "mean_image_ssim": float(middle.mean()),
                        "another_adapter_ssim": float(another.mean()),
                        "another_adapter_over_0.4": scores(another)["over_0.4"],
                    }
                )
                yield Findings(rows, sentence(rows))


def sides(
    architecture: Architecture, pictures: Pictures, rank: int | None, steps: int, seed: int
) -> tuple[dict[str, Weights], float | None]:
    """Left-hand sides by name, of an adapter, or of the training of all weights where the rank is None; and `in_factors`."""
    if rank is None:
        recipe = FullBatch(learning_rate=RATE, epochs=steps)
        module = architecture.build(seed).double()
        seen, _ = publish_weights(module, architecture, pictures, recipe, reveal_initial=True)
        return {"W": replace(seen, initial=None), "W - W0": seen}, None
    adapter, first = (adapted(architecture, pictures, rank, many, seed) for many in (steps, 1))
    # The first step moves B alone, which is zero before it: what it leaves of A is where A started.
    began = replace(adapter, start={**adapter.start, **{k: v for k, v in first.start.items() if k.endswith("lora_A")}})
    seen, known = composed(adapter), composed(began)
    base = {name: adapter.model.parameters[name].double() for name in seen.released}
    made = {"W0 + BA": seen, "BA": replace(seen, initial=base), "B(A - A0)": replace(seen, initial=known.released)}
    return made, in_factors(adapter, began, seen.network(), pictures)


def adapted(architecture: Architecture, pictures: Pictures, rank: int, steps: int, seed: int) -> Adapter:
    """What PEFT saves after so many full steps of gradient descent."""
    recipe = Recipe(optimizer="sgd", learning_rate=RATE, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        module = architecture.build(seed)
        adapter, _ = fine_tune(module, architecture, pictures, rank=rank, recipe=recipe, out=Path(folder), seed=seed)
    return adapter


def composed(adapter: Adapter) -> Weights:
    """W0 + s B A as trained weights in float64, whose biases were not trained."""
    exact = adapter.to(torch.float64)
    factors = {name: tensor.double() + exact.released.get(name, 0) for name, tensor in adapter.start.items()}
    made = {
        f"{module}.weight": exact.model.parameters[f"{module}.weight"]
        + s * product(factors[f"{module}.lora_A"], factors[f"{module}.lora_B"])
        for module, s in adapter.scaling.items()
    }
    frozen = tuple(name for name in exact.model.parameters if name not in made)
    model = replace(exact.model, parameters={**exact.model.parameters, **made}, frozen=frozen)
    return Weights(model=model, released=made, batch_size=adapter.batch_size)


def in_factors(adapter: Adapter, began: Adapter, network: FullyConnected, private: Pictures) -> float:
    """What the true images leave unexplained of A - A0 in the first layer, where it is asked to be sum_i lambda_i s B^T G_i.

    That is the stationarity of what was trained: A moves along dL/dA = s B^T dL/dW (Hu et al. 2021), W itself does not.
    """
    module = network.names[0].removesuffix(".weight")
    moved = (adapter.start[f"{module}.lora_A"] - began.start[f"{module}.lora_A"]).double()  # (rank, in)
    B = adapter.scaling[module] * adapter.released[f"{module}.lora_B"].double()  # (out, rank)
    x, delta = network.margins(private.images, private.labels)
    z = network.forward(x)
    for at in range(len(z) - 1, 0, -1):
        delta = (delta @ network.weights[at]) * (z[at - 1] > 0)
    signal = delta @ B  # (n, rank)
    K, t = (signal @ signal.T) * (x @ x.T), (signal * (x @ moved.T)).sum(1)
    share, size = cone(K, t), moved.square().sum()
    return float(((size - 2 * share @ t + share @ K @ share) / size).clamp_min(0).sqrt())


def told(seen: Weights, private: Pictures) -> dict[str, Any]:
    """The loss, what the true images leave unexplained of the first layer, and how far its row space lies in their span.

    inside: root mean square cosine between the two leading right singular vectors of what training made of the first layer,
    of all that there are as many of as images for `all_inside`, and the span of the images.
    """
    network, learned = seen.network(), seen.learned()
    x = network.inputs(private.images)
    rows, C = network.margins(private.images, private.labels)
    span = torch.linalg.qr(x.T).Q  # (in, n)
    V = torch.linalg.svd(learned.weights[0], full_matrices=False).Vh[: len(x)]
    inside = (V @ span).square().sum(1)
    return {
        "loss": float(slope(network.forward(x)[-1], private.labels)[1]),
        "truth_residual": explained(network, rows, C, seen.target(FIRST.layers))[0],
        "two_inside": float(inside[:2].mean().sqrt()),
        "all_inside": float(inside.mean().sqrt()),
    }


def sentence(rows: list[dict[str, Any]]) -> str:
    """Mean SSIM by rank."""
    parts = [
        f"{row['images']} images, rank {row['rank']}, {row['left_hand_side']}: {row['mean_ssim']:.2f}" for row in rows
    ]
    blind = f"mean image {rows[-1]['mean_image_ssim']:.2f}"
    return f"Mean SSIM of images out of composed adapters ({blind}). " + "; ".join(parts) + "."
