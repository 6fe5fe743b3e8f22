"""The example, and the attack in docs/adding_an_attack.md, run as they are printed."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from gradleak import Gradient, NotObserved, Secret
from gradleak.audit.loop import audit
from gradleak.audit.metrics import psnr_db
from gradleak.cli import app as cli
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.distances import relative_residual
from gradleak.observations.tensors import fingerprint
from gradleak.victims.gradient import capture_gradient

ROOT = Path(__file__).parents[2]


def run_example(folder: Path, *arguments: Path) -> tuple[str, Tensor]:
    """What it prints, and the picture that it writes: (3, 16, 16)."""
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "attack_my_model.py"), *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("gradleak-*/image-0.png")
    pixels = torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
    return done.stdout, pixels.view(16, 16, 3).permute(2, 0, 1) / 255


def test_attack_my_model_recovers_its_picture(tmp_path: Path) -> None:
    printed, picture = run_example(tmp_path)
    assert "The model reproduces the release" in printed
    assert "Labels: [0]" in printed  # the astronaut is the first class
    truth = load("embedded", "test", indices=[0], resize=(16, 16)).images[0]
    # Writing 8-bit pixels costs up to 1/255; as much again is left for the search, whose residual is below 1e-4.
    assert (picture - truth).abs().max() <= 2 / 255


def test_attack_my_model_takes_files_of_ones_own(tmp_path: Path) -> None:
    private = load("embedded", "test", indices=[1], resize=(16, 16))
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 10)]
    module = nn.Sequential(*layers)
    loss = nn.functional.cross_entropy(module(private.images), private.labels)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    save_file(dict(zip(names, gradients, strict=True)), tmp_path / "gradient.safetensors")
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    printed, picture = run_example(tmp_path, tmp_path / "gradient.safetensors", tmp_path / "weights.safetensors")
    assert "The model does not reproduce the release" in printed  # the picture in the example is another one
    assert "Labels: [1]" in printed
    assert (picture - private.images[0]).abs().max() <= 2 / 255


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class in the only python block of the page, with its defaults."""
    page = (ROOT / "docs" / "adding_an_attack.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "plain_matching.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("plain_matching").PlainMatching()
    del sys.modules["plain_matching"]


def observe(*, reveal_labels: bool = True) -> tuple[Gradient, Secret]:
    architecture = Architecture("lenet", (1, 8, 8), 10)
    private = load("digits", indices=[0])
    return capture_gradient(architecture.build(0), architecture, private, reveal_labels=reveal_labels)


def test_the_attack_of_the_page(attack: Any) -> None:
    observation, secret = observe()
    before = fingerprint({**observation.released, **observation.model.parameters})
    found = attack(observation, generator=torch.Generator().manual_seed(0))
    assert fingerprint({**observation.released, **observation.model.parameters}) == before
    again = attack(observation, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.images, again.images)
    simulated = observation.simulate(found.images, found.labels)
    assert found.residual == pytest.approx(float(relative_residual(simulated, observation.released)), rel=1e-6)
    # The last steps are 1e-4 long. A search that ends within 100 of them, 0.01, of the truth has 40 dB.
    assert psnr_db(found.images, secret.images) >= 40


def test_the_attack_of_the_page_is_audited_like_any_other(attack: Any) -> None:
    observation, secret = observe()
    public = public_pool("digits", "train", shape=(1, 8, 8), limit=200)
    (done,) = audit(observation, {"plain-matching": attack}, public, secret=secret)
    assert json.loads(json.dumps(done.result["parameters"])) == {"steps": 400, "step_size": 0.1}
    assert done.result["scores"]["identification_rank"] == [1]
    assert {f["name"]: f["level"] for f in done.result["flags"]} == {"replay": "info"}


def test_the_attack_of_the_page_refuses_what_it_cannot_do(attack: Any) -> None:
    observation, _ = observe(reveal_labels=False)
    with pytest.raises(NotObserved, match="labels were withheld"):
        attack(observation, generator=torch.Generator())
    (done,) = audit(observation, {"plain-matching": attack}, None)
    assert done.reconstruction is None
    assert done.result["status"].startswith("Not run: The labels were withheld")


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "readme.py").write_text(block, encoding="utf-8")
    command = [sys.executable, "-W", "error", "readme.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "identification_rank': [1]" in done.stdout


def commands_of_the_readme() -> list[list[str]]:
    """The words of every `gradleak ...` line in a shell block; lines that end in a backslash go on."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("gradleak") + 1 :] for line in words if "gradleak" in line]


@pytest.mark.parametrize("argv", commands_of_the_readme(), ids=" ".join)
def test_the_command_line_takes_what_the_readme_types(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only parsed: the commands themselves are replaced by one that does nothing."""
    done = []
    for name, (kind, _) in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, (kind, lambda *given: done.append(given)))
    assert cli.main(argv) == 0
    assert len(done) == 1


def test_the_readme_shows_every_command() -> None:
    shown = {" ".join(argv[:2]) if argv[0] in ("capture", "train") else argv[0] for argv in commands_of_the_readme()}
    assert shown == set(cli.COMMANDS) - {"demo"}  # which is `make demo`


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for file in (ROOT / "src" / "gradleak").rglob("*.py"):
        assert file.name in page or file.name == "__init__.py", file.name
