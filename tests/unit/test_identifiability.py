"""What can be known: against dense Jacobians and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from gradleak.audit import jacobian
from gradleak.audit.bound import (
    compare,
    determined,
    identifiability,
    posterior_variance,
    prior_of,
    singular_values,
)
from gradleak.audit.jacobian import jacobian_gram, jacobian_grams
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Update
from gradleak.observations.tensors import flatten
from gradleak.observations.training import Recipe
from oracles import dense_jacobian, lora_b_by_autograd, posterior_by_conditioning

LABELS = torch.tensor([1])
SCALING = 2.0


class TinyTransformer(nn.Module):
    """One pre-norm block of one head on 3x3 patches of 2x2 pixels: what makes a vision transformer, width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, 2)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        h = self.patches(images).flatten(2).transpose(1, 2)
        n = self.norm1(h)
        weights = (self.q(n) @ self.k(n).transpose(1, 2) / 8**0.5).softmax(-1)
        h = h + self.o(weights @ self.v(n))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        logits: Tensor = self.head(h.mean(1))
        return logits


class Twice(nn.Module):
    """A layer that is used two times, so that its gradient is no single product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(torch.tanh(self.inner(images.flatten(1)))))
        return logits


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=seeded(1), dtype=torch.float64)


def transformer() -> PictureModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model.of(TinyTransformer().double(), Architecture("tests:transformer", (1, 6, 6), 3))


def twice() -> PictureModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model.of(Twice().double(), Architecture("tests:twice", (1, 2, 2), 3))


def built(name: str, shape: tuple[int, int, int] = (1, 8, 8)) -> PictureModel:
    architecture = Architecture(name, shape, 4)
    return Model.of(architecture.build(0).double(), architecture)


def adapter(
    model: PictureModel, modules: list[str], rank: int, *, recipe: Recipe | None = None, seed: int = 0
) -> PictureObservation:
    start = {}
    for i, name in enumerate(modules):
        weight = model.parameters[f"{name}.weight"]
        A = torch.randn(rank, *weight.shape[1:], generator=seeded(seed + i), dtype=weight.dtype)
        start[f"{name}.lora_A"] = A / A[0].numel() ** 0.5
        start[f"{name}.lora_B"] = torch.zeros(len(weight), rank, *[1] * (weight.dim() - 2), dtype=weight.dtype)
    released = {name: tensor for name, tensor in start.items() if name.endswith("B")}
    release = Adapter(start=start, scaling=dict.fromkeys(modules, SCALING), recipe=recipe)
    return Observation(model=model, release=release, released=released, batch_size=1)


def gradient(model: PictureModel) -> PictureObservation:
    return Observation(model=model, released=dict(model.parameters))


def dense(o: PictureObservation, images: Tensor, labels: Tensor) -> np.ndarray:
    adapter, module = o.adapter, o.model.solid()
    A = {name: adapter.start[f"{name}.lora_A"] for name in adapter.scaling}
    rate = adapter.recipe.learning_rate if adapter.recipe else 1.0
    return dense_jacobian(
        lambda x: lora_b_by_autograd(module, x, labels, A, scaling=SCALING, learning_rate=rate), images
    )


def same_information(gram: Tensor, J: np.ndarray) -> None:
    """Singular values to 1e-6 down to 1e-5 of the largest, and what remains of the prior at four noises to 1e-6."""
    exact = np.linalg.svd(J, compute_uv=False)
    found = singular_values(gram, len(J)).numpy()
    matter = exact > 1e-5 * exact[0]
    assert np.abs(found[: len(exact)][matter] / exact[matter] - 1).max() < 1e-6
    C = 0.0625 * np.eye(J.shape[1])
    for noise in exact[0] * np.array([1e-5, 1e-4, 1e-2, 1.0]):
        remains = np.trace(np.linalg.inv(np.linalg.inv(C) + J.T @ J / noise**2))
        assert abs(float(posterior_variance(gram, noise, torch.from_numpy(C)).sum()) / remains - 1) < 1e-6


EVERY_LINEAR = ["q", "k", "v", "o", "up", "down", "head"]


def test_adapter_of_a_transformer_against_the_dense_jacobian() -> None:
    o, x = adapter(transformer(), EVERY_LINEAR, 2), pictures(1, 1, 6, 6)
    same_information(jacobian_gram(o, x, LABELS), dense(o, x, LABELS))


def test_adapter_of_convolutions_and_a_batch_against_the_dense_jacobian() -> None:
    recipe = Recipe(learning_rate=0.1, steps=1)
    o = adapter(built("lenet", (1, 5, 5)), ["1", "3", "8"], 2, recipe=recipe)
    x, y = pictures(2, 1, 5, 5), torch.tensor([0, 3])
    same_information(jacobian_gram(o, x, y, chunk=4), dense(o, x, y))  # 13 chunks are recorded; the last is not full


def test_a_float32_model_loses_no_more_than_its_rounding() -> None:
    o, x = adapter(transformer(), EVERY_LINEAR, 2), pictures(1, 1, 6, 6)
    exact, single = identifiability(o, x, LABELS), identifiability(o.to(torch.float32), x, LABELS)
    # 1e-5: float32 rounds to 6e-8 in each of the hundred or so operations through the network and back.
    np.testing.assert_allclose(single.posterior_std[1:], exact.posterior_std[1:], rtol=1e-5)
    np.testing.assert_allclose(single.posterior_std[0], exact.posterior_std[0], rtol=1e-4)


def test_gradient_and_update_against_the_dense_jacobian_of_simulate() -> None:
    model, x = twice(), pictures(2, 1, 2, 2)
    start, y = dict(model.parameters), torch.tensor([1, 2])
    recipe = Recipe(learning_rate=0.1, steps=2, batch_size=1)
    update = Observation(model=model, release=Update(recipe=recipe), released=start)
    for o in (gradient(model), update):
        J = dense_jacobian(lambda x, o=o: flatten(o.simulate(x, y)), x)  # type: ignore[misc]
        same_information(jacobian_gram(o, x, y), J)


@pytest.mark.parametrize("kind", ["adam", "two steps", "trained start", "A is released", "layer used twice"])
def test_adapters_that_are_no_plain_sketch(kind: str) -> None:
    model, modules, x = transformer(), ["q", "up"], pictures(1, 1, 6, 6)
    if kind == "layer used twice":
        model, modules, x = twice(), ["inner", "head"], pictures(1, 1, 2, 2)
    o = adapter(model, modules, 2)
    if kind == "adam":
        o = replace(o, release=replace(o.adapter, recipe=Recipe(optimizer="adam", learning_rate=0.1, steps=1)))
    elif kind == "two steps":
        o = replace(o, release=replace(o.adapter, recipe=Recipe(learning_rate=0.1, steps=2)))
    elif kind in ("trained start", "A is released"):
        noise = {k: torch.randn(v.shape, generator=seeded(), dtype=v.dtype) for k, v in o.adapter.start.items()}
        start = {k: v + 0.1 * noise[k] for k, v in o.adapter.start.items()}
        o = replace(o, release=replace(o.adapter, start=start))
        o = replace(o, released=start) if kind == "A is released" else o
    J = dense_jacobian(lambda x: flatten(o.simulate(x, LABELS)), x)
    gram = J.T @ J
    assert np.abs(jacobian_gram(o, x, LABELS).numpy() - gram).max() < 1e-10 * np.abs(gram).max()


def test_side_by_side_and_in_many_passes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = transformer(), pictures(1, 1, 6, 6)
    several = [adapter(model, EVERY_LINEAR, 2), adapter(model, ["q", "v"], 3, seed=5), adapter(model, ["head"], 1)]
    alone = [jacobian_gram(o, x, LABELS) for o in several]
    monkeypatch.setattr(jacobian, "HELD_BYTES", 36 * 8 * 70)  # 70 of the 169 rows at once: 3 passes
    seen: list[tuple[int, int]] = []
    together = jacobian_grams(several, x, LABELS, on_step=lambda step, steps, _: seen.append((step, steps)))
    for a, b in zip(together, alone, strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()
    assert seen == [(i, 6) for i in range(1, 7)]  # 3 passes of 36 columns, 32 at a time


def test_a_linear_release_has_the_closed_form() -> None:
    """At W = 0 all classes are equally likely: dL/dW = (1/4 - y) x^T is linear in x, and J^T J = 3/4 I."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4, bias=False)).double()
    nn.init.zeros_(net[1].weight)  # type: ignore[arg-type]
    o, x = gradient(Model.of(net, Architecture("tests:linear", (1, 3, 3), 4))), pictures(1, 1, 3, 3)
    found = identifiability(o, x, LABELS, noise_levels=(1e-3, 0.5, 10.0))
    np.testing.assert_allclose(found.singular_values, math.sqrt(0.75), rtol=1e-12)
    rms = math.sqrt(0.75 * float(x.square().sum()) / 36)
    remains = [1 / (1 / 0.25**2 + 0.75 / (level * rms) ** 2) for level in (1e-3, 0.5, 10.0)]
    np.testing.assert_allclose(found.noise_std, [1e-3 * rms, 0.5 * rms, 10 * rms], rtol=1e-12)
    np.testing.assert_allclose(np.square(found.posterior_std), remains, rtol=1e-10)
    np.testing.assert_allclose(found.psnr_db, -10 * np.log10(remains), rtol=1e-10)
    np.testing.assert_allclose(found.explained, 1 - np.array(remains) / 0.0625, rtol=1e-9)
    assert found.blind_psnr_db == pytest.approx(12.0412, abs=1e-4)  # -20 log10(0.25)
    assert found.determined == tuple(9 if 0.25 * math.sqrt(0.75) > level * rms else 0 for level in (1e-3, 0.5, 10.0))
    assert [found.information(level) for level in (1e-3, 0.5, 10.0)] == ["present", "partial", "absent"]
    assert found.sentence().startswith("This gradient holds 36 equations for 9 unknowns; at noise 0.001 of its size 9 ")
    assert ": the information is there. Whoever knows what such " in found.sentence()
    assert ": the information is absent. Whoever knows what such " in found.sentence(10.0)


