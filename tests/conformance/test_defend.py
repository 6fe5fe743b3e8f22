"""gradleak defend: what is written, that it says so, that it can be audited again, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradleak.cli.inputs import file_hash
from gradleak.formats.defended_adapter import all_truncated
from gradleak.formats.observation_file import load_observation
from gradleak.observations.defenses import GaussianNoise, TopK, defended
from gradleak.observations.truncation import TruncatedRank
from gradleak.report import record

Run = Callable[..., str]
DIGITS = ("--data", "digits")


@pytest.fixture
def captured(tmp_path: Path, ok: Run) -> Path:
    ok("capture", "gradient", "--model", "mlp", *DIGITS, "--indices", 3, "--reveal-labels", "--out", tmp_path / "plain")
    return tmp_path / "plain"


def test_a_gradient_is_defended_as_its_victim_would_have(tmp_path: Path, ok: Run, captured: Path) -> None:
    """Bit by bit what capture makes of the same picture with the same flag, and so is the knowledge of it."""
    seen = captured / "observation.safetensors"
    ok("defend", seen, "--with", "topk:0.1", "--out", tmp_path / "defended")
    made = [
        "capture",
        "gradient",
        "--model",
        "mlp",
        *DIGITS,
        "--indices",
        3,
        "--reveal-labels",
        "--defense",
        "topk:0.1",
    ]
    ok(*made, "--out", tmp_path / "by_victim")
    ours, theirs = (load_observation(tmp_path / out / "observation.safetensors") for out in ("defended", "by_victim"))
    assert ours.defenses == theirs.defenses == (TopK(0.1),)
    assert all(torch.equal(ours.released[name], t) for name, t in theirs.released.items())
    told = json.loads((tmp_path / "defended" / "defended.json").read_text())
    assert told == {"of": file_hash(seen), "with": ["topk:0.1"], "seed": 0}


def test_it_is_audited_again_with_and_without_what_is_known(tmp_path: Path, ok: Run, captured: Path) -> None:
    """Who knows the defense explains the truth to rounding; who does not is warned that something may stand between."""
    seen, secret = captured / "observation.safetensors", captured / "secret.safetensors"
    ok("defend", seen, "--with", "topk:0.1", "--with", "unknown", "--out", tmp_path / "hidden")
    assert load_observation(tmp_path / "hidden" / "observation.safetensors").defenses is None
    ok("defend", seen, "--with", "topk:0.1", "--out", tmp_path / "told")
    audit = [
        "audit",
        tmp_path / "told" / "observation.safetensors",
        "--secret",
        secret,
        *DIGITS,
        "--attacks",
        "analytic",
    ]
    for name, flags in (("aware", ()), ("unaware", ("--defense", "unknown"))):
        ok(*audit, *flags, "--out", tmp_path / name)
        [row] = record.read(tmp_path / name / "record.json")["results"]
        levels = {flag["name"]: flag["level"] for flag in row["flags"]}
        assert ("defense" in levels, "defense_unknown" in levels) == (name == "aware", name == "unaware")
        assert levels.get("replay") == ("info" if name == "aware" else "warning")


def test_defenses_add_up_in_their_order(tmp_path: Path, ok: Run, captured: Path) -> None:
    ok("defend", captured / "observation.safetensors", "--with", "topk:0.5", "--out", tmp_path / "a")
    ok(
        "defend",
        tmp_path / "a" / "observation.safetensors",
        "--with",
        "noise:0.01",
        "--seed",
        3,
        "--out",
        tmp_path / "b",
    )
    seen = load_observation(tmp_path / "b" / "observation.safetensors")
    assert seen.defenses == (TopK(0.5), GaussianNoise(0.01))
    first = load_observation(tmp_path / "a" / "observation.safetensors").released
    expected = defended(first, (GaussianNoise(0.01),), torch.Generator().manual_seed(3))
    assert all(torch.equal(seen.released[name], t) for name, t in expected.items())


def test_an_adapter_keeps_the_best_of_its_product(tmp_path: Path, ok: Run) -> None:
    """B A truncated is numpy's best approximation of that rank (Eckart and Young), in a folder that is read and audited as before."""
    made = ["capture", "adapter", "--model", "mlp", *DIGITS, "--epochs", 0, "--rank", 4, "--steps", 3]
    ok(*made, "--indices", 0, 1, 2, "--out", tmp_path / "o")
    adapter = tmp_path / "o" / "adapter"
    ok("defend", adapter, "--with", "svd:2", "--with", "noise:1e-6", "--out", tmp_path / "defended")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "defended"))
    assert before.keys() == after.keys()
    pairs = [(n, n.replace("lora_A", "lora_B")) for n in before if "lora_A" in n]
    assert pairs
    for a, b in pairs:
        U, s, V = torch.linalg.svd(before[b].double() @ before[a].double(), full_matrices=False)
        best, found = U[:, :2] * s[:2] @ V[:2], after[b].double() @ after[a].double()
        assert float((found - best).abs().max()) < 1e-5 * (
            1 + float(after[b].abs().max())
        )  # noise of 1e-6, five deviations
    audit = ["audit", tmp_path / "defended", "--base", tmp_path / "o" / "base", *DIGITS, "--attacks", "map-inversion"]
    ok(*audit, "--map-inversion.evaluations", 2, "--out", tmp_path / "out")
    detail = {row["item"]: row["detail"] for row in record.read(tmp_path / "out" / "record.json")["threat_model"]}
    assert detail["defenses"] == "products of the factors truncated to rank 2, Gaussian noise of deviation 1e-06"


