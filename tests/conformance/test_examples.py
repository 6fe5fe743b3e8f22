"""The example, the code and commands of the README, and the attack in docs/adding_an_attack.md, run as they are printed."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import gradleak
from gradleak.attacks import ATTACKS
from gradleak.audit.loop import audit
from gradleak.audit.metrics import psnr_db
from gradleak.cli import app as cli
from gradleak.errors import NotObserved
from gradleak.formats.observation_file import save_observation
from gradleak.formats.reconstruction_file import load_reconstruction
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import fingerprint
from gradleak.report import record
from gradleak.victims.gradient import capture_gradient

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "attack_my_model.py"
PAGE = (ROOT / "docs" / "adding_an_attack.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


# --- The example ---


def run_example(folder: Path, capsys: pytest.CaptureFixture[str], *files: Path) -> tuple[str, Tensor]:
    """What it prints, and the picture that it writes: (3, 16, 16)."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(sys, "argv", [str(EXAMPLE), *map(str, files)])
        patch.setattr(tempfile, "tempdir", str(folder))
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    (path,) = folder.glob("gradleak-*/image-0.png")
    pixels = torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
    return capsys.readouterr().out, pixels.view(16, 16, 3).permute(2, 0, 1) / 255


# 8-bit pixels cost up to 1/510; three times as much is left for the search, whose residual is below 1e-4.
PIXELS = 2 / 255


def test_attack_my_model_recovers_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed, picture = run_example(tmp_path, capsys)
    assert "The model reproduces the release" in printed
    assert "Labels: tensor([0])" in printed  # the astronaut is the first class
    truth = load("embedded", "test", indices=[0], resize=(16, 16)).images[0]
    assert (picture - truth).abs().max() <= PIXELS


def test_attack_my_model_takes_files_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private = load("embedded", "test", indices=[1], resize=(16, 16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 10)]
        module = nn.Sequential(*layers)
    loss = nn.functional.cross_entropy(module(private.images), private.labels)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    gradient, weights = tmp_path / "gradient.safetensors", tmp_path / "weights.safetensors"
    save_file(dict(zip(names, gradients, strict=True)), gradient)
    save_file(module.state_dict(), weights)
    printed, picture = run_example(tmp_path, capsys, gradient, weights)
    assert "The model does not reproduce the release" in printed  # the picture in the example is another one
    assert "Labels: tensor([1])" in printed
    assert (picture - private.images[0]).abs().max() <= PIXELS


# --- The attack of the page ---


