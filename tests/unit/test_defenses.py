"""Defenses as values: what each shares, against its definition written with loops; what an attacker who knows it uses; and sentences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradleak.errors import BadInput
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.defense_names import DEFENSES, Chosen, named
from gradleak.observations.defenses import (
    Defense,
    GaussianNoise,
    Quantised,
    RelativeNoise,
    Sign,
    StochasticallyQuantised,
    TopK,
    defended,
    deviations,
)
from gradleak.observations.model import Model
from gradleak.observations.private_step import ClippedNoise, PrivateStep
from gradleak.observations.soteria import Soteria
from gradleak.observations.tensors import Tensors, flatten
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient, share_update

MLP = Architecture("mlp", (1, 8, 8), 10)
BITS = (2, 4, 8, 16)


def gradients(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (40, 30), "b": (50,), "c": (6, 3, 3, 3)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def shared(defense: Defense, released: Tensors, seed: int = 0) -> Tensors:
    return defended(released, (defense,), torch.Generator().manual_seed(seed))


def model() -> Model[Architecture]:
    return Model.of(MLP.build(0), MLP)


def private(*rows: int) -> Pictures:
    return load("digits", indices=rows)


# --- What is shared ---


@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_to_the_nearest_of_so_many_steps(bits: int) -> None:
    """Written with numpy: of 2^(bits - 1) - 1 steps up to the largest entry, the nearest."""
    whole = gradients()
    for name, tensor in shared(Quantised(bits), whole).items():
        step = np.abs(whole[name].numpy()).max() / (2 ** (bits - 1) - 1)
        steps = step * np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
        distance = np.abs(steps[:, None] - whole[name].numpy().ravel()[None])
        assert np.allclose(np.abs(tensor.numpy() - whole[name].numpy()).ravel(), distance.min(0), atol=1e-12)
        assert len(set(tensor.flatten().tolist())) <= 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
def test_qsgd_keeps_the_mean_and_goes_to_a_neighbour(bits: int) -> None:
    """Alistarh et al., lemma 3.1 (i). The mean of 400 has a deviation of at most half a step / 20; 1,362 numbers: 5 deviations."""
    whole, count = gradients(), 400
    mean = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for seed in range(count):
        for name, tensor in shared(StochasticallyQuantised(bits), whole, seed).items():
            step = whole[name].abs().max() / (2 ** (bits - 1) - 1)
            assert float((tensor - whole[name]).abs().max()) <= float(step) * (1 + 1e-9)
            mean[name] += tensor / count
    for name, tensor in mean.items():
        step = float(whole[name].abs().max()) / (2 ** (bits - 1) - 1)
        assert float((tensor - whole[name]).abs().max()) < 5 * step / 2 / count**0.5


def test_noise_in_shares_of_the_norm() -> None:
    """Of 1,412 numbers the norm of noise is known to 1 / sqrt(2 x 1,412) = 1.9 %: four deviations. What an attacker takes for the
    deviation is found from the release alone, to the same."""
    whole, share = gradients(), 0.3
    noisy = shared(RelativeNoise(share), whole)
    noise = flatten(noisy) - flatten(whole)
    assert float(noise.norm() / flatten(whole).norm()) == pytest.approx(share, rel=0.08)
    expected = share * float(flatten(whole).norm()) / len(noise) ** 0.5
    assert float(deviations(noisy, (RelativeNoise(share),))["b"]) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [Quantised, StochasticallyQuantised])
def test_the_noise_of_rounding_is_known_from_what_was_shared(kind: Callable[[int], Defense], bits: int) -> None:
    """1,200 numbers that are spread over many steps: the root mean square of the error is step / sqrt 12, or step / sqrt 6 at
    random, to 1 / sqrt(2 x 1,200) times the spread of its square, below 2: four deviations."""
    whole = gradients()
    after = shared(kind(bits), whole)
    error = float((after["a"] - whole["a"]).square().mean().sqrt())
    assert float(deviations(after, (kind(bits),))["a"]) == pytest.approx(error, rel=0.16)


def test_noise_adds_up_in_squares() -> None:
    known = deviations(gradients(), (GaussianNoise(0.3), Sign(), GaussianNoise(0.4)))
    assert [float(deviation) for deviation in known.values()] == pytest.approx([0.5] * 3)


def test_clipping_gives_what_a_private_step_gives() -> None:
    """The mean of gradients that are each cut to the norm, by a loop over samples."""
    clip = 0.5
    seen, secret = capture_gradient(model(), private(3, 4, 5), defenses=(ClippedNoise(clip, 0.0), TopK(0.5)))
    assert seen.release.private == PrivateStep(clip=clip, noise_multiplier=0.0, divisor=3.0)  # type: ignore[attr-defined]
    assert seen.defenses == (TopK(0.5),)
    total = 0 * flatten(seen.model.parameters)
    for i in range(3):
        alone, _ = capture_gradient(model(), private(3 + i))
        g = flatten(alone.released)
        total += g * min(1.0, clip / float(g.norm())) / 3
    kept = flatten(seen.released)
    assert torch.allclose(
        kept[kept != 0], total[kept != 0], atol=1e-6
    )  # float32: the sums of three differ in their order
    assert seen.residual(secret.inputs, secret.labels) < 1e-5


def test_soteria_hides_the_columns_of_the_most_telling_features() -> None:
    """|r_i| / ||dr_i/dx||, feature by feature with autograd: the columns that are missing are those of the largest."""
    seen, secret = capture_gradient(model(), private(3), defenses=(Soteria(0.25),))
    plain, _ = capture_gradient(model(), private(3))
    name = [name for name in plain.released if name.endswith("weight")][-1]
    x = secret.inputs.clone().requires_grad_()
    network = MLP.build(0).eval()
    *front, _ = network.children()
    r = torch.nn.Sequential(*front)(x)[0]
    ratio = [
        abs(float(f.detach())) / max(float(torch.autograd.grad(f, x, retain_graph=True)[0].norm()), 1e-30) for f in r
    ]
    hidden = set(np.argsort(ratio)[-round(0.25 * len(ratio)) :].tolist())
    gone = {i for i in range(len(ratio)) if not bool(seen.released[name][:, i].any())}
    silent = {
        i for i in range(len(ratio)) if not bool(plain.released[name][:, i].any())
    }  # a unit that is off tells nothing
    assert gone == hidden | silent
    assert all(torch.equal(t, plain.released[k]) for k, t in seen.released.items() if k != name)
    assert seen.residual(secret.inputs, secret.labels) < 1e-6


# --- What an attacker who knows it uses ---

CERTAIN = [TopK(0.1), Quantised(8), Quantised(4), Quantised(2), Soteria(0.5)]


@pytest.mark.parametrize("defense", CERTAIN, ids=str)
def test_the_truth_explains_the_release_to_who_knows_the_defense_only(defense: Defense) -> None:
    """Known, nothing is left at the truth but rounding; unknown, the defense itself is."""
    seen, secret = capture_gradient(model(), private(3, 4), defenses=(defense,), reveal_labels=True)
    hidden, _ = capture_gradient(model(), private(3, 4), defenses=(defense,), told=False)
    plain, _ = capture_gradient(model(), private(3, 4))
    assert seen.residual(secret.inputs, secret.labels) < 1e-5
    apart = flatten(hidden.released) - flatten(plain.released)
    expected = float(apart.norm() / flatten(hidden.released).norm())
    assert hidden.defenses is None
    assert hidden.residual(secret.inputs, secret.labels) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert expected > 1e-3


def test_what_is_compared_has_a_slope_wherever_the_defense_tells_something() -> None:
    """Signs and steps have none; what an attacker compares with has, so that a search can use it."""
    for defense in (Sign(), TopK(0.5), Quantised(8)):
        seen, secret = capture_gradient(model(), private(3), defenses=(defense,))
        x = torch.full_like(secret.inputs, 0.5).requires_grad_()
        distance = sum((t - seen.released[name]).square().sum() for name, t in seen.simulate(x, secret.labels).items())
        [slope] = torch.autograd.grad(distance, x)  # type: ignore[arg-type]
        assert bool(slope.isfinite().all())
        assert float(slope.norm()) > 0


def test_a_control_goes_through_the_same_defense() -> None:
    """The same pictures in place of somebody else's: the same release, bit by bit, where the defense is certain."""
    for defense in CERTAIN:
        seen, secret = capture_gradient(model(), private(3, 4), defenses=(defense,))
        other = seen.of_others(secret.inputs, secret.labels)
        assert all(torch.allclose(other.released[name], t, atol=1e-7) for name, t in seen.released.items())


