"""The parts of the adapter recipes that carry an exact statement."""

from dataclasses import replace

import pytest
import torch

from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.distances import cosine
from gradleak.observations.observation import Model
from gradleak.observations.tensors import flatten
from gradleak.priors.gaussian import GaussianPrior
from gradleak.studies import phase0, phase1, phase2
from gradleak.studies.lora_victims import Base, blank, full_gradient, scores, trained


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
    gradient = full_gradient(base, base.private.images[:1], base.private.labels[:1])
    other = phase0.perturbed(gradient, value, torch.Generator().manual_seed(0))
    assert 1 - float(cosine(other.released, gradient.released)) == pytest.approx(value, abs=1e-6)
    assert float(flatten(other.released).norm() / flatten(gradient.released).norm()) == pytest.approx(1, abs=1e-5)


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
        expected = M @ sketch.factor.T
        # S = G A^T exactly (one SGD step from B = 0); float32 sums
        assert torch.allclose(sketch.measured, expected, atol=1e-4 * float(expected.abs().max()))


def test_raw_is_minus_b_a(base: Base) -> None:
    adapter = trained(blank(base, 4), base.private.images[:1], base.private.labels[:1])
    module = base.modules[-1]
    B, A = adapter.released[f"{module}.lora_B"], adapter.start[f"{module}.lora_A"]
    assert torch.allclose(phase2.raw(adapter).released[f"{module}.weight"], -(B @ A))


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
