"""The report page: complete, a pure function of the record, and deaf to hostile strings."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gradleak.report import record as records
from gradleak.report.html import describe, plain, render
from gradleak.report.record import Record, Result

# A PNG of one pixel would do; the page only looks at the letters.
PICTURES = [f"data:image/png;base64,iVBORw0KGgo{letter}" for letter in "ABCDEFGHIJ"]
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' onload='alert(3)"


class Page(HTMLParser):
    """The page as a browser would take it: its elements, the text within each kind of element, and all its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(" ".join(data.split()))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def make_result(attack: str = "inverting_gradients") -> Result:
    return {
        "attack": attack,
        "parameters": {"steps": 4000, "tv_weight": 0.01},
        "observation": {"kind": "Gradient", "batch": 2},
        "defense": None,
        "status": f"{attack} stopped where the objective no longer falls.",
        "residual": 0.00123,
        "seconds": 12.34,
        "iterations": 4000,
        "scores": {"psnr_db": [30.0, 20.0], "ssim": [0.9, 0.5], "identification_rank": [1, 12]},
        "controls": {
            "mean_image": {"psnr_db": [12.0, 16.0], "ssim": [0.2, 0.3]},
            "nearest_public": {"psnr_db": [29.0, 28.0], "ssim": [0.8, 0.7]},
            "wrong_observation": {"psnr_db": [14.0, 10.0], "ssim": [0.1, 0.6]},
        },
        "flags": [{"name": "vanishing_gradient", "level": "warning", "sentence": "The gradient is tiny."}],
        "trace": [(0, 1.0), (100, 0.1), (200, 0.01)],
        "pictures": {
            "mean_image": PICTURES[4:6],
            "reconstruction": PICTURES[2:4],
            "truth": PICTURES[0:2],
            "nearest_public": PICTURES[6:8],
        },
    }


def make_record(*results: Result) -> Record:
    record = records.new_record(
        {"name": "audit", "arguments": {"observation": "demo/observation.safetensors"}},
        seed=7,
        threat_model=[
            {"item": "gradient", "revealed": True, "detail": "62 tensors"},
            {"item": "labels", "revealed": False, "detail": "inferred by the attack"},
        ],
    )
    record["verdict"] = {"level": "recovered", "sentence": "One of two images was recovered."}
    record["results"].extend(results)
    return record


def rows(html: str) -> list[list[str]]:
    """The cells of every table row, as text."""
    cell = re.compile(r"<t[hd][^>]*>(.*?)</t[hd]>", re.DOTALL)
    return [
        [" ".join(re.sub(r"<[^>]+>", " ", found).split()) for found in cell.findall(row)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.DOTALL)
    ]


def test_the_parts_come_in_the_promised_order() -> None:
    record = make_record(make_result("dlg"), make_result("git"))
    record["table"] = [{"std": 0.1, "verdict": "partial"}, {"std": None, "extra": "yes"}]
    record["plots"] = [{"title": "PSNR against noise", "image": PICTURES[8]}]
    text = Page(render(record)).text
    parts = [
        "One of two images was recovered.",
        "All attacks at a glance",
        "What the attacker saw",
        "62 tensors",
        "1. dlg",
        "dlg stopped where",
        "Truth Reconstruction Mean image Nearest public",
        "Scores",
        "The gradient is tiny.",
        "Objective while the attack ran",
        "0.00123",
        "tv_weight",
        "2. git",
        "PSNR against noise",
        "How to run this again",
        "demo/observation.safetensors",
        "Environment",
    ]
    place = 0
    for part in parts:
        place = text.index(part, place)  # raises where a part is missing or comes too early
    assert ["0.1", "partial", "–"] in rows(render(record))  # noqa: RUF001
    assert ["–", "–", "yes"] in rows(render(record))  # noqa: RUF001


def test_render_is_pure() -> None:
    record = make_record(make_result("dlg"), make_result("git"))
    before = copy.deepcopy(record)
    assert render(record) == render(record) == render(before)
    assert record == before


def test_the_page_is_the_same_before_and_after_the_disk(tmp_path: Path) -> None:
    record = make_record(make_result())
    record["results"][0]["scores"] = {"psnr_db": [math.inf, 20.0]}
    record["table"] = [{"psnr_db": math.nan}]
    records.write(record, tmp_path / "record.json")
    assert render(records.read(tmp_path / "record.json")) == render(record)