def test_posterior_under_a_full_prior_is_gaussian_conditioning() -> None:
    rng = np.random.default_rng(0)
    J, root = rng.normal(size=(5, 8)), rng.normal(size=(8, 8))
    C = root @ root.T + 0.1 * np.eye(8)
    for noise in (1e-2, 1.0):
        found = posterior_variance(torch.from_numpy(J.T @ J), noise, torch.from_numpy(C))
        np.testing.assert_allclose(found, np.diag(posterior_by_conditioning(J, noise, C)), rtol=1e-8)


def test_a_full_prior_in_the_report() -> None:
    o, x = adapter(transformer(), ["q", "v"], 2), pictures(2, 1, 6, 6)
    y, public = torch.tensor([0, 2]), torch.rand(60, 1, 6, 6, generator=seeded(3)) + torch.rand(60, 1, 1, 1)
    C, J = prior_of(public), dense(o, x, y)
    found = identifiability(o, x, y, prior=C)
    both = np.kron(np.eye(2), C.numpy())  # the two pictures are independent
    for noise, std, count in zip(found.noise_std, found.posterior_std, found.determined, strict=True):
        remains = np.diag(posterior_by_conditioning(J, noise, both)).mean()
        assert std**2 == pytest.approx(remains, rel=1e-6)
        assert count == (np.linalg.svd(J @ np.linalg.cholesky(both), compute_uv=False) > noise).sum()
    assert found.blind_psnr_db == pytest.approx(-10 * math.log10(np.trace(both) / 72), rel=1e-9)


