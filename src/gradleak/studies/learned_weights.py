"""Exact-GIT on perceptrons: how close recovered weights come to the leaked ones, and what they reconstruct, next to coarse GIT.

Scored are entries that pairs can tell, the last layer's up to a constant. Diverged: a layer's cosine below 0.99, or no number.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from gradleak.attacks.exact_git.exact_git import Recovered, invert
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.pairs import stream
from gradleak.audit.metrics import psnr_db
from gradleak.modalities.networks import Architecture, Normalise
from gradleak.observations.model import PictureModel
from gradleak.observations.tensors import Tensors
from gradleak.studies.data_sets import blueprint
from gradleak.studies.findings import Findings
from gradleak.studies.learned_victims import Trial, field_of, fit, found_for
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table

# height and width of the pictures, repeats, pairs, epochs of coarse GIT, unseen pictures
EFFORT: dict[Size, tuple[int, int, int, int, int]] = {
    "smoke": (8, 1, 600, 1, 20),
    "small": (16, 10, 3_000, 4, 100),
    "paper": (32, 10, 10_000, 30, 1_000),
}


def perceptron(depth: int, activation: type[nn.Module], shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """So many biased linear layers of 64 units."""
    widths = [shape[0] * shape[1] * shape[2], *[64] * (depth - 1), classes]
    first, *others = [nn.Linear(*pair) for pair in pairwise(widths)]
    hidden = [module for layer in others for module in (activation(), layer)]
    return nn.Sequential(Normalise(shape[0]), nn.Flatten(), first, *hidden)


relu3, relu5 = partial(perceptron, 3, nn.ReLU), partial(perceptron, 5, nn.ReLU)
sigmoid3, sigmoid5 = partial(perceptron, 3, nn.Sigmoid), partial(perceptron, 5, nn.Sigmoid)
VICTIMS = {"relu3": relu3, "relu5": relu5, "sigmoid3": sigmoid3, "sigmoid5": sigmoid5}


@dataclass(frozen=True)
class Setting:
    """repeat: of the victim, with other weights."""

    model: str
    repeat: int


def cell(setting: Setting, bench: Bench) -> Result:
    """The weights of one victim and what they reconstruct; and what coarse GIT does, of the first repeat."""
    side, _, pairs, epochs, unseen = EFFORT[bench.size]
    native, classes = blueprint(bench.data, "paper")
    shape, seed = (native[0], side, side), 100 * bench.seed + setting.repeat
    architecture = Architecture(f"{VICTIMS[setting.model].func.__module__}:{setting.model}", shape, classes)
    trial = Trial(model=architecture.name, pairs=pairs, epochs=epochs, unseen=unseen)
    victim = field_of(architecture, trial, bench.data, seed, f"pictures of {side}x{side}" if shape != native else "")
    began, generator = time.process_time(), torch.Generator().manual_seed(seed)
    shards = partial(stream, victim.model, victim.public, count=pairs, shard=50, seed=seed)
    network = learned.train("exact-git", Recovered, {}, victim.model, shards, epochs=0, generator=generator).network
    cost = {"recovery_seconds": time.process_time() - began}
    assert isinstance(network, Recovered)
    found = {"mean_image": victim.public.images.mean(0).expand_as(victim.private.images)}
    if setting.repeat == 0:
        found["git"] = found_for(fit(victim, trial, bench.size, seed), victim, victim.private)
    for name, biases in {"exact": True, "weights_alone": False}.items():
        found[name] = found_for(partial(each, network, biases, shape), victim, victim.private)
    psnr = {f"{n}_psnr_db": float(psnr_db(images, victim.private.images).mean()) for n, images in found.items()}
    return Result({"pairs": pairs}, [scores(network, victim.model) | psnr], notes=victim.notes, cost=cost)


def scores(network: Recovered, model: PictureModel) -> Row:
    """The cosine of each layer's weights, and the least share of their entries that was told."""
    cosines, shares = list[float](), list[float]()
    for layer in network.chain.names:
        true, known = model.parameters[f"{layer}.weight"], network.determined()[f"{layer}.weight"]
        true = true - true.mean(0) if layer == network.chain.names[-1] else true
        found = network.weights()[f"{layer}.weight"][known]
        cosines.append(float(torch.cosine_similarity(found, true[known], dim=0)) if known.any() else 0.0)
        shares.append(float(known.double().mean()))
    row: Row = {f"cosine_{number}": cosine for number, cosine in enumerate(cosines, 1)}
    diverged = not all(cosine >= 0.99 for cosine in cosines)
    return row | {"least_cosine": min(cosines), "diverged": diverged, "least_share_told": min(shares)}


def each(network: Recovered, biases: bool, shape: tuple[int, ...], gradients: Tensors) -> Tensor:
    """Pictures (n, 1, ...) from gradients of one each, those of hidden biases included, or by the recovered weights alone."""
    weights = {name: tensor.double() for name, tensor in network.weights().items()}
    known = {name: g.double() for name, g in gradients.items() if biases or name.endswith("weight")}
    top = gradients[f"{network.chain.names[-1]}.bias"].double()
    one_by_one = [{name: g[i] for name, g in known.items()} for i in range(len(top))]
    found = [invert(network.chain, weights, one, top[i : i + 1]) for i, one in enumerate(one_by_one)]
    return torch.stack(found).view(-1, 1, *shape).clamp(0, 1).float()


def tell(table: Table) -> Findings:
    """The worst repeat in words."""
    parts = []
    for name in (row["model"] for row in table.rows):
        columns = ("least_cosine", "weights_alone_psnr_db")
        cosine, alone = (min(table.sampled(column, model=name), default=0.0) for column in columns)
        lost, seeds = sum(table.sampled("diverged", model=name)), len(table.sampled("diverged", model=name))
        parts.append(f"{name} {cosine:.4f}, {lost} of {seeds} seeds diverged, pictures by these weights {alone:.0f} dB")
    return Findings(f"Least cosine of recovered to true weights over layers and seeds: {'; '.join(parts)}.")


STUDY = Study(
    name="learned-weights",
    question="Which weights of a model do pairs of public pictures and their gradients tell, and what do these reconstruct?",
    settings=lambda data, size: [Setting(name, repeat) for name in VICTIMS for repeat in range(EFFORT[size][1])],
    cell=cell,
    over=("repeat",),
    tell=tell,
)
