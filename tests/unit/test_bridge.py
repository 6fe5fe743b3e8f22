"""Decoders from an adapter to the gradient: exact where the sketch determines it, better than the pseudo-inverse elsewhere."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradleak.attacks.decoders.mlp import MLP
from gradleak.attacks.decoders.pairs import batches, factors, identity, measure, sketched_moment
from gradleak.attacks.decoders.readout import decode
from gradleak.attacks.decoders.ridge import PseudoInverse, Ridge, k_means
from gradleak.attacks.decoders.unet import UNet
from gradleak.errors import BadInput
from gradleak.formats.observation_file import save_observation
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.tensors import Tensors, flatten
from gradleak.observations.training import Recipe
from gradleak.victims.training import train
from oracles import gradient_by_autograd

SHAPE = (1, 8, 8)
ONE_STEP = Recipe(learning_rate=0.1, steps=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapter_of(
    module: nn.Module, name: str, modules: list[str], rank: int | None, *, seed: int = 0
) -> PictureObservation:
    """An adapter at PEFT's start, B = 0; rank None: as many as each layer has inputs, so that nothing is lost."""
    generator, start = seeded(seed), {}
    for layer in modules:
        W = module.get_submodule(layer).weight
        assert isinstance(W, Tensor)
        r = rank or W[0].numel()
        start[f"{layer}.lora_A"] = torch.randn(r, *W.shape[1:], generator=generator) / W[0].numel() ** 0.5
        start[f"{layer}.lora_B"] = torch.zeros(len(W), r, *[1] * (W.dim() - 2))
    return Observation(
        model=Model.of(module, Architecture(name, SHAPE, 10)),
        release=Adapter(start=start, scaling=dict.fromkeys(modules, 2.0), recipe=ONE_STEP),
        released={f"{layer}.lora_B": start[f"{layer}.lora_B"] for layer in modules},
        batch_size=1,
    )


def begun(observation: PictureObservation, start: Tensors) -> PictureObservation:
    """The same adapter with another start."""
    return replace(observation, release=replace(observation.adapter, start=start))


def small_convnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(192, 10))


def released_after(adapter: PictureObservation, images: Tensor, labels: Tensor) -> PictureObservation:
    return replace(adapter, released={k: v.detach() for k, v in adapter.simulate(images, labels).items()})


def true_gradient(module: nn.Module, adapter: PictureObservation, images: Tensor, labels: Tensor) -> Tensors:
    gradient = gradient_by_autograd(module, images, labels)
    return {f"{layer}.weight": gradient[f"{layer}.weight"] for layer in adapter.adapter.scaling}


def cosine(a: Tensors, b: Tensors) -> float:
    return float(torch.cosine_similarity(flatten(a), flatten(b), dim=0))


LINEAR = ["2", "4", "6"]  # the linear layers of "mlp"
MakeAdapter = Callable[..., Adapter]


@pytest.fixture(scope="module")
def public() -> Pictures:
    return load("digits", "train", limit=1000)


@pytest.fixture(scope="module")
def private() -> Pictures:
    return load("digits", "test", limit=20)


@pytest.fixture(scope="module")
def network(public: Pictures) -> nn.Module:
    module = Architecture("mlp", SHAPE, 10).build(seed=0)
    train(module, replace(public, images=public.images[:300], labels=public.labels[:300]), epochs=2, seed=0)
    return module


@pytest.fixture(scope="module")
def adapter(network: nn.Module) -> PictureObservation:
    return adapter_of(network, "mlp", LINEAR, rank=4)


@pytest.fixture(scope="module")
def ridge(adapter: PictureObservation, public: Pictures) -> Ridge:
    return Ridge.fit(adapter, public.images, public.labels, generator=seeded())


def mean_cosine(
    decoder: Callable[[PictureObservation], PictureObservation],
    network: nn.Module,
    adapter: PictureObservation,
    pictures: Pictures,
) -> float:
    total = 0.0
    for i in range(len(pictures.images)):
        x, y = pictures.images[i : i + 1], pictures.labels[i : i + 1]
        total += cosine(decoder(released_after(adapter, x, y)).released, true_gradient(network, adapter, x, y))
    return total / len(pictures.images)


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_factors_are_those_of_each_picture_alone(
    network: nn.Module, adapter: PictureObservation, public: Pictures
) -> None:
    convnet = small_convnet()
    convolutional = adapter_of(convnet, "convnet", ["0", "2", "5"], rank=2)
    x, y = public.images[:3], public.labels[:3]
    for module, observed in ((network, adapter), (convnet, convolutional)):
        found = factors(observed, x, y)
        for i in range(3):
            for layer, G in true_gradient(module, observed, x[i : i + 1], y[i : i + 1]).items():
                X, delta = found[layer.removesuffix(".weight")]
                made = (delta[i].T @ X[i]).view_as(G)
                assert (made - G).norm() <= 1e-5 * G.norm()  # rounding of float32


