"""The command line: the main job from capture to report, and bad input that ends in one sentence and exit code 2."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradleak.attacks import ATTACKS
from gradleak.cli.app import main
from gradleak.formats.base_folder import read_base
from gradleak.formats.observation_file import load_observation, load_reconstruction, load_secret, save_observation
from gradleak.formats.peft import read_adapter
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.observation import Adapter, Model, Update
from gradleak.observations.tensors import fingerprint
from gradleak.observations.training import Recipe
from gradleak.report import record

MLP = Architecture("mlp", (1, 8, 8), 10)

Run = Callable[..., str]


@pytest.fixture
def ok(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must succeed; returns what it printed."""

    def run(*argv: object) -> str:
        code = main([str(part) for part in argv])
        printed = capsys.readouterr()
        assert (code, printed.err) == (0, "")
        return printed.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command that must end with exit code 2 and one sentence, and write nothing; returns the sentence."""

    def run(*argv: object) -> str:
        before = contents(tmp_path)
        code = main([str(part) for part in argv])
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        assert printed.err.startswith("gradleak: ")
        assert len(printed.err.splitlines()) == 1
        assert printed.err.rstrip()[-1] in ".?"
        assert contents(tmp_path) == before
        return printed.err

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a digit's gradient on an MLP and on a LeNet, an update, and the models' weights."""
    folder = tmp_path_factory.mktemp("captured")
    common = ["--data", "digits", "--indices", "3", "--reveal-labels"]
    for model in ("mlp", "lenet"):
        assert main(["capture", "gradient", "--model", model, "--out", str(folder / model), *common]) == 0
        save_file(Architecture(model, (1, 8, 8), 10).build(0).state_dict(), folder / f"{model}.safetensors")
    return folder


def seen(folder: Path, model: str) -> Path:
    return folder / model / "observation.safetensors"


def scored(path: Path) -> list[Any]:
    """What a record says apart from how long it took."""
    results: list[Any] = [dict(row) for row in record.read(path)["results"]]
    for row in results:
        row.pop("seconds")
    return results


# --- The main job ---


