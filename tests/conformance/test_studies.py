"""Every study runs at its smallest size, on embedded data, and says so."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest

from gradleak.report import html, record
from gradleak.studies import RECIPES

# What the smallest size has to show, as {study: (row, column, least)}: closed forms and proofs, which size does not change.
SHOWN: dict[str, tuple[dict[str, Any], str, float]] = {
    "dager-encoder": ({"batch": 1}, "rouge1", 100),  # one text of fewer tokens than the width is proven
    "dager-decoder": ({"batch": 1, "model": "small gpt2"}, "rouge1", 100),
    "lora-text": ({"rank": 64, "shared": "gradient"}, "rouge1", 100),  # fewer tokens than the rank
    "recursion": ({"model": "mlp", "noise": 0.0}, "median_db", 100),  # exact in float32
    "git-exact": ({"model": "relu3"}, "exact_psnr_db", 60),  # weights recovered, pictures in closed form
}


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Victims are trained once for all studies, and nowhere else than here."""
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path_factory.getbasetemp() / "victims"))


def finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name", RECIPES)
def test_the_smallest_size_runs(name: str, tmp_path: Path) -> None:
    study = RECIPES[name]
    more = {"device": "cpu"} if "device" in inspect.signature(study).parameters else {}
    findings = None
    for findings in study("embedded", "smoke", seed=0, start=lambda title: lambda *step: None, **more):  # noqa: B007
        pass
    assert findings is not None
    assert findings.table
    assert "smoke size" in findings.sentence
    assert all(plot["image"].startswith("data:image/png;base64,") for plot in findings.plots)
    for row in findings.table:
        # A cell without a number says why.
        assert all(map(finite, row.values())) or row.get("note"), row
    if name in SHOWN:
        where, column, least = SHOWN[name]
        rows = [row for row in findings.table if all(row.get(key) == value for key, value in where.items())]
        assert rows
        assert all(row[column] >= least for row in rows)
    written = record.new_record({"name": "reproduce", "arguments": {"name": name}}, 0, [])
    written["table"], written["plots"] = findings.table, findings.plots
    record.write(written, tmp_path / "record.json")
    assert name in html.render(record.read(tmp_path / "record.json"))
