"""Metrics against independent references: scikit-image, brute force over permutations, loops in numpy."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from skimage.transform import resize
from torch import Tensor

from conftest import Run
from gradleak.audit.metrics import (
    identification,
    lpips,
    lpips_from,
    match,
    mean_image,
    mse,
    nearest_public,
    pairwise_mse,
    psnr_db,
    ssim,
)
from gradleak.errors import BadInput


def pictures(n: int, channel: int, side: int, seed: int = 0) -> Tensor:
    """Smooth random pictures: white noise has no structure for SSIM to find."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channel, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)


def noisy(images: Tensor, sigma: float, seed: int = 1) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + sigma * noise).clamp(0, 1)


# --- MSE, PSNR ---


@pytest.mark.parametrize("error", [0.5, 0.1, 1e-3])
def test_psnr_of_a_constant_error_is_minus_20_log10_of_it(error: float) -> None:
    truth = torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    expected = torch.full((3,), -20 * math.log10(error), dtype=torch.float64)
    torch.testing.assert_close(psnr_db(truth + error, truth), expected, rtol=1e-12, atol=0)


def test_mse_and_psnr_keep_the_pictures_of_a_batch_apart() -> None:
    truth = torch.zeros(2, 3, 4, 4)
    reconstruction = truth.clone()
    reconstruction[1, 0, 0, 0] = 1.0  # one pixel value of 48
    assert mse(reconstruction, truth).tolist() == [0.0, pytest.approx(1 / 48)]
    assert psnr_db(reconstruction, truth).tolist() == [200.0, pytest.approx(10 * math.log10(48))]


def test_metrics_refuse_batches_that_would_broadcast() -> None:
    with pytest.raises(BadInput, match="agree"):
        mse(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    with pytest.raises(BadInput, match="agree"):
        ssim(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))


# --- SSIM ---


@pytest.mark.parametrize(("channel", "height", "width"), [(1, 11, 11), (1, 28, 28), (3, 32, 32), (3, 33, 47)])
@pytest.mark.parametrize("sigma", [0.02, 0.2])
def test_ssim_agrees_with_scikit_image(channel: int, height: int, width: int, sigma: float) -> None:
    truth = pictures(3, channel, 48)[..., :height, :width]
    reconstruction = noisy(truth, sigma)
    expected = [
        structural_similarity(  # type: ignore[no-untyped-call]
            a.double().numpy(),
            b.double().numpy(),
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(reconstruction, truth, strict=True)
    ]
    # both in float64: what is left is rounding
    np.testing.assert_allclose(ssim(reconstruction, truth).numpy(), expected, atol=1e-10)


def ssim_by_loops(x: np.ndarray, y: np.ndarray, radius: int) -> float:
    """Wang et al. 2004, equation 13, one window at a time. (height, width) float64."""
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i in range(radius, x.shape[0] - radius):
        for j in range(radius, x.shape[1] - radius):
            a = x[i - radius : i + radius + 1, j - radius : j + radius + 1]
            b = y[i - radius : i + radius + 1, j - radius : j + radius + 1]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(values))


@pytest.mark.parametrize(("side", "radius"), [(8, 3), (9, 4), (2, 0), (16, 5)])
def test_ssim_of_small_pictures_cuts_the_window(side: int, radius: int) -> None:
    truth = pictures(2, 1, side)
    reconstruction = noisy(truth, 0.1)
    expected = [
        ssim_by_loops(a[0].double().numpy(), b[0].double().numpy(), radius)
        for a, b in zip(reconstruction, truth, strict=True)
    ]
    np.testing.assert_allclose(ssim(reconstruction, truth).numpy(), expected, atol=1e-10)


def test_ssim_is_one_only_for_identical_pictures() -> None:
    truth = pictures(2, 3, 32)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (ssim(noisy(truth, 0.01), truth) < 0.999).all()
    torch.testing.assert_close(ssim(noisy(truth, 0.1), truth), ssim(truth, noisy(truth, 0.1)))


# --- LPIPS ---