def test_an_update_goes_through_its_defenses_once() -> None:
    gradient, secret = capture_gradient(model(), private(3), defenses=(TopK(0.2),), told=False)
    recipe = Recipe(learning_rate=0.1, steps=2)
    seen = share_update(gradient, secret, recipe, defenses=(TopK(0.2),))
    plain, _ = capture_gradient(model(), private(3))
    whole = share_update(plain, secret, recipe)
    expected = defended(whole.released, (TopK(0.2),), torch.Generator())
    assert seen.defenses is None
    assert all(torch.equal(t, expected[name]) for name, t in seen.released.items())


# --- Names, files and sentences ---

EVERY = (
    GaussianNoise(0.1),
    RelativeNoise(0.1),
    Sign(),
    TopK(0.1),
    Quantised(8),
    StochasticallyQuantised(4),
    Soteria(0.2),
)


@pytest.mark.parametrize("defense", EVERY, ids=str)
def test_a_defense_survives_flag_and_file(defense: Any, tmp_path: Path) -> None:
    name = next(name for name, kind in DEFENSES.items() if type(defense) is kind)
    assert named(":".join([name, *(f"{value:g}" for value in vars(defense).values())])) == defense
    seen, _ = capture_gradient(model(), private(3), defenses=(defense,))
    save_observation(seen, tmp_path / "o.safetensors")
    again = load_observation(tmp_path / "o.safetensors")
    assert again.defenses == (defense,)
    assert {"item": "defenses", "revealed": True, "detail": str(defense)} in again.threat_model()


