"""The report in a real browser: it draws its pictures, fits an 800-pixel window, and runs no script."""

import base64
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradleak.report import record as records
from gradleak.report.html import render
from gradleak.report.record import Record, Result

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome on the PATH to draw the page with"
)

COLOURS = {  # two images per column, one colour each
    "truth": [(200, 30, 40), (30, 160, 60)],
    "reconstruction": [(190, 60, 70), (60, 150, 90)],
    "mean_image": [(128, 120, 10), (129, 120, 10)],
    "nearest_public": [(20, 40, 200), (250, 130, 5)],
    "wrong_observation": [(120, 20, 180), (5, 180, 190)],
}
SHOWN_PIXELS = 126 * 126  # a picture is 128 pixels wide with a border of one
LONG = "a_name_without_a_single_space_" * 12
SCRIPT = "<script>document.body.dataset.width = document.documentElement.scrollWidth</script>"


def png(colour: tuple[int, int, int]) -> str:
    """A picture of 4 x 4 equal pixels."""
    buffer = BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_result(attack: str) -> Result:
    scores = {"psnr_db": [31.2, 18.9], "ssim": [0.94, 0.61]}
    return {
        "attack": attack,
        "parameters": {"steps": 4000, "note": LONG},
        "observation": {"kind": "Gradient", "batch": 2},
        "defense": None,
        "status": f"{attack} stopped after 4,000 steps.",
        "residual": 3.2e-4,
        "seconds": 184.2,
        "iterations": 4000,
        "scores": scores | {"identification_rank": [1, 3]},
        "controls": {name: scores for name in COLOURS if name not in ("truth", "reconstruction")},
        "flags": [
            {"name": "no_better_than_blind", "level": "warning", "sentence": f"<script>alert(1)</script> {LONG}"}
        ],
        "trace": [(i, 2.0**-i) for i in range(20)],
        "pictures": {name: [png(colour) for colour in colours] for name, colours in COLOURS.items()},
        "texts": {"truth": [LONG], "reconstruction": [LONG]},
        "labels": {"recovered": [LONG, LONG], "true": [LONG, "cat"]},
    }


def make_record() -> Record:
    record = records.new_record(
        {"name": "audit", "arguments": {"observation": LONG}},
        seed=0,
        threat_model=[{"item": "gradient", "revealed": True, "detail": LONG}],
    )
    record["verdict"] = {"level": "partial", "sentence": "One of the two images can be recognised."}
    record["results"] += [make_result("dlg"), make_result("inverting_gradients")]
    record["table"] = [{f"column {i}": LONG for i in range(12)}]
    record["plots"] = [{"title": LONG, "image": png((1, 2, 3))}]
    return record


def browse(folder: Path, html: str, *flags: str) -> str:
    """What the browser prints; flags say what it should do with the page."""
    (folder / "report.html").write_text(html, encoding="utf-8")
    base = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(BROWSER), *base, profile, *flags, (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    screenshot = tmp_path / "report.png"
    browse(tmp_path, render(make_record()), f"--screenshot={screenshot}", "--window-size=1000,4500")
    pixels = np.asarray(Image.open(screenshot).convert("RGB"))
    assert pixels.shape == (4500, 1000, 3)
    for colour in [colour for colours in COLOURS.values() for colour in colours]:
        count = int((pixels == colour).all(axis=-1).sum())
        # Two results show the same pictures. One in a hundred pixels may be lost at a rounded edge.
        assert count >= 0.99 * 2 * SHOWN_PIXELS, f"{colour} covers {count} pixels"
    lit = (pixels == (255, 255, 255)).all(axis=-1).mean()
    assert 0.4 < lit < 0.95, "a page is mostly white paper, but not blank"


def test_the_browser_finds_the_content(tmp_path: Path) -> None:
    page = browse(tmp_path, render(make_record()), "--dump-dom")
    assert "One of the two images can be recognised." in page
    assert "dlg stopped after 4,000 steps." in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert page.count("<img") == 2 * 2 * len(COLOURS) + 1
    assert page.count("<polyline") == 2


@pytest.mark.parametrize("width", [800, 1280])
def test_the_page_never_scrolls_sideways(tmp_path: Path, width: int) -> None:
    """A script measures the page, once the policy that forbids scripts has been taken out."""
    html, policies = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(make_record()))
    assert policies == 1
    page = browse(tmp_path, html.replace("</body>", SCRIPT + "</body>"), "--dump-dom", f"--window-size={width},900")
    measured = re.search(r'data-width="(\d+)"', page)
    assert measured is not None
    assert int(measured[1]) == width


def test_the_policy_stops_a_script_that_got_through(tmp_path: Path) -> None:
    """The second lock: the script that runs in the test above does not run under the page's own policy."""
    html = render(make_record()).replace("</body>", SCRIPT + "</body>")
    page = browse(tmp_path, html, "--dump-dom", "--window-size=800,900")
    assert SCRIPT in page
    assert "data-width" not in page