def test_capture_attack_audit_report_rerun(tmp_path: Path, ok: Run) -> None:
    folder = tmp_path / "captured"
    said = ok("capture", "gradient", "--model", "mlp", "--indices", 0, 1, "--seed", 4, "--out", folder)
    observation, secret = folder / "observation.safetensors", folder / "secret.safetensors"
    assert str(observation) in said
    truth = load("embedded", indices=[0, 1])
    assert torch.equal(load_secret(secret).images, truth.images)
    assert load_secret(secret).source == "embedded test 0 1"
    assert load_observation(observation).batch_size == 2

    ok("attack", observation, "--attack", "inverting-gradients", "--steps", 3, "--out", tmp_path / "attacked")
    files = {path.name for path in (tmp_path / "attacked").iterdir()}
    assert {"record.json", "reconstruction.safetensors", "inverting-gradients-0.png"} <= files
    assert load_reconstruction(tmp_path / "attacked" / "reconstruction.safetensors").images.shape == (2, 3, 32, 32)
    made = record.read(tmp_path / "attacked" / "record.json")
    assert made["results"][0]["parameters"]["steps"] == 3
    assert made["results"][0]["scores"] == {}  # it has seen no secret

    attacks = ["--attacks", "analytic", "inverting-gradients", "--steps", 3]
    said = ok("audit", observation, "--secret", secret, *attacks, "--out", tmp_path / "audited")
    made = record.read(tmp_path / "audited" / "record.json")
    assert [row["attack"] for row in made["results"]] == ["analytic", "inverting-gradients"]
    assert made["verdict"]["level"] == "recovered"
    assert made["verdict"]["sentence"] in said
    assert {row["item"]: row["revealed"] for row in made["threat_model"]}["images"] is False
    assert {"report.html", "record.json"} <= {path.name for path in (tmp_path / "audited").iterdir()}

    ok("report", tmp_path / "audited" / "record.json", "--out", tmp_path / "again" / "report.html")
    again = (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    assert again == (tmp_path / "audited" / "report.html").read_text(encoding="utf-8")

    ok("rerun", tmp_path / "audited" / "record.json", "--out", tmp_path / "rerun")
    assert scored(tmp_path / "rerun" / "record.json") == scored(tmp_path / "audited" / "record.json")
    ok(
        "rerun", tmp_path / "rerun" / "record.json", "--out", tmp_path / "twice"
    )  # a rerun's record is one like any other
    assert scored(tmp_path / "twice" / "record.json") == scored(tmp_path / "audited" / "record.json")


def test_capture_update_and_audit_it(tmp_path: Path, ok: Run) -> None:
    recipe = ["--learning-rate", 0.05, "--local-steps", 2, "--local-batch-size", 1]
    folder = tmp_path / "captured"
    ok("capture", "update", "--model", "mlp", "--data", "digits", "--indices", 5, *recipe, "--out", folder)
    update = load_observation(folder / "observation.safetensors")
    assert isinstance(update, Update)
    assert (update.learning_rate, update.local_steps, update.local_batch_size) == (0.05, 2, 1)
    audit = ["--secret", folder / "secret.safetensors", "--data", "digits", "--attacks", "analytic"]
    ok("audit", folder / "observation.safetensors", *audit, "--out", tmp_path / "audited")
    (row,) = record.read(tmp_path / "audited" / "record.json")["results"]
    assert row["observation"]["kind"] == "Update"
    assert "several local steps" in row["status"]


def test_capture_adapter(tmp_path: Path, ok: Run) -> None:
    """On embedded pictures: real PEFT and model folders, and an observation that is what they hold."""
    flags = ["--rank", 4, "--alpha", 6, "--rslora", "--target-modules", "2,6", "--optimizer", "momentum", "--lr", 0.02]
    flags += ["--steps", 2, "--local-batch-size", 1, "--indices", 0, 3, "--reveal-labels", "--epochs", 0]
    folder = tmp_path / "captured"
    said = ok("capture", "adapter", "--model", "mlp", *flags, "--out", folder)
    for name in ("adapter", "base", "observation.safetensors", "secret.safetensors"):
        assert f"{folder / name}: " in said
    assert len(said.splitlines()) == len(list(folder.iterdir())) == 4
    recipe = Recipe(optimizer="momentum", learning_rate=0.02, steps=2, batch_size=1)
    observation = load_observation(folder / "observation.safetensors")
    assert isinstance(observation, Adapter)
    assert (observation.recipe, observation.batch_size) == (recipe, 2)
    assert observation.scaling == {"2": 3.0, "6": 3.0}  # 6 / sqrt(4)
    module, architecture = read_base(folder / "base")
    assert architecture == observation.model.architecture == Architecture("mlp", (3, 32, 32), 10)
    read = read_adapter(folder / "adapter", Model.of(module, architecture), recipe=recipe)
    assert fingerprint(read.released) == fingerprint(observation.released)
    assert fingerprint(read.start) == fingerprint(observation.start)
    secret = load_secret(folder / "secret.safetensors")
    assert torch.equal(secret.images, load("embedded", indices=[0, 3]).images)
    assert secret.source == "embedded test 0 3"
    assert observation.labels is not None
    assert torch.equal(observation.labels, secret.labels)


def test_the_folder_of_an_adapter_is_audited(tmp_path: Path, ok: Run, refused: Run) -> None:
    tuned, flags = tmp_path / "tuned", ["--data", "digits", "--epochs", 0, "--rank", 8]
    ok("capture", "adapter", "--model", "mlp", *flags, "--out", tuned)
    audit = ["audit", tuned / "adapter", "--data", "digits"]
    based = [*audit, "--base", tuned / "base", "--evaluations", 10, "--attacks", "map-inversion"]

    # Without the secret: nothing is scored, but it is said what the adapter determines, and what is not exact.
    said = ok(*based, "--out", tmp_path / "foreign")
    assert "the information is" in said
    (row,) = record.read(tmp_path / "foreign" / "record.json")["results"]
    assert not row["scores"]
    assert row["observation"]["kind"] == "Adapter"
    assert {"not_exact", "dataset_size"} < {flag["name"] for flag in row["flags"]}
    assert str(row["parameters"]["prior"]).endswith("public pictures")

    # With it, and the recipe: exact, scored, recovered (64 pixels against hundreds of equations).
    secret = ["--lr", "1e-2", "--secret", tuned / "secret.safetensors"]
    ok(*based, "activation-patterns", "dlg", *secret, "--out", tmp_path / "known")
    rows = {row["attack"]: row for row in record.read(tmp_path / "known" / "record.json")["results"]}
    assert "not_exact" not in {flag["name"] for flag in rows["map-inversion"]["flags"]}
    assert rows["activation-patterns"]["scores"]["identification_rank"] == [1]
    assert rows["dlg"]["status"].startswith("Not run: ")
    (told,) = {flag["sentence"] for row in rows.values() for flag in row["flags"] if flag["name"] == "dataset_size"}
    assert "Trained on 1 sample," in told  # one picture makes rank one in every layer: exact

    assert "--base" in refused(*audit, "--out", tmp_path / "o")
    assert "no folder of a LoRA adapter" in refused("audit", tuned, "--base", tuned / "base", "--out", tmp_path / "o")
    assert "nowhere" in refused(*audit, "--base", tmp_path / "nowhere", "--out", tmp_path / "o")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((tuned / "adapter" / "adapter_config.json").read_text())
    (broken / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert "pickle" in refused("audit", broken, "--base", tuned / "base", "--out", tmp_path / "o")


def test_an_adapter_of_a_binary_model_trained_on_public_pictures(
    tmp_path: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path / "cache"))
    flags = ["--model", "mlp1000", "--data", "digits", "--indices", 2, 3, "--epochs", 1, "--reveal-labels"]
    ok("capture", "adapter", *flags, "--hide-batch-size", "--out", tmp_path / "o")
    observation = load_observation(tmp_path / "o" / "observation.safetensors")
    assert observation.model.architecture.classes == 2
    assert observation.batch_size is None
    assert observation.labels is not None
    assert torch.equal(observation.labels, load("digits", indices=[2, 3]).labels % 2)
    unseen = load("digits", limit=200)
    right = observation.model.logits({}, unseen.images).argmax(1) == unseen.labels % 2
    assert right.float().mean() > 0.8  # odd from even; 0.5 is chance


def test_an_adapter_of_a_transformer_and_one_on_top_of_its_base(tmp_path: Path, ok: Run, refused: Run) -> None:
    tiny = ["capture", "adapter", "--data", "digits", "--target-modules", "q_proj", "--epochs", 0, "--rank", 2]
    said = ok(*tiny, "--init", "pissa", "--out", tmp_path / "first")
    assert f"{tmp_path / 'first' / 'initial'}: " in said
    first = load_observation(tmp_path / "first" / "observation.safetensors")
    assert isinstance(first, Adapter)
    assert len(first.scaling) == 4
    assert first.released.keys() == first.start.keys()
    assert first.recipe == Recipe(learning_rate=0.01, steps=1)
    ok(*tiny, "--model", tmp_path / "first" / "base", "--out", tmp_path / "second")
    second = load_observation(tmp_path / "second" / "observation.safetensors")
    assert second.model.architecture.name == "vit"
    assert "neither config.json" in refused(*tiny, "--model", tmp_path / "first", "--out", tmp_path / "third")


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--target-modules", "2,fc"], "no linear or convolutional layer called 'fc'"),
        (["--target-modules", ""], "called ''"),
        (["--rank", "0"], "at least 1"),
        (["--rank", "20", "--init", "pissa"], "at least 20x20"),
        (["--lr", "0"], "above zero"),
        (["--lr", "1e30", "--steps", "3"], "diverged"),
        (["--local-batch-size", "0"], "above zero"),
        (["--steps", "-1"], "above zero"),
        (["--indices", "999"], "does not exist"),
        (["--model", "./no/such/base"], "Unknown model"),
        (["--model", "resnet21"], "resnet20"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_adapters_that_cannot_be(tmp_path: Path, refused: Run, flags: list[str], hint: str) -> None:
    assert hint in refused(
        "capture", "adapter", "--model", "mlp", "--data", "digits", "--epochs", 0, *flags, "--out", tmp_path / "o"
    )


def test_what_is_hidden_stays_hidden(tmp_path: Path, ok: Run) -> None:
    hide = ["--hide-buffers", "--hide-batch-size", "--precision", "float16", "--mode", "train"]
    ok(
        "capture",
        "gradient",
        "--model",
        "resnet20",
        "--data",
        "digits",
        "--indices",
        5,
        6,
        *hide,
        "--out",
        tmp_path / "o",
    )
    observation = load_observation(tmp_path / "o" / "observation.safetensors")
    assert observation.batch_size is None
    assert observation.labels is None
    assert observation.model.buffers is None
    assert observation.model.mode == "train"
    assert observation.precision == "float16"


def test_a_victim_trained_on_public_pictures_is_cached(
    tmp_path: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path / "cache"))
    for out in ("a", "b"):
        ok("capture", "gradient", "--model", "mlp", "--data", "digits", "--epochs", 1, "--out", tmp_path / out)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    a, b = (load_observation(tmp_path / out / "observation.safetensors") for out in ("a", "b"))
    assert fingerprint(a.released) == fingerprint(b.released)
    assert a.model.state_hash() == b.model.state_hash()
    untrained = Architecture("mlp", (1, 8, 8), 10).build(0).state_dict()
    assert not torch.equal(a.model.parameters["2.weight"], untrained["2.weight"])


def test_list_names_everything(ok: Run) -> None:
    from gradleak.attacks import ALL_ATTACKS
    from gradleak.modalities.networks import MODELS
    from gradleak.studies import RECIPES

    said = ok("list")
    assert set(ATTACKS) < set(ALL_ATTACKS)
    for name in (*ALL_ATTACKS, *MODELS, *RECIPES):
        assert name in said
    assert said.count("Sees ") == said.count("Recovers ") == len(ALL_ATTACKS)


def test_help_and_no_arguments_show_the_commands(ok: Run) -> None:
    for argv in ([], ["--help"]):
        said = ok(*argv)
        for command in (
            "demo",
            "capture gradient",
            "capture update",
            "capture adapter",
            "attack",
            "audit",
            "reproduce",
            "report",
            "rerun",
        ):
            assert command in said


def test_from_the_shell(tmp_path: Path, captured: Path) -> None:
    """A process of its own: nothing on stderr, no progress bar where there is no terminal, exit code 2 for bad input."""

    def shell(*argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gradleak.cli.app", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = shell("attack", seen(captured, "mlp"), "--attack", "analytic", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "record.json").is_file()
    done = shell("attack", seen(captured, "mlp"), "--attack", "analytic", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- Plain gradient files ---


@pytest.fixture
def plain(tmp_path: Path, captured: Path) -> Path:
    """Somebody's own {name: gradient} file of the MLP."""
    save_file(load_observation(seen(captured, "mlp")).released, tmp_path / "gradient.safetensors")
    return tmp_path / "gradient.safetensors"


def test_a_plain_gradient_file_with_its_model(tmp_path: Path, captured: Path, plain: Path, ok: Run) -> None:
    taken = ["--model", "mlp", "--weights", captured / "mlp.safetensors", "--input-shape", 1, 8, 8]
    ok("attack", plain, "--attack", "analytic", *taken, "--out", tmp_path / "out")
    found = load_reconstruction(tmp_path / "out" / "reconstruction.safetensors")
    truth = load_secret(captured / "mlp" / "secret.safetensors")
    assert (found.images - truth.images).abs().max() < 1e-4  # exact up to float32
    assert torch.equal(found.labels, truth.labels)


@pytest.mark.parametrize("attack", ["analytic", "inverting-gradients", "idlg"])
def test_a_plain_gradient_file_in_half_precision(tmp_path: Path, captured: Path, ok: Run, attack: str) -> None:
    released = load_observation(seen(captured, "mlp")).released
    save_file({name: tensor.half() for name, tensor in released.items()}, tmp_path / "half.safetensors")
    taken = ["--model", "mlp", "--weights", captured / "mlp.safetensors", "--input-shape", 1, 8, 8]
    short = {"inverting-gradients": ["--steps", 2], "idlg": ["--evaluations", 2, "--rounds", 0, "--restarts", 1]}
    ok(
        "attack",
        tmp_path / "half.safetensors",
        "--attack",
        attack,
        *short.get(attack, []),
        *taken,
        "--out",
        tmp_path / "o",
    )
    (row,) = record.read(tmp_path / "o" / "record.json")["results"]
    assert row["observation"]["precision"] == "float16"


def test_a_plain_gradient_file_alone_is_not_enough(tmp_path: Path, plain: Path, refused: Run) -> None:
    said = refused("attack", plain, "--attack", "analytic", "--out", tmp_path / "out")
    assert "--model" in said
    assert "--weights" in said


def test_a_plain_gradient_file_of_another_architecture(
    tmp_path: Path, captured: Path, plain: Path, refused: Run
) -> None:
    taken = ["--model", "lenet", "--weights", captured / "lenet.safetensors", "--input-shape", 1, 8, 8]
    said = refused("attack", plain, "--attack", "dlg", *taken, "--out", tmp_path / "out")
    assert "1.weight" in said  # the first tensor that differs
    taken[1] = "mlp"
    said = refused("attack", plain, "--attack", "dlg", *taken, "--out", tmp_path / "out")
    assert "another architecture" in said


def test_a_plain_gradient_file_with_another_picture_size(
    tmp_path: Path, captured: Path, plain: Path, refused: Run
) -> None:
    taken = ["--model", "mlp", "--weights", captured / "mlp.safetensors"]  # 3x32x32 if nothing else is said
    said = refused("attack", plain, "--attack", "analytic", *taken, "--out", tmp_path / "out")
    assert "2.weight" in said


# --- Bad input ---


def test_unknown_names_are_answered_with_near_ones(tmp_path: Path, captured: Path, refused: Run) -> None:
    out = ["--out", tmp_path / "out"]
    assert "did you mean inverting-gradients" in refused(
        "attack", seen(captured, "mlp"), "--attack", "inverting-gradient", *out
    )
    assert "did you mean" in refused("audit", seen(captured, "mlp"), "--attacks", "analytic", "dlgg", *out)
    assert "gradleak list" in refused("attack", seen(captured, "mlp"), "--attack=zzz", *out)
    assert "did you mean audit" in refused("audti", *out)
    assert "capture" in refused("capture", "photograph", *out)
    assert "resnet20" in refused("capture", "gradient", "--model", "resnet21", *out)
    assert "fresh-vs-saved" in refused("reproduce", "fresh", *out)
    assert "no_such_module" in refused("capture", "gradient", "--model", "no_such_module:build", *out)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--data", "digits", "--indices", "500"], "rows 0 to 499"),
        (["--data", "./no/such/folder"], "does not exist"),
        (["--data", "digits", "--split", "validation"], "'train', 'test'"),
        (["--data", "digits", "--weights", "no-such-file"], "no file"),
        (["--data", "digits", "--model", "convnet64"], "convnet64"),
        (["--data", "digits", "--resize", "0", "8"], "at least 1"),
    ],
    ids=["row", "folder", "split", "weights", "a picture too small for the model", "size"],
)
def test_captures_that_cannot_be(tmp_path: Path, refused: Run, argv: list[str], hint: str) -> None:
    assert hint in refused("capture", "gradient", *argv, "--out", tmp_path / "out")


def test_damaged_observations(tmp_path: Path, captured: Path, refused: Run) -> None:
    path, out = tmp_path / "observation", ["--attack", "analytic", "--out", tmp_path / "out"]
    assert "There is no file" in refused("attack", path, *out)
    torch.save({"w": torch.ones(2)}, path)
    assert "pickle" in refused("attack", path, *out)
    path.write_bytes(seen(captured, "mlp").read_bytes()[:-100])
    assert "truncated" in refused("attack", path, *out)
    path.write_text("hello")
    assert "not a readable safetensors file" in refused("attack", path, *out)
    assert "observation" in refused("attack", captured / "mlp" / "secret.safetensors", *out)


def test_what_contradicts_the_provenance(tmp_path: Path, captured: Path, refused: Run) -> None:
    out = ["--attack", "analytic", "--out", tmp_path / "out"]
    other = MLP.build(1).state_dict()
    save_file(other, tmp_path / "weights")
    assert "not the state" in refused("attack", seen(captured, "mlp"), "--weights", tmp_path / "weights", *out)
    assert "eval mode, not in train mode" in refused("attack", seen(captured, "mlp"), "--mode", "train", *out)
    assert "another architecture" in refused("attack", seen(captured, "mlp"), "--model", "lenet", *out)


def test_an_attack_that_lacks_what_it_needs(tmp_path: Path, captured: Path, refused: Run) -> None:
    said = refused("attack", seen(captured, "lenet"), "--attack", "analytic", "--out", tmp_path / "out")
    assert "Conv2d" in said
    assert "linear layer with bias" in said


def test_an_audit_goes_on_without_the_attack_that_cannot_run(tmp_path: Path, captured: Path, ok: Run) -> None:
    short = ["--attacks", "analytic", "inverting-gradients", "--steps", 2, "--data", "digits"]
    secret = captured / "lenet" / "secret.safetensors"
    ok("audit", seen(captured, "lenet"), "--secret", secret, *short, "--out", tmp_path / "out")
    analytic, inverting = record.read(tmp_path / "out" / "record.json")["results"]
    assert analytic["status"].startswith("Not run: ")
    assert inverting["scores"]
    assert "Not run" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_an_interrupt_leaves_what_was_finished(
    tmp_path: Path, captured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Interrupted:
        def __call__(self, observation: object, *, generator: object, on_step: object = None) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(ATTACKS, "dlg", Interrupted)
    out = ["--attacks", "analytic", "dlg", "--data", "digits", "--out", str(tmp_path / "out")]
    assert main(["audit", str(seen(captured, "mlp")), *out]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [row["attack"] for row in record.read(tmp_path / "out" / "record.json")["results"]] == ["analytic"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_secret_that_is_none_or_another_ones(tmp_path: Path, captured: Path, ok: Run, refused: Run) -> None:
    audit = ["--attacks", "analytic", "--data", "digits", "--out", tmp_path / "out"]
    observation = seen(captured, "mlp")
    assert "There is no file" in refused("audit", observation, "--secret", tmp_path / "none", *audit)
    assert "not a secret file" in refused("audit", observation, "--secret", observation, *audit)
    ok("capture", "gradient", "--model", "lenet", "--out", tmp_path / "colour")
    said = refused("audit", observation, "--secret", tmp_path / "colour" / "secret.safetensors", *audit)
    assert "(3, 32, 32)" in said


@pytest.mark.parametrize("command", ["capture", "attack", "audit", "rerun", "a file"])
def test_results_are_never_overwritten(tmp_path: Path, captured: Path, ok: Run, refused: Run, command: str) -> None:
    out = tmp_path / "out"
    if command == "a file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("precious")
    argv: dict[str, list[object]] = {
        "capture": ["capture", "gradient", "--model", "mlp"],
        "attack": ["attack", seen(captured, "mlp"), "--attack", "analytic"],
        "audit": ["audit", seen(captured, "mlp"), "--attacks", "analytic", "--data", "digits"],
    }
    if command == "rerun":
        ok(*argv["attack"], "--out", tmp_path / "first")
        argv["rerun"] = ["rerun", tmp_path / "first" / "record.json"]
    assert "choose another --out" in refused(*argv.get(command, argv["attack"]), "--out", out)


def test_reports_of_what_is_no_record(tmp_path: Path, refused: Run) -> None:
    assert "No such file" in refused("report", tmp_path / "none.json", "--out", tmp_path / "report.html")
    (tmp_path / "bad.json").write_text("{}")
    assert "schema" in refused("report", tmp_path / "bad.json", "--out", tmp_path / "report.html")


def test_a_device_that_is_not_there(tmp_path: Path, captured: Path, refused: Run) -> None:
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for device in (missing, "abacus"):
        argv = ["--attack", "analytic", "--device", device, "--out", tmp_path / "out"]
        assert device in refused("attack", seen(captured, "mlp"), *argv)


# --- Rerun ---


@pytest.fixture
def attacked(tmp_path: Path, captured: Path, ok: Run) -> Path:
    """A record whose observation lies in the test's own folder."""
    (tmp_path / "observation").write_bytes(seen(captured, "mlp").read_bytes())
    short = ["--attack", "inverting-gradients", "--steps", 4, "--seed", 7, "--restarts=2"]
    ok("attack", tmp_path / "observation", *short, f"--out={tmp_path / 'first'}")
    return tmp_path / "first" / "record.json"


def test_a_rerun_gives_the_same_bits(tmp_path: Path, attacked: Path, ok: Run) -> None:
    ok("rerun", attacked, "--out", tmp_path / "second")
    assert scored(tmp_path / "second" / "record.json") == scored(attacked)
    first, second = (load_file(tmp_path / name / "reconstruction.safetensors") for name in ("first", "second"))
    assert torch.equal(first["images"], second["images"])


def test_a_search_starts_at_the_reconstruction_of_another(
    tmp_path: Path, attacked: Path, ok: Run, refused: Run
) -> None:
    start, observation = attacked.parent / "reconstruction.safetensors", tmp_path / "observation"
    flags = ["--start", start, "--out", tmp_path / "second"]
    ok("attack", observation, "--attack", "inverting-gradients", "--steps", "1", *flags)
    first, second = (load_reconstruction(path) for path in (start, tmp_path / "second" / "reconstruction.safetensors"))
    assert float((first.images - second.images).abs().max()) <= 0.1 + 1e-6  # one step of step size 0.1
    assert "no search" in refused(
        "attack", observation, "--attack", "analytic", "--start", start, "--out", tmp_path / "none"
    )


@pytest.mark.parametrize("kind", ["git", "lti"])
def test_a_generator_is_trained_and_attacks(tmp_path: Path, captured: Path, ok: Run, refused: Run, kind: str) -> None:
    observation, pairs = seen(captured, "lenet"), tmp_path / "pairs"
    ok("capture", "pairs", observation, "--count", 60, "--noise", 0.001, "--out", pairs)
    ok(
        "capture", "pairs", observation, "--count", 60, "--noise", 0.001, "--out", pairs
    )  # goes on, and there is nothing left
    ok("train", kind, observation, "--pairs", pairs, "--training-epochs", 1, "--out", tmp_path / "trained")
    generator = ["--generator", tmp_path / "trained" / "generator.safetensors"]
    ok("attack", observation, "--attack", kind, *generator, "--out", tmp_path / "found")
    start = ["--start", tmp_path / "found" / "reconstruction.safetensors"]
    ok("attack", observation, "--attack", "inverting-gradients", "--steps", 2, *start, "--out", tmp_path / "better")
    assert "git" in refused("attack", observation, "--attack", "git", "--out", tmp_path / "none")
    assert "weights or buffers" in refused(
        "attack", other_state(tmp_path, captured), "--attack", kind, *generator, "--out", tmp_path / "none"
    )
    assert "not both" in refused(
        "capture", "pairs", observation, "--leak", "sign", "--noise", 1, "--out", tmp_path / "none"
    )


def other_state(tmp_path: Path, captured: Path) -> Path:
    """An observation of the same architecture with other weights."""
    observation = load_observation(seen(captured, "lenet"))
    parameters = {name: p + 1e-3 for name, p in observation.model.parameters.items()}
    save_observation(replace(observation, model=replace(observation.model, parameters=parameters)), tmp_path / "other")
    return tmp_path / "other"


def test_a_rerun_refuses_changed_inputs(tmp_path: Path, captured: Path, attacked: Path, refused: Run) -> None:
    (tmp_path / "observation").write_bytes(seen(captured, "lenet").read_bytes())
    assert "no longer the file" in refused("rerun", attacked, "--out", tmp_path / "second")
    (tmp_path / "observation").unlink()
    assert "There is no file" in refused("rerun", attacked, "--out", tmp_path / "second")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves a mark when it is imported; yields the mark."""
    (tmp_path / "planted_model.py").write_text(
        "from pathlib import Path\n"
        "from gradleak.modalities.networks import mlp\n"
        "Path(__file__).with_name('imported').touch()\n"
        "def build(shape, classes):\n    return mlp(shape, classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "imported"
    sys.modules.pop("planted_model", None)


@pytest.mark.parametrize(
    "planting",
    [
        ["--model", "planted_model:build"],
        ["--model=planted_model:build"],
        ["--model", "mlp", "--model", "planted_model:build"],
        ["--model=mlp", "--model=planted_model:build"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_record_cannot_make_us_import_code(
    tmp_path: Path, attacked: Path, planted: Path, refused: Run, planting: list[str]
) -> None:
    written = json.loads(attacked.read_text(encoding="utf-8"))
    written["command"]["arguments"]["argv"] += planting
    attacked.write_text(json.dumps(written), encoding="utf-8")
    assert "planted_model:build" in refused("rerun", attacked, "--out", tmp_path / "second")
    assert not planted.exists()


@pytest.mark.parametrize("command", [["rerun", "RECORD"], ["report", "RECORD"], ["list"], ["nonsense"], []], ids=str)
def test_a_record_cannot_make_us_run_anything_else(
    tmp_path: Path, attacked: Path, refused: Run, command: list[str]
) -> None:
    """Only commands that write a record can be in one; above all not another rerun, which allows its own code."""
    written = json.loads(attacked.read_text(encoding="utf-8"))
    written["command"]["arguments"]["argv"] = [part.replace("RECORD", str(attacked)) for part in command]
    (tmp_path / "forged.json").write_text(json.dumps(written), encoding="utf-8")
    refused("rerun", tmp_path / "forged.json", "--out", tmp_path / "second")


def test_a_record_cannot_choose_where_results_go(tmp_path: Path, attacked: Path, ok: Run) -> None:
    written = json.loads(attacked.read_text(encoding="utf-8"))
    written["command"]["arguments"]["argv"] += ["--out", str(tmp_path / "elsewhere"), f"--out={tmp_path / 'there'}"]
    attacked.write_text(json.dumps(written), encoding="utf-8")
    ok("rerun", attacked, "--out", tmp_path / "second")
    assert (tmp_path / "second" / "record.json").is_file()
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "there").exists()


def test_code_of_ones_own_is_imported_when_it_is_named(tmp_path: Path, planted: Path, ok: Run, refused: Run) -> None:
    own = ["--model", "planted_model:build"]
    ok("capture", "gradient", *own, "--data", "digits", "--out", tmp_path / "captured")
    observation = tmp_path / "captured" / "observation.safetensors"
    sys.modules.pop("planted_model")
    planted.unlink()
    argv = ["attack", observation, "--attack", "analytic"]
    assert "--model" in refused(*argv, "--out", tmp_path / "attacked")
    assert not planted.exists()
    ok(*argv, *own, "--out", tmp_path / "attacked")
    assert planted.exists()
    assert "--model" in refused("rerun", tmp_path / "attacked" / "record.json", "--out", tmp_path / "again")
    ok("rerun", tmp_path / "attacked" / "record.json", *own, "--out", tmp_path / "again")