def observe(*, reveal_labels: bool = True) -> tuple[PictureObservation, Secret]:
    architecture = Architecture("lenet", (1, 8, 8), 10)
    model = Model.of(architecture.build(0), architecture)
    return capture_gradient(model, load("digits", indices=[0]), reveal_labels=reveal_labels)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's file where the page says, and the page's lines in `attacks/__init__.py`."""
    folder = tmp_path_factory.mktemp("copy")
    package = folder / "gradleak"
    shutil.copytree(Path(gradleak.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (code,), (change,) = blocks(PAGE, "python"), blocks(PAGE, "diff")
    (package / "attacks" / "plain_matching.py").write_text(code, encoding="utf-8")
    imported, entry = [line.removeprefix("+") for line in change.splitlines() if line.startswith("+")]
    names = package / "attacks" / "__init__.py"
    old = names.read_text(encoding="utf-8")
    table = "ATTACKS: dict[str, type] = {\n"
    assert f" {table}" in change
    assert old.count(table) == 1
    names.write_text(old.replace(table, f"{imported}\n\n{table}{entry}\n"), encoding="utf-8")
    return folder


def test_the_attack_of_the_page_runs_from_the_command_line(tmp_path: Path, house: Path) -> None:
    observation, _ = observe()
    save_observation(observation, tmp_path / "observation.safetensors")
    command = [sys.executable, "-W", "error", "-m", "gradleak", "attack", "observation.safetensors"]
    command += ["--data", "digits", "--attack", "plain-matching", "--plain-matching.steps", "50", "--out", "attacked"]
    environment = {**os.environ, "PYTHONPATH": str(house)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "plain-matching: Finished 50 steps at relative residual" in done.stdout
    (row,) = record.read(tmp_path / "attacked" / "record.json")["results"]
    assert (row["attack"], row["parameters"]) == ("plain-matching", {"steps": 50, "step_size": 0.1})
    assert row["iterations"] == 50
    found = load_reconstruction(tmp_path / "attacked" / "reconstruction.safetensors")
    # A residual of 1 is what explains nothing; fifty steps of a tenth and less explain most of it.
    assert found.residual < 0.5
    assert found.residual == pytest.approx(observation.residual(found.value, found.labels), rel=1e-4)


@pytest.mark.parametrize("offered", ["path", "package"])
def test_the_attack_of_the_page_runs_outside_the_package(tmp_path: Path, offered: str) -> None:
    """By its place in the current folder, or by the entry point of a package that pip has installed (its dist-info)."""
    observation, _ = observe()
    save_observation(observation, tmp_path / "observation.safetensors")
    (code,), (point,) = blocks(PAGE, "python"), blocks(PAGE, "toml")
    (tmp_path / "plain_matching.py").write_text(code, encoding="utf-8")
    name = "plain_matching:PlainMatching" if offered == "path" else "plain-matching"
    environment = {**os.environ, "PYTHONPATH": str(Path(gradleak.__file__).parents[1])}
    if offered == "package":
        installed = tmp_path / "site" / "plain-1.0.dist-info"
        installed.mkdir(parents=True)
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: plain\nVersion: 1.0\n", encoding="utf-8")
        group, line = point.splitlines()
        points = f"[{group.split(chr(34))[1]}]\n{line.replace(chr(34), '')}\n"
        (installed / "entry_points.txt").write_text(points, encoding="utf-8")
        (tmp_path / "plain_matching.py").rename(installed.parent / "plain_matching.py")
        environment["PYTHONPATH"] += f"{os.pathsep}{installed.parent}"
    command = [sys.executable, "-m", "gradleak", "attack", "observation.safetensors", "--attack", name]
    command += ["--data", "digits", "--plain-matching.steps", "50", "--out", "attacked"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = record.read(tmp_path / "attacked" / "record.json")["results"]
    assert (row["attack"], row["parameters"]["steps"]) == ("plain-matching", 50)
    assert load_reconstruction(tmp_path / "attacked" / "reconstruction.safetensors").residual < 0.5


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("no_such_module:Attack", "Cannot import the attack 'no_such_module:Attack': No module named"),
        ("pathlib:Nothing", "Cannot import the attack 'pathlib:Nothing'"),
        ("pathlib:Path", "pathlib:Path is no attack: it has no sees"),
    ],
)
def test_what_is_no_attack_is_refused_in_a_sentence(
    place: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["attack", "observation.safetensors", "--attack", place, "--out", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith(f"gradleak: {sentence}")


def test_the_file_of_the_page_passes_the_linters(house: Path) -> None:
    file = house / "gradleak" / "attacks" / "plain_matching.py"
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), "--no-cache", str(file)]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def attack(house: Path) -> Any:
    """The attack of the page, with its defaults, beside those of this process."""
    spec = importlib.util.spec_from_file_location(
        "plain_matching", house / "gradleak" / "attacks" / "plain_matching.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_matching"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        return module.PlainMatching()
    finally:
        del sys.modules["plain_matching"]


def test_the_attack_of_the_page(attack: Any) -> None:
    observation, secret = observe()
    before = fingerprint({**observation.released, **observation.model.parameters})
    found = attack(observation, generator=torch.Generator().manual_seed(0))
    assert fingerprint({**observation.released, **observation.model.parameters}) == before
    assert found.residual == pytest.approx(observation.residual(found.value, found.labels), rel=1e-5)
    # The last steps are 1e-4 long. A search that ends within 100 of them, 0.01, of the truth has 40 dB.
    assert psnr_db(found.value, secret.inputs) >= 40
    short = replace(attack, steps=5)
    first, again = (short(observation, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first.value, again.value)


def test_the_attack_of_the_page_is_audited_like_any_other(attack: Any) -> None:
    observation, secret = observe()
    public = public_pool("digits", "train", shape=(1, 8, 8), limit=200)
    (done,) = audit(observation, {"plain-matching": replace(attack, steps=100)}, public, secret=secret)
    assert json.loads(json.dumps(done.result["parameters"])) == {"steps": 100, "step_size": 0.1}
    assert done.result["scores"]["identification_rank"] == [1]
    assert {f["name"]: f["level"] for f in done.result["flags"]} == {"replay": "info"}


def test_the_attack_of_the_page_refuses_what_it_cannot_do(attack: Any) -> None:
    observation, _ = observe(reveal_labels=False)
    with pytest.raises(NotObserved, match="labels were withheld"):
        attack(observation, generator=torch.Generator())
    (done,) = audit(observation, {"plain-matching": attack}, None)
    assert done.reconstruction is None
    assert done.result["status"].startswith("Not run: The labels were withheld")


# --- The README ---


def test_the_python_of_the_readme_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(README, "python")
    (tmp_path / "readme.py").write_text(block, encoding="utf-8")
    runpy.run_path(str(tmp_path / "readme.py"), run_name="__main__")
    assert "1 of 1 private images came back" in " ".join(capsys.readouterr().out.split())
    assert {"record.json", "report.html", "samples.csv"} <= {path.name for path in (tmp_path / "digit").iterdir()}


def commands(page: str) -> list[list[str]]:
    """The words of every `gradleak ...` line in a shell block; lines that end in a backslash go on."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("gradleak") + 1 :] for line in words if "gradleak" in line]


@pytest.mark.parametrize("argv", commands(README), ids=" ".join)
def test_the_command_line_takes_what_the_readme_types(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only parsed: what would be done is replaced by nothing."""
    done = []
    monkeypatch.setattr(cli, "perform", lambda *given: done.append(given))
    assert cli.main(argv) == 0
    assert len(done) == 1


def test_the_readme_shows_every_command() -> None:
    shown = {" ".join(argv[:2]) if argv[0] in cli.GROUPS else argv[0] for argv in commands(README)}
    assert shown == set(cli.COMMANDS) - {"demo", "reproduce"}  # which is `make demo`, and an old name of `study`


def test_the_readme_shows_every_attack() -> None:
    tables = [line for line in README.splitlines() if line.startswith("| `")]
    named = {name for line in tables for name in re.findall(r"`([a-z-]+)`", line.split("|")[1])}
    assert named == set(ATTACKS)


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "SECURITY.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in links(page):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_links_of_the_readme_lead_somewhere_from_the_package_index_too() -> None:
    """PyPI shows the page away from the repository: its links and its picture are whole addresses, of files that are here."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    places = (
        f"{urls['Homepage']}/blob/main/",
        urls["Homepage"].replace("github.com", "raw.githubusercontent.com") + "/main/",
    )
    own = [target for target in links("README.md") if target.startswith(places)]
    assert len(own) > 10
    assert all(target.startswith("https://") for target in links("README.md"))
    for target in own:
        assert ROOT.joinpath(re.split("/main/", target, maxsplit=1)[1]).exists(), target
