"""The parts of the studies of adapters that carry an exact statement, and what studies of texts start from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradleak.attacks.dager.dager import Dager
from gradleak.errors import BadInput
from gradleak.modalities.hub import packaged
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import Model
from gradleak.observations.tensors import flatten
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies import (
    adapter_decoding,
    adapter_reconstruction,
    fine_tuned_weights,
    perfect_gradient,
    text_encoder,
    text_victims,
)
from gradleak.studies.adapter_victims import Base, batched, blank, full_gradient, raw, scores, trained
from gradleak.studies.data_sets import rows_of
from gradleak.studies.run import Plan, run
from gradleak.victims.gradient import capture_gradient


@pytest.fixture(scope="module")
def base() -> Base:
    architecture = Architecture("convnet", (1, 8, 8), 10)
    public = public_pool("digits", "train", shape=(1, 8, 8), limit=300)
    rest = rows_of(public, 99, 300)
    model = Model.of(architecture.build(0), architecture)
    return Base(model, "digits", rest, public.images[:99], GaussianPrior.fit(rest.images))


@pytest.fixture(scope="module")
def private() -> Pictures:
    return load("digits", indices=range(4))


@pytest.mark.parametrize("value", perfect_gradient.COSINES)
def test_a_perturbed_gradient_has_exactly_that_cosine(base: Base, private: Pictures, value: float) -> None:
    """Up to the rounding of its float32 sums over n entries, at most 8 sqrt(n) 2^-24 of the product of the lengths, but for
    a probability below 1e-7 if its rounding errors are independent (Higham and Mary 2019: 2 n exp(-lambda^2 / 2), lambda = 8).

    With that error in the projection of the noise and in each of two lengths, the cosine c is off by up to 2 sqrt(1 - c^2) times
    as much, and the length by less than that.
    """
    gradient = full_gradient(base, rows_of(private, 0, 1))
    other = perfect_gradient.perturbed(gradient, value, torch.Generator().manual_seed(0))
    g, p = (flatten(seen.released).double() for seen in (gradient, other))
    error = 8 * len(g) ** 0.5 * 2**-24
    tolerance = 2 * (1 - value**2) ** 0.5 * error + 4 * 2**-24  # each entry is rounded a few times, too
    assert float(p @ g / (p.norm() * g.norm())) == pytest.approx(value, abs=tolerance)
    assert float(p.norm() / g.norm()) == pytest.approx(1, abs=tolerance)


def test_each_tensor_keeps_its_place(base: Base, private: Pictures) -> None:
    gradient = full_gradient(base, rows_of(private, 0, 1))
    unsorted = replace(gradient, released=dict(reversed(gradient.released.items())))
    same = perfect_gradient.perturbed(unsorted, 1.0, torch.Generator()).released
    assert all(torch.allclose(same[name], tensor, rtol=1e-6) for name, tensor in gradient.released.items())


def test_the_adapter_is_the_sketch_of_the_full_gradient(base: Base, private: Pictures) -> None:
    some = rows_of(private, 0, 2)
    adapter = trained(blank(base, 4, batch=2), some)
    gradient = full_gradient(base, some).released
    for sketch in adapter.sketches():
        M = gradient[f"{sketch.module}.weight"].flatten(1)
        expected = M @ sketch.through.T
        # S = G A^T exactly (one SGD step from B = 0); float32 sums
        assert torch.allclose(sketch.measured, expected, atol=1e-4 * float(expected.abs().max()))


def test_raw_is_minus_b_a(base: Base, private: Pictures) -> None:
    adapter = trained(blank(base, 4), rows_of(private, 0, 1))
    module = base.modules[-1]
    B, A = adapter.released[f"{module}.lora_B"].double(), adapter.adapter.start[f"{module}.lora_A"].double()
    error = raw(adapter).released[f"{module}.weight"] + B @ A
    # a sum of four products in float32, whatever cancels: four roundings each, and their squares
    assert bool((error.abs() <= 4.001 * 2**-24 * (B.abs() @ A.abs())).all())


def test_scores_of_the_truth_and_of_the_mean(base: Base, private: Pictures) -> None:
    truth = [private.images[:2], private.images[2:]]
    exact = scores(base, [batch.flip(0) for batch in truth], truth)  # matched within each batch
    assert len(exact) == 4
    assert all(row["better_than_mean"] and row["better_than_mean_ssim"] and row["identified"] for row in exact)
    mean = base.public.images.mean(0, keepdim=True).expand(2, -1, -1, -1)
    for row in scores(base, [mean, mean], truth):
        # two ways to sum the public pictures in float32 and float64
        assert row["psnr_above_mean_db"] == pytest.approx(0, abs=1e-4)
        assert not row["identified"]


def test_a_picture_is_not_better_than_itself(base: Base, private: Pictures) -> None:
    mean = base.public.images.double().mean(0).to(private.images).expand(4, -1, -1, -1)
    assert not any(row["better_than_mean"] for row in scores(base, [mean], [private.images]))


def test_pictures_that_fill_no_batch_are_refused(private: Pictures) -> None:
    assert [len(some.labels) for some in batched(private, 2)] == [2, 2]
    with pytest.raises(BadInput, match="4 private pictures fill no batch of 8"):
        batched(private, 8)


def test_a_decoder_that_knows_has_cosine_one(base: Base, private: Pictures) -> None:
    """And one that knows all but the sign of one layer has -1 there. To the rounding of a sum in float64."""
    true = full_gradient(base, rows_of(private, 0, 1)).released
    found = adapter_decoding.fidelity(true, true)
    assert (found["cosine"], found["cosine_layers"]) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6))
    layer = list(true)[-1].removesuffix(".weight")
    kind = layer.rpartition(".")[2]
    turned = {name: -tensor if name == f"{layer}.weight" else tensor for name, tensor in true.items()}
    assert adapter_decoding.fidelity(turned, true, kind)["cosine"] == pytest.approx(-1, abs=1e-6)
    assert adapter_decoding.fidelity(turned, true)["cosine_layers"] == pytest.approx(1, abs=1e-6)  # without the last


def test_every_row_of_the_map_has_its_place(tmp_path: Path) -> None:
    fields = [adapter_reconstruction.Setting("convnet", adapter_reconstruction.MAP, 2, 4, 2)]
    study = replace(adapter_reconstruction.STUDY, settings=lambda data, size: fields)
    [row] = run(Plan(study=study, out=tmp_path, data="digits", size="smoke")).all
    assert (row["rank"], row["batch"], row["samples"]) == (4, 2, 2)
    assert 0 <= row["explained"] <= 1
    assert (tmp_path / "plot-0.png").is_file()


# --- Texts ---


def test_data_sets_beside_a_folder_are_found(tmp_path: Path) -> None:
    for name in ("sst2", "rotten_tomatoes"):
        (tmp_path / name).mkdir()
    assert set(text_victims.sources(str(tmp_path / "sst2"))) == {"sst2", "rotten_tomatoes"}
    assert text_victims.sources("embedded") == {"embedded": "embedded"}


def test_the_pretrained_encoder_gives_two_texts_away() -> None:
    """all-MiniLM-L6-v2 with its whole vocabulary, where its package is installed."""
    if packaged(text_victims.PRETRAINED) is None:
        pytest.skip(text_victims.STAND_IN)
    model = text_victims.model_of(text_victims.PRETRAINED, "classification", "embedded", "smoke", 0)
    seen, secret = capture_gradient(model, load_texts("embedded", indices=[0, 1]))
    found = Dager()(seen, generator=torch.Generator().manual_seed(0))
    assert sorted(found.value) == sorted(secret.inputs)


def test_an_encoder_that_stands_in_is_named_in_the_first_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No number of a small random encoder passes for one of the pretrained encoder."""
    monkeypatch.setattr(text_victims, "packaged", lambda name: None)
    table = run(Plan(study=text_encoder.STUDY, out=tmp_path, size="smoke"), limit=1)
    assert "not pretrained" in str(table.rows[0]["model"])
    sentence = json.loads((tmp_path / "record.json").read_text())["verdict"]["sentence"]
    assert f"a small bert, as {text_victims.STAND_IN}" in sentence


# --- Fine-tuning in the regime of the neural tangent kernel ---


@pytest.mark.parametrize(("rate", "rows"), [(1e9, 0), (1e-3, 1)])
def test_a_fine_tuning_that_diverges_is_a_row_with_a_reason(tmp_path: Path, rate: float, rows: int) -> None:
    one = [fine_tuned_weights.Setting("trained", 8, rate, 20)]
    study = replace(fine_tuned_weights.STUDY, settings=lambda data, size: one)
    table = run(Plan(study=study, out=tmp_path, data="digits", size="smoke"))
    assert len(table.rows) == rows
    assert [("diverged" in row["note"]) for row in table.failed] == [True] * (1 - rows)
