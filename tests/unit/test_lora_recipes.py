"""The parts of the studies of adapters that carry an exact statement, and what studies of texts start from."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.weights.ntk import NTK
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import Model
from gradleak.observations.tensors import flatten
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies import dager_encoder, ntk, phase0, phase1, phase2, text_victims
from gradleak.studies.lora_victims import Base, blank, full_gradient, scores, trained
from gradleak.studies.text_victims import PACKAGE, Sources, encoder
from gradleak.victims.gradient import capture_gradient


@pytest.fixture(scope="module")
def base() -> Base:
    architecture = Architecture("convnet", (1, 8, 8), 10)
    public = public_pool("digits", "train", shape=(1, 8, 8), limit=300)
    rest = replace(public, images=public.images[99:], labels=public.labels[99:])
    private: Pictures = load("digits", indices=range(4))
    model = Model.of(architecture.build(0), architecture)
    return Base(model, rest, public.images[:99], private, GaussianPrior.fit(rest.images))


@pytest.mark.parametrize("value", phase0.COSINES)
def test_a_perturbed_gradient_has_exactly_that_cosine(base: Base, value: float) -> None:
    """Up to the rounding of its float32 sums over n entries, at most 8 sqrt(n) 2^-24 of the product of the lengths, but for
    a probability below 1e-7 if its rounding errors are independent (Higham and Mary 2019: 2 n exp(-lambda^2 / 2), lambda = 8).

    With that error in the projection of the noise and in each of two lengths, the cosine c is off by up to 2 sqrt(1 - c^2) times
    as much, and the length by less than that.
    """
    gradient = full_gradient(base, base.private.images[:1], base.private.labels[:1])
    other = phase0.perturbed(gradient, value, torch.Generator().manual_seed(0))
    g, p = (flatten(seen.released).double() for seen in (gradient, other))
    error = 8 * len(g) ** 0.5 * 2**-24
    tolerance = 2 * (1 - value**2) ** 0.5 * error + 4 * 2**-24  # each entry is rounded a few times, too
    assert float(p @ g / (p.norm() * g.norm())) == pytest.approx(value, abs=tolerance)
    assert float(p.norm() / g.norm()) == pytest.approx(1, abs=tolerance)


def test_each_tensor_keeps_its_place(base: Base) -> None:
    gradient = full_gradient(base, base.private.images[:1], base.private.labels[:1])
    unsorted = replace(gradient, released=dict(reversed(gradient.released.items())))
    same = phase0.perturbed(unsorted, 1.0, torch.Generator()).released
    assert all(torch.allclose(same[name], tensor, rtol=1e-6) for name, tensor in gradient.released.items())


def test_the_adapter_is_the_sketch_of_the_full_gradient(base: Base) -> None:
    images, labels = base.private.images[:2], base.private.labels[:2]
    adapter = trained(blank(base, 4, batch=2), images, labels)
    gradient = full_gradient(base, images, labels).released
    for sketch in adapter.sketches():
        M = gradient[f"{sketch.module}.weight"].flatten(1)
        expected = M @ sketch.through.T
        # S = G A^T exactly (one SGD step from B = 0); float32 sums
        assert torch.allclose(sketch.measured, expected, atol=1e-4 * float(expected.abs().max()))


def test_raw_is_minus_b_a(base: Base) -> None:
    adapter = trained(blank(base, 4), base.private.images[:1], base.private.labels[:1])
    module = base.modules[-1]
    B, A = adapter.released[f"{module}.lora_B"].double(), adapter.adapter.start[f"{module}.lora_A"].double()
    error = phase2.raw(adapter).released[f"{module}.weight"] + B @ A
    # a sum of four products in float32, whatever cancels: four roundings each, and their squares
    assert bool((error.abs() <= 4.001 * 2**-24 * (B.abs() @ A.abs())).all())


def test_scores_of_the_truth_and_of_the_mean(base: Base) -> None:
    truth = [base.private.images[:2], base.private.images[2:]]
    exact = scores(base, [batch.flip(0) for batch in truth], truth)  # matched within each batch
    assert (exact["beats_mean_psnr"], exact["top1_of_100"], exact["images"]) == (1.0, 1.0, 4)
    mean = base.public.images.mean(0, keepdim=True).expand(2, -1, -1, -1)
    blind = scores(base, [mean, mean], truth)
    assert blind["psnr_db"] == blind["mean_image_psnr_db"]
    assert blind["beats_mean_psnr"] == 0.0


def test_a_decoder_that_knows_has_cosine_one(base: Base) -> None:
    images, labels = base.private.images, base.private.labels
    queue = [full_gradient(base, images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    found = phase1.fidelity(base, lambda adapter: queue.pop(0), 4, 1, 1, 0, base.private)
    assert (found["cosine"], found["cosine_layers"], found["tested"]) == (1.0, 1.0, 4)


def test_every_row_of_the_map_has_its_place(base: Base) -> None:
    row = phase2.cell(base, 4, 2, 1, 3, 0, lambda _: lambda *_: None)
    assert (row["rank"], row["batch"], row["images"]) == (4, 2, 2)
    assert 0 <= row["explained"] <= 1
    assert len(phase2.findings([row]).plots) == 1


# --- Texts ---


def test_data_sets_beside_a_folder_are_found(tmp_path: Path) -> None:
    for name in ("sst2", "rotten_tomatoes"):
        (tmp_path / name).mkdir()
    assert set(Sources.of(str(tmp_path / "sst2")).folders) == {"sst2", "rotten_tomatoes"}
    assert Sources.of("embedded").folders == {"embedded": "embedded"}


def test_the_pretrained_encoder_gives_two_texts_away() -> None:
    """all-MiniLM-L6-v2 with its whole vocabulary, where its package is installed."""
    if find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    seen, secret = capture_gradient(encoder("embedded", 0), load_texts("embedded", indices=[0, 1]))
    found = Dager()(seen, generator=torch.Generator().manual_seed(0))
    assert sorted(found.value) == sorted(secret.inputs)


def test_an_encoder_that_stands_in_is_named_in_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of a small random encoder passes for one of the pretrained encoder."""
    monkeypatch.setattr(text_victims, "find_spec", lambda name: None)
    first = next(dager_encoder.run("embedded", "smoke", seed=0, start=lambda title: lambda *step: None))
    assert "not pretrained" in str(first.table[0]["model"])
    assert f"a small bert, as {text_victims.STAND_IN}" in first.sentence


# --- Fine-tuning in the regime of the neural tangent kernel ---


@pytest.mark.parametrize(("rate", "repeats"), [(1e9, 0), (1e-3, 1)])
def test_a_fine_tuning_that_diverges_is_a_row_with_a_reason(rate: float, repeats: int) -> None:
    architecture = Architecture("mlp", (1, 8, 8), 10)
    model, private = Model.of(architecture.build(0), architecture), load("digits", indices=range(2))
    setting, mean = ntk.Setting("trained", 2, rate, 20), torch.zeros(1, 1, 8, 8)
    attack = NTK(steps=1, restarts=1)
    found = ntk.row(attack, setting, model, private, 1, mean, 0, lambda title: lambda *step: None)
    assert found["repeats"] == repeats
    assert ("diverged" in str(found["note"])) == (repeats == 0)