def test_pictures_stand_in_columns_with_their_scores() -> None:
    html = render(make_record(make_result()))
    assert [image["src"] for image in Page(html).attributes("img")] == [PICTURES[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert [
        "Image 1",
        "PSNR 30.00 dB SSIM 0.900 Rank 1",
        "PSNR 12.00 dB SSIM 0.200",
        "PSNR 29.00 dB SSIM 0.800",
    ] in rows(html)
    assert "image-rendering: pixelated" in html


def test_scores_stand_next_to_the_controls_and_the_gap_is_to_the_best_blind_one() -> None:
    """Expected gaps: numpy. The best blind control differs from image to image; nearest_public, chosen with the truth
    in hand, is better than both and must not count."""
    result = make_result()
    attack = np.array(result["scores"]["psnr_db"], dtype=float)
    blind = np.array([result["controls"][name]["psnr_db"] for name in ("mean_image", "wrong_observation")], dtype=float)
    gaps = [f"{gap:+.2f}" for gap in attack - blind.max(axis=0)]
    gap_of_means = f"{attack.mean() - blind.mean(axis=1).max():+.2f}"
    found = rows(render(make_record(result)))
    ssim = ["0.900", "0.200", "0.800", "0.100", "+0.700"]
    assert ["1", "30.00", "12.00", "29.00", "14.00", gaps[0], *ssim, "1"] in found
    ssim = ["0.500", "0.300", "0.700", "0.600", "−0.100"]  # noqa: RUF001
    assert ["2", "20.00", "16.00", "28.00", "10.00", gaps[1], *ssim, "12"] in found
    ssim = ["0.700", "0.250", "0.750", "0.350", "+0.350"]
    assert ["Mean", "25.00", "14.00", "28.50", "12.00", gap_of_means, *ssim, "6.5"] in found


def test_where_less_is_better_the_gap_is_turned_round() -> None:
    result = make_result()
    result["scores"] = {"lpips": [0.1], "unheard_of": [5.0]}
    result["controls"] = {"mean_image": {"lpips": [0.7], "unheard_of": [4.0]}, "wrong_observation": {"lpips": [0.4]}}
    assert ["1", "0.100", "0.700", "0.400", "+0.300", "5.0000", "4.0000"] in rows(render(make_record(result)))


def test_without_a_blind_control_there_is_no_gap() -> None:
    result = make_result()
    result["scores"], result["controls"] = {"psnr_db": [30.0]}, {"nearest_public": {"psnr_db": [29.0]}}
    assert ["1", "30.00", "29.00"] in rows(render(make_record(result)))


def test_a_missing_number_is_a_dash_and_never_a_better_mean() -> None:
    result = make_result()
    result["residual"] = None
    result["scores"] = {"psnr_db": [None, 20.0]}
    result["controls"] = {"mean_image": {"psnr_db": [12.0, 16.0]}, "wrong_observation": {"psnr_db": [14.0, None]}}
    found = rows(render(make_record(result)))
    dash = "–"  # noqa: RUF001
    assert ["1", dash, "12.00", "14.00", dash] in found
    assert ["2", "20.00", "16.00", dash, dash] in found  # the control without a number might have been the best one
    assert ["Mean", "20.00 (1 of 2)", "14.00", "14.00 (1 of 2)", dash] in found
    assert ["Residual", dash] in found


def test_several_results_are_compared_at_the_top() -> None:
    noisy = make_result("git")
    noisy["defense"] = {"kind": "GaussianNoise", "std": 0.1}
    noisy["scores"], noisy["controls"], noisy["flags"] = {"psnr_db": [10.0, 11.0]}, {}, []
    found = rows(render(make_record(make_result("dlg"), noisy)))
    assert found[0] == (
        [
            "Attack",
            "Mean PSNR (dB)",
            "Best blind control, PSNR (dB)",
            "Mean SSIM",
            "Identified",
            "Residual",
            "Seconds",
            "Flags",
        ]
    )
    dash = "–"  # noqa: RUF001
    assert found[1] == ["dlg", "25.00", "14.00 (mean image)", "0.700", "1 of 2", "0.00123", "12.34", "1 warning"]
    assert found[2] == ["git GaussianNoise (std 0.1)", "10.50", dash, dash, dash, "0.00123", "12.34", "none"]
    assert "All attacks at a glance" not in render(make_record(make_result()))


def test_it_works_without_a_secret() -> None:
    result = make_result()
    result["scores"], result["controls"], result["flags"] = {}, {}, []
    result["pictures"] = {"reconstruction": PICTURES[:2]}
    result["labels"] = {"recovered": [3, 7]}
    record = make_record(result)
    record["verdict"] = {"level": "unscored", "sentence": "Nothing to compare with."}
    text = Page(render(record)).text
    assert "Not scored: there was no secret to compare with." in text
    assert "Recovered 3, 7 ." in text or "Recovered 3, 7." in text
    assert "No check raised a flag." in text
    assert "Truth" not in text


def test_an_attack_that_did_not_run_is_not_said_to_lack_a_secret() -> None:
    result = make_result()
    result["scores"], result["controls"], result["pictures"], result["trace"] = {}, {}, {}, []
    result["status"], result["residual"], result["iterations"] = "Not run: the labels are hidden.", None, 0
    text = Page(render(make_record(result))).text
    assert "Not run: the labels are hidden." in text
    assert "There is nothing to score." in text
    assert "no secret" not in text


def test_it_works_without_a_result() -> None:
    assert "No attack was run." in Page(render(make_record())).text


def test_labels_are_counted_in_any_order() -> None:
    result = make_result()
    result["labels"] = {"recovered": [3, 3, 7], "true": [7, 3, 1]}
    assert "2 of 3 right, in whatever order" in render(make_record(result))


def test_hostile_strings_are_only_ever_text() -> None:
    """Every string of the record, keys included, is an attack on the page."""
    tame = make_record(make_result("dlg"), make_result("git"))
    hostile = make_record(make_result("dlg"), make_result("git"))
    for record, text in ((tame, "plain"), (hostile, HOSTILE)):
        record["command"] = {"name": text, "arguments": {text: text, "list": [text, {text: text}]}}
        record["created"] = record["gradleak"] = text
        record["environment"] = {text: {text: text}}
        record["threat_model"] = [{"item": text, "revealed": True, "detail": text}]
        record["verdict"]["sentence"] = text
        record["table"] = [{text: text}]
        record["plots"] = [{"title": text, "image": PICTURES[0]}]
        for result in record["results"]:
            result["attack"] = result["status"] = text
            result["parameters"] = {text: text, "distance": {"kind": text, text: text}}
            result["observation"] = result["defense"] = {"kind": text, text: text}
            result["scores"] = {text: [1.0, 2.0]}
            result["controls"] = {text: {text: [1.0, 2.0]}}
            result["flags"] = [{"name": text, "level": "error", "sentence": text}]
            result["pictures"] = {text: PICTURES[:1]}
            result["labels"] = {"recovered": [text], "true": [text]}
            result["texts"] = {"truth": [text], "reconstruction": [text]}
    page, expected = Page(render(hostile)), Page(render(tame))
    shape = [(tag, sorted(attributes)) for tag, attributes in page.elements]
    assert shape == [(tag, sorted(attributes)) for tag, attributes in expected.elements]
    assert not page.attributes("script")
    assert page.text.count(HOSTILE) > 30  # it is there to be read


BAD_PICTURES = [
    "javascript:alert(1)",
    "https://example.org/pixel.png",
    "data:text/html;base64,AAAA",
    "data:image/svg+xml;base64,AAAA",
    'data:image/png;base64,AAAA"><script>alert(1)</script>',
    "data:image/png;base64,AAAA\n",
    "data:image/png;base64,",
    " data:image/png;base64,AAAA",
    "",
]


@pytest.mark.parametrize("uri", BAD_PICTURES)
def test_a_picture_that_is_no_embedded_png_is_left_out_with_a_note(uri: str) -> None:
    result = make_result()
    result["pictures"] = {"truth": PICTURES[:2], "reconstruction": [PICTURES[2], uri]}
    record = make_record(result)
    record["plots"] = [{"title": "Plot", "image": uri}]
    page = Page(render(record))
    assert [image["src"] for image in page.attributes("img")] == [PICTURES[0], PICTURES[2], PICTURES[1]]
    assert "left out: not an embedded PNG" in page.text
    assert "Left out: not an embedded PNG." in page.text
    assert not page.attributes("script")


def test_columns_of_unequal_length_are_filled_up() -> None:
    result = make_result()
    result["pictures"] = {"truth": PICTURES[:1], "reconstruction": PICTURES[1:4]}
    assert Page(render(make_record(result))).text.count("no picture") == 2


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = render(make_record(make_result("dlg"), make_result("git")))
    page = Page(html)
    policy = [meta["content"] or "" for meta in page.attributes("meta") if "http-equiv" in meta]
    assert len(policy) == 1
    assert policy[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r"data:image/png;base64,[^\"]+", "", html))
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    links = [attributes["href"] for _, attributes in page.elements if "href" in attributes]
    assert links == ["#result-1", "#result-2"]
    assert set(links) <= {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}


def test_texts_are_shown_and_can_be_saved() -> None:
    result = make_result("dager")
    result["pictures"] = {}
    result["scores"] = {"rouge1": [1.0]}
    result["texts"] = {"truth": ["Dear <b>Ann</b>"], "reconstruction": ["Dear <b>Ann</b> \ud800", "more"]}
    html = render(make_record(result))
    html.encode("utf-8")
    found = rows(html)
    assert ["1", "Dear &lt;b&gt;Ann&lt;/b&gt;", "Dear &lt;b&gt;Ann&lt;/b&gt; ?"] in found
    assert ["2", "–", "more"] in found  # noqa: RUF001


def points(html: str) -> list[np.ndarray]:
    """The polylines of the page, (points, 2) each, in pixels: x to the right, y downwards."""
    lines = [line["points"] or "" for line in Page(html).attributes("polyline")]
    return [np.array([pair.split(",") for pair in line.split()], dtype=float) for line in lines]


def curve(trace: list[tuple[int, float | None]]) -> str:
    result = make_result()
    result["trace"] = trace
    return render(make_record(result))


def test_a_positive_curve_is_drawn_on_a_log_scale() -> None:
    """Equal ratios are equal heights: 1, 1/10, 1/100 at equal steps lie on a straight line, corner to corner."""
    html = curve([(0, 1.0), (100, 0.1), (200, 0.01)])
    np.testing.assert_allclose(points(html)[0], [[64, 8], [344, 98], [624, 188]], atol=0.05)
    assert "objective (log scale)" in html
    assert {"0.01", "0.1", "1"} <= set(Page(html).texts)


def test_a_curve_with_a_value_of_zero_is_drawn_on_a_linear_scale() -> None:
    html = curve([(0, 4.0), (100, 1.0), (200, 0.0)])
    np.testing.assert_allclose(points(html)[0], [[64, 8], [344, 143], [624, 188]], atol=0.05)
    assert "log scale" not in html


def test_a_curve_breaks_at_missing_values_and_at_restarts() -> None:
    html = curve([(0, 4.0), (1, 3.0), (2, None), (3, 2.0), (4, math.nan), (0, 5.0), (1, 1.0)])
    assert [len(line) for line in points(html)] == [2, 2, 2]  # a single point is drawn as a line to itself


def test_a_long_curve_is_thinned_and_says_so() -> None:
    html = curve([(i, 1.0 + i) for i in range(4001)])
    (line,) = points(html)
    assert len(line) <= 402
    assert line[0, 0] == 64
    assert line[-1, 0] == 624
    assert "One point in 11 is drawn." in html


@pytest.mark.parametrize("trace", [[], [(0, 1.0)], [(0, None), (1, math.nan)]])
def test_fewer_than_two_values_make_no_curve(trace: list[tuple[int, float | None]]) -> None:
    assert "<svg" not in curve(trace)


EXTREME_VALUES = [[5.0, 5.0], [0.0, 0.0], [1.0, 1.0], [1e-320, 1e300, 1.0], [-1e299, 1e299], [1e308, -1e308, 0.0, 1.0]]


@pytest.mark.parametrize("values", EXTREME_VALUES)
def test_a_curve_of_extreme_values_stays_inside_its_axes(values: list[float]) -> None:
    html = curve([(10**12 + i, value) for i, value in enumerate(values)])
    for line in points(html):
        assert (line >= [64, 8]).all()
        assert (line <= [624, 188]).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),  # noqa: RUF001
        (math.inf, "–"),  # noqa: RUF001
        (True, "yes"),
        (0.1, "0.1"),
        (2**40, "1099511627776"),
        ("as it is", "as it is"),
        ([1, "a"], '[1, "a"]'),
    ],
)
def test_plain(value: object, text: str) -> None:
    assert plain(value) == text


def test_describe() -> None:
    assert describe(None) == "none"
    assert describe({"kind": "Prune", "share": 0.9, "layers": ["a"]}) == 'Prune (share 0.9, layers ["a"])'
    assert describe({"kind": "L2"}) == "L2"
    assert describe({"share": 0.9}) == "share 0.9"


def test_every_level_has_a_colour_and_a_word() -> None:
    words = {"recovered": "Recovered", "partial": "Partly recovered", "nothing": "Nothing recovered"}
    for level, word in (words | {"unscored": "Not scored"}).items():
        record = make_record()
        record["verdict"] = json.loads(json.dumps({"level": level, "sentence": "So."}))
        html = render(record)
        assert f'class="verdict {level}"' in html
        assert f"<strong>{word}</strong>" in html
        assert re.search(rf"\.{level}\b[^{{]*{{ color:", html)