def test_an_adapter_is_captured_behind_defenses(tmp_path: Path, ok: Run, refused: Run) -> None:
    """What was done stands in its folder, where an audit reads it; with A frozen and its start found, truncation is undone and the truth
    explains what was shared to rounding. Clients that do not divide the samples are refused before anything is written."""
    made = [
        "capture",
        "adapter",
        "--model",
        "mlp",
        *DIGITS,
        "--epochs",
        0,
        "--rank",
        4,
        "--steps",
        3,
        "--indices",
        0,
        1,
    ]
    ok(*made, "--defense", "frozen-a", "--defense", "svd:1", "--out", tmp_path / "o")
    folder = tmp_path / "o" / "adapter"
    assert json.loads((folder / "defended.json").read_text())["with"] == ["frozen-a", "svd:1"]
    audit = [
        "audit",
        folder,
        "--base",
        tmp_path / "o" / "base",
        "--secret",
        tmp_path / "o" / "secret.safetensors",
        *DIGITS,
    ]
    recipe = ["--lr", 1e-2, "--steps", 3, "--batch-size", 2]
    ok(*audit, *recipe, "--attacks", "unmixing", "--out", tmp_path / "out")
    read = record.read(tmp_path / "out" / "record.json")
    detail = {row["item"]: row["detail"] for row in read["threat_model"]}
    assert detail["initial adapter"] == "A is as it began: B alone was trained"
    assert detail["defenses"] == "products of the factors truncated to rank 1"
    [replayed] = [f for row in read["results"] for f in row["flags"] if f["name"] == "replay"]
    assert replayed["level"] == "info"
    assert "2 samples are not as many for each of 3 clients" in refused(
        *made, "--defense", "clients:3", "--out", tmp_path / "no"
    )
    assert not (tmp_path / "no").exists()


def test_truncating_the_change_of_b_is_truncating_the_product() -> None:
    """Where the rows of A are orthonormal: what the audit's control goes through."""
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(7, 4, generator=generator), torch.linalg.qr(torch.randn(9, 4, generator=generator)).Q.T
    short = defended({"m.lora_B": B}, (TruncatedRank(2),), generator)["m.lora_B"]
    both = all_truncated({"m.lora_A.weight": A, "m.lora_B.weight": B}, 2)
    assert torch.allclose(short @ A, both["m.lora_B.weight"] @ both["m.lora_A.weight"], atol=1e-5)


def test_what_cannot_be_defended_is_refused_in_a_sentence(tmp_path: Path, refused: Run, captured: Path) -> None:
    seen, out = captured / "observation.safetensors", ("--out", tmp_path / "no")
    assert "Say with what: --with top-k:0.1" in refused("defend", seen, *out)
    assert "soteria:0.5 is done where the private data are" in refused("defend", seen, "--with", "soteria:0.5", *out)
    assert "dp-sgd:1:1 is done where the private data are" in refused("defend", seen, "--with", "dp-sgd:1:1", *out)
    assert "this is no adapter's folder" in refused("defend", seen, "--with", "svd:2", *out)
    save_file({"weight": torch.ones(3)}, tmp_path / "plain.safetensors")
    assert "is neither an observation" in refused("defend", tmp_path / "plain.safetensors", "--with", "sign", *out)
    assert "There is no defense 'nothing'" in refused("defend", seen, "--with", "nothing", *out)
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "adapter_config.json").write_text("{}")
    assert not (tmp_path / "no" / "observation.safetensors").exists()
