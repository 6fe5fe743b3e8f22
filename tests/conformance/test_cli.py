"""The command line: the main job from capture to report, flags that each say something, and bad input that ends in one sentence
and exit code 2. What the commands do with texts is in test_cli_texts.py."""

import ast
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import gradleak
from gradleak.attacks import ATTACKS
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.seed import USUAL
from gradleak.cli import auditing, commands
from gradleak.cli.app import COMMANDS, main
from gradleak.formats.model_folder import read_base, read_model, write_base
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.formats.peft import read_adapter
from gradleak.formats.reconstruction_file import load_reconstruction
from gradleak.formats.secret_file import load_secret
from gradleak.modalities.networks import MODELS, Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.adapter import Adapter
from gradleak.observations.defenses import GaussianNoise, Sign, TopK
from gradleak.observations.model import Model
from gradleak.observations.release import Release
from gradleak.observations.releases import RELEASES, Gradient, Update
from gradleak.observations.tensors import fingerprint
from gradleak.observations.training import Recipe
from gradleak.report import record, summary
from gradleak.report.words import LEVELS
from gradleak.studies.catalogue import STUDIES
from gradleak.victims.demo import DEMO
from gradleak.victims.play import CaptureAdapter, CaptureGradient

MLP = Architecture("mlp", (1, 8, 8), 10)
PACKAGE = Path(gradleak.__file__).parent
DIGITS = ("--data", "digits")
# Of the attacks on adapters, those that would take seconds, cut to a few steps.
SHORT = ("--map-inversion.evaluations", 3, "--map-inversion.pairs", 0, "--inverting-gradients.steps", 2)

Run = Callable[..., str]


@dataclass(frozen=True, kw_only=True)
class Guess:
    """An attack that takes no time: random pictures.

    steps  how many times it does nothing
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality

    steps: int = 1

    def __call__(self, observation: Any, *, generator: torch.Generator, on_step: object = None) -> Reconstruction:
        shape = (observation.batch_size or 1, *observation.model.architecture.input_shape)
        images = torch.rand(shape, generator=generator)
        return Reconstruction(images, torch.zeros(len(images)).long(), 1.0, "Nothing was tried.", Outcome.NOTHING)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command that must end with exit code 2 and one line, and write nothing; returns the line."""

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


@pytest.fixture
def unparsed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command whose flags do not exist: exit code 2 and what is known instead, which is returned; nothing is written."""

    def run(*argv: object) -> str:
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as ended:
            main([str(part) for part in argv])
        assert ended.value.code == 2
        assert contents(tmp_path) == before
        return capsys.readouterr().err

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a digit's gradient on an MLP and on a LeNet, an adapter of the MLP, and the models' weights."""
    folder = tmp_path_factory.mktemp("captured")
    common = [*DIGITS, "--indices", "3", "--reveal-labels"]
    with redirect_stdout(io.StringIO()):
        for model in ("mlp", "lenet"):
            assert main(["capture", "gradient", "--model", model, "--out", str(folder / model), *common]) == 0
            save_file(Architecture(model, (1, 8, 8), 10).build(0).state_dict(), folder / f"{model}.safetensors")
        tuned = ["capture", "adapter", "--model", "mlp", *DIGITS, "--epochs", "0", "--out", str(folder / "tuned")]
        assert main(tuned) == 0
    return folder


@pytest.fixture(scope="module")
def batchnorm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two digits' gradient on a ResNet in train mode, with everything hidden that can be, in half precision."""
    out = tmp_path_factory.mktemp("batchnorm") / "o"
    hide = ["--hide-buffers", "--hide-batch-size", "--precision", "float16", "--mode", "train"]
    with redirect_stdout(io.StringIO()):
        made = ["capture", "gradient", "--model", "resnet20", *DIGITS, "--indices", "5", "6", *hide, "--out", str(out)]
        assert main(made) == 0
    return out


def seen(folder: Path, model: str) -> Path:
    return folder / model / "observation.safetensors"


def adapter(folder: Path) -> tuple[object, ...]:
    """What names the captured adapter as PEFT saved it, on its base model."""
    return folder / "tuned" / "adapter", "--base", folder / "tuned" / "base"


def scored(path: Path) -> list[Any]:
    """What a record says apart from how long it took."""
    results: list[Any] = [dict(row) for row in record.read(path)["results"]]
    for row in results:
        row.pop("seconds")
    return results


def rows_of(out: Path) -> dict[str, Any]:
    """{attack: its row} of the record in a folder."""
    return {row["attack"]: row for row in record.read(out / "record.json")["results"]}


def threats(out: Path) -> dict[str, Any]:
    """{item: its row} of the threat model in a folder's record."""
    return {row["item"]: row for row in record.read(out / "record.json")["threat_model"]}


def levels(row: Any) -> dict[str, str]:
    """{flag: its level} of a row."""
    return {flag["name"]: flag["level"] for flag in row["flags"]}


# --- The main job ---


