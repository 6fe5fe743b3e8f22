"""Exact-GIT on perceptrons: how close the weights recovered from pairs come to the leaked ones, layer by layer, over seeds;
and what they reconstruct, next to coarse GIT on the same pairs.

Scored are the entries that pairs can tell (leaked_weights.determined), the last layer up to a constant over the classes. A seed counts as
diverged if a layer's cosine is below 0.99 or not a number.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.exact_git.exact_git import Recovered, invert
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.pairs import Pairs, stream
from gradleak.modalities.networks import Architecture, Normalise
from gradleak.modalities.pictures import public_pool
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors
from gradleak.studies.data_sets import blueprint
from gradleak.studies.findings import Findings, Row, Size, Start, opening
from gradleak.studies.learned_victims import GIT, Field, fit, found_for, scores

WIDTH = 64
# height and width of the pictures, pairs, seeds, unseen pictures, epochs of coarse GIT
SIZES: dict[Size, tuple[int, int, int, int, int]] = {
    "smoke": (8, 600, 1, 20, 1),
    "small": (16, 3_000, 10, 100, 4),
    "paper": (32, 10_000, 10, 1_000, 30),
}


def perceptron(
    depth: int, activation: Callable[[], nn.Module], shape: tuple[int, int, int], classes: int
) -> nn.Sequential:
    """So many biased linear layers of 64 units."""
    layers: list[nn.Module] = [Normalise(shape[0]), nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], WIDTH)]
    for _ in range(depth - 2):
        layers += [activation(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers, activation(), nn.Linear(WIDTH, classes))


relu3, relu5 = partial(perceptron, 3, nn.ReLU), partial(perceptron, 5, nn.ReLU)
sigmoid3, sigmoid5 = partial(perceptron, 3, nn.Sigmoid), partial(perceptron, 5, nn.Sigmoid)
VICTIMS = ("relu3", "relu5", "sigmoid3", "sigmoid5")


def run(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every victim; the findings so far."""
    side, pairs, seeds, private, epochs = SIZES[size]
    native, classes = blueprint(data, "paper")
    rows, shape = list[Row](), (native[0], side, side)
    resized = f"pictures of {side}x{side}" if shape != native else ""
    public = public_pool(data, "train", shape=shape, limit=pairs)
    held = public_pool(data, "test", shape=shape, limit=private, seed=1)
    for name in VICTIMS:
        on_step, leaked = start(name), list[Row]()
        for number in range(seeds):
            architecture = Architecture(f"{__name__}:{name}", shape, classes)
            model = Model.of(architecture.build(seed + number).eval(), architecture)
            field = Field(model, public, held)
            leaked.append(recovered(field, pairs, seed + number))
            on_step(number + 1, seeds, min(leaked[-1]["cosines"]))
        made, _ = fit(field, "git", GIT[size], pairs=pairs, epochs=epochs, seed=seed, on_step=start("coarse GIT"))
        coarse = scores(found_for(made, field, held), held.images)
        blind = scores(public.images.mean(0).expand_as(held.images), held.images)
        controls = {"git_psnr_db": coarse["psnr_db"], "mean_image_psnr_db": blind["psnr_db"]}
        rows.append(row(name, pairs, leaked) | controls)
        yield findings(rows).after(opening(data, size, resized, *field.notes(size, pairs, private)))


def recovered(field: Field, pairs: int, seed: int) -> Row:
    """Of one leaked model: the cosine of each layer's weights, the share of their entries that was told, what unseen pictures are
    reconstructed to, CPU seconds of the recovery."""
    began = time.process_time()

    def shards() -> Iterator[Pairs]:
        return stream(field.model, field.public, count=pairs, shard=50, seed=seed)

    generator = torch.Generator().manual_seed(seed)
    network = learned.train("exact-git", Recovered, {}, field.model, shards, epochs=0, generator=generator).network
    seconds = time.process_time() - began
    assert isinstance(network, Recovered)
    cosines, shares = list[float](), list[float]()
    weights, determined = network.weights(), network.determined()
    for name in (f"{layer}.weight" for layer in network.chain.names):
        true = field.model.parameters[name]
        true = true - true.mean(0) if name.startswith(network.chain.names[-1]) else true
        known = determined[name]
        cosines.append(float(F.cosine_similarity(weights[name][known], true[known], dim=0)) if known.any() else 0.0)
        shares.append(float(known.double().mean()))
    shape = field.model.architecture.input_shape
    exact = scores(found_for(partial(each, network, shape, True), field, field.private), field.private.images)
    alone = scores(found_for(partial(each, network, shape, False), field, field.private), field.private.images)
    return {"cosines": cosines, "shares": shares, "seconds": seconds, "exact": exact, "alone": alone}


def each(network: Recovered, shape: tuple[int, ...], biases: bool, gradients: Tensors) -> Tensor:
    """Pictures (n, 1, ...) from gradients of one picture each; without the hidden biases' gradients, the recovered weights alone lead
    down to the first layer."""
    weights = {name: tensor.double() for name, tensor in network.weights().items()}
    top, found = network.chain.names[-1], list[Tensor]()
    for number in range(len(gradients[f"{top}.bias"])):
        gradient = {name: g[number].double() for name, g in gradients.items() if biases or name.endswith("weight")}
        delta = gradients[f"{top}.bias"][number].double()[None]
        found.append(invert(network.chain, weights, gradient, delta))
    return torch.stack(found).view(-1, 1, *shape).clamp(0, 1).float()


def row(name: str, pairs: int, leaked: list[Row]) -> Row:
    """The worst seed of each column."""
    least = [min(values) for values in zip(*(one["cosines"] for one in leaked), strict=True)]
    return {
        "model": name,
        "seeds": len(leaked),
        "pairs": pairs,
        **{f"cosine_{layer}": round(least[layer - 1], 5) if layer <= len(least) else None for layer in range(1, 6)},
        "diverged": sum(not min(one["cosines"]) >= 0.99 for one in leaked),
        "least_share_told": round(min(min(one["shares"]) for one in leaked), 3),
        "seconds": round(max(one["seconds"] for one in leaked), 1),
        "exact_psnr_db": min(one["exact"]["psnr_db"] for one in leaked),
        "weights_alone_psnr_db": min(one["alone"]["psnr_db"] for one in leaked),
    }


def findings(rows: list[Row]) -> Findings:
    """The table, and the least cosines in words."""
    parts = []
    for one in rows:
        cosines = [one[f"cosine_{layer}"] for layer in range(1, 6) if one[f"cosine_{layer}"] is not None]
        parts.append(f"{one['model']} {min(cosines):.4f}, {one['diverged']} of {one['seeds']} seeds diverged")
    return Findings(rows, "Least cosine of recovered to true weights over layers and seeds: " + "; ".join(parts) + ".")