def test_a_biased_first_layer_determines_every_pixel() -> None:
    found = identifiability(gradient(built("mlp", (1, 4, 4))), pictures(1, 1, 4, 4), LABELS)
    assert found.determined[0] == found.unknowns == 16
    assert found.information(1e-4) == "present"
    assert found.determined == tuple(sorted(found.determined, reverse=True))  # more noise never tells more


def test_fewer_equations_than_unknowns() -> None:
    o = adapter(built("lenet"), ["8"], 1)  # 4 outputs of rank 1: 4 equations
    found = identifiability(o, pictures(1, 1, 8, 8), LABELS)
    assert found.equations == 4
    assert found.unknowns == 64
    assert 1 <= int((found.singular_values > 0).sum()) <= 4
    assert max(found.determined) <= 4
    assert found.explained[0] < 4 / 64 + 1e-9  # each equation explains one of 64 directions at most
    assert found.information(1e-4) == "absent"


def test_compare_is_each_alone() -> None:
    model, x = transformer(), pictures(1, 1, 6, 6)
    several = [adapter(model, ["q", "v"], 2), gradient(model)]
    for together, o in zip(compare(several, x, LABELS), several, strict=True):
        assert together.determined == identifiability(o, x, LABELS).determined
        assert together.release == o.release.name