def test_capture_attack_audit_report_rerun(tmp_path: Path, ok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "inverting-gradients", Guess)
    folder = tmp_path / "captured"
    said = ok("capture", "gradient", "--model", "mlp", *DIGITS, "--indices", 0, 1, "--seed", 4, "--out", folder)
    observation, secret = folder / "observation.safetensors", folder / "secret.safetensors"
    assert str(observation) in said
    assert torch.equal(load_secret(secret).inputs, load("digits", indices=[0, 1]).images)
    assert load_secret(secret).source == "digits test 0 1"
    assert load_observation(observation).batch_size == 2

    short = ["--inverting-gradients.steps", 3]
    ok("attack", observation, "--attack", "inverting-gradients", *short, *DIGITS, "--out", tmp_path / "attacked")
    files = {path.name for path in (tmp_path / "attacked").iterdir()}
    assert {"record.json", "report.html", "reconstruction.safetensors", "inverting-gradients-0.png"} <= files
    assert load_reconstruction(tmp_path / "attacked" / "reconstruction.safetensors").value.shape == (2, 1, 8, 8)
    row = rows_of(tmp_path / "attacked")["inverting-gradients"]
    assert row["parameters"]["steps"] == 3
    assert row["scores"] == {}  # it has seen no secret

    attacks = ["--attacks", "analytic", "inverting-gradients", *short]
    said = ok("audit", observation, "--secret", secret, *attacks, *DIGITS, "--out", tmp_path / "audited")
    made = record.read(tmp_path / "audited" / "record.json")
    assert [row["attack"] for row in made["results"]] == ["analytic", "inverting-gradients"]
    assert made["verdict"]["level"] == "recovered"
    assert made["verdict"]["sentence"] in said
    assert threats(tmp_path / "audited")["images"]["revealed"] is False
    files = {path.name for path in (tmp_path / "audited").iterdir()}
    assert {"report.html", "record.json", "pictures.png"} <= files

    ok("report", tmp_path / "audited" / "record.json", "--out", tmp_path / "again" / "report.html")
    again = (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    assert again == (tmp_path / "audited" / "report.html").read_text(encoding="utf-8")

    ok("rerun", tmp_path / "audited" / "record.json", "--out", tmp_path / "rerun")
    assert scored(tmp_path / "rerun" / "record.json") == scored(tmp_path / "audited" / "record.json")
    ok("rerun", tmp_path / "rerun" / "record.json", "--out", tmp_path / "twice")  # its record is one like any other
    assert scored(tmp_path / "twice" / "record.json") == scored(tmp_path / "audited" / "record.json")


def test_a_bare_audit_of_an_adapter(tmp_path: Path, captured: Path, ok: Run) -> None:
    """Every attack that recovers pictures is asked, with its parameters and the adapter's recipe side by side; decoders, which do
    no better than map-inversion, only when they are named."""
    said = ok("audit", *adapter(captured), "--lr", "1e-2", *DIGITS, *SHORT, "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    bare = [
        name
        for name, kind in ATTACKS.items()
        if kind.modality == "pictures" and not getattr(kind, "by_name_only", False)  # type: ignore[attr-defined]
    ]
    assert list(rows) == bare
    ran = {name for name, row in rows.items() if row["ran"]}
    assert ran == {"activation-patterns", "map-inversion", "inverting-gradients", "dataset-size"}
    assert rows["dlg"]["status"].startswith("Not run: ")
    assert rows["map-inversion"]["parameters"]["evaluations"] == 3
    assert rows["inverting-gradients"]["parameters"]["steps"] == 2
    assert threats(tmp_path / "out")["recipe"]["revealed"]
    assert "decode-pseudo-inverse, decode-ridge, decode-mlp, decode-unet" in said.partition("Not tried: ")[2]


def test_capture_update_and_audit_it(tmp_path: Path, ok: Run) -> None:
    recipe = ["--learning-rate", 0.05, "--local-steps", 2, "--local-batch-size", 1]
    folder = tmp_path / "captured"
    ok("capture", "update", "--model", "mlp", *DIGITS, "--indices", 5, *recipe, "--out", folder)
    update = load_observation(folder / "observation.safetensors")
    assert update.release == Update(recipe=Recipe(learning_rate=0.05, steps=2, batch_size=1))
    audit = ["--secret", folder / "secret.safetensors", *DIGITS, "--attacks", "analytic"]
    ok("audit", folder / "observation.safetensors", *audit, "--out", tmp_path / "audited")
    row = rows_of(tmp_path / "audited")["analytic"]
    assert row["observation"]["kind"] == "update"
    assert "Not exact: 2 steps were taken" in row["status"]


def test_capture_weights_and_attack_them(tmp_path: Path, ok: Run) -> None:
    folder = tmp_path / "captured"
    ok("capture", "weights", "--per-class", 1, "--epochs", 20, "--reveal-labels", "--out", folder)
    observation = load_observation(folder / "observation.safetensors")
    assert (observation.release.name, observation.batch_size) == ("weights", 2)
    assert not (folder / "training.safetensors").exists()  # nothing is left to go on with
    seen = [folder / "observation.safetensors", *DIGITS, "--public-split", "test"]
    ok("attack", *seen, "--attack", "kkt", "--kkt.steps", 2, "--out", tmp_path / "kkt")
    assert rows_of(tmp_path / "kkt")["kkt"]["parameters"]["steps"] == 2


def test_capture_adapter(tmp_path: Path, ok: Run) -> None:
    """Real PEFT and model folders, and an observation that is what they hold."""
    flags = ["--rank", 4, "--alpha", 6, "--rslora", "--target-modules", "2,6", "--optimizer", "momentum", "--lr", 0.02]
    flags += ["--steps", 2, "--local-batch-size", 1, "--indices", 0, 3, "--reveal-labels", "--epochs", 0]
    folder = tmp_path / "captured"
    said = ok("capture", "adapter", "--model", "mlp", *DIGITS, *flags, "--out", folder)
    for name in ("adapter", "base", "observation.safetensors", "secret.safetensors"):
        assert f"{folder / name}: " in said
    assert len(list(folder.iterdir())) == 5  # and command.json
    recipe = Recipe(optimizer="momentum", learning_rate=0.02, steps=2, batch_size=1)
    observation = load_observation(folder / "observation.safetensors")
    assert (observation.adapter.recipe, observation.batch_size) == (recipe, 2)
    assert observation.adapter.scaling == {"2": 3.0, "6": 3.0}  # 6 / sqrt(4)
    module, architecture = read_base(folder / "base")
    assert architecture == observation.model.architecture == MLP
    read = read_adapter(folder / "adapter", read_model(folder / "base"), recipe=recipe)
    assert fingerprint(read.released) == fingerprint(observation.released)
    assert fingerprint(read.adapter.start) == fingerprint(observation.adapter.start)
    assert fingerprint(module.state_dict()) == fingerprint(MLP.build(0).state_dict())
    secret = load_secret(folder / "secret.safetensors")
    assert torch.equal(secret.inputs, load("digits", indices=[0, 3]).images)
    assert secret.source == "digits test 0 3"
    assert observation.labels is not None
    assert secret.labels is not None
    assert torch.equal(observation.labels, secret.labels)


def test_the_folder_of_an_adapter_is_audited(tmp_path: Path, captured: Path, ok: Run, refused: Run) -> None:
    tuned = captured / "tuned"
    audit = ["audit", tuned / "adapter", *DIGITS]
    based = [*audit, "--base", tuned / "base", "--attacks", "activation-patterns"]

    # Without the secret: nothing is scored, but it is said what the adapter determines, and what is not exact.
    said = ok(*based, "--out", tmp_path / "foreign")
    assert "dB where a blind guess has" in said
    row = rows_of(tmp_path / "foreign")["activation-patterns"]
    assert not row["scores"]
    assert row["observation"]["kind"] == "adapter"
    assert "not_exact" in levels(row)
    assert row["parameters"]["prior"].endswith("public pictures")

    # With it, and the recipe: exact, scored, recovered (64 pixels against hundreds of equations).
    secret = ["--lr", "1e-2", "--secret", tuned / "secret.safetensors"]
    ok(*based, "dataset-size", "dlg", *secret, "--out", tmp_path / "known")
    rows = rows_of(tmp_path / "known")
    assert "not_exact" not in levels(rows["activation-patterns"])
    assert rows["activation-patterns"]["scores"]["identification_rank"] == [1]
    assert rows["dlg"]["status"].startswith("Not run: ")
    assert rows["dataset-size"]["count"] == {
        "recovered": 1,
        "true": 1,
    }  # one picture makes rank one in every layer: exact

    assert "--base" in refused(*audit, "--out", tmp_path / "o")
    assert "no folder of a LoRA adapter" in refused(
        "audit", captured / "mlp", "--base", tuned / "base", "--out", tmp_path / "o"
    )
    assert "nothing has changed" in refused("audit", tuned / "base", "--base", tuned / "base", "--out", tmp_path / "o")
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
    flags = ["--model", "mlp1000", *DIGITS, "--indices", 2, 3, "--epochs", 1, "--reveal-labels"]
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
    tiny = ["capture", "adapter", *DIGITS, "--target-modules", "q_proj", "--rank", 2]
    said = ok(*tiny, "--epochs", 0, "--init", "pissa", "--out", tmp_path / "first")
    assert f"{tmp_path / 'first' / 'initial'}: " in said
    first = load_observation(tmp_path / "first" / "observation.safetensors")
    assert len(first.adapter.scaling) == 4
    assert first.released.keys() == first.adapter.start.keys()
    assert first.adapter.recipe == Recipe(learning_rate=0.01, steps=1)
    based = [*tiny, "--model", tmp_path / "first" / "base", "--out", tmp_path / "second"]
    ok(*based)
    second = load_observation(tmp_path / "second" / "observation.safetensors")
    assert second.model.architecture.name == "vit"
    assert "leave --epochs out" in refused(*based[:-1], tmp_path / "third", "--epochs", 2)
    assert "neither config.json" in refused(*tiny, "--model", tmp_path / "first", "--out", tmp_path / "third")


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--target-modules", "2,fc"], "no linear or convolutional layer called 'fc'"),
        (["--target-modules", ""], "called ''"),
        (["--rank", "0"], "at least 1"),
        (["--rank", "20", "--init", "pissa"], "at least 20x20"),
        (["--lr", "0"], "above zero"),
        (["--lr", "1e6", "--steps", "30", "--optimizer", "momentum"], "diverged"),
        (["--local-batch-size", "0"], "above zero"),
        (["--steps", "-1"], "above zero"),
        (["--indices", "999"], "does not exist"),
        (["--model", "./no/such/base"], "Unknown model"),
        (["--model", "resnet21"], "resnet20"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_adapters_that_cannot_be(tmp_path: Path, refused: Run, flags: list[str], hint: str) -> None:
    made = ["capture", "adapter", "--model", "mlp", *DIGITS, "--epochs", 0, *flags, "--out", tmp_path / "o"]
    assert hint in refused(*made)


def test_what_is_hidden_stays_hidden(batchnorm: Path) -> None:
    observation = load_observation(batchnorm / "observation.safetensors")
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
        ok("capture", "gradient", "--model", "mlp", *DIGITS, "--epochs", 1, "--out", tmp_path / out)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    a, b = (load_observation(tmp_path / out / "observation.safetensors") for out in ("a", "b"))
    assert fingerprint(a.released) == fingerprint(b.released)
    assert a.model.state_hash() == b.model.state_hash()
    assert not torch.equal(a.model.parameters["2.weight"], MLP.build(0).state_dict()["2.weight"])


# --- Defenses ---


@pytest.mark.parametrize(
    ("flags", "defense", "detail"),
    [
        (("--defense", "noise:0.01"), GaussianNoise(0.01), "Gaussian noise of deviation 0.01"),
        (("--defense", "sign"), Sign(), "signs only"),
        (("--defense", "topk:0.01"), TopK(0.01), "the largest 1 % of the entries"),
    ],
    ids=["noise", "sign", "top-k"],
)
def test_a_defended_gradient_says_so_everywhere(
    tmp_path: Path, captured: Path, ok: Run, flags: tuple[object, ...], defense: Any, detail: str
) -> None:
    """Signs and the largest entries replay exactly; noise does not, which is no mistake of the set-up: a warning."""
    made = ["capture", "gradient", "--model", "mlp", *DIGITS, "--indices", 3, "--reveal-labels", *flags]
    ok(*made, "--out", tmp_path / "defended")
    observation = load_observation(tmp_path / "defended" / "observation.safetensors")
    assert observation.defenses == (defense,)
    plain = load_observation(seen(captured, "mlp"))
    assert fingerprint(observation.released) != fingerprint(plain.released)
    if isinstance(defense, Sign):
        assert all(torch.equal(t, plain.released[name].sign()) for name, t in observation.released.items())
    secret = ["--secret", tmp_path / "defended" / "secret.safetensors", *DIGITS, "--attacks", "analytic"]
    ok("audit", tmp_path / "defended" / "observation.safetensors", *secret, "--out", tmp_path / "out")
    made_of_it = record.read(tmp_path / "out" / "record.json")
    assert threats(tmp_path / "out")["defenses"]["detail"] == detail
    row = rows_of(tmp_path / "out")["analytic"]
    assert row["defense"] == {"kind": detail}
    assert levels(row)["defense"] == "info"
    assert levels(row)["replay"] == ("warning" if isinstance(defense, GaussianNoise) else "info")
    assert made_of_it["verdict"]["level"] != "void"
    assert detail in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_defenses_that_cannot_be(tmp_path: Path, refused: Run) -> None:
    made = ["capture", "gradient", "--model", "mlp", *DIGITS, "--out", tmp_path / "o"]
    assert "There is no defense 'nose': did you mean noise" in refused(*made, "--defense", "nose:1")
    assert "given as top-k:SHARE" in refused(*made, "--defense", "top-k")
    assert "are numbers" in refused(*made, "--defense", "noise:loud")
    assert "between 0 and" in refused(*made, "--defense", "noise:-1")
    assert "comes last" in refused(*made, "--defense", "unknown", "--defense", "sign")
    assert "give it first" in refused(*made, "--defense", "sign", "--defense", "dp-sgd:1:1")


# --- Verdicts: what speaks against the numbers comes first ---


def test_the_secret_of_another_observation_voids_the_verdict(tmp_path: Path, captured: Path, ok: Run) -> None:
    ok("capture", "gradient", "--model", "mlp", *DIGITS, "--indices", 5, "--out", tmp_path / "other")
    audit = ["--secret", tmp_path / "other" / "secret.safetensors", *DIGITS, "--attacks", "analytic"]
    said = ok("audit", seen(captured, "mlp"), *audit, "--out", tmp_path / "out")
    made = record.read(tmp_path / "out" / "record.json")
    assert levels(made["results"][0])["replay"] == "error"
    assert made["verdict"]["level"] == "void"
    assert "it is another secret" in made["verdict"]["sentence"]
    assert made["verdict"]["sentence"] in said


def test_a_secret_among_the_public_pictures_voids_the_verdict(tmp_path: Path, ok: Run) -> None:
    """The analytic attack is exact, and still: who has the secret among the public pictures has shown nothing."""
    ok("capture", "gradient", "--model", "mlp", *DIGITS, "--split", "train", "--indices", 200, "--out", tmp_path / "c")
    audit = ["--secret", tmp_path / "c" / "secret.safetensors", *DIGITS, "--attacks", "analytic"]
    said = ok("audit", tmp_path / "c" / "observation.safetensors", *audit, "--out", tmp_path / "out")
    made = record.read(tmp_path / "out" / "record.json")
    assert levels(made["results"][0]) == {"replay": "info", "secret_is_public": "error"}
    assert made["verdict"]["level"] == "void"
    assert "1 private images are in the public pool" in made["verdict"]["sentence"]
    assert made["verdict"]["sentence"] in said


def test_a_model_that_does_not_give_the_release_voids_the_verdict(tmp_path: Path, captured: Path, ok: Run) -> None:
    """A plain gradient, believed to be taken at other weights than it was."""
    save_file(load_observation(seen(captured, "mlp")).released, tmp_path / "gradient.safetensors")
    save_file(MLP.build(1).state_dict(), tmp_path / "weights.safetensors")
    taken = ["--model", "mlp", "--weights", tmp_path / "weights.safetensors", "--input-shape", 1, 8, 8, *DIGITS]
    secret = ["--secret", captured / "mlp" / "secret.safetensors", "--attacks", "analytic"]
    said = ok("audit", tmp_path / "gradient.safetensors", *taken, *secret, "--out", tmp_path / "out")
    made = record.read(tmp_path / "out" / "record.json")
    assert made["verdict"]["level"] == "void"
    assert "does not reproduce the release" in made["verdict"]["sentence"]
    assert made["verdict"]["sentence"] in said


# --- The demo ---


def test_the_demo_keeps_observations_apart(tmp_path: Path, ok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny: Any = {
        "adapter": (CaptureAdapter(model="mlp", data="digits", epochs=0), {"activation-patterns": {}}),
        "fine-tuning": (
            CaptureAdapter(model="mlp", data="digits", epochs=0, indices=(1,)),
            {"activation-patterns": {}},
        ),
        "gradient": (
            CaptureGradient(model="mlp", data="digits", indices=(3,)),
            {"analytic": {}, "inverting-gradients": {}},
        ),
    }
    assert tiny.keys() == DEMO.keys()
    monkeypatch.setattr(auditing, "DEMO", tiny)
    monkeypatch.setitem(ATTACKS, "inverting-gradients", Guess)
    said = ok("demo", "--out", tmp_path / "demo")
    made = record.read(tmp_path / "demo" / "record.json")
    names = [(row["observation"]["name"], row["observation"]["kind"], row["attack"]) for row in made["results"]]
    assert names == [
        ("adapter", "adapter", "activation-patterns"),
        ("fine-tuning", "adapter", "activation-patterns"),
        ("gradient", "gradient", "analytic"),
        ("gradient", "gradient", "inverting-gradients"),
    ]
    facts: dict[str, set[str]] = {"adapter": set(), "fine-tuning": set(), "gradient": set()}
    for fact in made["threat_model"]:
        facts[fact["observation"]].add(fact["item"])
    assert "recipe" in facts["adapter"] - facts["gradient"]
    assert {"released", "labels", "batch size", "images"} <= facts["adapter"] & facts["gradient"]
    verdicts = {one["observation"]: one for one in made["verdicts"]}
    assert list(verdicts) == ["adapter", "fine-tuning", "gradient"]
    assert "activation-patterns" in verdicts["adapter"]["sentence"]
    assert "The best attack is analytic" in verdicts["gradient"]["sentence"]
    assert made["verdict"]["level"] == "recovered"
    for name, one in verdicts.items():
        assert one["sentence"] in made["verdict"]["sentence"]
        [line] = [line for line in said.splitlines() if line.startswith(f"{name}: {LEVELS[one['level']]}. ")]
        assert one["sentence"] in line
    for name in DEMO:
        assert {"observation.safetensors", "secret.safetensors"} <= {
            p.name for p in (tmp_path / "demo" / name).iterdir()
        }
    ok("rerun", tmp_path / "demo" / "record.json", "--out", tmp_path / "again")
    assert scored(tmp_path / "again" / "record.json") == scored(tmp_path / "demo" / "record.json")


def test_what_was_not_tried_on_one_observation_stays_said(
    tmp_path: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a second observation has been audited into the same record."""
    gradient: Any = CaptureGradient(model="mlp", data="digits")
    monkeypatch.setattr(auditing, "DEMO", {"first": (gradient, {"dlg": {}}), "second": (gradient, {"analytic": {}})})
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    ok("demo", "--out", tmp_path / "demo")
    first, second = record.read(tmp_path / "demo" / "record.json")["verdicts"]
    assert (first["level"], second["level"]) == ("nothing", "recovered")
    assert first["untried"][0] == "analytic"
    assert (
        "Not asked for, although they read such a release: <strong>analytic,"
        in (tmp_path / "demo" / "report.html").read_text()
    )


def test_every_attack_of_the_demo_reads_its_observation() -> None:
    assert isinstance(DEMO["adapter"][0], CaptureAdapter)
    assert isinstance(DEMO["gradient"][0], CaptureGradient)
    for name, (_, attacks) in DEMO.items():
        for attack, given in attacks.items():
            assert not {*given} - {field.name for field in dataclasses.fields(ATTACKS[attack])}
            assert RELEASES["gradient" if name == "gradient" else "adapter"] in ATTACKS[attack].sees  # type: ignore[attr-defined]


def test_eight_pictures_come_back_from_an_adapter_by_its_seed(tmp_path: Path, ok: Run) -> None:
    """Two hundred steps; neither recipe nor seed nor number is told. Each digit is found among 100, where chance finds one in 100 of
    them, and above 30 dB, where the mean image has 11."""
    out = tmp_path / "out"
    tuned = ["--rank", 16, "--steps", 200, "--lr", 1e-2, "--seed", 42, "--epochs", 0, "--indices", *range(8)]
    ok("capture", "adapter", "--model", "mlp1000", *DIGITS, *tuned, "--out", out)
    audit = ["audit", out / "adapter", "--base", out / "base", "--secret", out / "secret.safetensors", *DIGITS]
    said = ok(*audit, "--attacks", "unmixing", "--out", tmp_path / "audit")
    assert "8 of 8 private images came back" in said
    made = record.read(tmp_path / "audit" / "record.json")
    facts = {fact["item"]: fact["detail"] for fact in made["threat_model"]}
    assert facts["initial adapter"] == "recovered: seed 42 draws it"
    assert facts["batch size"] == "8"
    [row] = made["results"]
    assert row["scores"]["identification_rank"] == [1] * 8
    assert min(value or 0 for value in row["scores"]["psnr_db"]) > 30
    assert "seed" in levels(row)


def beginning(folder: Path) -> str:
    """What the record in this folder says of the adapter's start."""
    return next(
        f["detail"] for f in record.read(folder / "record.json")["threat_model"] if f["item"] == "initial adapter"
    )


def test_seeds_beyond_the_usual_ones_are_searched(
    tmp_path: Path, captured: Path, ok: Run, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range holds the seed or it does not; a wrong one is told with the number of seeds; rerun searches again."""
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    ok("capture", "adapter", "--model", "mlp", *DIGITS, "--epochs", 0, "--seed", 54_321, "--out", tmp_path / "a")
    audit = ["audit", tmp_path / "a" / "adapter", "--base", tmp_path / "a" / "base", *DIGITS, "--attacks", "dlg"]
    ok(*audit, "--seeds", "54000:55000", "--out", tmp_path / "found")
    assert beginning(tmp_path / "found") == "recovered: seed 54321 draws it"
    ok("rerun", tmp_path / "found" / "record.json", "--out", tmp_path / "again")
    assert beginning(tmp_path / "again") == beginning(tmp_path / "found")
    ok(*audit, "--seeds", 500, "--out", tmp_path / "none")
    assert beginning(tmp_path / "none").startswith("unknown")
    assert f"none of {len(USUAL) + 500:,} seeds draws" in (tmp_path / "none" / "record.json").read_text()
    for text in ("", "0", "5:5", "9:3", "-1", "1e6", "4294967297", "1:2:3", "\u0663"):
        assert "--seeds is N or START:END" in refused(*audit, f"--seeds={text}", "--out", tmp_path / "no")
    gradient = ["audit", seen(captured, "mlp"), *DIGITS, "--attacks", "dlg", "--seeds", 500]
    assert "--seeds says nothing about this observation" in refused(*gradient, "--out", tmp_path / "no")


def test_an_adapter_of_pissa_is_audited_beside_its_base(
    tmp_path: Path, ok: Run, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gives the adapter before training; there is no seed to search for."""
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    ok("capture", "adapter", "--model", "mlp", *DIGITS, "--epochs", 0, "--init", "pissa", "--out", tmp_path / "a")
    audit = ["audit", tmp_path / "a" / "adapter", "--base", tmp_path / "a" / "base", *DIGITS, "--attacks", "dlg"]
    ok(*audit, "--out", tmp_path / "audit")
    assert beginning(tmp_path / "audit") == "recovered: the base model's weights give it"
    assert "--seeds says nothing" in refused(*audit, "--seeds", 500, "--out", tmp_path / "no")


def test_an_adapter_that_was_merged_is_told_by_its_seed(
    tmp_path: Path, ok: Run, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weights that `merge_and_unload` leaves, as a folder and as a file, without a learning rate: what their adapter gives away. Each
    of four digits is found among 100, where chance finds one in 100 of them, and above 20 dB, where the mean image has 11. With another
    base a learning rate is asked for, as of weights that were trained as a whole."""
    from peft import PeftModel

    tuned = ["--rank", 8, "--steps", 20, "--lr", 5e-2, "--seed", 42, "--epochs", 0, "--indices", *range(4)]
    ok("capture", "adapter", "--model", "mlp", *DIGITS, *tuned, "--out", tmp_path / "a")
    base, merged = tmp_path / "a" / "base", tmp_path / "merged"
    whole: Any = PeftModel.from_pretrained(read_model(base).solid(), str(tmp_path / "a" / "adapter"))
    after = Model.of(whole.merge_and_unload(), MLP)
    write_base(after, merged)
    audit = ["audit", merged, "--base", base, "--attacks", "unmixing", *DIGITS]
    ok(*audit, "--secret", tmp_path / "a" / "secret.safetensors", "--out", tmp_path / "audit")
    assert beginning(tmp_path / "audit") == "recovered: seed 42 draws it"
    [row] = record.read(tmp_path / "audit" / "record.json")["results"]
    assert row["scores"]["identification_rank"] == [1] * 4
    assert min(value or 0 for value in row["scores"]["psnr_db"]) > 20
    assert {"merged", "seed"} <= set(levels(row))
    assert threats(tmp_path / "audit")["batch size"]["detail"] == "4"
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    ok("audit", merged, "--base", base, "--attacks", "dlg", *DIGITS, "--batch-size", 3, "--out", tmp_path / "told")
    assert threats(tmp_path / "told")["batch size"]["detail"] == "3"

    shape = ["--model", "mlp", "--input-shape", 1, 8, 8, *DIGITS, "--attacks", "dataset-size"]
    files = ["--before", base / "model.safetensors", "--after", merged / "model.safetensors"]
    for number, given in enumerate((files, [merged / "model.safetensors", "--weights", base / "model.safetensors"])):
        for rate in ([], ["--lr", 5e-2, "--steps", 20])[: 2 - number]:
            out = tmp_path / f"files{number}{len(rate)}"
            ok("audit", *given, *shape, *rate, "--out", out)
            assert beginning(out) == "recovered: seed 42 draws it"

    write_base(Model.of(MLP.build(5), MLP), tmp_path / "other")
    for other in (tmp_path / "other", merged):
        given = [other, "--base", base if other != merged else tmp_path / "other"]
        assert "did not change as a merged LoRA adapter" in refused("audit", *given, *DIGITS, "--out", tmp_path / "no")
    assert "say with --base" in refused("audit", merged, *DIGITS, "--out", tmp_path / "no")


def test_a_search_for_seeds_that_is_stopped_says_where_to_go_on(
    tmp_path: Path, captured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The audit goes on with what is known."""

    def stopped(observation: Any, *, seeds: range | None = None, on_step: Any = None) -> Any:
        if seeds is None:
            return observation
        on_step(2_000, len(seeds), 0.0)
        raise KeyboardInterrupt

    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    monkeypatch.setattr("gradleak.cli.informed.with_start_recovered", stopped)
    tuned = captured / "tuned"
    audit = ["audit", str(tuned / "adapter"), "--base", str(tuned / "base"), *DIGITS, "--attacks", "dlg"]
    assert main([*audit, "--seeds", "1000:4000000000", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert told == "gradleak: the search for the seed stops; --seeds 3000:4000000000 goes on with it.\n"
    assert [row["attack"] for row in record.read(tmp_path / "out" / "record.json")["results"]] == ["dlg"]


# --- Help ---


def test_list_names_everything(ok: Run) -> None:
    said = ok("list")
    for name in (*ATTACKS, *MODELS, *STUDIES):
        assert name in said
    headers = {sys.modules[kind.__module__].__doc__ for kind in ATTACKS.values()}
    for header in headers:  # of a file, which may hold several attacks
        assert header is not None
        assert header.count("\nSees ") == header.count("\nRecovers ") == 1
    assert said.count("Sees ") == said.count("Recovers ") == len(ATTACKS)


def test_help_lists_commands_and_versions_are_told(ok: Run) -> None:
    everything = ok()
    assert ok("--help") == ok("-h") == everything
    for command in COMMANDS:
        assert f"  {command} " in everything
    assert "Start with: gradleak demo" in everything
    for group in ("capture", "train"):
        listed = ok(group)
        assert ok(group, "--help") == listed
        for command in COMMANDS:
            assert (f"  {command} " in listed) == command.startswith(f"{group} ")
    assert (
        ok("--version")
        == ok("-V")
        == f"gradleak {record.new_record({'name': '', 'arguments': {}}, 0, [])['gradleak']}\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"usage: gradleak {command} " in printed.out


def test_the_help_of_an_attack_shows_its_parameters_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["attack", "--attack", "dlg", "--help"])
    printed = capsys.readouterr().out
    assert "--dlg.restarts INT" in printed
    assert "starts at most" in printed  # from the docstring of the attack
    assert "--inverting-gradients" not in printed


def test_from_the_shell() -> None:
    """A process of its own; one that attacks something is in test_examples.py."""

    def shell(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gradleak", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = shell("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gradleak ")
    done = shell("reprot")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gradleak: Unknown command 'reprot': did you mean report")
    assert len(done.stderr.splitlines()) == 1


# --- Parameters of attacks and facts of training ---


def test_steps_are_those_of_the_adapter(
    tmp_path: Path, captured: Path, ok: Run, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS, "inverting-gradients", Guess)
    attack = ["--attack", "inverting-gradients", "--inverting-gradients.steps", 2, *DIGITS]
    trained = ["--lr", "1e-2", "--steps", 3, "--optimizer", "momentum"]
    ok("attack", *adapter(captured), *trained, *attack, "--out", tmp_path / "out")
    assert rows_of(tmp_path / "out")["inverting-gradients"]["parameters"]["steps"] == 2
    recipe = str(Recipe(optimizer="momentum", learning_rate=1e-2, steps=3))
    assert threats(tmp_path / "out")["recipe"]["detail"] == recipe
    said = refused("attack", *adapter(captured), "--steps", 3, *attack, "--out", tmp_path / "none")
    assert "needs its --lr" in said
    said = refused("attack", seen(captured, "mlp"), "--steps", 3, *attack, "--out", tmp_path / "none")
    assert "--steps says nothing about" in said


def test_flags_reach_the_attack_whose_name_they_carry(
    tmp_path: Path, captured: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    monkeypatch.setitem(ATTACKS, "inverting-gradients", Guess)
    flags = ["--attacks", "dlg", "inverting-gradients", "--dlg.steps", 5, "--inverting-gradients.steps=7"]
    ok("audit", seen(captured, "mlp"), *flags, *DIGITS, "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert (rows["dlg"]["parameters"], rows["inverting-gradients"]["parameters"]) == ({"steps": 5}, {"steps": 7})
    attacks = record.read(tmp_path / "out" / "record.json")["command"]["attacks"]
    assert attacks == {"dlg": {"steps": 5}, "inverting-gradients": {"steps": 7}}


def test_an_attacks_flag_needs_its_name(tmp_path: Path, captured: Path, unparsed: Run) -> None:
    bare = ["attack", seen(captured, "mlp"), "--attack", "dlg", *DIGITS, "--out", tmp_path / "out"]
    assert "--dlg.restarts" in unparsed(*bare, "--restarts", 1)
    assert "--analytic.restarts" in unparsed(*bare, "--analytic.restarts", 1)  # of an attack that was not chosen
    assert "--lr" in unparsed(*bare, "--lr", "much")


def test_attacks_need_a_name(tmp_path: Path, captured: Path, refused: Run) -> None:
    out = ["--out", tmp_path / "out"]
    for name in ATTACKS:
        assert name in refused("audit", seen(captured, "mlp"), *out, "--attacks")
    assert "--attacks needs a name" in refused("audit", seen(captured, "mlp"), "--attacks", *out)
    assert "--attack needs a name" in refused("attack", seen(captured, "mlp"), "--attack", *out)
    assert "Unknown attack ''" in refused("attack", seen(captured, "mlp"), "--attack=", *out)


def test_a_model_of_pictures_has_no_task(tmp_path: Path, captured: Path, refused: Run) -> None:
    said = refused(
        "attack", *adapter(captured), "--task", "causal-lm", "--attack", "analytic", "--out", tmp_path / "out"
    )
    assert "holds no language model" in said


def test_attacks_named_twice_run_once(tmp_path: Path, captured: Path, ok: Run, refused: Run) -> None:
    audit = ["audit", seen(captured, "mlp"), *DIGITS, "--attacks", "analytic"]
    ok(*audit, "analytic", "--out", tmp_path / "out")
    assert list(rows_of(tmp_path / "out")) == ["analytic"]
    assert "what is to run is dlg" in refused(*audit, "--attacks", "dlg", "--out", tmp_path / "none")


def test_unknown_names_are_answered_with_near_ones(tmp_path: Path, captured: Path, refused: Run) -> None:
    out = ["--out", tmp_path / "out"]
    attack = ["attack", seen(captured, "mlp"), *out, "--attack"]
    assert "did you mean inverting-gradients" in refused(*attack, "inverting-gradient")
    assert "did you mean dlg" in refused(*attack, "DLG")
    assert "did you mean inverting-gradients" in refused(*attack, "InvertingGradients")
    assert "did you mean" in refused("audit", seen(captured, "mlp"), "--attacks", "analytic", "dlgg", *out)
    assert "gradleak list" in refused("attack", seen(captured, "mlp"), "--attack=zzz", *out)
    assert "did you mean audit" in refused("audti", *out)
    assert "did you mean audit" in refused("AUDIT", *out)
    assert "capture gradient" in refused("capture", "photograph", *out)
    assert "resnet20" in refused("capture", "gradient", "--model", "resnet21", *out)
    assert "did you mean fresh-vs-saved" in refused("reproduce", "fresh-vs", *out)
    assert "no_such_module" in refused("capture", "gradient", "--model", "no_such_module:build", *out)


def test_what_cannot_run_is_a_row_with_the_reason(tmp_path: Path, captured: Path, ok: Run) -> None:
    attacks = ["--attacks", "dager", "activation-patterns", "analytic", *DIGITS]
    said = ok("audit", seen(captured, "mlp"), *attacks, "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["dager", "activation-patterns", "analytic"]
    assert [row["ran"] for row in rows.values()] == [False, False, True]
    reason = "It recovers texts, and the observed model takes pictures."
    assert rows["dager"]["status"] == f"Not run: {reason}"
    assert "an adapter, and what was released is a gradient" in rows["activation-patterns"]["status"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert reason in page
    assert "analytic explains the observation best" in said


def test_an_audit_in_which_nothing_can_run_says_why(
    tmp_path: Path, captured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["audit", seen(captured, "mlp"), "--attacks", "dager", *DIGITS, "--fail-on", "partly"]
    assert main([str(part) for part in [*command, "--out", tmp_path / "out"]]) == 3
    said = capsys.readouterr().out
    made = record.read(tmp_path / "out" / "record.json")
    assert made["verdict"]["level"] == "unscored"
    assert "No attack could run on this observation. dager: Not run: It recovers texts" in said
    assert "Not tried: analytic," in said


@pytest.mark.parametrize(("bar", "code"), [((), 0), (("--fail-on", "recovered"), 1), (("--fail-on", "partly"), 1)])
def test_an_audit_is_a_gate(
    bar: tuple[str, ...], code: int, tmp_path: Path, captured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One digit behind a perceptron's gradient comes back (Phong et al. 2017); with --json nothing but JSON is on stdout."""
    files = [seen(captured, "mlp"), "--secret", captured / "mlp" / "secret.safetensors", "--attacks", "analytic"]
    command = ["audit", *files, *DIGITS, *bar, "--json", "--out", tmp_path / "out"]
    assert main([str(part) for part in command]) == code
    printed = capsys.readouterr()
    short = json.loads(printed.out)
    assert short["verdict"]["level"] == "recovered"
    assert [(row["attack"], row["recovered"], row["samples"]) for row in short["attacks"]] == [("analytic", 1, 1)]
    assert "1 of 1 private images came back" in printed.err


def test_what_an_audit_writes_is_its_owners_alone(tmp_path: Path, captured: Path, ok: Run) -> None:
    secret = captured / "mlp" / "secret.safetensors"
    ok("audit", seen(captured, "mlp"), "--secret", secret, "--attacks", "analytic", *DIGITS, "--out", tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert {"record.json", "report.html", "pictures.png", "analytic-0.png", *summary.FILES} <= modes.keys()
    assert set(modes.values()) == {0o600}


def test_a_redacted_audit_keeps_scores_and_no_picture(tmp_path: Path, captured: Path, ok: Run) -> None:
    secret = captured / "mlp" / "secret.safetensors"
    common = [seen(captured, "mlp"), "--secret", secret, "--attacks", "analytic", *DIGITS]
    ok("audit", *common, "--redact", "--out", tmp_path / "out")
    ok("audit", *common, "--out", tmp_path / "whole")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"record.json", "report.html", *summary.FILES}
    for path in (tmp_path / "out").iterdir():
        assert not [word for word in ("data:image", str(tmp_path), str(captured)) if word in path.read_text()]
    [own], [whole] = (rows_of(tmp_path / name).values() for name in ("out", "whole"))
    assert own["scores"] == whole["scores"]
    assert "data:image" in (tmp_path / "whole" / "report.html").read_text()


def test_an_attack_that_does_not_read_the_observation_names_those_that_do(
    tmp_path: Path, captured: Path, refused: Run
) -> None:
    out = [*DIGITS, "--out", tmp_path / "out"]
    for attack in ("dager", "activation-patterns", "kkt"):
        said = refused("attack", seen(captured, "mlp"), "--attack", attack, *out)
        readers = said.partition("Attacks that do: ")[2].rstrip(".\n").split(", ")
        expected = [
            name
            for name, kind in ATTACKS.items()
            if kind.modality == "pictures" and Gradient in kind.sees  # type: ignore[attr-defined]
        ]
        assert readers == expected


def test_an_attack_that_lacks_what_it_needs(tmp_path: Path, captured: Path, refused: Run) -> None:
    said = refused("attack", seen(captured, "lenet"), "--attack", "analytic", *DIGITS, "--out", tmp_path / "out")
    assert "Conv2d" in said
    assert "linear layer with bias" in said


# --- Every flag says something ---


SETTINGS = ("cli/seen_flags.py", "cli/flags.py", "victims/play.py", "victims/publish.py")
READERS = ("cli", "victims")


def test_every_flag_is_read_by_its_command() -> None:
    sources = {
        str(path.relative_to(PACKAGE)): path.read_text() for part in READERS for path in (PACKAGE / part).glob("*.py")
    }
    assert unread(sources) == {"Common.config"}  # which is read before the others: test_cli_conventions.py
    forgotten = sources["cli/flags.py"].replace(
        "    record: Positional[Path]", "    unused: int = 0\n    record: Positional[Path]", 1
    )
    assert unread({**sources, "cli/flags.py": forgotten}) == {"Common.config", "Report.unused"}
    ignored = sources["victims/play.py"].replace("self.rslora", "False")
    assert unread({**sources, "victims/play.py": ignored}) == {"Common.config", "CaptureAdapter.rslora"}


def unread(sources: dict[str, str]) -> set[str]:
    """Fields of flags dataclasses that nothing reads: no attribute of `self` in their class or a subclass, none of an argument that
    is of their class, a subclass or Any."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    classes = {c.name: c for name in SETTINGS for c in ast.walk(trees[name]) if isinstance(c, ast.ClassDef)}
    parents = {c.name: {base.id for base in c.bases if isinstance(base, ast.Name)} for c in classes.values()}

    def derived(kind: str, base: str) -> bool:
        return kind == base or any(derived(parent, base) for parent in parents.get(kind, ()))

    read: list[tuple[str, str]] = []  # (class whose field it is, or Any; field)
    for kind in classes.values():
        read += [(kind.name, field) for field in attributes(kind, "self")]
    for tree in trees.values():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for argument in function.args.args:
                    annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                    read += [(annotation.rpartition(".")[2], field) for field in attributes(function, argument.arg)]
    fields = {
        (kind.name, line.target.id)
        for kind in classes.values()
        for line in kind.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id != "GROUP"
    }
    return {
        f"{kind}.{field}"
        for kind, field in fields
        if not any(name == field and (by == "Any" or derived(by, kind)) for by, name in read)
    }


def attributes(tree: ast.AST, variable: str) -> list[str]:
    """What is read of a variable: variable.field, or getattr(variable, "field", ...)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == variable:
            found.append(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) == variable:
            found += [
                part.value for part in node.args[1:2] if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
    return found


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("captured", ["--classes", "10"]),
        ("captured", ["--input-shape", "1", "8", "8"]),
        ("captured", ["--batch-size", "2"]),
        ("captured", ["--lr", "0.01"]),
        ("captured", ["--optimizer", "adam"]),
        ("captured", ["--base", "somewhere"]),
        ("captured", ["--initial", "somewhere"]),
        ("captured", ["--task", "causal-lm"]),
        ("plain", ["--initial", "somewhere"]),
        ("plain", ["--proximal", "0.1"]),
        ("captured", ["--weight-decay", "0.1"]),
        ("captured", ["--loss", "focal"]),
        ("adapter", ["--local-batch-size", "2"]),
        ("plain", ["--steps", "2"]),
        ("plain", ["--base", "somewhere"]),
        ("plain", ["--task", "classification"]),
        ("weights", ["--mode", "eval"]),
        ("adapter", ["--weights", "somewhere"]),
        ("adapter", ["--mode", "eval"]),
        ("adapter", ["--input-shape", "1", "8", "8"]),
        ("adapter", ["--classes", "10"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_flags_that_say_nothing_about_the_observation(
    tmp_path: Path, captured: Path, plain: Path, refused: Run, given: str, flags: list[str]
) -> None:
    taken = ["--model", "mlp", "--weights", captured / "mlp.safetensors"]
    seen_as: dict[str, list[object]] = {
        "captured": [seen(captured, "mlp")],
        "plain": [plain, *taken],
        "weights": [captured / "mlp.safetensors", *taken[:2]],
        "adapter": [*adapter(captured)],
    }
    said = refused("attack", *seen_as[given], *flags, "--attack", "analytic", "--out", tmp_path / "out")
    assert f"{flags[0]} says nothing about" in said


@pytest.mark.parametrize("command", ["gradient", "update", "adapter"])
def test_epochs_say_nothing_of_a_model_that_is_trained(
    tmp_path: Path, captured: Path, refused: Run, command: str
) -> None:
    made = ["capture", command, "--model", captured / "tuned" / "base", *DIGITS, "--epochs", 1]
    assert "leave --epochs out" in refused(*made, "--out", tmp_path / "out")


def test_a_model_that_brings_its_weights_takes_no_others(tmp_path: Path, captured: Path, refused: Run) -> None:
    made = ["capture", "gradient", "--model", captured / "tuned" / "base", *DIGITS, "--out", tmp_path / "out"]
    assert "leave --weights out" in refused(*made, "--weights", captured / "mlp.safetensors")
    assert "--task is for language models" in refused(*made, "--task", "causal-lm")


# --- Plain files ---


@pytest.fixture(scope="module")
def plain(captured: Path) -> Path:
    """Somebody's own {name: gradient} file of the MLP."""
    path = captured / "gradient.safetensors"
    save_file(load_observation(seen(captured, "mlp")).released, path)
    return path


def test_a_plain_gradient_file_with_its_model(tmp_path: Path, captured: Path, plain: Path, ok: Run) -> None:
    taken = ["--model", "mlp", "--weights", captured / "mlp.safetensors", "--input-shape", 1, 8, 8, *DIGITS]
    ok("attack", plain, "--attack", "analytic", *taken, "--out", tmp_path / "out")
    found = load_reconstruction(tmp_path / "out" / "reconstruction.safetensors")
    truth = load_secret(captured / "mlp" / "secret.safetensors")
    assert (found.value - truth.inputs).abs().max() < 1e-4  # exact up to float32
    assert found.labels is not None
    assert truth.labels is not None
    assert torch.equal(found.labels, truth.labels)
    assert threats(tmp_path / "out")["released"]["detail"].startswith("gradient: ")
    ok("rerun", tmp_path / "out" / "record.json", "--out", tmp_path / "again")
    assert scored(tmp_path / "again" / "record.json") == scored(tmp_path / "out" / "record.json")


def test_plain_weights_are_those_of_a_trained_network(tmp_path: Path, captured: Path, ok: Run) -> None:
    shape = ["--model", "mlp", "--input-shape", 1, 8, 8, *DIGITS]
    attack = ["--attack", "kkt", "--kkt.steps", 1]
    ok("attack", captured / "mlp.safetensors", *shape, *attack, "--batch-size", 2, "--out", tmp_path / "out")
    rows = threats(tmp_path / "out")
    assert rows["released"]["detail"].startswith("weights: ")
    assert rows["batch size"]["detail"] == "2"


@pytest.mark.parametrize("attack", ["analytic", "idlg"])
def test_a_plain_gradient_file_in_half_precision(tmp_path: Path, captured: Path, ok: Run, attack: str) -> None:
    released = load_observation(seen(captured, "mlp")).released
    save_file({name: tensor.half() for name, tensor in released.items()}, tmp_path / "half.safetensors")
    taken = ["--model", "mlp", "--weights", captured / "mlp.safetensors", "--input-shape", 1, 8, 8, *DIGITS]
    idlg = ["--idlg.evaluations", 2, "--idlg.rounds", 0, "--idlg.restarts", 1]
    short = idlg if attack == "idlg" else []
    ok("attack", tmp_path / "half.safetensors", "--attack", attack, *short, *taken, "--out", tmp_path / "o")
    assert rows_of(tmp_path / "o")[attack]["observation"]["precision"] == "float16"


def test_a_plain_gradient_file_alone_is_not_enough(tmp_path: Path, plain: Path, refused: Run) -> None:
    said = refused("attack", plain, "--attack", "analytic", "--out", tmp_path / "out")
    assert "--model" in said
    assert "--weights" in said


def test_a_plain_gradient_file_of_another_architecture(
    tmp_path: Path, captured: Path, plain: Path, refused: Run
) -> None:
    taken = ["--model", "lenet", "--weights", captured / "lenet.safetensors", "--input-shape", 1, 8, 8]
    said = refused("attack", plain, "--attack", "dlg", *taken, "--out", tmp_path / "out")
    assert "2.bias" in said  # the first tensor that differs
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


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ([*DIGITS, "--indices", "500"], "rows 0 to 499"),
        (["--data", "./no/such/folder"], "does not exist"),
        ([*DIGITS, "--split", "validation"], "'train', 'test'"),
        ([*DIGITS, "--weights", "no-such-file"], "no file"),
        ([*DIGITS, "--model", "convnet64"], "convnet64"),
        ([*DIGITS, "--resize", "0", "8"], "not (0, 8)"),
        ([*DIGITS, "--threads", "0"], "between 1 and 1,024"),
        ([*DIGITS, "--threads", "-1"], "between 1 and 1,024"),
    ],
    ids=["row", "folder", "split", "weights", "a picture too small for the model", "size", "no threads", "threads"],
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
    save_file(MLP.build(1).state_dict(), tmp_path / "weights")
    assert "not the state" in refused("attack", seen(captured, "mlp"), "--weights", tmp_path / "weights", *out)
    assert "eval mode, not in train mode" in refused("attack", seen(captured, "mlp"), "--mode", "train", *out)
    assert "another architecture" in refused("attack", seen(captured, "mlp"), "--model", "lenet", *out)


def test_an_interrupt_leaves_what_was_finished(
    tmp_path: Path, captured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Interrupted(Guess):
        def __call__(self, observation: Any, *, generator: torch.Generator, on_step: object = None) -> Reconstruction:
            raise KeyboardInterrupt

    monkeypatch.setitem(ATTACKS, "dlg", Interrupted)
    out = ["--attacks", "analytic", "dlg", *DIGITS, "--out", str(tmp_path / "out")]
    assert main(["audit", str(seen(captured, "mlp")), *out]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1
    made = record.read(tmp_path / "out" / "record.json")
    assert [row["attack"] for row in made["results"]] == ["analytic"]
    assert made["verdict"]["sentence"].startswith("analytic explains the observation best")
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_secret_that_is_none_or_another_ones(tmp_path: Path, captured: Path, ok: Run, refused: Run) -> None:
    audit = ["--attacks", "analytic", *DIGITS, "--out", tmp_path / "out"]
    observation = seen(captured, "mlp")
    assert "There is no file" in refused("audit", observation, "--secret", tmp_path / "none", *audit)
    assert "not a secret file" in refused("audit", observation, "--secret", observation, *audit)
    ok("capture", "gradient", "--model", "lenet", "--out", tmp_path / "colour")
    said = refused("audit", observation, "--secret", tmp_path / "colour" / "secret.safetensors", *audit)
    assert "(3, 32, 32)" in said


@pytest.mark.parametrize("command", ["capture", "attack", "audit", "train", "demo", "study", "rerun", "a file"])
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
        "audit": ["audit", seen(captured, "mlp"), "--attacks", "analytic", *DIGITS],
        "train": ["train", "lti", seen(captured, "mlp"), "--count", 10, *DIGITS],
        "demo": ["demo"],
        "study": ["study", "closed-form"],
    }
    if command == "rerun":
        ok(*argv["attack"], "--out", tmp_path / "first")
        argv["rerun"] = ["rerun", tmp_path / "first" / "record.json"]
    assert "choose another --out" in refused(*argv.get(command, argv["attack"]), "--out", out)


@pytest.mark.parametrize("command", ["capture", "attack", "audit", "report", "demo"])
def test_a_place_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, captured: Path, refused: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A file stands where the folder would be made: the operating system says no, whoever asks."""
    (tmp_path / "file").write_text("precious")
    record.write(record.new_record({"name": "attack", "arguments": {}}, 0, []), tmp_path / "record.json")
    monkeypatch.setattr(auditing, "DEMO", {"gradient": (CaptureGradient(model="mlp", data="digits"), ("analytic",))})
    argv: dict[str, list[object]] = {
        "capture": ["capture", "gradient", "--model", "mlp", *DIGITS],
        "attack": ["attack", seen(captured, "mlp"), "--attack", "analytic", *DIGITS],
        "audit": ["audit", seen(captured, "mlp"), "--attacks", "analytic", *DIGITS],
        "report": ["report", tmp_path / "record.json"],
        "demo": ["demo"],
    }
    assert str(tmp_path / "file") in refused(*argv[command], "--out", tmp_path / "file" / "out")


def test_reports_of_what_is_no_record(tmp_path: Path, refused: Run) -> None:
    assert "No such file" in refused("report", tmp_path / "none.json", "--out", tmp_path / "report.html")
    (tmp_path / "bad.json").write_text("{}")
    assert "schema" in refused("report", tmp_path / "bad.json", "--out", tmp_path / "report.html")


def test_a_device_that_is_not_there(tmp_path: Path, captured: Path, refused: Run) -> None:
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for device in (missing, "abacus"):
        argv = ["--device", device, "--out", tmp_path / "out"]
        assert device in refused("attack", seen(captured, "mlp"), "--attack", "analytic", *argv)
        assert device in refused("audit", seen(captured, "mlp"), *argv)
        assert device in refused("demo", *argv)


# --- Learned attacks ---


@pytest.mark.parametrize("kind", ["git", "lti"])
def test_a_generator_is_trained_and_attacks(tmp_path: Path, captured: Path, ok: Run, refused: Run, kind: str) -> None:
    observation, pairs = seen(captured, "lenet"), tmp_path / "pairs"
    made = ["capture", "pairs", observation, *DIGITS, "--count", 20, "--defense", "noise:0.001", "--out", pairs]
    ok(*made)
    ok(*made)  # goes on, and there is nothing left
    trained = ["--pairs", pairs, *DIGITS, "--training-epochs", 1, "--count", 20]
    ok("train", kind, observation, *trained, "--out", tmp_path / "trained")
    generator = [f"--{kind}.generator", tmp_path / "trained" / "generator.safetensors"]
    ok("attack", observation, "--attack", kind, *generator, *DIGITS, "--out", tmp_path / "found")
    inputs = record.read(tmp_path / "found" / "record.json")["command"]["inputs"]
    assert set(inputs) == {str(observation), str(generator[1])}
    none = [*DIGITS, "--out", tmp_path / "none"]
    assert kind in refused("attack", observation, "--attack", kind, *none)
    other = refused("attack", other_state(tmp_path, captured), "--attack", kind, *generator, *none)
    assert "weights or buffers" in other
    assert "done before there is one" in refused("capture", "pairs", observation, "--defense", "soteria:0.5", *none)


def other_state(tmp_path: Path, captured: Path) -> Path:
    """An observation of the same architecture with other weights."""
    observation = load_observation(seen(captured, "lenet"))
    parameters = {name: p + 1e-3 for name, p in observation.model.parameters.items()}
    save_observation(replace(observation, model=replace(observation.model, parameters=parameters)), tmp_path / "other")
    return tmp_path / "other"


def test_pairs_are_of_whole_gradients(tmp_path: Path, captured: Path, refused: Run) -> None:
    said = refused("capture", "pairs", *adapter(captured), *DIGITS, "--out", tmp_path / "out")
    assert "whole gradients" in said


# --- Rerun ---


@pytest.fixture(scope="module")
def attacked(captured: Path) -> Path:
    """The record of a search on the MLP's gradient."""
    short = ["--attack", "inverting-gradients", "--inverting-gradients.steps", "4", "--inverting-gradients.restarts=2"]
    with redirect_stdout(io.StringIO()):
        made = ["attack", str(seen(captured, "mlp")), *short, *DIGITS, "--seed", "7", f"--out={captured / 'attacked'}"]
        assert main(made) == 0
    return captured / "attacked" / "record.json"


@pytest.fixture
def forged(tmp_path: Path, attacked: Path) -> Callable[..., Path]:
    """Write the record with a part of its command changed; returns the file."""

    def forge(change: Callable[[Any], object]) -> Path:
        written = json.loads(attacked.read_text(encoding="utf-8"))
        change(written["command"])
        (tmp_path / "forged.json").write_text(json.dumps(written), encoding="utf-8")
        return tmp_path / "forged.json"

    return forge


def test_a_rerun_gives_the_same_bits(tmp_path: Path, attacked: Path, ok: Run) -> None:
    ok("rerun", attacked, "--out", tmp_path / "second")
    assert scored(tmp_path / "second" / "record.json") == scored(attacked)
    first, second = (load_file(p / "reconstruction.safetensors") for p in (attacked.parent, tmp_path / "second"))
    assert torch.equal(first["images"], second["images"])
    before, after = record.read(attacked)["command"], record.read(tmp_path / "second" / "record.json")["command"]
    assert after == {**before, "arguments": {**before["arguments"], "out": str(tmp_path / "second")}}


def test_a_record_keeps_every_argument(attacked: Path) -> None:
    kept = record.read(attacked)["command"]["arguments"]
    told = {field.name for field in dataclasses.fields(commands.RERUNNABLE["attack"])}
    assert set(kept) == told - {
        "config",
        "quiet",
        "verbose",
        "resume",
        "overwrite",
    }  # which change nothing that is found
    assert (kept["attack"], kept["data"], kept["seed"], kept["steps"]) == ("inverting-gradients", "digits", 7, None)


def test_a_search_starts_at_the_reconstruction_of_another(
    tmp_path: Path, captured: Path, attacked: Path, ok: Run, refused: Run
) -> None:
    start, observation = tmp_path / "start", seen(captured, "mlp")
    start.write_bytes((attacked.parent / "reconstruction.safetensors").read_bytes())
    flags = ["--start", start, *DIGITS]
    one = ["--attack", "inverting-gradients", "--inverting-gradients.steps", 1]
    ok("attack", observation, *one, *flags, "--out", tmp_path / "second")
    first, second = (load_reconstruction(path) for path in (start, tmp_path / "second" / "reconstruction.safetensors"))
    assert float((first.value - second.value).abs().max()) <= 0.1 + 1e-6  # one step of step size 0.1
    none = [*flags, "--out", tmp_path / "none"]
    assert "no search" in refused("attack", observation, "--attack", "analytic", *none)
    ok("rerun", tmp_path / "second" / "record.json", "--out", tmp_path / "third")
    assert scored(tmp_path / "third" / "record.json") == scored(tmp_path / "second" / "record.json")
    start.write_bytes((tmp_path / "second" / "reconstruction.safetensors").read_bytes())
    assert "no longer the file" in refused("rerun", tmp_path / "second" / "record.json", "--out", tmp_path / "fourth")


def test_a_rerun_refuses_changed_inputs(tmp_path: Path, captured: Path, ok: Run, refused: Run) -> None:
    observation = tmp_path / "observation"
    observation.write_bytes(seen(captured, "mlp").read_bytes())
    ok("attack", observation, "--attack", "analytic", *DIGITS, "--out", tmp_path / "first")
    again = ["rerun", tmp_path / "first" / "record.json", "--out", tmp_path / "second"]
    observation.write_bytes(seen(captured, "lenet").read_bytes())
    assert "no longer the file" in refused(*again)
    observation.unlink()
    assert "There is no file" in refused(*again)


@pytest.mark.parametrize("changed", ["weights", "base", "adapter"])
def test_whatever_a_result_depends_on_is_an_input(
    tmp_path: Path, captured: Path, plain: Path, ok: Run, refused: Run, changed: str
) -> None:
    """Files beside the observation too: the weights of a plain gradient, the base model of an adapter."""
    own = tmp_path / "own"
    own.mkdir()
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "base/model.safetensors"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_bytes((captured / "tuned" / name).read_bytes())
    (own / "base" / "gradleak.json").write_bytes((captured / "tuned" / "base" / "gradleak.json").read_bytes())
    (own / "weights").write_bytes((captured / "mlp.safetensors").read_bytes())
    taken = [plain, "--model", "mlp", "--weights", own / "weights", "--input-shape", 1, 8, 8, "--attack", "analytic"]
    based = [own / "adapter", "--base", own / "base", "--attack", "activation-patterns"]
    ok("attack", *(taken if changed == "weights" else based), *DIGITS, "--out", tmp_path / "first")
    at = {"weights": "weights", "base": "base/model.safetensors", "adapter": "adapter/adapter_model.safetensors"}[
        changed
    ]
    other = {name: tensor + 1e-3 for name, tensor in load_file(own / at).items()}
    save_file(other, own / at)
    assert "no longer the file" in refused("rerun", tmp_path / "first" / "record.json", "--out", tmp_path / "second")


def test_records_of_older_versions_are_not_run_again(
    tmp_path: Path, captured: Path, attacked: Path, refused: Run
) -> None:
    """They kept a command line, which anybody can write anything into; what they say is still shown."""
    written = json.loads(attacked.read_text(encoding="utf-8"))
    inputs = written["command"]["inputs"]
    argv = ["attack", str(seen(captured, "mlp")), "--attack", "analytic", "--out", str(tmp_path / "elsewhere")]
    written["command"] = {"name": "attack", "arguments": {"argv": argv, "inputs": inputs}}
    written["schema"] = "gradleak/record/1"
    (tmp_path / "old.json").write_text(json.dumps(written), encoding="utf-8")
    assert "by an older gradleak" in refused("rerun", tmp_path / "old.json", "--out", tmp_path / "second")
    assert main(["report", str(tmp_path / "old.json"), "--out", str(tmp_path / "report.html")]) == 0


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


def test_a_record_cannot_make_us_import_code(
    tmp_path: Path, forged: Callable[..., Path], planted: Path, refused: Run
) -> None:
    path = forged(lambda command: command["arguments"].update(model="planted_model:build"))
    assert "planted_model:build" in refused("rerun", path, "--out", tmp_path / "second")
    allowed = refused("rerun", path, "--model", "another:build", "--out", tmp_path / "second")
    assert "planted_model:build" in allowed
    assert not planted.exists()


@pytest.mark.parametrize("name", ["rerun", "report", "list", "capture gradient", "nonsense", ""])
def test_a_record_cannot_make_us_run_anything_else(
    tmp_path: Path, forged: Callable[..., Path], refused: Run, name: str
) -> None:
    """Only commands that write a record can be in one; above all not another rerun, which allows its own code."""
    path = forged(lambda command: command.update(name=name))
    assert "cannot be run again" in refused("rerun", path, "--out", tmp_path / "second")


def test_a_record_cannot_choose_where_results_go(tmp_path: Path, forged: Callable[..., Path], ok: Run) -> None:
    path = forged(lambda command: command["arguments"].update(out=str(tmp_path / "elsewhere")))
    ok("rerun", path, "--out", tmp_path / "second")
    assert (tmp_path / "second" / "record.json").is_file()
    assert not (tmp_path / "elsewhere").exists()


def test_a_record_cannot_let_an_attack_write_to_a_folder(
    tmp_path: Path, forged: Callable[..., Path], refused: Run
) -> None:
    elsewhere = {"kkt-search": {"folder": str(tmp_path / "elsewhere")}}
    path = forged(lambda command: command.update(attacks=elsewhere))
    assert "would let kkt-search write to a folder" in refused("rerun", path, "--out", tmp_path / "second")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda command: command["arguments"].update(overwrite=True), "no argument 'overwrite'"),
        (lambda command: command["arguments"].update(seed="seven"), "seed"),
        (lambda command: command["arguments"].update(task="poetry"), "task"),
        (lambda command: command["arguments"].update(weights=[1]), "does not say how it was made"),
        (lambda command: command["arguments"].update(threads=0), "number of threads"),
        (lambda command: command["arguments"].pop("attack"), "`attack`"),
        (lambda command: command["arguments"].update(attack="analytic"), "what is to run is analytic"),
        (lambda command: command["arguments"].update(device="abacus"), "abacus"),
        (lambda command: command.update(attacks={"no-such": {}}), "of no-such, and what is to run"),
        (
            lambda command: command["attacks"].update(analytic={}),
            "of inverting-gradients, analytic, and what is to run",
        ),
        (lambda command: command.pop("attacks"), "of none"),
        (lambda command: command["attacks"]["inverting-gradients"].update(zeal=1), "no parameter 'zeal'"),
        (lambda command: command["attacks"]["inverting-gradients"].update(steps="two"), "steps"),
        (lambda command: command["attacks"]["inverting-gradients"].update(prior="mine"), "no parameter 'prior'"),
    ],
    ids=range(14),
)
def test_records_that_do_not_say_how_they_were_made(
    tmp_path: Path, forged: Callable[..., Path], refused: Run, change: Callable[[Any], None], hint: str
) -> None:
    assert hint in refused("rerun", forged(change), "--out", tmp_path / "second")


def test_code_of_ones_own_is_imported_when_it_is_named(tmp_path: Path, planted: Path, ok: Run, refused: Run) -> None:
    own = ["--model", "planted_model:build"]
    ok("capture", "gradient", *own, *DIGITS, "--out", tmp_path / "captured")
    observation = tmp_path / "captured" / "observation.safetensors"
    sys.modules.pop("planted_model")
    planted.unlink()
    argv = ["attack", observation, "--attack", "analytic", *DIGITS]
    assert "--model" in refused(*argv, "--out", tmp_path / "attacked")
    assert not planted.exists()
    ok(*argv, *own, "--out", tmp_path / "attacked")
    assert planted.exists()
    assert "--model" in refused("rerun", tmp_path / "attacked" / "record.json", "--out", tmp_path / "again")
    ok("rerun", tmp_path / "attacked" / "record.json", *own, "--out", tmp_path / "again")
