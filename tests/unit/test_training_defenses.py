"""Defenses that are a part of the training, against their definitions; what an attacker who knows them explains, and one who does not."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradleak.attacks.activation_patterns.activation_patterns import ActivationPatterns
from gradleak.attacks.seed import with_start_recovered
from gradleak.attacks.truncated import with_truncation_undone
from gradleak.errors import BadInput
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.modalities.losses import CrossEntropy
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.adapter import Adapter
from gradleak.observations.defense_names import Chosen, named
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import flatten
from gradleak.observations.training import Recipe
from gradleak.observations.truncation import truncated, untruncated
from gradleak.victims.adapter import fine_tune
from gradleak.victims.gradient import capture_gradient, share_update

MLP = Architecture("mlp", (1, 8, 8), 10)
FOUR = load("digits", indices=(3, 4, 5, 6))
LOCAL = Recipe(learning_rate=0.1, steps=3, batch_size=2)


def model(reduction: str = "mean") -> Model[Architecture]:
    return Model.of(MLP.build(0), MLP, criterion=CrossEntropy(reduction=reduction))  # type: ignore[arg-type]


def gradient(*texts: str, told: bool = True, reduction: str = "mean") -> tuple[PictureObservation, Tensor, Tensor]:
    defenses = Chosen.of(texts).defenses
    seen, secret = capture_gradient(model(reduction), FOUR, defenses=defenses, told=told)
    assert secret.labels is not None
    return seen, secret.inputs, secret.labels


def adapter(
    out: Path, *texts: str, steps: int = 5, optimizer: str = "sgd"
) -> tuple[PictureObservation, Tensor, Tensor]:
    recipe = Recipe(optimizer=optimizer, learning_rate=0.05, steps=steps, batch_size=2)  # type: ignore[arg-type]
    seen, secret = fine_tune(model(), FOUR, rank=4, out=out, recipe=recipe, defenses=texts, seed=3)
    assert secret.labels is not None
    return seen, secret.inputs, secret.labels


# --- What is shared, by its definition ---


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clients_share_the_mean_of_their_gradients(reduction: str) -> None:
    seen, x, y = gradient("clients:2", reduction=reduction)
    own = [torch.func.grad(seen.model.loss)(seen.model.parameters, x[i : i + 2], y[i : i + 2]) for i in (0, 2)]
    assert all(torch.allclose(t, (own[0][name] + own[1][name]) / 2, atol=1e-7) for name, t in seen.released.items())


def test_clients_share_the_mean_of_their_updates() -> None:
    """Each alone, two pictures in three steps."""
    seen, secret = capture_gradient(model(), FOUR, defenses=(named("clients:2"),))
    mean = share_update(seen, secret, LOCAL, defenses=(named("clients:2"),))
    own = []
    for rows in ((3, 4), (5, 6)):
        alone, kept = capture_gradient(model(), load("digits", indices=rows))
        own.append(share_update(alone, kept, LOCAL).released)
    assert all(torch.allclose(t, (own[0][name] + own[1][name]) / 2, atol=1e-6) for name, t in mean.released.items())


def test_mix_up_mixes_pictures_and_labels() -> None:
    """With soft labels written out: -sum_c t_c log p_c at x' = .7 x_i + .3 x_(i - 1), t = .7 e_i + .3 e_(i - 1), sample by sample."""
    seen, x, y = gradient("mix-up:0.7")
    leaves = {name: p.clone().requires_grad_() for name, p in seen.model.parameters.items()}
    total = torch.zeros(())
    for i in range(4):
        mixture = 0.7 * x[i] + 0.3 * x[i - 1]
        log_p = torch.func.functional_call(seen.model.module, leaves, (mixture[None],)).log_softmax(1)[0]
        total = total - (0.7 * log_p[y[i]] + 0.3 * log_p[y[i - 1]]) / 4
    exact = torch.autograd.grad(total, list(leaves.values()))
    assert all(torch.allclose(seen.released[name], g, atol=1e-7) for name, g in zip(leaves, exact, strict=True))


def test_the_mean_over_masks_is_what_is_simulated() -> None:
    """One step from B = 0 behind dropout of a quarter: all 2^6 masks of six inputs, each with its probability, in float64."""
    shape, p = Architecture("mlp", (1, 2, 3), 10), 0.25
    small = Model.of(shape.build(0).double(), shape)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 1, 2, 3, generator=generator, dtype=torch.float64), torch.tensor([4])
    A = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    B = torch.zeros(256, 3, dtype=torch.float64)
    release = Adapter(
        start={"2.lora_A": A, "2.lora_B": B}, scaling={"2": 1.0}, recipe=Recipe(learning_rate=1.0, steps=1), dropout=p
    )
    found = release.simulate(small, {"2.lora_B": B}, x, y)["2.lora_B"]

    mean, module = torch.zeros_like(B), small.solid()
    for mask in product((0, 1), repeat=6):
        leaf, kept = B.clone().requires_grad_(), torch.tensor(mask, dtype=torch.float64) / (1 - p)
        hook = module.get_submodule("2").register_forward_hook(
            lambda layer, args, out, leaf=leaf, kept=kept: out + (args[0] * kept) @ A.T @ leaf.T
        )
        [g] = torch.autograd.grad(torch.nn.functional.cross_entropy(module(x), y), leaf)
        hook.remove()
        mean -= (1 - p) ** sum(mask) * p ** (6 - sum(mask)) * g
    assert torch.allclose(found, mean, atol=1e-12)


