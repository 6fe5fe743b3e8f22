"""The record: what is written can be read again, strictly, and bad files are refused with a sentence."""

import copy
import json
import math
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy
import pytest

from gradleak.errors import BadInput
from gradleak.report import record as records
from gradleak.report.record import Record, Result


def full_result() -> Result:
    return {
        "attack": "dlg",
        "parameters": {"steps": 300, "distance": {"kind": "L2"}},
        "observation": {"name": "gradient", "kind": "gradient", "batch": 2},
        "defense": {"kind": "GaussianNoise", "std": 0.1},
        "status": "Converged.",
        "residual": 1e-9,
        "seconds": 1.5,
        "iterations": 300,
        "scores": {"psnr_db": [31.25, None], "identification_rank": [1, 2]},
        "controls": {"mean_image": {"psnr_db": [12.0, 11.5]}},
        "flags": [{"name": "no_better_than_blind", "level": "warning", "sentence": "It is not."}],
        "trace": [(0, 1.0), (1, None)],
        "ran": True,
        "outcome": "solved",
        "leads": [19.25, None],
        "intervals": {"psnr_db": (12.5, 31.5), "leads": (1.5, 20.5)},
        "repeats": [{"seed": 0, "residual": 0.5, "scores": {"psnr_db": 31.0}, "recovered": 1, "partly": 1}],
        "recovered": [True, False],
        "partly": [True, False],
        "proven": [True, False],
        "media": "text/plain",
        "shown": {"truth": ["hello"], "reconstruction": ["h\u00e9llo \ud800"]},  # a tokenizer can cut a pair in two
        "decoys": 99,
        "labels": {"recovered": [3, 7], "true": [7, 3]},
        "count": {"recovered": 2, "true": 2},
    }


def full_record() -> Record:
    record = records.new_record(
        {"name": "audit", "arguments": {"out": "demo"}, "attacks": {"dlg": {"steps": 3}}, "inputs": {"a": "0f"}},
        seed=0,
        threat_model=[{"item": "labels", "revealed": False, "detail": "recovered by the attack"}],
    )
    record["verdict"] = {"level": "partial", "sentence": "One of two."}
    record["results"].append(full_result())
    record["table"] = [{"std": 0.1, "psnr_db": 31.25}]
    record["plots"] = [{"title": "PSNR", "image": "data:image/png;base64,AAAA"}]
    record["verdicts"] = [{**record["verdict"], "observation": "gradient"}]
    record["metrics"] = {"psnr_db": {"label": "PSNR", "unit": "dB", "better": "higher", "decimals": 2}}
    record["controls"] = {"mean_image": {"label": "Mean image", "blind": True}}
    return record


def as_json(record: Record) -> Any:
    """The record in JSON's own types, by way of the standard library alone."""
    return json.loads(json.dumps(record))


def test_a_new_record_says_when_and_where_it_was_made() -> None:
    record = records.new_record({"name": "demo", "arguments": {}}, seed=None, threat_model=[])
    made = datetime.fromisoformat(record["created"])
    assert made.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - made) < timedelta(minutes=1)
    assert record["schema"] == "gradleak/record/2"
    assert record["seed"] is None
    assert record["results"] == []
    assert record["verdict"]["level"] == "unscored"
    assert record["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["environment"]["cpus"] == os.cpu_count()
    assert record["environment"]["packages"]["numpy"] == numpy.__version__


def test_write_then_read_gives_the_record_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    record = full_record()
    records.write(record, path)
    assert records.read(path) == as_json(record)
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]