def test_sketches_and_moments_equal_a_loop_over_gradients(
    network: nn.Module, adapter: PictureObservation, public: Pictures
) -> None:
    x, y = public.images[:7], public.labels[:7]
    seen = 0
    for rows, found in batches(adapter, x, y, size=3):
        for sketch, S, pair in found:
            for i, S_i, moment in zip(range(7)[rows], S, sketched_moment(S, pair), strict=True):
                G = true_gradient(network, adapter, x[i : i + 1], y[i : i + 1])[f"{sketch.module}.weight"]
                naive = torch.zeros(G.shape[1], G.shape[1])  # G^T G, row by row of G
                for row in G:
                    naive += torch.outer(row, row)
                torch.testing.assert_close(S_i, G @ sketch.through.T, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(moment, sketch.through @ naive, rtol=1e-4, atol=1e-6)
                seen += 1
    assert seen == 7 * len(LINEAR)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_pairs_are_what_the_adapter_would_release(factor: float, adapter: PictureObservation, public: Pictures) -> None:
    # With B away from zero, the gradient is taken at W + s B A.
    start = {
        k: v if k.endswith("A") else factor * torch.randn(v.shape, generator=seeded())
        for k, v in adapter.adapter.start.items()
    }
    adapter = begun(adapter, start)
    x, y = public.images[:1], public.labels[:1]
    [(_, found)] = batches(adapter, x, y)
    for sketch, (_, S, pair) in zip(released_after(adapter, x, y).sketches(), found, strict=True):
        assert (sketch.measured - S[0]).norm() <= 1e-5 * S.norm()
        torch.testing.assert_close(measure(sketch, pair), S)


# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 64])
def test_ridge_satisfies_the_sketch_equation(
    groups: int, adapter: PictureObservation, public: Pictures, private: Pictures
) -> None:
    fitted = Ridge.fit(
        adapter, public.images[:300], public.labels[:300], generator=seeded(), groups=groups, softmax=False
    )
    observed = released_after(adapter, private.images[:2], private.labels[:2])
    decoded = fitted(observed).released
    for sketch in observed.sketches():
        explained = decoded[f"{sketch.module}.weight"] @ sketch.through.T
        assert (explained - sketch.measured).norm() <= 1e-5 * sketch.measured.norm()  # float32; the solution is exact


def test_convolutions_are_decoded(public: Pictures, private: Pictures) -> None:
    adapter = adapter_of(small_convnet(), "convnet", ["0", "2", "5"], rank=3)
    fitted = Ridge.fit(adapter, public.images[:64], public.labels[:64], generator=seeded(), softmax=False)
    observed = released_after(adapter, private.images[:1], private.labels[:1])
    decoded = fitted(observed).released
    for sketch in observed.sketches():
        explained = decoded[f"{sketch.module}.weight"].flatten(1) @ sketch.through.T
        assert (explained - sketch.measured).norm() <= 1e-5 * sketch.measured.norm()


def test_full_rank_adapter_is_decoded_exactly(network: nn.Module, public: Pictures, private: Pictures) -> None:
    full = adapter_of(network, "mlp", LINEAR, rank=None).to(torch.float64)
    fitted = Ridge.fit(full, public.images[:100].double(), public.labels[:100], generator=seeded(), softmax=False)
    x, y = private.images[:3].double(), private.labels[:3]
    G = true_gradient(copy.deepcopy(network).double(), full, x, y)
    for decoder in (fitted, PseudoInverse()):
        made = decoder(released_after(full, x, y)).released
        for name in G:
            assert (made[name] - G[name]).norm() <= 1e-4 * G[name].norm()


def test_both_factors_are_explained_where_both_are_released(
    network: nn.Module, adapter: PictureObservation, public: Pictures, private: Pictures
) -> None:
    start = {
        k: v if k.endswith("A") else torch.randn(v.shape, generator=seeded()) / 50
        for k, v in adapter.adapter.start.items()
    }
    both = replace(begun(adapter, start), released={k: torch.zeros_like(v) for k, v in start.items()})
    fitted = Ridge.fit(both, public.images[:300], public.labels[:300], generator=seeded(), softmax=False)
    observed = released_after(both, private.images[:1], private.labels[:1])
    assert len(observed.sketches()) == 2 * len(LINEAR)
    decoded = fitted(observed)
    for sketch in observed.sketches():
        M = decoded.released[f"{sketch.module}.weight"]
        explained = (M if sketch.side == "right" else M.T) @ sketch.through.T
        assert (explained - sketch.measured).norm() <= 1e-4 * sketch.measured.norm()
    merged = both.adapter.merged(both.model, {})  # the gradient was taken there, not at the base model's weights
    assert all(torch.equal(decoded.model.parameters[name], merged[name]) for name in merged)


# --- quality --------------------------------------------------------------------------------------------------------


def test_ridge_beats_the_pseudo_inverse_on_unseen_digits(
    network: nn.Module, adapter: PictureObservation, ridge: Ridge, public: Pictures, private: Pictures
) -> None:
    # Rank 4 of 64 and 256 inputs: the pseudo-inverse keeps a share r / in of the energy, a cosine of 0.13 to 0.25.
    inverse = mean_cosine(PseudoInverse(), network, adapter, private)
    plain, grouped, softmax = (
        mean_cosine(
            Ridge.fit(adapter, public.images, public.labels, generator=seeded(), groups=groups, softmax=use),
            network,
            adapter,
            private,
        )
        for groups, use in ((1, False), (64, False), (1, True))
    )
    assert 0.1 < inverse < 0.25
    assert plain > inverse + 0.5
    assert min(grouped, softmax) > plain + 0.02  # each part earns its place: 0.03 to 0.08 on three draws of A
    assert mean_cosine(ridge, network, adapter, private) > max(grouped, softmax)


def test_trained_decoders_learn(
    network: nn.Module, adapter: PictureObservation, public: Pictures, private: Pictures
) -> None:
    inverse, losses = mean_cosine(PseudoInverse(), network, adapter, private), list[float]()
    mlp = MLP.fit(
        adapter,
        public.images,
        public.labels,
        generator=seeded(),
        on_step=lambda step, steps, loss: losses.append(loss),
        steps=30,
    )
    assert sum(losses[-5:]) < sum(losses[:5])
    assert mean_cosine(mlp, network, adapter, private) > inverse + 0.5
    losses.clear()
    unet = UNet.fit(
        adapter,
        public.images,
        public.labels,
        generator=seeded(),
        on_step=lambda step, steps, loss: losses.append(loss),
        steps=8,
    )
    assert sum(losses[-3:]) < sum(losses[:3])
    few = replace(private, images=private.images[:8], labels=private.labels[:8])
    assert mean_cosine(unet, network, adapter, few) > inverse + 0.1  # 8 steps of two pictures are few


def test_softmax_gives_the_residual_and_the_features(
    network: nn.Module, adapter: PictureObservation, ridge: Ridge, private: Pictures
) -> None:
    # Ten classes give nine equations beside the four of the sketch. delta = p - onehot is known up to its length, which
    # the features' distribution tells: within 10 % for the median digit.
    errors, cosines = [], []
    W, b = adapter.model.parameters["6.weight"], adapter.model.parameters["6.bias"]
    for i in range(len(private.images)):
        x, y = private.images[i : i + 1], private.labels[i : i + 1]
        sketch = released_after(adapter, x, y).sketches()[-1]
        G = decode(sketch, W, b, ridge.last["6/mean"], ridge.last["6/covariance"])
        assert G is not None
        true = true_gradient(network, adapter, x, y)["6.weight"]
        errors.append(float((G.norm() / true.norm()).log().abs()))
        cosines.append(float(torch.cosine_similarity(G.flatten(), true.flatten(), dim=0)))
    assert torch.tensor(errors).median() < 0.1
    assert sum(cosines) / len(cosines) > 0.9


def test_softmax_is_left_alone_where_its_equation_does_not_hold(
    adapter: PictureObservation, ridge: Ridge, private: Pictures
) -> None:
    W, b = adapter.model.parameters["6.weight"], adapter.model.parameters["6.bias"]
    mean, covariance = ridge.last["6/mean"], ridge.last["6/covariance"]
    two = private.labels[0] != private.labels
    other = int(two.nonzero()[0])
    batch = released_after(adapter, private.images[[0, other]], private.labels[[0, other]])
    assert decode(batch.sketches()[-1], W, b, mean, covariance) is None
    nothing = replace(adapter.sketches()[-1], measured=torch.zeros(10, 4))
    assert decode(nothing, W, b, mean, covariance) is None
    unscaled = replace(
        batch, release=replace(batch.adapter, recipe=None)
    )  # without a recipe, only directions are known
    assert bool(flatten(ridge(unscaled).released).isfinite().all())


def test_k_means_finds_separate_groups() -> None:
    truth = torch.arange(60) % 3
    points = 10 * torch.eye(3)[truth] + torch.rand(60, 3, generator=seeded())
    _, owner = k_means(points, 12, seeded())  # more centres than groups: each serves one group only
    assert all(len(set(truth[owner == k].tolist())) <= 1 for k in range(12))


# --- contract -------------------------------------------------------------------------------------------------------


def test_decoded_gradient_is_an_observation(ridge: Ridge, adapter: PictureObservation, private: Pictures) -> None:
    observed = released_after(adapter, private.images[:1], private.labels[:1])
    before = identity(observed)
    decoded = ridge(observed)
    assert set(decoded.released) == {f"{layer}.weight" for layer in LINEAR}
    assert set(decoded.model.frozen) == set(adapter.model.parameters) - set(decoded.released)
    assert decoded.simulate(private.images[:1], private.labels[:1]).keys() == decoded.released.keys()
    assert identity(observed) == before
    inverse = PseudoInverse.fit(adapter, private.images, private.labels, generator=seeded())(observed)
    assert all(torch.equal(inverse.released[k], v) for k, v in observed.as_gradient().items())


def test_equal_seeds_give_equal_bits_and_survive_the_disk(
    adapter: PictureObservation, public: Pictures, private: Pictures, tmp_path: Path
) -> None:
    observed = released_after(adapter, private.images[:1], private.labels[:1])
    x, y = public.images[:100], public.labels[:100]
    fits: list[Callable[[], Ridge | MLP | UNet]] = [
        lambda: Ridge.fit(adapter, x, y, generator=seeded(3)),
        lambda: MLP.fit(adapter, x, y, generator=seeded(3), steps=2),
        lambda: UNet.fit(adapter, x, y, generator=seeded(3), steps=2),
    ]
    for fit in fits:
        first, second = fit(), fit()
        first.save(tmp_path / "decoder")
        loaded = type(first).load(tmp_path / "decoder")
        answers = [flatten(decoder(observed).released) for decoder in (first, second, loaded)]
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])
    with pytest.raises(BadInput, match="kind unet, not ridge"):
        Ridge.load(tmp_path / "decoder")


