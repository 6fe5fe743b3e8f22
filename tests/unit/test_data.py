"""Where pictures come from: embedded crops, digits, parquet and picture folders written here, real data when present."""

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.modalities.pictures import (
    PHOTOGRAPHS,
    Photograph,
    embedded_boxes,
    load,
    public_pool,
    resized,
    with_channels,
)

DATA = Path(os.environ.get("GRADLEAK_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted data sets go to a folder of the test, and nothing asks the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- embedded ---


def test_embedded_sizes_order_and_range() -> None:
    test, train = load("embedded"), load("embedded", "train")
    assert len(test.classes) == 10
    assert test.classes[0] == "astronaut"
    for pictures, n in ((test, 100), (train, 640)):
        assert pictures.images.shape == (n, 3, 32, 32)
        assert pictures.images.dtype == torch.float32
        assert float(pictures.images.min()) >= 0
        assert float(pictures.images.max()) <= 1
        assert pictures.labels.tolist() == [i % 10 for i in range(n)]
        assert pictures.labels.dtype == torch.int64
    assert (test.source, test.split, train.split) == ("embedded", "test", "train")
    # no private crop is blank (a flat one could not be told from its neighbours); 0.05 is 13 of 255 grey levels
    assert float(test.images.std((1, 2, 3)).min()) > 0.05


def test_embedded_is_the_same_every_time_and_row_by_row() -> None:
    everything = load("embedded")
    assert torch.equal(load("embedded").images, everything.images)
    some = load("embedded", indices=[17, 3])
    assert torch.equal(some.images, everything.images[[17, 3]])
    assert some.labels.tolist() == [7, 3]
    assert torch.equal(load("embedded", limit=4).images, everything.images[:4])


def photograph_size(file: str) -> tuple[int, int]:
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / file) as image:
        return image.size


@pytest.mark.parametrize("photo", PHOTOGRAPHS, ids=lambda photo: photo.name)
def test_no_private_pixel_is_public(photo: Photograph) -> None:
    width, height = photograph_size(photo.file)
    touched = {}
    for split in ("train", "test"):
        boxes = embedded_boxes(photo, split, width, height)
        assert len(set(boxes)) == len(boxes)  # no crop twice
        touched[split] = np.zeros((height, width), dtype=bool)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert right - left == bottom - top >= 32
            touched[split][top:bottom, left:right] = True
    assert touched["train"].any()
    assert not (touched["train"] & touched["test"]).any()


def test_private_pixels_do_not_reach_public_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blacken the private square of every photograph: the public crops do not change, the private ones do."""
    before = load("embedded", "train").images
    original = Image.Image.convert
    by_size: dict[tuple[int, int], list[Photograph]] = {}
    for photo in PHOTOGRAPHS:
        by_size.setdefault(photograph_size(photo.file), []).append(photo)
    # the patch knows a photograph by its size, so those that share one are left to the test above
    told_apart = {size: photos[0] for size, photos in by_size.items() if len(photos) == 1}

    def blackened(self: Image.Image, mode: str) -> Image.Image:
        image = original(self, mode)
        if (photo := told_apart.get(self.size)) is not None:
            image.paste(0, (photo.left, photo.top, photo.left + photo.side, photo.top + photo.side))
        return image

    monkeypatch.setattr(Image.Image, "convert", blackened)
    assert torch.equal(load("embedded", "train").images, before)
    assert len(told_apart) >= 5
    for label in (PHOTOGRAPHS.index(photo) for photo in told_apart.values()):
        assert float(load("embedded").images[label::10].max()) == 0


def test_the_two_motorcycle_pictures_are_not_both_used() -> None:
    """They are a stereo pair of one scene: the public half of one would show the private half of the other."""
    assert sum("motorcycle" in photo.file for photo in PHOTOGRAPHS) == 1


def test_embedded_resize_uses_the_photograph() -> None:
    large = load("embedded", limit=2, resize=(64, 64)).images
    assert large.shape == (2, 3, 64, 64)
    enlarged = torch.stack([resized(image, (64, 64)) for image in load("embedded", limit=2).images])
    assert float((large - enlarged).abs().max()) > 0.1  # detail that 32x32 does not have


# --- digits ---


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    reference = load_digits()
    train, test = load("digits", "train"), load("digits")
    assert train.images.shape == (1297, 1, 8, 8)
    assert test.images.shape == (500, 1, 8, 8)
    together = torch.cat([train.images, test.images])[:, 0].numpy()
    np.testing.assert_array_equal(together * 16, reference.images)  # sixteenths are exact in binary
    assert torch.cat([train.labels, test.labels]).tolist() == reference.target.tolist()


# --- folders ---


def write_parquet(folder: Path, images: list[Image.Image], labels: list[int], split: str = "test") -> None:
    folder.mkdir(exist_ok=True)

    def encoded(image: Image.Image) -> dict[str, bytes | None]:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"img": [encoded(i) for i in images], "label": labels}, features=features)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_parquet_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pixels = random_pixels(5, 12, 10, 3)
    write_parquet(tmp_path / "set", [Image.fromarray(p) for p in pixels], [0, 1, 1, 0, 1])
    capfd.readouterr()
    pictures = load(tmp_path / "set", indices=[4, 0, 2])
    assert capfd.readouterr() == ("", "")  # no progress bars
    np.testing.assert_allclose(pictures.images.permute(0, 2, 3, 1).numpy() * 255, pixels[[4, 0, 2]], atol=1e-4)
    assert pictures.labels.tolist() == [1, 0, 1]
    assert pictures.classes == ("cat", "dog")
    assert pictures.source == str(tmp_path / "set")
    assert load(str(tmp_path / "set"), limit=2).images.shape == (2, 3, 12, 10)


def test_only_the_chosen_rows_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "set", [Image.fromarray(p) for p in random_pixels(20, 8, 8, 3)], [0] * 20)
    opened = []
    original = Image.open

    def counted(file: io.BytesIO) -> Image.Image:
        opened.append(file)
        return original(file)

    monkeypatch.setattr(Image, "open", counted)
    load(tmp_path / "set", indices=[3, 5])
    load(tmp_path / "set", limit=3)
    public_pool(tmp_path / "set", "test", shape=(3, 8, 8), limit=4)
    assert len(opened) == 2 + 3 + 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_colour_modes_become_three_channels(tmp_path: Path, mode: str) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    (tmp_path / "set").mkdir()
    Image.fromarray(colours).convert(mode).save(tmp_path / "set" / "a.tiff")
    images = load(tmp_path / "set", "train").images
    np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy() * 255, colours, atol=1e-4)


def test_grey_stays_grey_unless_colour_is_beside_it(tmp_path: Path) -> None:
    grey = random_pixels(6, 6)
    (tmp_path / "set").mkdir()
    Image.fromarray(grey).save(tmp_path / "set" / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "set" / "b.png")  # 65535 = 255 * 257
    Image.fromarray(random_pixels(6, 6, 3)).save(tmp_path / "set" / "c.png")
    two = load(tmp_path / "set", "train", limit=2).images
    assert two.shape == (2, 1, 6, 6)
    np.testing.assert_allclose(two[:, 0].numpy() * 255, [grey, grey], atol=1e-4)
    three = load(tmp_path / "set", "train").images
    assert three.shape == (3, 3, 6, 6)
    assert torch.equal(three[0], two[0].expand(3, 6, 6))


def test_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    Image.new("P", (4, 4)).save(tmp_path / "set" / "a.png", transparency=b"\x00\x80")
    assert load(tmp_path / "set", "train").images.shape == (1, 3, 4, 4)


def test_class_folders_and_flat_folders(tmp_path: Path) -> None:
    for name, label, i in itertools.product(["classes", "flat"], ["bird", "ship"], range(2)):
        folder = tmp_path / name / (label if name == "classes" else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(8, 8, 3, seed=i)).save(folder / f"{label}{i}.png")
    pictures = load(tmp_path / "classes", "train")
    assert pictures.classes == ("bird", "ship")
    assert pictures.labels.tolist() == [0, 0, 1, 1]
    flat = load(tmp_path / "flat", "train")
    assert flat.labels.tolist() == [0, 0, 0, 0]
    assert flat.classes == ("unlabelled",)
    assert torch.equal(flat.images, pictures.images)


def test_pictures_of_different_sizes_need_resize(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name, shape in (("a", (8, 10)), ("b", (9, 12))):
        Image.fromarray(random_pixels(*shape)).save(tmp_path / "set" / f"{name}.png")
    with pytest.raises(BadInput, match=r"row 0 is 8x10 and row 1 is 9x12 .* resize"):
        load(tmp_path / "set", "train")
    assert load(tmp_path / "set", "train", resize=(6, 7)).images.shape == (2, 1, 6, 7)


def test_resize_is_antialiased() -> None:
    """A one-pixel chessboard, halved by a filter without antialiasing, would alias; its local mean is 1/2."""
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    small = resized(board[None].float(), (8, 8))
    assert float((small[:, 1:-1, 1:-1] - 0.5).abs().max()) < 0.02
    # against Pillow's bicubic resampling; only its rounding to 8 bits differs
    picture = random_pixels(40, 30)
    expected = np.asarray(Image.fromarray(picture).resize((10, 16), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(resized(torch.from_numpy(picture)[None] / 255, (16, 10))[0], expected, atol=1.5 / 255)


# --- public pool ---


def test_public_pool_is_a_seeded_sample_of_the_split() -> None:
    pool = public_pool("embedded", shape=(3, 32, 32), limit=50, seed=1)
    assert torch.equal(pool.images, public_pool("embedded", shape=(3, 32, 32), limit=50, seed=1).images)
    assert not torch.equal(pool.images, public_pool("embedded", shape=(3, 32, 32), limit=50, seed=2).images)
    everything = load("embedded", "train")
    rows = [
        next(i for i, candidate in enumerate(everything.images) if torch.equal(picture, candidate))
        for picture in pool.images[:5]
    ]
    assert everything.labels[rows].tolist() == pool.labels[:5].tolist()
    assert pool.split == "train"
    assert len(public_pool("digits", shape=(1, 8, 8), limit=10_000).images) == 1297


def test_public_pool_comes_in_the_asked_shape() -> None:
    assert public_pool("embedded", shape=(1, 16, 20), limit=3).images.shape == (3, 1, 16, 20)
    assert public_pool("digits", shape=(3, 32, 32), limit=3).images.shape == (3, 3, 32, 32)
    with pytest.raises(BadInput, match="1 or 3 channels"):
        public_pool("digits", shape=(4, 8, 8))


def test_luma_is_pillows() -> None:
    colours = random_pixels(4, 4, 3)
    expected = np.asarray(Image.fromarray(colours).convert("L")) / 255

    def tensor(pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255

    np.testing.assert_allclose(with_channels(tensor(colours), 1)[0], expected, atol=1 / 255)  # Pillow rounds


# --- what is refused, and how ---


def test_bad_sources_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"embedded has no split 'validation'; it has 'train', 'test'"):
        load("embedded", "validation")
    with pytest.raises(BadInput, match="rows 0 to 99"):
        load("embedded", indices=[0, 100])
    with pytest.raises(BadInput, match="Row -1 does not exist"):
        load("embedded", indices=[-1])
    with pytest.raises(BadInput, match="at least 1"):
        load("embedded", limit=0)
    with pytest.raises(BadInput, match="No rows were selected"):
        load("embedded", indices=[])
    with pytest.raises(BadInput, match="height, width"):
        load("embedded", resize=(0, 8))
    with pytest.raises(BadInput, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="does not exist"):
        load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="cannot be read as a folder"):
        load(tmp_path / "empty")
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(BadInput, match="is a file"):
        load(tmp_path / "file.png")


def test_unknown_split_of_a_folder_names_the_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set", [Image.new("RGB", (4, 4))], [0])
    with pytest.raises(BadInput, match=r"no split 'train'; it has 'test'"):
        load(tmp_path / "set", "train")


def test_text_has_no_pictures(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(BadInput, match="holds no pictures: its columns are text, label"):
        load(tmp_path)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    Image.fromarray(random_pixels(8, 8, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:80])
    assert len(load(tmp_path, "train", limit=1).images) == 1
    with pytest.raises(BadInput, match=r"row 1 .* cannot be read"):
        load(tmp_path, "train")


def test_hidden_labels_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set", [Image.new("RGB", (4, 4))], [-1])
    with pytest.raises(BadInput, match="hides its labels"):
        load(tmp_path / "set")


def test_integer_labels_name_their_classes(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.new("L", (4, 4))] * 3, "label": [5, 0, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    pictures = load(tmp_path, "train", indices=[1])
    assert pictures.labels.tolist() == [0]
    assert pictures.classes == ("0", "1", "2", "3", "4", "5")


def test_a_hub_name_without_network_says_what_would_work() -> None:
    with pytest.raises(BadInput, match=r"'no-such-set' is no folder here, .* hub: .*\. Give .* need no network"):
        load("no-such-set")


def test_a_folder_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "cifar10", [Image.new("RGB", (4, 4), (255, 0, 0))], [1])
    monkeypatch.chdir(tmp_path)
    assert load("cifar10").images[0, :, 0, 0].tolist() == [1, 0, 0]


def test_progress_bars_stay_as_the_caller_left_them(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set", [Image.new("RGB", (4, 4))], [0])
    assert not datasets.are_progress_bars_disabled()
    load(tmp_path / "set")
    assert not datasets.are_progress_bars_disabled()


def test_importing_data_is_light() -> None:
    heavy = "sorted({'datasets', 'skimage', 'sklearn', 'torchmetrics', 'pandas'} & set(sys.modules))"
    code = f"import sys, gradleak.modalities.pictures, gradleak.audit.metrics; print({heavy})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


# --- real data ---


@pytest.mark.parametrize(
    ("name", "split", "shape", "classes"),
    [
        ("cifar10", "test", (3, 32, 32), 10),
        ("mnist", "test", (1, 28, 28), 10),
        ("imagenet_sample", "train", (3, 160, 160), None),
        ("orl_faces", "train", (1, 112, 92), None),
    ],
)
def test_real_data(name: str, split: str, shape: tuple[int, int, int], classes: int | None) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not in GRADLEAK_DATA; the synthetic folders above cover the code")
    pictures = load(DATA / name, split, indices=[3, 1])
    assert pictures.images.shape == (2, *shape)
    assert float(pictures.images.min()) >= 0
    assert float(pictures.images.max()) <= 1
    assert 0.05 < float(pictures.images.std()) < 0.5  # a photograph, neither blank nor unscaled
    assert classes is None or len(pictures.classes) == classes
    file = next((DATA / name).glob(f"{split}-*.parquet"))
    row = datasets.Dataset.from_parquet(str(file))[3]
    column = next(key for key, value in row.items() if isinstance(value, Image.Image))
    expected = np.asarray(row[column]).reshape(shape[1], shape[2], shape[0])  # decoded by datasets itself
    np.testing.assert_allclose(pictures.images[0].permute(1, 2, 0).numpy() * 255, expected, atol=1e-4)
    assert int(pictures.labels[0]) == row["label"]
    with pytest.raises(BadInput, match="has no split"):
        load(DATA / name, "dev")