def test_determined_counts_what_rises_above_the_noise() -> None:
    assert determined(torch.tensor([4.0, 2.0, 1.0, 0.0]), 0.3, prior_std=0.25) == 2  # 1, 0.5 > 0.3; 0.25, 0 are not


def test_prior_is_that_of_ledoit_and_wolf() -> None:
    images = torch.rand(12, 3, 2, 2, generator=seeded(), dtype=torch.float64).cumsum(3)
    theirs, shrinkage = ledoit_wolf(images.flatten(1).numpy())
    assert 0.01 < shrinkage < 1
    np.testing.assert_allclose(prior_of(images), theirs, rtol=1e-10)


def test_bad_input_is_refused_in_a_sentence() -> None:
    o, x = adapter(transformer(), ["q"], 2), pictures(1, 1, 6, 6)
    with pytest.raises(BadInput, match=r"pictures of \(batch, 1, 6, 6\)"):
        identifiability(o, x[0], LABELS)
    with pytest.raises(BadInput, match=r"pictures of \(batch, 1, 6, 6\)"):
        identifiability(o, pictures(1, 1, 8, 8), LABELS)
    with pytest.raises(BadInput, match="as many labels"):
        identifiability(o, x, torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="above zero"):
        identifiability(o, x, LABELS, noise_levels=(0.0,))
    with pytest.raises(BadInput, match="fit 36 unknowns"):
        identifiability(o, x, LABELS, prior=torch.eye(35))
    with pytest.raises(BadInput, match="not positive definite"):
        identifiability(o, x, LABELS, prior=torch.zeros(36, 36))
    with pytest.raises(BadInput, match="one model state"):
        compare([o, adapter(built("lenet", (1, 6, 6)), ["8"], 1)], x, LABELS)
    with pytest.raises(BadInput, match="choose one of"):
        identifiability(o, x, LABELS).sentence(0.5)
    with pytest.raises(BadInput, match="not finite"):
        jacobian_gram(o, x * math.nan, LABELS)
    with pytest.raises(BadInput, match="pixels in all at most"):
        jacobian_gram(o, x.expand(1_000, 1, 6, 6), LABELS.expand(1_000))
    with pytest.raises(BadInput, match="at least two"):
        prior_of(x)
    with pytest.raises(BadInput, match="all equal"):
        prior_of(torch.ones(3, 1, 2, 2))
    zero = replace(o, release=replace(o.adapter, start={k: v * 0 for k, v in o.adapter.start.items()}))
    with pytest.raises(BadInput, match="every released number is zero"):
        identifiability(zero, x, LABELS)
    with pytest.raises(BadInput, match="noise must be above zero"):
        posterior_variance(torch.eye(2), 0.0, torch.eye(2))
