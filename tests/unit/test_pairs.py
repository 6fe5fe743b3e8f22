"""Pairs for learned attacks: equal to one gradient after another, and the same however they were made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gradleak.attacks.learned.pairs import Pairs, chosen, read, stream, write
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.defenses import GaussianNoise, Sign, TopK
from gradleak.observations.model import Model, PictureModel

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return public_pool("digits", "train", shape=SHAPE, limit=60)


def model(seed: int = 0, name: str = "lenet") -> PictureModel:
    architecture = Architecture(name, SHAPE, 10)
    return Model.of(architecture.build(seed).eval(), architecture)


def joined(shards: list[Pairs]) -> Pairs:
    names = shards[0].gradients
    return Pairs(
        torch.cat([s.images for s in shards]),
        torch.cat([s.labels for s in shards]),
        {name: torch.cat([s.gradients[name] for s in shards]) for name in names},
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_each_pair_is_the_gradient_of_its_pictures(pictures: Pictures, batch: int) -> None:
    """Against autograd, one batch after another."""
    leaked = model()
    pairs = next(stream(leaked, pictures, count=5, batch=batch))
    for i in range(5):
        module = leaked.architecture.build(0).eval()
        F.cross_entropy(module(pairs.images[i]), pairs.labels[i]).backward()  # type: ignore[no-untyped-call]
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(pairs.gradients[name][i], parameter.grad, rtol=1e-4, atol=1e-6)


def test_every_picture_is_used_once_before_any_is_used_again() -> None:
    assert sorted(chosen(7, 7, 1, 0).flatten().tolist()) == list(range(7))
    assert sorted(chosen(6, 4, 3, 0).flatten().tolist()) == sorted(2 * list(range(6)))


def test_shards_do_not_depend_on_their_size_or_on_where_one_begins(pictures: Pictures) -> None:
    whole = next(stream(model(), pictures, count=40))
    parts = joined(list(stream(model(), pictures, count=40, shard=12)))
    assert torch.equal(whole.images, parts.images)
    assert all(torch.allclose(whole.gradients[k], parts.gradients[k], atol=1e-7) for k in whole.gradients)
    noisy = {"count": 40, "shard": 12, "defenses": (GaussianNoise(0.1),)}
    [last] = list(stream(model(), pictures, first=3, **noisy))  # type: ignore[arg-type]
    assert torch.equal(last.gradients["8.bias"], list(stream(model(), pictures, **noisy))[3].gradients["8.bias"])  # type: ignore[arg-type]


def test_an_interrupted_capture_goes_on_and_ends_the_same(pictures: Pictures, tmp_path: Path) -> None:
    plan = {"count": 30, "shard": 10, "defenses": (GaussianNoise(0.01),)}
    write(tmp_path / "whole", model(), pictures, **plan)  # type: ignore[arg-type]
    write(tmp_path / "half", model(), pictures, **plan)  # type: ignore[arg-type]
    (tmp_path / "half" / "shard-00001.safetensors").unlink()
    (tmp_path / "half" / "shard-00001.safetensors.unfinished").write_bytes(b"half")
    with pytest.raises(BadInput, match=r"lacks shard-00001\.safetensors.*goes on there"):
        list(read(tmp_path / "half", model()))
    write(tmp_path / "half", model(), pictures, **plan)  # type: ignore[arg-type]
    for a, b in zip(read(tmp_path / "whole", model()), read(tmp_path / "half", model()), strict=True):
        assert torch.equal(a.images, b.images)
        assert all(torch.equal(a.gradients[k], b.gradients[k]) for k in a.gradients)


def test_folders_and_models_that_do_not_fit(pictures: Pictures, tmp_path: Path) -> None:
    write(tmp_path, model(), pictures, count=10, shard=10)
    with pytest.raises(BadInput, match="another model"):
        list(read(tmp_path, model(1)))
    with pytest.raises(BadInput, match="in another way"):
        write(tmp_path, model(), pictures, count=20, shard=10)
    with pytest.raises(BadInput, match="holds no pairs"):
        list(read(tmp_path / "nowhere", model()))
    (tmp_path / "shard-00000.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(BadInput, match="not a readable"):
        list(read(tmp_path, model()))
    (tmp_path / "pairs.json").write_text(json.dumps([]))
    with pytest.raises(BadInput, match="damaged"):
        list(read(tmp_path, model()))


def test_pictures_that_do_not_fit(pictures: Pictures) -> None:
    with pytest.raises(BadInput, match="need at least 1 pictures"):
        next(stream(model(), replace(pictures, images=pictures.images[..., 1:]), count=1))
    with pytest.raises(BadInput, match="labels up to 10"):
        next(stream(model(), replace(pictures, labels=pictures.labels + 1), count=1))


def test_pairs_that_are_not_finite_are_refused(pictures: Pictures) -> None:
    broken = model()
    broken.parameters["1.weight"][0] = torch.nan
    with pytest.raises(BadInput, match=r"shard 0, the gradient of \S+ is NaN"):
        next(stream(broken, pictures, count=3))


def test_what_defenses_leave() -> None:
    released = {"a": torch.tensor([[3.0, -4.0], [0.1, 0.0]]), "b": torch.tensor([[[1.0], [-2.0]], [[5.0], [0.3]]])}
    generator = torch.Generator().manual_seed(0)
    assert Sign().apply(released, generator)["b"].flatten().tolist() == [1, -1, 1, 1]
    kept = TopK(0.5).apply(released, generator)  # of four entries each, the two largest
    assert kept["a"].tolist() == [[3, -4], [0, 0]]
    assert kept["b"].flatten().tolist() == pytest.approx([0, 0, 5, 0.3])
    many = {"a": torch.zeros(2, 10_000)}
    noise = GaussianNoise(0.1).apply(many, generator)["a"]
    assert noise.std(1).tolist() == pytest.approx(
        [0.1, 0.1], rel=0.05
    )  # the error of a standard deviation: 1 / sqrt(2 n)
    assert not torch.equal(noise[0], noise[1])
    for bad in (lambda: TopK(0), lambda: GaussianNoise(-1)):
        with pytest.raises(BadInput):
            bad()