def test_an_extra_key_survives(tmp_path: Path) -> None:
    record = cast(dict[str, Any], full_record()) | {"later": [1, 2]}
    records.write(cast(Record, record), tmp_path / "record.json")
    assert cast(dict[str, Any], records.read(tmp_path / "record.json"))["later"] == [1, 2]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    record = full_record()
    result = record["results"][0]
    result["residual"] = math.nan
    result["scores"] = {"psnr_db": (math.inf, -math.inf, 3.0)}
    result["trace"] = [(0, math.nan), (1, 2.0)]
    result["parameters"] = {"nested": {"deep": [math.inf, (math.nan, 1.0)]}}
    before = copy.deepcopy(record)
    records.write(record, tmp_path / "record.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    written = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)["results"][0]
    assert written["residual"] is None
    assert written["scores"] == {"psnr_db": [None, None, 3.0]}
    assert written["trace"] == [[0, None], [1, 2.0]]
    assert written["parameters"] == {"nested": {"deep": [None, [None, 1.0]]}}
    assert repr(record) == repr(before)  # the caller's record is left as it was (repr: nan is not equal to itself)


def spoil_with_an_object(record: Record) -> None:
    record["results"][0]["parameters"] = {"steps": object()}


def spoil_with_a_wrong_type(record: Record) -> None:
    record["results"][0]["seconds"] = cast(float, "soon")


@pytest.mark.parametrize(("spoil", "error"), [(spoil_with_an_object, TypeError), (spoil_with_a_wrong_type, BadInput)])
def test_a_record_that_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, spoil: Any, error: type[Exception]
) -> None:
    path = tmp_path / "record.json"
    records.write(full_record(), path)
    old = path.read_bytes()
    record = full_record()
    spoil(record)
    with pytest.raises(error):
        records.write(record, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "record.json"
    records.write(full_record(), path)
    old = path.read_bytes()

    def half_then_fail(target: Path, text: str, encoding: str) -> int:
        target.write_bytes(text.encode(encoding)[: len(text) // 2])
        raise OSError(28, "No space left on device")

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    if step == "write_text":
        monkeypatch.setattr(Path, "write_text", half_then_fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        records.write(full_record(), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


NOT_RECORDS = [
    ("{", "is not JSON"),
    ("", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('{"seed": NaN}', "NaN is no JSON number"),
    ('{"seed": -Infinity}', "-Infinity is no JSON number"),
    ('{"seed": 1' + "0" * 5000 + "}", "is not JSON"),
    ("[]", "it has no schema"),
    ("{}", "it has no schema"),
    ('{"schema": 1}', "it has no schema"),
    ('{"schema": "gradleak/record/3"}', "was written by a newer gradleak: upgrade"),
    ('{"schema": "gradleak/record/0"}', "has the unknown schema 'gradleak/record/0'"),
    ('{"schema": "gradleak/record/one"}', "has the unknown schema"),
    ('{"schema": "gradleak/observation/2"}', "has the unknown schema"),
    ('{"schema": "gradleak/record/2"}', "is not a valid 'gradleak/record/2' (Object missing required field"),
    ('{"schema": "gradleak/record/1"}', "is not a valid 'gradleak/record/1' (Object missing required field `command`"),
]


@pytest.mark.parametrize(("text", "complaint"), NOT_RECORDS, ids=range(len(NOT_RECORDS)))
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert_refused(tmp_path / "bad.json", complaint)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.json", "No such file")
    assert_refused(tmp_path, "Cannot read the record")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert_refused(tmp_path / "binary.json", "is not JSON")


REQUIRED_HERE = ["gradleak", "created", "command", "seed", "environment", "threat_model", "verdict", "results"]
REQUIRED_OF_A_RESULT = [
    "attack",
    "parameters",
    "observation",
    "defense",
    "status",
    "residual",
    "seconds",
    "iterations",
    "scores",
    "controls",
    "flags",
]


@pytest.mark.parametrize("key", REQUIRED_HERE)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    record = as_json(full_record())
    del record[key]
    assert_dict_refused(record, tmp_path, f"missing required field `{key}`")


@pytest.mark.parametrize("key", REQUIRED_OF_A_RESULT)
def test_a_missing_key_of_a_result_is_named(tmp_path: Path, key: str) -> None:
    record = as_json(full_record())
    del record["results"][0][key]
    assert_dict_refused(record, tmp_path, f"missing required field `{key}` - at `$.results[0]`")


OPTIONAL_OF_A_RESULT = ["trace", "ran", "outcome", "leads", "recovered", "partly", "proven"]
OPTIONAL_OF_A_RESULT += ["media", "shown", "decoys", "labels", "count", "intervals", "repeats"]


def test_every_key_of_a_result_is_tried() -> None:
    assert {*REQUIRED_OF_A_RESULT, *OPTIONAL_OF_A_RESULT} == set(full_result()) == set(Result.__annotations__)


@pytest.mark.parametrize("key", OPTIONAL_OF_A_RESULT)
def test_the_other_keys_of_a_result_may_be_missing(tmp_path: Path, key: str) -> None:
    record = as_json(full_record())
    del record["results"][0][key]
    records.write(record, tmp_path / "record.json")
    assert records.read(tmp_path / "record.json") == record


WRONG_TYPES: list[tuple[str, object, str]] = [
    ("seed", 1.5, "$.seed"),
    ("seed", True, "$.seed"),
    ("created", 7, "$.created"),
    ("results", {}, "$.results"),
    ("results", [7], "$.results[0]"),
    ("verdict.level", "fine", "$.verdict.level"),
    ("verdicts.0.level", "safe", "$.verdicts[0].level"),
    ("threat_model.0.revealed", "yes", "$.threat_model[0].revealed"),
    ("threat_model.0.revealed", 1, "$.threat_model[0].revealed"),
    ("metrics.psnr_db.better", "more", "$.metrics[...].better"),
    ("metrics.psnr_db.decimals", -1, "$.metrics[...].decimals"),
    ("metrics.psnr_db.decimals", 10**9, "$.metrics[...].decimals"),  # would make a page of a gigabyte
    ("controls.mean_image.blind", "no", "$.controls[...].blind"),
    ("command.inputs", {"a": 1}, "$.command.inputs[...]"),
    ("results.0.seconds", None, "$.results[0].seconds"),
    ("results.0.residual", 10**400, "$.results[0].residual"),
    ("results.0.defense", "none", "$.results[0].defense"),
    ("results.0.scores", {"psnr_db": 31.0}, "$.results[0].scores[...]"),
    ("results.0.scores", {"psnr_db": [1.0, "two"]}, "$.results[0].scores[...][1]"),
    ("results.0.controls", {"mean_image": []}, "$.results[0].controls[...]"),
    ("results.0.flags.0.level", "fatal", "$.results[0].flags[0].level"),
    ("results.0.trace", [[0, 1.0, 2.0]], "$.results[0].trace[0]"),
    ("results.0.trace", [["0", 1.0]], "$.results[0].trace[0][0]"),
    ("results.0.media", "text/html", "$.results[0].media"),
    ("results.0.shown", {"truth": "data:"}, "$.results[0].shown[...]"),
    ("results.0.proven", [1], "$.results[0].proven[0]"),
    ("results.0.count", {"recovered": "many"}, "$.results[0].count.recovered"),
    ("table", [[1, 2]], "$.table[0]"),
    ("plots", [{"title": "PSNR"}], "missing required field `image` - at `$.plots[0]`"),
]


@pytest.mark.parametrize(("place", "value", "complaint"), WRONG_TYPES)
def test_a_wrong_type_is_named(tmp_path: Path, place: str, value: object, complaint: str) -> None:
    record = as_json(full_record())
    *path, last = place.split(".")
    target = record
    for key in path:
        target = target[int(key) if key.isdecimal() else key]
    target[last] = value
    assert_dict_refused(record, tmp_path, complaint)
    with pytest.raises(BadInput) as refusal:
        records.write(record, tmp_path / "never.json")
    assert complaint in str(refusal.value)


def old_record() -> dict[str, Any]:
    """A record as gradleak 0.1.0 wrote it, of a demo: two observations, one threat model."""
    row: dict[str, Any] = {
        "attack": "map-inversion",
        "parameters": {"evaluations": 75},
        "observation": {"kind": "Adapter", "architecture": "mlp", "revealed": ["adapter"]},
        "defense": None,
        "status": "Finished.",
        "residual": 0.5,
        "seconds": 1.5,
        "iterations": 450,
        "scores": {"psnr_db": [16.5], "identification_rank": [1]},
        "controls": {"mean_image": {"psnr_db": [11.5]}, "nearest_public": {"psnr_db": [17.5]}},
        "flags": [],
        "trace": [[1, 0.5]],
        "pictures": {"truth": ["data:image/png;base64,AAAA"], "reconstruction": ["data:image/png;base64,AAAB"]},
        "decoys": 99,
    }
    texts = {"truth": ["hello"], "reconstruction": ["hello"]}
    dager = {**row, "attack": "dager", "observation": {"kind": "TextGradient"}, "texts": texts}
    del dager["pictures"]
    missing = {
        **row,
        "attack": "recursive",
        "status": "Not run: it is for one image.",
        "residual": None,
        "pictures": {},
    }
    return {
        "schema": "gradleak/record/1",
        "gradleak": "0.1.0",
        "created": "2026-11-25T13:56:29+00:00",
        "command": {"name": "demo", "arguments": {"argv": ["demo", "--out", "x"], "inputs": {"a.safetensors": "0f"}}},
        "seed": 0,
        "environment": {"python": "3.11.7"},
        "threat_model": [{"item": "adapter", "revealed": True, "detail": "rank 2"}],
        "verdict": {"level": "recovered", "sentence": "So."},
        "results": [row, missing, dager],
    }


def test_an_old_record_is_read_in_the_words_of_today(tmp_path: Path) -> None:
    old = old_record()
    (tmp_path / "old.json").write_text(json.dumps(old))
    record = records.read(tmp_path / "old.json")
    records.write(record, tmp_path / "new.json")
    assert records.read(tmp_path / "new.json") == record
    assert record["schema"] == records.SCHEMA
    first, missing, dager = record["results"]
    assert (first.get("media"), first.get("shown")) == ("image/png", old["results"][0]["pictures"])
    assert (dager.get("media"), dager.get("shown")) == ("text/plain", old["results"][2]["texts"])
    assert [row.get("ran") for row in record["results"]] == [True, False, True]
    assert "shown" not in missing
    assert not {"pictures", "texts"} & set(dager)
    assert record["command"] == {
        "name": "demo",
        "arguments": {"argv": ["demo", "--out", "x"]},
        "inputs": {"a.safetensors": "0f"},
    }
    assert record["metrics"]["psnr_db"] == {"label": "PSNR", "unit": "dB", "better": "higher", "decimals": 2}
    assert [name for name, control in record["controls"].items() if not control["blind"]] == ["nearest_public"]


def test_an_old_threat_model_is_that_of_the_first_observation_only(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(old_record()))
    record = records.read(tmp_path / "old.json")
    assert [row["observation"]["name"] for row in record["results"]] == ["Adapter", "Adapter", "TextGradient"]
    assert [fact.get("observation") for fact in record["threat_model"]] == ["Adapter"]


def test_an_old_record_says_which_study_it_is_of(tmp_path: Path) -> None:
    old = old_record() | {"results": []}
    old["command"] = {"name": "reproduce", "arguments": {"argv": ["reproduce", "lora-text", "--out", "x"]}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert records.read(tmp_path / "old.json")["command"]["arguments"]["name"] == "lora-text"


@pytest.mark.parametrize("key", ["command", "threat_model", "results"])
@pytest.mark.parametrize("value", [None, 7, [7], {"name": 7}])
def test_a_damaged_old_record_is_refused(tmp_path: Path, key: str, value: object) -> None:
    assert_dict_refused(old_record() | {key: value}, tmp_path, "is not a valid 'gradleak/record/1'")


def test_a_damaged_row_of_an_old_record_is_refused(tmp_path: Path) -> None:
    old = old_record()
    old["results"][0]["pictures"] = ["data:"]
    assert_dict_refused(old, tmp_path, "at `$.results[0].shown`")


def test_the_report_works_without_torch() -> None:
    """The parent package is replaced by an empty one, for it may import torch; then a whole report is made."""
    package = Path(records.__file__).parents[1]
    code = f"""
import sys, types
parent = types.ModuleType("gradleak")
parent.__path__ = [{str(package)!r}]
sys.modules["gradleak"] = parent
from gradleak.report.html import render
from gradleak.report.record import new_record
render(new_record({{"name": "demo", "arguments": {{}}}}, 0, []))
heavy = {{"torch", "transformers", "datasets", "torchmetrics", "matplotlib", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def assert_dict_refused(record: object, folder: Path, complaint: str) -> None:
    (folder / "bad.json").write_text(json.dumps(record))
    assert_refused(folder / "bad.json", complaint)


def assert_refused(path: Path, complaint: str) -> None:
    with pytest.raises(BadInput) as refusal:
        records.read(path)
    sentence = str(refusal.value)
    assert complaint in sentence
    assert path.name in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