def test_dropout_is_drawn_in_training_and_told_by_the_folder(tmp_path: Path) -> None:
    seen, *_ = adapter(tmp_path / "a", "lora-dropout:0.3", steps=1)
    plain, *_ = adapter(tmp_path / "b", steps=1)
    assert seen.adapter.dropout == 0.3
    assert "dropout 0.3, whose masks nobody knows" in seen.release.inexact()
    cosine = torch.cosine_similarity(flatten(seen.released), flatten(plain.released), dim=0)
    assert 0.3 < float(cosine) < 0.99  # of one mask a sample: 1 / sqrt(1 + p / (1 - p)) = .84 of equal inputs


# --- Who knows it, and who does not ---


@pytest.mark.parametrize("texts", [("clients:2",), ("mix-up:0.7",), ("clients:2", "mix-up:0.6", "top-k:0.5")])
def test_the_truth_explains_gradients_and_updates_to_who_knows(texts: tuple[str, ...], tmp_path: Path) -> None:
    """To rounding; to somebody who does not know, what the defense changed is left. Files keep it."""
    seen, x, y = gradient(*texts)
    save_observation(seen, tmp_path / "o.safetensors")
    again = load_observation(tmp_path / "o.safetensors")
    assert again.release == seen.release
    assert again.residual(x, y) < 1e-5
    defenses = Chosen.of(texts).defenses
    for told in (True, False):
        plain, secret = capture_gradient(model(), FOUR, defenses=defenses, told=told)
        update = share_update(plain, secret, LOCAL, defenses=defenses)
        assert (update.residual(x, y) < 1e-5) == told
    if texts != ("clients:2",):  # of which the mean of gradients is the gradient
        assert gradient(*texts, told=False)[0].residual(x, y) > 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_frozen_a_makes_every_step_known(optimizer: str, tmp_path: Path) -> None:
    """Where A is trained too and its start unknown, the truth explains several steps only roughly; frozen, to rounding. Who is not told, and
    finds the seed, sees that A has not moved."""
    seen, x, y = adapter(tmp_path / "a", "frozen-a", optimizer=optimizer)
    assert seen.residual(x, y) < 1e-5
    assert {"item": "initial adapter", "revealed": True, "detail": "A is as it began: B alone was trained"} in (
        seen.threat_model()
    )
    hidden, *_ = adapter(tmp_path / "b", "frozen-a", "unknown", optimizer=optimizer)
    assert hidden.residual(x, y) > 1e-3
    found = with_start_recovered(hidden)
    assert found.adapter.frozen_a
    assert found.residual(x, y) < 1e-5


def test_adapters_of_clients_and_of_mixtures_are_simulated(tmp_path: Path) -> None:
    for number, text in enumerate(("clients:2", "mix-up:0.7")):
        seen, x, y = adapter(tmp_path / str(number), text, "frozen-a")
        assert seen.residual(x, y) < 1e-5
        assert replace(seen, release=replace(seen.adapter, clients=1, mixup=1.0)).residual(x, y) > 1e-3


def test_truncation_is_undone_where_the_start_is_known(tmp_path: Path) -> None:
    """After any steps with A frozen, and after one without: what is left of B is B in the columns that were kept, to rounding. The start is
    found by its seed."""
    for number, (texts, steps) in enumerate(((("frozen-a",), 5), ((), 1))):
        seen, x, y = adapter(tmp_path / str(number), *texts, "svd:2", steps=steps)
        assert seen.residual(x, y) > 0.3  # at the A that it shows
        undone = with_truncation_undone(seen)
        assert (undone.adapter.origin, undone.adapter.seed) == ("recovered", 3)
        assert undone.residual(x, y) < 1e-4
        whole, *_ = adapter(tmp_path / f"{number}_whole", *texts, steps=steps)
        for name in whole.released:
            B, kept = whole.released[name], undone.released[name]
            assert float((B - kept).norm()) < float(B.norm())  # a projection of it
            assert torch.allclose(kept.T @ (B - kept), torch.zeros(4, 4), atol=1e-4 * float(B.norm()) ** 2)


def test_who_is_not_told_of_a_truncation_gets_a_picture(tmp_path: Path) -> None:
    """The rows of zeros that it leaves in A are no equations; they once made NaN of all others."""
    recipe = Recipe(learning_rate=0.05, steps=2)
    one, _ = fine_tune(
        model(),
        load("digits", indices=(3,)),
        rank=4,
        out=tmp_path,
        recipe=recipe,
        defenses=("svd:2", "unknown"),
        seed=3,
    )
    assert bool(ActivationPatterns()(one, generator=torch.Generator().manual_seed(0)).value.isfinite().all())


def test_untruncated_factors_have_the_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B, start = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((4, 9), (7, 4), (4, 9)))
    short_A, short_B = truncated(A, B, 2)
    back_A, back_B = untruncated(short_A, short_B, start)
    assert torch.allclose(back_B @ back_A, short_B @ short_A, atol=1e-10)


# --- Sentences ---


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    wrong = {
        "says nothing about an? gradient: A is not trained": ("frozen-a",),
        "says nothing about an? gradient: dropout of 0.1 before the adapter": ("lora-dropout:0.1",),
        "4 samples are not as many for each of 3 clients": ("clients:3",),
        "over 1 to 1,000,000 clients, not over 0": ("clients:0",),
        "goes with neither mix-up nor a mean over clients": ("mix-up:0.5", "dp-sgd:1:1"),
        "comes before every other defense": ("top-k:0.1", "mix-up:0.5"),
        "Mix-up keeps a share between 0 and 1 of each sample, not 1": ("mix-up:1",),
        "Dropout has a probability between 0 and 1, not 0": ("lora-dropout:0",),
    }
    for sentence, texts in wrong.items():
        with pytest.raises(BadInput, match=sentence):
            gradient(*texts)
    with pytest.raises(BadInput, match="says nothing about an adapter"):
        adapter(tmp_path, "dp-sgd:1:1")