def test_other_adapters_and_models_are_refused(network: nn.Module, adapter: PictureObservation, ridge: Ridge) -> None:
    altered = copy.deepcopy(network)
    altered[0:3][2].bias.data[0] += 1e-3  # type: ignore[index]
    for other in (
        adapter_of(network, "mlp", LINEAR, rank=4, seed=1),
        adapter_of(network, "mlp", LINEAR[1:], rank=4),
        adapter_of(altered, "mlp", LINEAR, rank=4),
    ):
        for decoder in (ridge, MLP(ridge.fitted, {}), UNet(ridge.fitted, {})):
            with pytest.raises(BadInput, match="fitted to another"):
                decoder(other)


def test_foreign_files_are_refused(adapter: PictureObservation, private: Pictures, tmp_path: Path) -> None:
    released = {name: torch.zeros_like(p) for name, p in adapter.model.parameters.items()}
    observed = Observation(model=adapter.model, released=released)
    save_observation(observed, tmp_path / "observation")
    (tmp_path / "text").write_text("no decoder")
    for file, words in (("observation", "not a decoder file"), ("text", "not a readable"), ("nowhere", "no file")):
        for decoder in (Ridge, MLP, UNet):
            with pytest.raises(BadInput, match=words):
                decoder.load(tmp_path / file)


def test_what_cannot_be_decoded_is_refused(adapter: PictureObservation, public: Pictures) -> None:
    x, y = public.images[:4], public.labels[:4]
    for decoder in (Ridge, MLP, UNet):
        with pytest.raises(BadInput, match="labels go from 0 to 10"):
            decoder.fit(adapter, x, torch.tensor([0, 1, 2, 10]), generator=seeded())
        with pytest.raises(BadInput, match="labelled pictures"):
            decoder.fit(adapter, x[:, :, 1:], y, generator=seeded())
    mute = replace(adapter, released={k: v for k, v in adapter.adapter.start.items() if k.endswith("A")})
    with pytest.raises(BadInput, match="measures no gradient"):  # A's change is s B^T G, and B starts at zero
        Ridge.fit(mute, x, y, generator=seeded())
    normed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    batched = adapter_of(normed, "normed", ["3"], rank=2)
    with pytest.raises(BadInput, match="BatchNorm in train mode"):
        factors(replace(batched, model=batched.model.assume(mode="train")), x, y)
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(BadInput, match="ungrouped"):
        factors(adapter_of(grouped, "grouped", ["1"], rank=2), x, y)