LAYERS = (  # index, channels in and out, kernel, stride, padding of AlexNet
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for k, (n, before, after, kernel, _, _) in enumerate(LAYERS):
        state[f"features.{n}.weight"] = torch.randn(after, before, kernel, kernel, generator=generator) / (
            kernel * math.sqrt(before)
        )
        state[f"features.{n}.bias"] = 0.1 * torch.randn(after, generator=generator)
        state[f"lin{k}.model.1.weight"] = torch.rand(1, after, 1, 1, generator=generator)
    save_file(state, tmp_path / "lpips.safetensors")
    monkeypatch.setenv("GRADLEAK_LPIPS", str(tmp_path / "lpips.safetensors"))
    return state


def alexnet_by_loops(image: np.ndarray, state: dict[str, Tensor]) -> list[np.ndarray]:
    """(3, h, w) in [0, 1] -> five normalised activations, one output position at a time."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    x = ((image * 2 - 1) - shift[:, None, None]) / scale[:, None, None]
    found = []
    for n, _, after, kernel, stride, padding in LAYERS:
        if n in (3, 6):  # 3x3 maximum, stride 2
            rows = range(0, x.shape[1] - 2, 2)
            columns = range(0, x.shape[2] - 2, 2)
            x = np.stack([np.stack([x[:, i : i + 3, j : j + 3].max((1, 2)) for j in columns], 1) for i in rows], 1)
        weight, bias = state[f"features.{n}.weight"].double().numpy(), state[f"features.{n}.bias"].double().numpy()
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        height, width = ((side - kernel) // stride + 1 for side in x.shape[1:])
        y = np.zeros((after, height, width))
        for i in range(height):
            for j in range(width):
                patch = x[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
                y[:, i, j] = np.maximum(np.tensordot(weight, patch, 3) + bias, 0)
        x = y
        found.append(y / np.linalg.norm(y, axis=0))
    return found


def lpips_by_loops(a: np.ndarray, b: np.ndarray, state: dict[str, Tensor]) -> float:
    total = 0.0
    pairs = zip(alexnet_by_loops(a, state), alexnet_by_loops(b, state), strict=True)
    for k, (p, q) in enumerate(pairs):
        head = state[f"lin{k}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        total += float((head * (p - q) ** 2).sum(0).mean())
    return total


def test_lpips_equals_loops(weights: dict[str, Tensor]) -> None:
    truth = pictures(2, 3, 67)
    reconstruction = noisy(truth, 0.1)
    expected = [
        lpips_by_loops(a.double().numpy(), b.double().numpy(), weights)
        for a, b in zip(reconstruction, truth, strict=True)
    ]
    found = lpips(reconstruction, truth)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)  # float32 against float64 through five layers


def test_lpips_enlarges_small_pictures_and_repeats_grey(weights: dict[str, Tensor]) -> None:
    truth = pictures(1, 1, 32)
    reconstruction = noisy(truth, 0.1)

    def enlarged(image: Tensor) -> np.ndarray:  # (1, 32, 32) -> (3, 64, 64), by scikit-image
        big = resize(  # type: ignore[no-untyped-call]
            image[0].double().numpy(), (64, 64), order=1, mode="edge", anti_aliasing=False
        )
        return np.stack([big] * 3)

    expected = lpips_by_loops(enlarged(reconstruction[0]), enlarged(truth[0]), weights)
    found = lpips(reconstruction, truth)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), [expected], rtol=1e-4)


@pytest.mark.usefixtures("weights")
def test_lpips_is_a_distance_that_grows_with_noise() -> None:
    truth = pictures(2, 3, 32)
    scores = [lpips(noisy(truth, sigma), truth) for sigma in (0.0, 0.05, 0.1, 0.3)]
    assert all(score is not None for score in scores)
    table = torch.stack([score for score in scores if score is not None])
    assert (table[0] == 0).all()
    assert (table.diff(dim=0) > 0).all()
    torch.testing.assert_close(lpips(truth, noisy(truth, 0.1)), table[2])


def test_lpips_without_weights_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADLEAK_LPIPS", raising=False)
    assert lpips(pictures(1, 3, 32), pictures(1, 3, 32)) is None


def test_lpips_refuses_a_file_that_does_not_fit(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = pictures(1, 3, 32)
    path = tmp_path / "other.safetensors"
    monkeypatch.setenv("GRADLEAK_LPIPS", str(path))
    with pytest.raises(BadInput, match="no readable safetensors file"):
        lpips(x, x)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(BadInput, match="no readable safetensors file"):
        lpips(x, x)
    save_file({name: value for name, value in weights.items() if not name.startswith("lin2")}, path)
    with pytest.raises(BadInput, match=r"lin2\.weight is missing"):
        lpips(x, x)
    save_file({**weights, "features.3.weight": torch.zeros(1)}, path)
    with pytest.raises(BadInput, match=r"features\.3\.weight has shape \(1,\)"):
        lpips(x, x)


def test_lpips_reads_the_file_that_the_package_lpips_makes(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Its names: net.slice1.0.weight in place of features.0.weight; heads twice, and constants besides."""
    a, b = pictures(1, 3, 32), pictures(1, 3, 32, seed=1)
    expected = lpips(a, b)
    theirs = {name: value for name, value in weights.items() if name.startswith("lin")}
    theirs |= {f"lins.{name[3:]}": value.clone() for name, value in theirs.items()}
    for k, (n, *_) in enumerate(LAYERS):
        theirs |= {f"net.slice{k + 1}.{n}.{part}": weights[f"features.{n}.{part}"] for part in ("weight", "bias")}
    save_file({**theirs, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "theirs.safetensors")
    before = os.environ["GRADLEAK_LPIPS"]
    assert expected is not None
    with lpips_from(tmp_path / "theirs.safetensors"):
        torch.testing.assert_close(lpips(a, b), expected)
    assert os.environ["GRADLEAK_LPIPS"] == before  # the next audit measures as it says


def test_a_file_that_does_not_fit_is_refused_before_anything_runs(tmp_path: Path, refused: Run) -> None:
    (tmp_path / "alex.pth").write_bytes(b"a pickle")
    said = refused("audit", tmp_path / "alex.pth", "--lpips", tmp_path / "alex.pth", "--out", tmp_path / "out")
    assert "no readable safetensors file with the weights of LPIPS" in said


# --- matching ---


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("m", "n"), [(4, 4), (5, 3), (1, 1)])
def test_match_is_the_best_of_all_assignments(m: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reconstruction = torch.rand(m, 1, 2, 2, generator=generator)
    truth = torch.rand(n, 1, 2, 2, generator=generator)

    def cost(order: tuple[int, ...]) -> float:
        return sum(float(((reconstruction[r] - truth[t]) ** 2).mean()) for t, r in enumerate(order))

    best = min(itertools.permutations(range(m), n), key=cost)
    assert match(reconstruction, truth).tolist() == list(best)


def test_match_undoes_a_permutation() -> None:
    truth = pictures(6, 3, 8)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    reconstruction = noisy(truth[order], 0.02)
    lined_up = reconstruction[match(reconstruction, truth)]
    assert torch.equal(order[match(reconstruction, truth)], torch.arange(6))
    assert (mse(lined_up, truth) < 4 * 0.02**2).all()


def test_match_refuses_what_cannot_be_matched() -> None:
    truth = pictures(2, 1, 4)
    with pytest.raises(BadInput, match="cannot be matched"):
        match(truth[:1], truth)
    with pytest.raises(BadInput, match="NaN"):
        match(truth * torch.nan, truth)
    with pytest.raises(BadInput, match="cannot be compared"):
        match(pictures(2, 3, 4), truth)


def constant(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2)


def test_identification_counts_the_decoys_that_are_closer() -> None:
    decoys = constant(0.0, 0.25, 0.75, 1.0)
    ranks = identification(constant(0.5, 0.1, 0.9), constant(0.4, 0.3, 0.1), decoys)
    # |0.5-0.4| beats all four; |0.1-0.3| loses to 0 and 0.25; |0.9-0.1| loses to 1, 0.75 and 0.25
    assert ranks.tolist() == [1, 3, 4]
    assert ranks.dtype == torch.int64


def test_identification_gives_no_credit_for_ties_nan_or_a_blank() -> None:
    decoys = constant(0.25, 0.75)
    assert identification(constant(0.5), constant(0.25), decoys).tolist() == [3]  # both decoys are exactly as close
    assert identification(constant(0.5) * torch.nan, constant(0.25), decoys).tolist() == [3]
    assert identification(constant(0.5), constant(0.5), constant(0.5)).tolist() == [2]


def test_identification_without_information_is_chance() -> None:
    """Truth, decoys and reconstruction drawn alike: the rank is uniform on 1..m+1, so its mean is (m + 2) / 2."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.rand(n, 1, 4, 4, generator=generator) for n in (4000, 4000)]
    ranks = torch.cat(
        [
            identification(a[None], b[None], torch.rand(9, 1, 4, 4, generator=generator))
            for a, b in zip(*draw, strict=True)
        ]
    )
    # 4,000 line-ups of 10: standard error of the mean 2.87 / 63 = 0.045, of the hit rate 0.3 / 63 = 0.005; 4 of them
    assert float(ranks.double().mean()) == pytest.approx(5.5, abs=0.18)
    assert float((ranks == 1).double().mean()) == pytest.approx(0.1, abs=0.02)


# --- baselines ---


def test_mean_image_is_the_best_constant_guess() -> None:
    public = pictures(20, 3, 8)
    np.testing.assert_allclose(mean_image(public).numpy(), np.mean(public.double().numpy(), axis=0), atol=1e-6)

    def error(guess: Tensor) -> float:
        return float(mse(guess.expand_as(public), public).mean())

    assert error(mean_image(public)) < min(error(mean_image(public) + step) for step in (-0.01, 0.01))


def test_nearest_public_is_the_closest_of_all() -> None:
    public, truth = pictures(12, 1, 8, seed=4), pictures(5, 1, 8, seed=5)
    found = nearest_public(truth, public)
    for t, picture in zip(truth, found, strict=True):
        distances = [float(((t - p) ** 2).mean()) for p in public]
        assert torch.equal(picture, public[distances.index(min(distances))])
    torch.testing.assert_close(pairwise_mse(truth, found).diagonal(), pairwise_mse(truth, public).min(1).values)


def test_baselines_need_public_pictures() -> None:
    nothing = torch.zeros(0, 1, 8, 8)
    with pytest.raises(BadInput, match="no public pictures"):
        mean_image(nothing)
    with pytest.raises(BadInput, match="no public pictures"):
        nearest_public(pictures(1, 1, 8), nothing)
