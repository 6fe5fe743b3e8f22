"""Learned inversion: GIT's generator, LTI's network, their training and their files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import trained
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.git import RIDGE, Git, Transcript, units
from gradleak.attacks.learned.lti import LTI
from gradleak.attacks.learned.pairs import Pairs, stream
from gradleak.audit.loop import audit
from gradleak.audit.metrics import psnr_db
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.tensors import fingerprint
from gradleak.victims.gradient import capture_gradient
from oracles import labels_of

SHAPE = (1, 8, 8)
LENET = Architecture("lenet", SHAPE, 10)
ATTACK: dict[str, Any] = {"git": Git, "lti": LTI}


def model(name: str = "lenet", seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> PictureModel:
    architecture = Architecture(name, shape, 10)
    return Model.of(architecture.build(seed).eval(), architecture)


@pytest.fixture(scope="module", params=["git", "lti"])
def generator(request: pytest.FixtureRequest) -> learned.Generator:
    return trained.generator(request.param)


def test_unseen_digits_come_back_better_than_their_mean(generator: learned.Generator) -> None:
    """The mean digit is at 0.073 mean squared error; a linear map alone would explain most of it."""
    unseen = load("digits", indices=range(100))
    seen = next(stream(model(), unseen, count=100))
    error = (generator(seen.gradients) - seen.images).square().mean()
    blind = (trained.public().images.mean(0) - unseen.images).square().mean()
    assert float(error) < 0.5 * float(blind)


def test_no_weight_of_the_leaked_model_enters(generator: learned.Generator) -> None:
    """Built from the structure only: another state of the architecture gives the same network."""
    build = trained.BUILD[generator.kind]
    networks = []
    for leaked in (model(), model(seed=1)):
        torch.manual_seed(0)
        networks.append(build(leaked, **generator.options).state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_the_same_bits_after_the_disk_and_as_an_attack(generator: learned.Generator, tmp_path: Path) -> None:
    private = load("digits", indices=[5])
    observation, _ = capture_gradient(Model.of(LENET.build(0), LENET), private)
    generator.save(tmp_path / "generator")
    attack = ATTACK[generator.kind](generator=tmp_path / "generator")
    state = torch.get_rng_state()
    before = fingerprint(observation.released)
    found = attack(observation, generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())
    assert fingerprint(observation.released) == before
    direct = generator({name: tensor[None] for name, tensor in observation.released.items()})[0]
    assert torch.equal(found.value, direct)
    assert labels_of(found) == private.labels.tolist()
    assert float(psnr_db(found.value, private.images)) > 12


def test_generators_of_something_else_are_refused(generator: learned.Generator, tmp_path: Path) -> None:
    path = tmp_path / "generator"
    generator.save(path)
    attack = ATTACK[generator.kind](generator=path)
    private = load("digits", indices=[5])

    def asked(name: str = "lenet", seed: int = 0, rows: tuple[int, ...] = (5,)) -> None:
        architecture = Architecture(name, SHAPE, 10)
        gradient, _ = capture_gradient(
            Model.of(architecture.build(seed).eval(), architecture), load("digits", indices=rows)
        )
        attack(gradient, generator=torch.Generator())

    with pytest.raises(BadInput, match=r"trained for .*lenet.* the observation is of .*mlp"):
        asked("mlp")
    with pytest.raises(BadInput, match="its weights or buffers differ"):
        asked(seed=1)
    with pytest.raises(BadInput, match="batches of 1, the observation is of 2"):
        asked(rows=(5, 6))
    gradient, _ = capture_gradient(Model.of(LENET.build(0), LENET), private)
    with pytest.raises(NotObserved, match="gradleak train"):
        replace(attack, generator=None)(gradient, generator=torch.Generator())
    with pytest.raises(NotObserved, match="of the kind"):
        ATTACK["lti" if generator.kind == "git" else "git"](generator=path)(gradient, generator=torch.Generator())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match="not a readable"):
        attack(gradient, generator=torch.Generator())


def test_a_secret_among_the_training_pictures_is_flagged(generator: learned.Generator, tmp_path: Path) -> None:
    generator.save(tmp_path / "generator")
    attack = {generator.kind: ATTACK[generator.kind](generator=tmp_path / "generator")}
    for pictures, seen in ((trained.public(), True), (load("digits", indices=[5]), False)):
        one = replace(pictures, images=pictures.images[:1], labels=pictures.labels[:1])
        observation, secret = capture_gradient(Model.of(LENET.build(0), LENET), one)
        [row] = list(audit(observation, attack, trained.public(), secret=replace(secret, source="")))
        assert ("secret_in_training" in {flag["name"] for flag in row.result["flags"]}) == seen


class Listener(nn.Module):
    """A generator that learns nothing, and writes down which shard was held out when which pairs came."""

    def __init__(self, model: PictureModel) -> None:
        super().__init__()
        self.weight, self.held, self.heard = nn.Parameter(torch.zeros(())), "at first", list[tuple[object, int]]()

    def prepare(self, shards: learned.Shards) -> None:
        assert self.heard == []

    def hold_out(self, shard: int | None) -> None:
        self.held = shard  # type: ignore[assignment]

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        self.heard += [(self.held, int(number)) for number in gradients["number"]]
        return self.weight * torch.ones(len(gradients["number"]), 1, *SHAPE)


def test_each_shard_is_learnt_with_what_was_solved_without_it() -> None:
    """A generator adds to a regression in closed form: pairs that this has seen would teach it to add nothing."""

    def shards() -> Iterator[Pairs]:
        for number in range(7):
            yield Pairs(torch.zeros(3, 1, *SHAPE), torch.zeros(3, 1), {"number": torch.full((3,), float(number))})

    made = learned.train("own", Listener, {}, model(), shards, epochs=2, batch=2, generator=torch.Generator())
    assert isinstance(made.network, Listener)
    assert made.network.heard == [(number, number) for _ in range(2) for number in range(7) for _ in range(3)]
    assert made.network.held is None  # and in use, with what was solved over all


def test_the_regression_of_a_shard_has_not_seen_it() -> None:
    """Against ridge regressions by numpy, one for each of five folds of the shards; the last has seen all."""
    shards = list(stream(model(), trained.public(), count=210, shard=30))  # seven: the first and the sixth share a fold
    network = Transcript(model(), width=8, hidden=8)
    network.prepare(lambda: iter(shards))
    first = network.bootstrap(shards[0].gradients).double().numpy()
    centre, spread = network.centre.double().numpy(), network.spread.double().numpy()
    np.testing.assert_allclose(centre, first.mean(0), atol=1e-5)
    known = [(network.bootstrap(s.gradients).double().numpy() - centre) / spread for s in shards]
    wanted = [(s.images.flatten(1) - network.mean_image).double().numpy() for s in shards]
    for shard in (*range(7), None):
        network.hold_out(shard)
        used = [i for i in range(7) if shard is None or i % 5 != shard % 5]
        x, y = (np.concatenate([rows[i] for i in used]) for rows in (known, wanted))
        candidates = [
            np.linalg.solve(x.T @ x / len(x) + weight * np.eye(x.shape[1]), x.T @ y / len(x)) for weight in RIDGE
        ]
        apart = [np.abs(network.slopes[network.fold].double().numpy() - c).max() / np.abs(c).max() for c in candidates]
        assert min(apart) < 1e-4, shard  # float32 keeps seven digits; which weight is best is not asked here
        assert sorted(apart)[1] > 1e-3, shard  # and the others are told apart
        seen = network(shards[1].gradients).flatten(1)  # at first the generator is its regression
        expected = torch.from_numpy(known[1]).float() @ network.slopes[network.fold] + network.mean_image
        torch.testing.assert_close(seen.detach(), expected, rtol=1e-3, atol=1e-4)


def test_batches_are_matched_in_their_best_order() -> None:
    """Against the Hungarian method."""
    found, true = (torch.rand(6, 4, 1, 3, 3, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    expected = []
    for a, b in zip(found, true, strict=True):
        cost = (a[:, None] - b[None]).square().mean((2, 3, 4))
        rows, columns = linear_sum_assignment(cost.numpy())
        expected.append(float(cost[rows, columns].mean()))
    assert float(learned.assigned_error(found, true)) == pytest.approx(sum(expected) / 6, rel=1e-5)


@pytest.mark.parametrize("kind", ["git", "lti"])
def test_a_batch_of_two_is_learnt(kind: str) -> None:
    made = trained.generator(kind, 2)
    assert made.trace[-1][1] < 0.8 * made.trace[0][1]
    seen = next(stream(model(), load("digits", indices=range(40)), count=20, batch=2))
    mean = trained.public().images.mean(0).expand_as(seen.images)
    error, blind = (learned.assigned_error(found, seen.images) for found in (made(seen.gradients), mean))
    assert float(error) < float(blind)


def test_layers_and_blocks_are_read_in_order() -> None:
    assert [u.name for u in units(model())] == ["1", "3", "5", "8"]
    assert units(model())[0].input == (1, 8, 8)
    residual = units(model("resnet20", shape=(3, 32, 32)))
    assert [u.name for u in residual] == ["1", "2", *[str(i) for i in range(4, 13)], "15"]
    assert all(name.startswith("4.") for name in residual[2].parameters)
    transformer = [u.name.rpartition("vit.")[2] for u in units(model("vit"))]
    assert transformer[:3] == ["embeddings", "layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("name", "shape"), [("resnet20", (3, 16, 16)), ("vit", SHAPE), ("mlp", SHAPE), ("convnet", SHAPE)]
)
def test_every_model_has_a_generator(name: str, shape: tuple[int, int, int]) -> None:
    leaked = model(name, shape=shape)
    network = Transcript(leaked, width=8, hidden=8)
    gradients = {k: torch.randn(2, *p.shape) for k, p in leaked.parameters.items()}
    assert network(gradients).shape == (2, 1, *shape)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.layer(self.layer(x.flatten(1))))
        return result


def test_a_layer_that_is_called_twice_is_named() -> None:
    leaked = Model.of(Twice(), LENET)
    with pytest.raises(BadInput, match="cannot read layer: it is called 2 times"):
        units(leaked)
