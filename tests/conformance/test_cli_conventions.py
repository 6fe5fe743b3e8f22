"""What people know from other command lines: files in place of flags, results gone on with or replaced, silence, progress without a terminal,
a table at the end, completion, help and lists that cost nothing."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import DIGITS, Guess

from gradleak.attacks import ATTACKS
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit import progress
from gradleak.cli import sources
from gradleak.cli.app import COMMANDS, main
from gradleak.observations.defense_names import DEFENSES
from gradleak.report import record, terminal
from gradleak.report.words import LEVELS
from gradleak.studies.catalogue import STUDIES

Run = Callable[..., str]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a digit's gradient on an MLP."""
    out = tmp_path_factory.mktemp("conventions") / "mlp"
    with redirect_stdout(io.StringIO()):
        assert main(["capture", "gradient", "--model", "mlp", *DIGITS, "--reveal-labels", "--out", str(out)]) == 0
    return out


@pytest.fixture
def audit(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A short audit, in a folder where nothing else lies."""
    monkeypatch.chdir(tmp_path)
    return ["audit", captured / "observation.safetensors", *DIGITS, "--attacks", "analytic", "dlg", "--out", "out"]


def rows(out: Path) -> dict[str, Any]:
    return {row["attack"]: row for row in record.read(out / "record.json")["results"]}


# --- Files in place of flags ---


def test_a_file_says_what_flags_say_and_flags_win(
    tmp_path: Path, captured: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    Path("audit.toml").write_text(
        f'observation = "{captured / "observation.safetensors"}"\ndata = "digits"\nattacks = ["dlg"]\nseed = 7\n'
        'out = "a"\n[dlg]\nsteps = 5\n'
    )
    Path("pyproject.toml").write_text(
        '[tool.gradleak.audit]\nseed = 3\npublic-split = "test"\n[tool.gradleak.attack]\nnothing = 1\n'
    )
    ok("audit", "--config", "audit.toml")
    ok("audit", "--config=audit.toml", "--out", "b", "--seed=8", "--dlg.steps", 6)
    first, second = (record.read(Path(name, "record.json"))["command"] for name in "ab")
    assert [first["arguments"][key] for key in ("seed", "data", "public_split")] == [7, "digits", "test"]
    assert first["attacks"] == {"dlg": {"steps": 5}}
    assert second["arguments"]["seed"] == 8
    assert second["attacks"] == {"dlg": {"steps": 6}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tread = 2", "'tread', and there is no such flag: did you mean thread"),
        ("[analytic]\ntolerances = 1", "'analytic.tolerances', and there is no such flag: did you mean tolerance"),
        ('lr = "fast"', "'lr', and its value is unusable"),
        ("lr = ", "cannot be read as TOML"),
        ('attacks = ["mine:Attack"]', "would import the code"),
        ('model = "mine:build"', "would import the code"),
        ("overwrite = true", "said on the command line alone"),
    ],
)
def test_files_of_flags_that_cannot_be(audit: list[object], refused: Run, text: str, said: str) -> None:
    Path("audit.toml").write_text(text)
    assert said in refused(*audit, "--config", "audit.toml")
    Path("audit.toml").unlink()
    assert "There is no file audit.toml" in refused(*audit, "--config", "audit.toml")
    head, _, tail = text.partition("[")  # tables of attacks lie in that of the command
    Path("pyproject.toml").write_text(
        f"[tool.gradleak.audit]\n{head}" + (f"[tool.gradleak.audit.{tail}" if head == "" else "")
    )
    if head in ("", text):
        assert said in refused(*audit)


# --- Results gone on with, and replaced ---


def test_an_audit_that_was_interrupted_goes_on(
    audit: list[object],
    captured: Path,
    ok: Run,
    refused: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Interrupted(Guess):
        def __call__(self, observation: Any, *, generator: torch.Generator, on_step: object = None) -> Reconstruction:
            raise KeyboardInterrupt

    secret = ["--secret", captured / "secret.safetensors"]
    monkeypatch.setitem(ATTACKS, "dlg", Interrupted)
    assert main([str(part) for part in (*audit, *secret)]) == 130
    capsys.readouterr()
    before = rows(Path("out"))["analytic"]
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    assert "--resume" in refused(*audit, *secret)
    assert "made with another --data" in refused(*audit, *secret, "--data", "embedded", "--resume")
    assert "made with other attacks" in refused(*audit, *secret, "--resume", "--dlg.steps", 2)
    assert "1 attacks are finished in out." in ok(*audit, *secret, "--resume")
    after = rows(Path("out"))
    assert after["analytic"] == before  # its seconds too: it did not run again
    assert after["dlg"]["ran"]
    monkeypatch.setitem(ATTACKS, "dlg", Interrupted)
    ok(*audit, *secret, "--resume")  # nothing is left to do
    assert rows(Path("out")) == after
    sentences = [record.read(Path("out/record.json"))["verdict"]["sentence"]]
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    ok(*audit[:-1], "whole", *secret)
    sentences.append(record.read(Path("whole/record.json"))["verdict"]["sentence"])
    assert sentences[0] == sentences[1]


def test_a_redacted_audit_goes_on_and_stays_redacted(
    audit: list[object], captured: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    redacted = [*audit, "--secret", captured / "secret.safetensors", "--redact"]
    ok(*redacted)
    file = Path("out/record.json")
    whole = record.read(file)
    record.write({**whole, "results": whole["results"][:1]}, file)
    ok(*redacted, "--resume")
    again = record.read(file)["results"]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in whole["results"]]


SLOW = """
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from test_cli import Guess


@dataclass(frozen=True, kw_only=True)
class VerySlow(Guess):
    def __call__(self, observation, *, generator, on_step=None):
        while Path("wait").exists():
            time.sleep(0.05)
        return super().__call__(observation, generator=generator)
"""


def test_an_audit_that_was_killed_goes_on(
    audit: list[object], ok: Run, refused: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And while it runs, nobody else gets its folder."""
    Path("slow_attack.py").write_text(SLOW)
    Path("wait").touch()
    killed = [*(part for part in audit if part != "dlg")]
    killed.insert(killed.index("analytic") + 1, "slow_attack:VerySlow")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "gradleak", *map(str, killed)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not Path("out/record.json").exists() and process.poll() is None:
            time.sleep(0.05)
        for more in ("--resume", "--overwrite"):
            assert "Another gradleak is writing to out" in refused(*audit, more)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = rows(Path("out"))
    assert list(before) == ["analytic"]
    Path("wait").unlink()
    monkeypatch.setattr("gradleak.attacks.ATTACKS", ATTACKS)  # the name of the attack goes with the test
    try:
        ok(*killed, "--resume")
    finally:
        ATTACKS.pop("very-slow", None)
    after = rows(Path("out"))
    assert after["analytic"] == before["analytic"]
    assert after["very-slow"]["ran"]


def test_a_folder_that_nothing_came_into_is_gone(audit: list[object], refused: Run) -> None:
    refused(*audit[:-1], "new/out", "--secret", "nothing")
    refused(*audit[:-1], "new/out", "--lr", 1)
    assert not Path("new").exists()
    Path("out").mkdir()
    refused(*audit, "--lr", 1)
    assert Path("out").is_dir()  # which was there before


def test_results_are_replaced_where_that_is_asked_for(
    audit: list[object], captured: Path, ok: Run, refused: Run
) -> None:
    attack = ["attack", captured / "observation.safetensors", *DIGITS, "--attack", "analytic", "--out", "out"]
    ok(*attack)
    Path("out/old.png").touch()
    assert "lies in" in refused("attack", *attack[1:-1], captured, "--overwrite")
    said = refused(*attack, "--overwrite", "--start", Path("out/reconstruction.safetensors"))
    assert "lies in" in said
    ok("attack", *attack[1:], "--overwrite")
    assert not Path("out/old.png").exists()
    before = Path("out/record.json").read_text()
    refused(*attack, "--overwrite", "--lr", 1)  # bad input leaves everything where it was
    assert Path("out/record.json").read_text() == before
    assert sorted(Path().glob(".*")) == []
    ok(*attack, "--resume")  # finished: nothing is computed
    assert Path("out/record.json").read_text() == before
    assert "give one of them" in refused(*attack, "--overwrite", "--resume")
    shutil.rmtree("out")
    Path("out").mkdir()
    Path("out/letters.txt").write_text("precious")
    assert "no folder that gradleak has written" in refused(*attack, "--overwrite")


def test_what_is_captured_goes_on_and_is_replaced(
    tmp_path: Path, ok: Run, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    capture = ["capture", "gradient", "--model", "lenet", *DIGITS, "--out", "out"]
    ok(*capture, "--resume")  # nothing is there: it begins
    before = Path("out/observation.safetensors").stat().st_mtime_ns
    assert "finished already" in ok(*capture, "--resume")
    assert Path("out/observation.safetensors").stat().st_mtime_ns == before
    assert "another --indices" in refused(*capture, "--indices", 4, "--resume")
    assert "--overwrite" in refused(*capture)
    ok(*capture, "--indices", 4, "--overwrite")
    assert "finished already" in ok(*capture, "--indices", 4, "--resume")
    assert Path("out/command.json").stat().st_mode & 0o777 == 0o600
    train = ["train", "lti", "out/observation.safetensors", *DIGITS, "--count", 4, "--training-epochs", 1, "--out", "t"]
    ok(*train)
    assert "finished already" in ok(*train, "--resume")


# --- What is said ---


def test_quiet_says_nothing_and_verbose_more(
    audit: list[object], ok: Run, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS, "dlg", Guess)
    audit = [*audit[:-3], "dlg", "adam-epsilon", *audit[-2:]]  # which reads no gradient
    assert ok(*audit, "-q") == ""
    assert json.loads(ok(*audit, "-q", "--json", "--overwrite"))["verdict"]["level"] == "unscored"
    usual, more = ok(*audit, "--overwrite"), ok(*audit, "-v", "--overwrite")
    assert not usual.count("adam-epsilon: Not run: ")
    assert more.count("adam-epsilon: Not run: ") == 1
    assert "There is no file" in refused("audit", "nothing", "-q", "--out", "none")


def test_an_audit_ends_with_a_table_and_the_place_of_the_report(audit: list[object], captured: Path, ok: Run) -> None:
    secret = ["--secret", captured / "secret.safetensors"]
    last = ok(*audit[:-3], *audit[-2:], *secret).splitlines()[-5:]
    assert last[0].split()[:3] == ["attack", "Outcome", "Recovered"]
    assert last[1].startswith("analytic")
    assert "1 of 1" in last[1]
    assert last[2].startswith("Risk of sharing it: HIGH (")
    assert last[3].startswith("Private data recovered. 1 of 1 private ")
    assert last[4] == f"See {Path('out/report.html')}."


def test_progress_without_a_terminal_is_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    moments = iter([0.0, 0.0, 30.0, 60.0, 90.0, 121.0])  # begun twice, then one for each step
    on_step = progress.lines(lambda: next(moments))("dlg")
    for step in (100, 200, 300, 400):
        on_step(step, 2_000, 0.01234)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "dlg: step 200 of 2,000, 0.0123, 9 min left",  # 1,800 steps at 200 a minute
        "dlg: step 400 of 2,000, 0.0123, 8 min left",  # 1,600 steps at 400 in 121 seconds
    ]


def test_tables_keep_observations_apart() -> None:
    about: record.Command = {"name": "audit", "arguments": {}}
    made = record.new_record(about, 0, [])
    for name in ("first", "second"):
        row = record.new_result("dlg", {}, {"name": name})
        made["results"].append({**row, "ran": True, "residual": 0.1})
    made["results"].append({**record.new_result("ntk", {}, {"name": "second"}), "ran": False})
    lines = terminal.text(made).splitlines()
    assert [line.split()[0] for line in lines[:-3]] == ["first", "dlg", "second", "dlg"]
    assert lines[-3] == "Not run: ntk."
    assert lines[-2].startswith("Risk of sharing it: CANNOT SAY (")
    assert lines[-1:] == ["Not scored. No reconstruction has been scored."]
    made["verdicts"] = [{"level": "nothing", "sentence": "None.", "observation": name} for name in ("first", "second")]
    assert terminal.text(made).splitlines()[-2:] == [
        f"{name}: {LEVELS['nothing']}. None." for name in ("first", "second")
    ]


def test_a_table_that_is_too_wide_loses_nothing_and_breaks_no_name() -> None:
    made = record.new_record({"name": "audit", "arguments": {}}, 0, [])
    made["metrics"] = {
        key: {"label": f"Another measure {key}", "unit": "", "better": "higher", "decimals": 3} for key in "abcdef"
    }
    row: Any = {**record.new_result("inverting-gradients", {}, {"name": ""}), "ran": True, "residual": 0.00125}
    row |= {"seconds": 12.34, "scores": {key: [1 / 3, 2 / 3] for key in "abcdef"}}
    made["results"] = [row]
    text = terminal.text(made)
    assert "inverting-gradients " in text
    assert text.count("0.500") == 6
    assert "12.34" in text


# --- What there is ---


def test_sources_tell_of_attacks_what_the_attacks_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    live = {name: sources.imported(name) for name in ATTACKS}
    monkeypatch.delitem(sys.modules, "gradleak.attacks")
    assert {name: sources.attack(name) for name in sources.attack_names()} == live
    for attack in live.values():
        assert attack.sees
        assert attack.recovers
        assert all(parameter.help for parameter in attack.parameters), attack.name


def test_lists_are_those_of_the_program(ok: Run) -> None:
    listed = json.loads(ok("list", "--json"))
    assert [attack["name"] for attack in listed["attacks"]] == list(ATTACKS)
    assert listed["studies"] == {name: study.question for name, study in STUDIES.items()}
    assert [form.partition(":")[0] for form in listed["defenses"]] == list(DEFENSES)
    assert all(said.endswith(".") for said in listed["defenses"].values())  # whole sentences
    assert "Also called noise." in listed["defenses"]["gaussian-noise:STD"]
    assert list(json.loads(ok("list", "studies", "--json"))) == ["studies"]
    assert "Attacks" not in ok("list", "models")


def test_attacks_for_a_file_are_told_with_reasons_and_costs(captured: Path, ok: Run, refused: Run) -> None:
    rows = json.loads(ok("list", "attacks", "--for", captured / "observation.safetensors", *DIGITS, "--json"))
    told = {row["attack"]: row for row in rows}
    assert list(told) != list(ATTACKS)  # those that apply come first
    assert set(told) == set(ATTACKS)
    assert told["dager"]["why"] == "It recovers texts, and the observed model takes pictures."
    assert told["dlg"]["seconds"] > 0
    assert told["analytic"]["cost"] == "seconds to a few minutes"
    lines = ok("list", "--for", captured / "observation.safetensors", *DIGITS).splitlines()
    assert len(lines) == len(ATTACKS)
    assert lines[-1].split()[1] == "no:"
    assert "leave studies out" in refused("list", "studies", "--for", captured / "observation.safetensors")


def test_help_has_headings_defaults_and_the_sentences_of_attacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    said = capsys.readouterr().out
    for heading in ("observation", "model", "training", "membership", "attack", "output", "dlg", "map-inversion"):
        assert f" {heading} options " in said
    words = " ".join(re.sub("[│|]", " ", said).split())
    assert (
        "--dlg.restarts INT starts at most; another is made only when the objective stays above 1e-8 (default: 3)"
        in words
    )
    assert "{None}" not in said
    assert "(default: None)" not in said


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_flags_and_names(ok: Run, tmp_path: Path) -> None:
    script = tmp_path / "completion.sh"
    script.write_text(ok("completion", "bash"))
    assert ok("completion", "zsh").endswith(script.read_text())

    def completed(*words: str) -> list[str]:
        ask = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _gradleak; echo "${COMPREPLY[@]}"'
        command = ["bash", "-c", ask, str(script), "gradleak", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()

    assert completed("ca") == ["capture", "canaries"]
    assert completed("capture", "") == [name.split()[1] for name in COMMANDS if name.startswith("capture ")]
    assert completed("audit", "x", "--attacks", "dlg", "--dlg.r") == [
        "--dlg.rounds",
        "--dlg.round-evaluations",
        "--dlg.restarts",
    ]
    assert completed("attack", "x", "--attack", "inv") == ["inverting-gradients"]
    assert completed("attack", "x", "--schedule", "") == ["linear", "cosine"]
    assert completed("report", "comp") == ["completion.sh"]


def test_fish_is_told_of_every_command_and_flag(ok: Run) -> None:
    script = ok("completion", "fish")
    for command in COMMANDS:
        assert f"-a {command.split()[-1]}" in script
    assert "-l dlg.restarts -d 'starts at most'" in script
    for line in script.splitlines()[1:]:
        assert line.startswith("complete -c gradleak -n ")
        assert line.replace("\\'", "").count("'") % 2 == 0