def test_flags_are_taken_in_their_order_and_may_be_hidden() -> None:
    chosen = Chosen.of(("topk:0.1", "noise:0.01", "dp-sgd:1:0.8", "unknown"))
    assert chosen.defenses == (TopK(0.1), GaussianNoise(0.01), ClippedNoise(1.0, 0.8))
    assert chosen.known is None
    assert Chosen.of(()).known == ()


WRONG = {
    "There is no defense 'nose': did you mean noise": "nose:1",
    "The defense bits is given as bits:BITS, not as 'bits'": "bits",
    "The defense dp-sgd is given as dp-sgd:CLIP:NOISE_MULTIPLIER": "dp-sgd:1",
    "'top-k:most' is no defense: what follows the name are numbers": "top-k:most",
    "in 2 to 16 bits, not in 1": "bits:1",
    "in 2 to 16 bits, not in 17": "qsgd:17",
    "lies in (0, 1], not at 0": "top-k:0",
    "share of noise lies between 0": "relative-noise:-1",
    "DP-SGD cuts to a norm above 0": "dp-sgd:0:1",
    "Soteria hides lies between 0 and 1, not at 1": "soteria:1",
}


@pytest.mark.parametrize(("sentence", "text"), WRONG.items(), ids=WRONG.values())
def test_what_is_no_defense_is_refused_in_a_sentence(sentence: str, text: str) -> None:
    with pytest.raises(BadInput) as caught:
        named(text)
    assert sentence in str(caught.value)
    assert str(caught.value).count(". ") == 0  # one sentence


def test_defenses_that_do_not_fit_the_release_are_refused_in_a_sentence() -> None:
    with pytest.raises(BadInput, match="comes before every other defense"):
        capture_gradient(model(), private(3), defenses=(TopK(0.1), ClippedNoise(1, 1)))
    gradient, secret = capture_gradient(model(), private(3))
    with pytest.raises(BadInput, match="DP-SGD is a way to take gradients: it says nothing about an update"):
        share_update(gradient, secret, Recipe(learning_rate=0.1, steps=1), defenses=(ClippedNoise(1, 1),))
    with pytest.raises(BadInput, match="Soteria is for pictures"):
        Soteria(0.1).bound(model(), [[1, 2]])
    with pytest.raises(BadInput, match="applied where these are"):
        Soteria(0.1).apply({}, torch.Generator())
