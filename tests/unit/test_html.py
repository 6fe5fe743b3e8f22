"""The report page: complete, a pure function of the record, and deaf to hostile strings."""

import base64
import copy
import math
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
from PIL import Image

from gradleak.audit.verdict import verdict
from gradleak.report import record as records
from gradleak.report.html import describe, plain, render
from gradleak.report.record import Labels, Level, Metric, Record, Result
from gradleak.report.sheet import save_sheet

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


def make_result(attack: str = "inverting_gradients", observation: str = "gradient") -> Result:
    """A result on pictures; the best blind control differs from one to the other."""
    return {
        "attack": attack,
        "parameters": {"steps": 4000, "tv_weight": 0.01},
        "observation": {"name": observation, "kind": observation, "batch_size": 2, "revealed": [observation]},
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
        "ran": True,
        "outcome": "solved",
        "leads": [16.0, 4.0],
        "recovered": [True, False],
        "partly": [True, False],
        "trace": [(0, 1.0), (100, 0.1), (200, 0.01)],
        "media": "image/png",
        "shown": {
            "mean_image": PICTURES[4:6],
            "reconstruction": PICTURES[2:4],
            "truth": PICTURES[0:2],
            "nearest_public": PICTURES[6:8],
        },
        "decoys": 99,
    }


def text_result(attack: str = "dager") -> Result:
    """A result on texts: the first proven and word for word, the second in part, the third not."""
    result = make_result(attack)
    result["scores"] = {"rouge1": [1.0, 0.75, 0.0]}
    result["controls"] = {"frequent_words": {"rouge1": [0.25, 0.25, 0.25]}}
    result["leads"] = [0.75, 0.5, -0.25]
    result["recovered"], result["partly"] = [True, False, False], [True, True, False]
    result["proven"] = [True, False, False]
    result["media"] = "text/plain"
    result["shown"] = {
        "truth": ["Dear <b>Ann</b>", "it rains", "good bye"],
        "reconstruction": ["Dear <b>Ann</b>", "rains it", ""],
        "frequent_words": ["the of", "the of", "the <i>of"],
    }
    del result["decoys"]
    return result


def missing_result(attack: str, reason: str, observation: str = "gradient") -> Result:
    row = records.new_result(attack, {"steps": 1}, {"name": observation, "kind": observation})
    return {**row, "ran": False, "status": f"Not run: {reason}"}


def metric(label: str, unit: str = "", better: str = "higher", decimals: int = 3) -> Metric:
    return cast(Metric, {"label": label, "unit": unit, "better": better, "decimals": decimals})


def make_record(*results: Result) -> Record:
    record = records.new_record(
        {"name": "audit", "arguments": {"observation": "demo/observation.safetensors"}},
        seed=7,
        threat_model=[
            {"item": "gradient", "revealed": True, "detail": "62 tensors"},
            {"item": "labels", "revealed": False, "detail": "inferred by the attack"},
        ],
    )
    record["verdict"] = {"level": "partial", "sentence": "One of two images was recovered."}
    record["metrics"] = {
        "psnr_db": metric("PSNR", "dB", "higher", 2),
        "ssim": metric("SSIM"),
        "lpips": metric("LPIPS", "", "lower"),
        "rouge1": metric("ROUGE-1"),
        "identification_rank": metric("Rank", "", "lower", 0),
    }
    record["controls"] = {
        "mean_image": {"label": "Mean image", "blind": True},
        "nearest_public": {"label": "Nearest public", "blind": False},
        "frequent_words": {"label": "Frequent words", "blind": True},
        "wrong_observation": {"label": "Wrong observation", "blind": True},
    }
    record["results"].extend(results)
    return record


def of_level(level: str, *results: Result) -> Record:
    record = make_record(*results)
    record["verdict"] = {"level": cast(Level, level), "sentence": "So."}
    return record


def two_observations() -> Record:
    """map-inversion on an adapter found nothing, dlg on a gradient something."""
    adapter = make_result("map-inversion", "adapter")
    adapter["recovered"] = adapter["partly"] = [False, False]
    record = make_record(adapter, make_result("dlg"), make_result("idlg"))
    record["verdict"] = {"level": "partial", "sentence": "Adapter: None. Gradient: One of two by dlg."}
    record["verdicts"] = [
        {"level": "nothing", "sentence": "None, by map-inversion.", "observation": "adapter"},
        {"level": "partial", "sentence": "One of two by dlg.", "observation": "gradient"},
    ]
    record["threat_model"] = [
        {"item": "adapter", "revealed": True, "detail": "rank 2", "observation": "adapter"},
        {"item": "gradient", "revealed": True, "detail": "62 tensors", "observation": "gradient"},
    ]
    return record


def text_of(record: Record) -> str:
    return Page(render(record)).text


def in_order(text: str, parts: list[str]) -> None:
    place = 0
    for part in parts:
        assert part in text[place:], f"{part!r} is missing, or comes too early"
        place = text.index(part, place) + len(part)


def rows(html: str) -> list[list[str]]:
    """The cells of every table row, as text."""
    cell = re.compile(r"<t[hd][^>]*>(.*?)</t[hd]>", re.DOTALL)
    return [
        [" ".join(re.sub(r"<[^>]+>", " ", found).split()) for found in cell.findall(row)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.DOTALL)
    ]


def test_the_parts_come_in_the_promised_order() -> None:
    record = make_record(make_result("dlg"), make_result("git"), missing_result("kkt", "It reads weights."))
    record["table"] = [{"std": 0.1, "verdict": "partial"}, {"std": None, "extra": "yes"}]
    record["plots"] = [{"title": "PSNR against noise", "image": PICTURES[8]}]
    record["verdict"] |= {"headline": "One image came back.", "untried": ["ntk"]}
    record["metrics"]["psnr_db"]["meaning"] = "in decibels (dB)."
    record["remedies"] = {
        "gradient": [
            {"change": "Train with differential privacy", "effect": "Much.", "cost": "Some.", "source": "x.md"}
        ]
    }
    parts = [
        "One image came back.",
        "One of two images was recovered.",
        "What came back: dlg",
        "Truth Reconstruction Mean image Nearest public",
        "PSNR: in decibels (dB).",
        "Identified among 100:",
        "What to do",
        "Train with differential privacy",
        "What was not tried, and why",
        "ntk",
        "Not run: kkt : It reads weights.",
        "What the attacker saw",
        "62 tensors",
        "All attacks at a glance",
        "Gap: by how much",
        "1. dlg",
        "dlg stopped where",
        "Scores",
        "The gradient is tiny.",
        "Objective while the attack ran",
        "0.00123",
        "tv_weight",
        "2. git",
        "Truth Reconstruction Mean image Nearest public",
        "PSNR against noise",
        "How to run this again",
        "demo/observation.safetensors",
        "Environment",
    ]
    in_order(text_of(record), parts)
    assert ["0.1", "partial", "–"] in rows(render(record))  # noqa: RUF001
    assert ["–", "–", "yes"] in rows(render(record))  # noqa: RUF001


def test_every_observation_has_a_part_of_its_own() -> None:
    """Verdict, results at a glance, threat model, attacks; and nothing of the one stands in the part of the other."""
    record = two_observations()
    summary, adapter, gradient = (Page(part).text for part in render(record).split("<section "))
    in_order(
        summary, ["Private data partly recovered", "adapter", "No sample recovered", "gradient", "One of two by dlg."]
    )
    in_order(
        adapter, ["None, by map-inversion.", "The closest attack: map-inversion", "rank 2", "The attack", "Scores"]
    )
    in_order(gradient, ["One of two by dlg.", "What came back: dlg", "62 tensors", "at a glance", "2. dlg", "3. idlg"])
    assert "dlg" not in adapter
    assert "62 tensors" not in adapter
    assert "map-inversion" not in gradient
    assert "rank 2" not in gradient


def test_one_observation_needs_no_heading() -> None:
    record = make_record(make_result())
    record["verdicts"] = [{**record["verdict"], "observation": "gradient"}]
    record["threat_model"] = [{"item": "gradient", "revealed": True, "detail": "62", "observation": "gradient"}]
    html = render(record)
    assert 'class="several"' not in html
    assert html.count("One of two images was recovered.") == 1
    assert "Observation: gradient (batch_size 2)" in html  # what is plain of it, under its threat model
    assert 'id="observation-' not in html


def test_a_fact_that_names_no_observation_is_about_all_of_them() -> None:
    record = two_observations()
    record["threat_model"] = [*record["threat_model"], {"item": "seed", "revealed": True, "detail": "known to all"}]
    assert text_of(record).count("known to all") == 2


def test_several_observations_without_verdicts_share_the_one_there_is() -> None:
    record = two_observations()
    del record["verdicts"]
    assert text_of(record).count("Adapter: None. Gradient: One of two by dlg.") == 1
    assert text_of(record).count("What dlg returned") == 1
    assert "What came back" not in text_of(record)


def test_an_observation_that_nothing_was_tried_on_has_its_part() -> None:
    record = two_observations()
    record["results"] = record["results"][:1]
    in_order(text_of(record), ["Observation: adapter", "Observation: gradient", "No attack was run.", "62 tensors"])


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
    first, second = [row for row in rows(html) if row[0].startswith("Image ") and len(row) == 4]
    recovered, lost = "Recovered PSNR 30.00 dB SSIM 0.900 Rank 1", "Not recovered PSNR 20.00 dB SSIM 0.500 Rank 12"
    assert first == ["Image 1", recovered, "PSNR 12.00 dB SSIM 0.200", "PSNR 29.00 dB SSIM 0.800"]
    assert second == ["Image 2", lost, "PSNR 16.00 dB SSIM 0.300", "PSNR 28.00 dB SSIM 0.700"]
    assert "image-rendering: pixelated" in html
    alts = [image["alt"] for image in Page(html).attributes("img")]
    assert alts[:2] == ["Truth, image 1", "Reconstruction, image 1, recovered, PSNR 30.00 dB, SSIM 0.900"]


def test_pictures_without_a_truth_are_numbered_too() -> None:
    result = make_result()
    result["shown"] = {"reconstruction": PICTURES[:2]}
    del result["recovered"], result["partly"]
    assert ["Image 1 PSNR 30.00 dB SSIM 0.900 Rank 1"] in rows(render(make_record(result)))


def test_scores_stand_next_to_the_controls_and_the_gap_is_to_the_best_blind_one() -> None:
    """Expected gaps: numpy. The best blind control differs from image to image; nearest_public, chosen with the truth
    in hand, is better than both and must not count. The mean gap is the mean of the gaps, as the verdict's lead is."""
    result = make_result()
    del result["leads"]
    attack = np.array(result["scores"]["psnr_db"], dtype=float)
    blind = np.array([result["controls"][name]["psnr_db"] for name in ("mean_image", "wrong_observation")], dtype=float)
    gaps = attack - blind.max(axis=0)
    assert gaps.mean() != attack.mean() - blind.mean(axis=1).max()  # the gap of the means would be another one
    found = rows(render(make_record(result)))
    assert ["1", "30.00", "12.00", "29.00", "14.00", f"{gaps[0]:+.2f}"] in found
    assert ["2", "20.00", "16.00", "28.00", "10.00", f"{gaps[1]:+.2f}"] in found
    assert ["Mean", "25.00", "14.00", "28.50", "12.00", f"{gaps.mean():+.2f}"] in found
    assert ["1", "0.900", "0.200", "0.800", "0.100", "+0.700"] in found
    assert ["2", "0.500", "0.300", "0.700", "0.600", "−0.100"] in found  # noqa: RUF001
    assert ["Mean", "0.700", "0.250", "0.750", "0.350", "+0.300"] in found
    assert ["Mean", "6.5"] in found


def test_the_mean_gap_is_the_lead_of_the_verdict() -> None:
    """Where a record has leads, the page shows those, and the sentence that `verdict` makes of them says the same mean."""
    result = make_result("dlg")
    record = make_record(result, make_result("git"))
    sentence = verdict([result], record["metrics"])["sentence"]
    said = re.search(r"([+-][0-9.]+) dB against", sentence)
    assert said is not None
    found = rows(render(record))
    (mean,) = {row[5] for row in found if row[0] == "Mean" and len(row) == 6 and row[1] == "25.00"}
    (glance,) = [row[5] for row in found if row[0] == "dlg"]
    assert mean == glance == "+10.00"  # (16 + 4) / 2
    assert f"{float(mean):+.1f}" == said[1]
    result["leads"] = [3.0, -1.0]  # believed, whatever else the row holds
    assert "+1.00" in [row[5] for row in rows(render(make_record(result))) if row[0] == "Mean" and len(row) == 6]


def test_where_less_is_better_the_gap_is_turned_round() -> None:
    result = make_result()
    result["scores"], result["leads"] = {"lpips": [0.1], "unheard_of": [5.0]}, []
    result["controls"] = {"mean_image": {"lpips": [0.7], "unheard_of": [4.0]}, "wrong_observation": {"lpips": [0.4]}}
    found = rows(render(make_record(result)))
    assert ["1", "0.100", "0.700", "0.400", "+0.300"] in found
    assert ["1", "5.0000", "4.0000"] in found  # which is better, nobody says


def test_a_record_without_labels_goes_by_names_and_has_no_gap() -> None:
    record = make_record(make_result("dlg"), make_result("git"))
    del record["metrics"], record["controls"]
    text = text_of(record)
    assert {"psnr_db", "mean_image"} <= set(Page(render(record)).texts)
    assert "Gap" not in text
    assert "PSNR" not in text
    assert "is no blind control" not in text


@pytest.mark.parametrize("blind", [None, False])
def test_without_a_blind_control_there_is_no_gap(blind: bool | None) -> None:
    """A control that the record does not describe is not taken for a blind one."""
    result = make_result()
    result["scores"], result["leads"] = {"psnr_db": [30.0]}, []
    result["controls"] = {"nearest_public": {"psnr_db": [29.0]}}
    record = make_record(result)
    record["controls"] = {} if blind is None else {"nearest_public": {"label": "Nearest", "blind": blind}}
    assert ["1", "30.00", "29.00"] in rows(render(record))
    assert "The gap says" not in text_of(record)


def test_what_the_score_tables_explain() -> None:
    """The gap where there is one, an oracle where one was scored, rank 1 where ranks are."""
    result = make_result()
    sentences = ["The gap says by how much", "Nearest public is no blind control", "Rank 1: of all candidates"]
    assert all(sentence in text_of(make_record(result)) for sentence in sentences)
    del result["scores"]["identification_rank"], result["controls"]["nearest_public"]
    assert [sentence in text_of(make_record(result)) for sentence in sentences] == [True, False, False]
    assert "is no blind control" not in text_of(make_record(result))
    result["scores"] = {}
    assert "The gap says" not in text_of(make_record(result))


def test_a_missing_number_is_a_dash_and_never_a_better_mean() -> None:
    result = make_result()
    result["residual"], result["leads"] = None, []
    result["scores"] = {"psnr_db": [None, 20.0]}
    result["controls"] = {"mean_image": {"psnr_db": [12.0, 16.0]}, "wrong_observation": {"psnr_db": [14.0, None]}}
    found = rows(render(make_record(result)))
    dash = "–"  # noqa: RUF001
    assert ["1", dash, "12.00", "14.00", dash] in found
    assert ["2", "20.00", "16.00", dash, dash] in found  # the control without a number might have been the best one
    assert ["Mean", "20.00 (1 of 2)", "14.00", "14.00 (1 of 2)", dash] in found
    assert ["Residual", dash] in found
    result["scores"] = {"psnr_db": [30.0, 20.0]}
    found = rows(render(make_record(result)))
    assert ["1", "30.00", "12.00", "14.00", "+16.00"] in found
    assert ["Mean", "25.00", "14.00", "14.00 (1 of 2)", dash] in found  # +16 would leave the worse one out


def test_several_results_are_compared_at_the_top() -> None:
    """The best blind control is taken sample by sample: (14 + 16) / 2; the attack's mean is ahead of that by the gap."""
    noisy = make_result("git")
    noisy["defense"] = {"kind": "GaussianNoise", "std": 0.1}
    noisy["scores"], noisy["controls"], noisy["flags"] = {"psnr_db": [10.0, 11.0]}, {}, []
    noisy["leads"], noisy["recovered"], noisy["partly"], noisy["outcome"] = [], [False] * 2, [False, True], "stuck"
    record = make_record(make_result("dlg"), noisy)
    found = rows(render(record))
    head = next(k for k, row in enumerate(found) if row[0] == "Attack")
    assert found[head] == [
        *["Attack", "Outcome", "Recovered", "PSNR (dB)", "Best blind control", "Gap", "SSIM"],
        *["Identified", "Residual", "Seconds", "Flags"],
    ]
    dash = "–"  # noqa: RUF001
    run = ["0.00123", "12.34"]
    first = ["dlg", "explains all", "1 of 2", "25.00", "15.00", "+10.00", "0.700", "1 of 2", *run, "1 warning"]
    assert found[head + 1] == first
    second = ["explains little", "0 of 2, 1 in part", "10.50", dash, dash, dash, dash, *run, "none"]
    assert found[head + 2] == ["git GaussianNoise (std 0.1)", *second]
    assert "Scores are means over the samples." in text_of(record)
    assert "All attacks at a glance" not in render(make_record(make_result()))


def test_means_are_not_spoken_of_where_there_are_no_scores() -> None:
    first, second = make_result("dlg"), make_result("git")
    first["scores"] = second["scores"] = {}
    text = text_of(make_record(first, second))
    assert "All attacks at a glance" in text
    assert "Scores are means" not in text


def test_what_did_not_run_is_a_list_and_never_a_row_of_dashes() -> None:
    missing = [missing_result("kkt", "It reads weights."), missing_result("ntk", "It is for one image.")]
    html = render(make_record(make_result("dlg"), *missing))
    assert "Not run: kkt : It reads weights. Not run: ntk : It is for one image." in Page(html).text
    assert [row[0] for row in rows(html) if row[0] in ("dlg", "kkt", "ntk")] == ["dlg"]
    assert "attacks</summary>" not in html
    assert "steps" in html
    assert html.count('<details class="attack more"') == 1
    assert "Not run" not in render(make_record(make_result("dlg")))


def test_many_that_did_not_run_are_folded_up_and_reasons_are_said_once() -> None:
    missing = [missing_result(name, "It reads weights.") for name in ("a", "b", "c")]
    html = render(make_record(make_result("dlg"), *missing, missing_result("d", "No labels.")))
    folded = html[html.index("<summary>Not run: 4 attacks</summary>") :].split("</details>")[0]
    in_order(Page(folded).text, ["a, b, c : It reads weights.", "d : No labels."])
    assert Page(html).text.count("Not run") == 1


def test_where_nothing_could_run_its_flags_are_shown() -> None:
    missing = [missing_result("kkt", "It reads weights."), missing_result("ntk", "No.")]
    for row in missing:
        row["flags"] = [{"name": "defense_unknown", "level": "warning", "sentence": "Nobody says which."}]
    text = text_of(of_level("unscored", *missing))
    assert text.count("Warning: defense unknown. Nobody says which.") == 1
    assert "No attack was run." not in text
    assert "The attack" not in text.replace("The attacker", "")
    assert "Warning: defense" not in text_of(make_record(make_result(), *missing))


def test_it_works_without_a_secret() -> None:
    result = make_result()
    result["scores"], result["controls"], result["flags"] = {}, {}, []
    result["shown"] = {"reconstruction": PICTURES[:2]}
    result["labels"] = {"recovered": [3, 7]}
    del result["recovered"], result["partly"], result["leads"]
    text = text_of(of_level("unscored", result))
    assert "Not scored: that takes the secret, and public data for the controls." in text
    assert "What inverting_gradients returned" in text
    assert "Recovered classes 3, 7." in text
    assert "No check raised a flag." in text
    assert "Truth" not in text
    assert "Not recovered" not in text
    assert "Not scored:" not in text_of(make_record(make_result()))
    assert "No check raised a flag." not in text_of(make_record(make_result()))


def test_an_attack_that_returned_nothing_is_not_said_to_lack_a_secret() -> None:
    result = make_result()
    result["scores"], result["controls"], result["trace"] = {}, {}, []
    result["shown"] = {"reconstruction": []}
    text = text_of(of_level("unscored", result))
    assert "There is nothing to score." in text
    assert "that takes the secret" not in text
    assert "returned" not in text
    assert "There is nothing to score." not in text_of(make_record(make_result()))


def test_it_works_without_a_result() -> None:
    assert "No attack was run." in text_of(make_record())
    assert "No attack was run." not in text_of(make_record(make_result()))
    assert "No attack was run." not in text_of(make_record(missing_result("kkt", "It reads weights.")))
    study = make_record()
    study["table"] = [{"std": 0.1}]
    assert "No attack was run." not in text_of(study)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"recovered": [0]}, "Recovered class 0."),
        ({"recovered": [0], "true": [0]}, "Recovered class 0; true class 0: 1 of 1 right."),
        ({"recovered": [1], "true": [0]}, "Recovered class 1; true class 0: 0 of 1 right."),
        (
            {"recovered": [3, 3, 7], "true": [7, 3, 1]},
            "Recovered classes 3, 3, 7; true classes 7, 3, 1: 2 of 3 right, in whatever order.",
        ),
        ({"recovered": []}, None),
    ],
)
def test_labels_are_classes_and_counted_in_any_order(labels: Labels, sentence: str | None) -> None:
    result = make_result()
    result["labels"] = labels
    assert sentence in render(make_record(result)) if sentence else "<h4>Labels" not in render(make_record(result))


def test_labels_that_were_given_are_not_recovered() -> None:
    result = make_result()
    result["labels"] = {"recovered": [3, 7], "true": [7, 3]}
    result["observation"] = {**result["observation"], "revealed": ["gradient", "labels"]}
    text = text_of(make_record(result))
    assert "The attacker was given classes 3, 7." in text
    assert "Recovered class" not in text
    assert "2 of 2 right" not in text


def test_a_number_of_samples_is_shown() -> None:
    result = make_result("dataset-size")
    result["scores"], result["controls"] = {}, {}
    result["count"] = {"recovered": 4, "true": 5}
    del result["shown"], result["recovered"], result["partly"]
    html = render(make_record(result, make_result()))
    assert "Recovered 4; true 5." in Page(html).text
    (glance,) = [row for row in rows(html) if row[0] == "dataset-size"]
    assert glance[3] == "4 (true 5)"
    alone = text_of(of_level("unscored", result))
    assert "Not scored:" not in alone
    assert "nothing to score" not in alone
    result["count"] = {"recovered": 4}
    assert "Recovered 4." in text_of(make_record(result))
    assert "Number of samples" not in text_of(make_record(make_result("a"), make_result("b")))


def test_the_strongest_evidence_is_that_of_the_attack_the_verdict_speaks_of() -> None:
    weak, strong = make_result("weak"), make_result("strong")
    weak["recovered"] = weak["partly"] = [False, False]
    assert "What came back: strong" in text_of(make_record(weak, strong))
    weak["leads"] = [100.0, 100.0]  # a lead is less than a recovery
    record = make_record(weak, strong)
    assert "What came back: strong" in text_of(record)
    assert "The best attack is strong" in verdict(record["results"], record["metrics"])["sentence"]
    strong["recovered"] = strong["partly"] = [False, False]
    assert "closest attack: weak" in text_of(of_level("nothing", strong, weak))
    for row, residual in ((weak, 0.5), (strong, 0.1)):
        row["scores"], row["leads"], row["residual"] = {}, [], residual
    assert "What strong returned" in text_of(of_level("unscored", weak, strong))
    weak["proven"] = [True, False]
    assert "What came back: weak" in text_of(of_level("partial", strong, weak))


def test_what_stands_at_the_top_is_not_shown_twice() -> None:
    html = render(make_record(make_result("dlg"), make_result("git")))
    assert len(Page(html).attributes("img")) == 2 * 8
    assert html.count("What it returned stands") == 1
    alone = make_record(make_result("dlg"))
    alone["results"][0]["shown"] = {}
    assert "What it returned stands" not in render(alone)


def test_of_many_samples_the_best_come_first() -> None:
    result = make_result()
    n = 20
    result["recovered"] = result["partly"] = [i == 17 for i in range(n)]
    result["leads"] = [99.0 if i == 3 else 0.0 for i in range(n)]
    result["scores"] = {"psnr_db": [float(i) for i in range(n)]}
    result["controls"], result["shown"] = {}, {"truth": [PICTURES[0]] * n, "reconstruction": [PICTURES[1]] * n}
    html = render(make_record(result))
    assert "The 8 best of 20 are shown first; the others" in html
    images = [row[0] for row in rows(html) if row[0].startswith("Image ")]
    assert images[:2] == ["Image 18", "Image 4"]  # a recovery is more than a lead
    assert sorted(images) == sorted(f"Image {i + 1}" for i in range(n))  # each once
    assert "are shown first" not in render(make_record(make_result()))


def test_the_details_of_attacks_are_folded_up_also_of_a_single_one() -> None:
    def details(record: Record) -> list[bool]:
        return [
            "open" in d for d in Page(render(record)).attributes("details") if "attack" in str(d.get("class")).split()
        ]

    assert details(make_record(make_result())) == [False]
    assert details(make_record(make_result("a"), make_result("b"))) == [False, False]
    assert details(two_observations()) == [False, False, False]


def test_hidden_is_not_more_alarming_than_revealed() -> None:
    html = render(make_record())
    assert ["gradient", "revealed", "62 tensors"] in rows(html)
    assert ["labels", "hidden", "inferred by the attack"] in rows(html)
    assert not re.search(r"\.(yes|no)\b[^}]*--red", html)


def test_hostile_strings_are_only_ever_text() -> None:
    """Every string of the record, keys included, is an attack on the page."""
    pages = []
    for text in ("plain", HOSTILE):
        record = two_observations()
        record["results"] += [text_result(), missing_result(text, text), make_result("count")]
        record["command"] = {
            "name": text,
            "arguments": {text: text, "name": text, "list": [text, {text: text}]},
            "attacks": {text: {text: text}},
            "inputs": {text: text},
        }
        record["created"] = record["gradleak"] = text
        record["environment"] = {text: {text: text}}
        record["threat_model"] = [{"item": text, "revealed": True, "detail": text, "observation": text}]
        record["verdict"]["sentence"] = text
        record["verdicts"] = [{"level": "partial", "sentence": text, "observation": text}]
        record["metrics"] = {text: metric(text, text)}
        record["controls"] = {text: {"label": text, "blind": False}, "other": {"label": text, "blind": True}}
        record["table"] = [{text: text}]
        record["plots"] = [{"title": text, "image": PICTURES[0]}]
        for k, result in enumerate(record["results"]):
            result["attack"] = text
            result["parameters"] = {text: text, "distance": {"kind": text, text: text}}
            result["observation"] = {"name": text if k else "first", "kind": text, text: text}
            result["defense"] = {"kind": text, text: text}
            if not result.get("ran"):
                continue
            result["status"] = result["outcome"] = text
            result["scores"] = {text: [1.0, 2.0]}
            result["controls"] = {text: {text: [1.0, 2.0]}, "other": {text: [1.0, 2.0]}}
            result["flags"] = [{"name": text, "level": "error", "sentence": text}]
            result["labels"] = {"recovered": [text], "true": [text]}
            result["shown"] = {"truth": [text], "reconstruction": [text], text: [text]}
        pages.append(Page(render(record)))
    tame, hostile = ([(tag, sorted(attributes)) for tag, attributes in page.elements] for page in pages)
    assert hostile == tame
    assert not pages[1].attributes("script")
    assert not [image for image in pages[1].attributes("img") if image["src"] not in PICTURES]
    assert pages[1].text.count(HOSTILE) > 60  # it is there to be read


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
    result["shown"] = {"truth": PICTURES[:2], "reconstruction": [PICTURES[2], uri]}
    record = make_record(result)
    record["plots"] = [{"title": "Plot", "image": uri}]
    page = Page(render(record))
    assert [image["src"] for image in page.attributes("img")] == [PICTURES[0], PICTURES[2], PICTURES[1]]
    assert "left out: not an embedded PNG" in page.text
    assert "Left out: not an embedded PNG." in page.text
    assert not page.attributes("script")
    assert "eft out" not in text_of(make_record(make_result()))


def test_columns_of_unequal_length_are_filled_up() -> None:
    result = make_result()
    result["shown"] = {"truth": PICTURES[:1], "reconstruction": PICTURES[1:4]}
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
    assert sorted(str(link) for link in links) == ["#evidence-1", "#result-1", "#result-2"]
    assert set(links) <= {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}


def test_links_lead_somewhere() -> None:
    page = Page(render(two_observations()))
    links = {attributes["href"] for _, attributes in page.elements if "href" in attributes}
    assert links >= {"#observation-1", "#observation-2", "#result-2", "#result-3"}
    places = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert links <= {f"#{place}" for place in places}
    assert len(set(places)) == len(places)


def test_texts_stand_side_by_side_and_say_what_became_of_them() -> None:
    html = render(make_record(text_result()))
    found = rows(html)
    ann = "Dear &lt;b&gt;Ann&lt;/b&gt;"
    assert ["Text", "Truth", "Reconstruction", "Result"] in found
    assert ["1", ann, ann, "Proven Recovered word for word ROUGE-1 1.000"] in found
    assert ["2", "it rains", "rains it", "Recovered in part ROUGE-1 0.750"] in found
    assert ["3", "good bye", "(nothing)", "Not recovered ROUGE-1 0.000"] in found
    assert "<img" not in html


def test_texts_of_controls_are_folded_up() -> None:
    html = render(make_record(text_result()))
    place = html.index("<summary>The controls' texts</summary>")
    assert html[:place].rstrip().endswith("<details>")
    folded = html[place:].split("</details>")[0]
    assert ["Text", "Frequent words"] in rows(folded)
    assert ["3", "the &lt;i&gt;of"] in rows(folded)
    assert "Frequent words" not in html[:place]
    without = text_result()
    without["shown"] = {name: texts for name, texts in without["shown"].items() if name != "frequent_words"}
    assert "The controls' texts" not in render(make_record(without))


def test_texts_without_a_secret_are_proven_or_not() -> None:
    result = text_result()
    result["scores"], result["controls"] = {}, {}
    result["shown"] = {"reconstruction": ["one", "two", "three"]}
    del result["recovered"], result["partly"], result["leads"]
    found = rows(render(of_level("partial", result)))
    assert ["Text", "Reconstruction", "Result"] in found
    assert ["1", "one", "Proven"] in found
    assert ["2", "two", "Not proven"] in found
    del result["proven"]
    found = rows(render(of_level("unscored", result)))
    assert ["Text", "Reconstruction"] in found  # nothing is said of them
    assert ["1", "one"] in found


def test_a_proof_is_explained_where_there_is_one() -> None:
    sentence = "Proven: nothing else explains what was released."
    result = text_result()
    assert sentence in text_of(make_record(result))
    result["proven"] = [False, False, False]
    assert sentence not in text_of(make_record(result))
    assert sentence not in text_of(make_record(make_result()))


@pytest.mark.parametrize("media", ["image/png", "text/plain", None])
def test_a_picture_is_called_recovered_and_a_text_word_for_word(media: str | None) -> None:
    result = text_result()
    if media is None:
        del result["media"]  # taken for text, which cannot do any harm
    else:
        result["media"] = cast(Any, media)
    html = render(make_record(result))
    assert (">Recovered word for word<" in html) == (media != "image/png")
    assert (">Recovered</span>" in html) == (media == "image/png")


def test_a_text_that_looks_like_a_picture_is_text() -> None:
    result = text_result()
    result["shown"] = {"truth": PICTURES[:1], "reconstruction": PICTURES[:1]}
    page = Page(render(make_record(result)))
    assert not page.attributes("img")
    assert page.text.count(PICTURES[0]) == 2


def test_lone_surrogates_can_be_saved() -> None:
    result = text_result()
    result["shown"] = {"truth": ["Ann"], "reconstruction": ["Ann \ud800"]}  # a tokenizer can cut a pair in two
    html = render(make_record(result))
    html.encode("utf-8")
    assert "Ann ?" in html


def test_where_all_is_void_nothing_is_called_recovered() -> None:
    """No line of the page contradicts the verdict: only what is proven needs no number, and stands."""
    record = of_level("void", make_result("dlg"), make_result("git"))
    record["verdict"]["sentence"] = "No number here can be relied on. The truth is public."
    html = render(record)
    text = Page(html).text
    assert "Void: these numbers mean nothing" in text
    assert "The truth is public." in text
    assert (
        text.count("what is scored and counted here means nothing") == 3
    )  # at a glance, and with either attack's scores
    assert "ecovered</span>" not in html
    assert html.count('<span class="mark void">Void</span>') == 4
    assert {row[2] for row in rows(html) if row[0] in ("dlg", "git")} == {"void"}
    assert "What stands" not in text
    assert "What it returned stands" not in text
    assert "means nothing" not in text_of(make_record(make_result("dlg"), make_result("git")))
    for result in record["results"]:
        result["scores"] = {}
    assert "what is scored and counted here" not in text_of(record)


def test_a_proof_stands_where_all_else_is_void() -> None:
    proven = text_result("dager")
    text = text_of(of_level("void", make_result("dlg"), proven))
    assert "What stands: dager" in text
    less = text_result("token-span")
    less["recovered"], less["proven"], proven["proven"] = [True] * 3, [True, False, False], [True, True, False]
    assert "What stands: dager" in text_of(of_level("void", less, proven))
    proven["proven"] = [True, False, False]
    page = rows(render(of_level("void", proven)))
    assert ["1", "Dear &lt;b&gt;Ann&lt;/b&gt;", "Dear &lt;b&gt;Ann&lt;/b&gt;", "Proven ROUGE-1 1.000"] in page
    assert ["2", "it rains", "rains it", "Void ROUGE-1 0.750"] in page
    (glance,) = [row for row in rows(render(of_level("void", make_result("dlg"), proven))) if row[0] == "dager"]
    assert glance[2] == "void, 1 proven"


def test_a_void_observation_leaves_the_other_one_alone() -> None:
    record = two_observations()
    record["verdicts"] = [{**record["verdicts"][0], "level": "void"}, record["verdicts"][1]]
    _, adapter, gradient = (Page(part).text for part in render(record).split("<section "))
    assert "means nothing" in adapter
    assert "means nothing" not in gradient


def test_how_to_run_it_again() -> None:
    record = make_record(make_result())
    record["command"] = {
        "name": "audit",
        "arguments": {"a": 1},
        "attacks": {"dlg": {"steps": 5}},
        "inputs": {"b": "0f0f"},
    }
    text = text_of(record)
    in_order(text, ["gradleak rerun", "Parameters of the attacks", "steps 5", "Input files", "0f0f"])
    record["command"] = {"name": "audit", "arguments": {"argv": ["audit", "--out", "x"]}}
    text = text_of(record)
    assert "gradleak rerun" not in text
    assert "An older gradleak made this record" in text
    assert "Parameters of the attacks" not in text
    assert "Input files" not in text
    assert "An older gradleak" not in text_of(make_record())


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


WORDS = {
    "recovered": ("Private data recovered", "red", "What came back: dlg"),
    "partial": ("Private data partly recovered", "amber", "What came back: dlg"),
    "members": ("Who was in the training data can be told", "amber", "The closest attack: dlg"),
    "nothing": ("No sample recovered: no proof of safety", "grey", "The closest attack: dlg"),
    "absent": ("Not in the release: nothing to recover", "green", "The closest attack: dlg"),
    "unscored": ("Not scored", "grey", "What dlg returned"),
    "void": ("Void: these numbers mean nothing", None, None),
}


def declarations(html: str, level: str) -> str:
    """What the style sheet says of a class by itself."""
    return " ".join(re.findall(rf"(?:^|, )\.{level}(?:, [^{{}}]*)? {{([^}}]*)}}", html, re.MULTILINE))


@pytest.mark.parametrize("level", get_args(Level))
def test_every_level_has_its_words_and_its_colour(level: str) -> None:
    """Green is for what is not in the release, and for nothing else: not found is not safe."""
    words, colour, evidence = WORDS[level]
    html = render(of_level(level, make_result("dlg")))
    assert f'class="verdict {level}"' in html
    assert f"<strong>{words}</strong>" in html
    assert f"<title>gradleak audit: {words}</title>" in html
    for _, _, other in WORDS.values():
        assert other is None or (other in html) == (other == evidence)
    colours = set(re.findall(r"--(red|amber|green|grey)\)", declarations(html, level)))
    assert colours == ({colour} if colour else set())


def test_words_and_changes_are_explained_where_a_page_has_them_first() -> None:
    """Of two observations, the second does not say again what the first has said, and names changes that were told."""
    record = make_record()
    told: Any = {**make_result("dlg"), "recovered": [True], "leads": [9.0]}
    rows: Any = [{**told, "observation": {**told["observation"], "name": name}} for name in ("one", "two")]
    record["results"] = rows
    change: Any = {"change": "Add noise.", "effect": "It hides all.", "cost": "None.", "source": "findings/defenses.md"}
    other: Any = {**change, "change": "Sum up clients.", "effect": "It hides some."}
    record["remedies"] = {"one": [change], "two": [change, other]}
    record["verdict"] = {"level": "recovered", "sentence": "Found."}
    record["verdicts"] = [{**record["verdict"], "observation": name} for name in ("one", "two")]
    html = render(record)
    text = Page(html).text
    assert html.count("<dt>Gap:</dt>") == html.count("<dt>Residual:</dt>") == 1
    assert [text.count(said) for said in ("It hides all.", "It hides some.")] == [1, 1]
    assert "Above stands what these do here too: Add noise." in text


@pytest.mark.parametrize("level", get_args(Level))
def test_every_level_says_what_to_do(level: str) -> None:
    """Nothing that was found, or not found, is called safe; only what is not in the release needs nothing."""
    text = Page(render(of_level(level, make_result("dlg")))).text
    said = text.partition("What to do")[2][:300]
    assert {
        "recovered": "Do not share it as it is",
        "partial": "Do not share it as it is",
        "members": "Do not share it with anybody who may hold such samples",
        "nothing": "Do not take it for safe",
        "absent": "Nothing, as long as",
        "unscored": "Share nothing on the strength of this page",
        "void": "Mend what the checks name",
    }[level] in said
    assert ("differentially private" in said) == (level in ("recovered", "partial", "members"))


def test_a_study_gives_no_advice() -> None:
    record = make_record()
    record["table"] = [{"attack": "dlg", "psnr_db": 30.0}]
    assert "What to do" not in render(record)


def test_void_is_striking_without_colour() -> None:
    html = render(of_level("void"))
    assert "repeating-linear-gradient" in declarations(html, "void")
    assert re.search(r"\.verdict\.void { border: [^}]*dashed", html)


def test_membership_is_drawn_with_its_curve_and_a_score_that_is_not_there_is_no_error() -> None:
    record, score = (
        of_level("members"),
        {"auc": 0.9, "low": 0.8, "high": 0.95, "rates": [], "roc": [(0.0, 0.5), (1.0, 1.0)]},
    )
    found = {
        "members": 20,
        "fresh": 30,
        "reference": 10,
        "best": "base-ratio",
        "level": 0.95,
        "scores": {"base-ratio": score},
    }
    found |= {
        "not_run": {"certificate": "It cannot."},
        "certificate": None,
        "apart": None,
        "media": "text/plain",
        "flags": [],
    }
    found |= {"exposed": [{"row": 7, "score": 1.5, "above": 0, "p": None, "shown": "<b>mine</b>"}]}
    record["membership"] = {**found, "verdict": "members", "sentence": "Members are told."}  # type: ignore[typeddict-item]
    html = render(record)
    assert "&lt;b&gt;mine&lt;/b&gt;" in html
    assert html.count("<polyline") == 2  # the curve, and chance
    assert "0.900 (0.800 to 0.950)" in html
    record["membership"]["best"] = "another"
    assert "0.900 (0.800 to 0.950)" in render(record)
    for level in ("nothing", "unscored"):  # what was asked already is not advised
        record["verdict"]["level"] = level
        said = Page(render(record)).text.partition("What to do")[2][:300]
        assert "with --members" not in said
        assert ("Do not take it for safe" if level == "nothing" else "with --non-members") in said


def test_a_study_says_found_in_place_of_a_level() -> None:
    record = of_level("unscored")
    record["command"] = {"name": "reproduce", "arguments": {"name": "lora-text"}}
    assert "<strong>Found</strong>" not in render(record)
    record["table"] = [{"std": 0.1}]
    html = render(record)
    assert "<strong>Found</strong>" in html
    assert "gradleak reproduce lora-text</h1>" in html
    assert "Not scored" not in html


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    full = colour if len(colour) == 6 else "".join(2 * letter for letter in colour)
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(full[k : k + 2], 16) / 255 for k in (0, 2, 4))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_contrast(scheme: int) -> None:
    """At least 4.5 to 1 in either scheme, which is what WCAG 2.2 asks of text (1.4.3)."""
    html = render(make_record())
    colours = dict(re.findall(r"--([a-z-]+): #([0-9a-f]{3,6});", re.findall(r":root {([^}]*)}", html)[scheme]))
    pairs = [(name, f"{name}-bg") for name in ("red", "amber", "green", "grey")]
    pairs += [("ink", ground) for ground in ("page", "panel", "red-bg", "amber-bg", "green-bg", "grey-bg")]
    pairs += [(text, ground) for text in ("soft", "line") for ground in ("page", "panel")]
    pairs += [("line", ground) for ground in ("red-bg", "amber-bg", "green-bg", "grey-bg")]  # links in a verdict
    for text, ground in pairs:
        low, high = sorted([luminance(colours[text]), luminance(colours[ground])])
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"


def test_a_sheet_has_one_column_for_the_truth_and_each_attack_and_control(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("L", (4, 4), 128).save(buffer, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    result = make_result()
    result["shown"] = {name: [picture] * 2 for name in ("truth", "reconstruction", *result["controls"])}
    save_sheet(make_record(result, text_result(), missing_result("kkt", "No.")), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        width, height = sheet.size
    assert width / 1.6 == pytest.approx(5 * 130)  # columns of 1.6 inches, 130 dots each
    assert height / 1.9 == pytest.approx(2 * 130)


def test_there_is_no_sheet_without_scored_pictures(tmp_path: Path) -> None:
    result = make_result()
    result["scores"] = {}
    save_sheet(make_record(result, text_result()), tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_intervals_of_a_study_stand_beside_their_means() -> None:
    study = make_record()
    study["table"] = [{"x": 0.5, "x_low": 0.4, "x_high": 0.6}, {"x": 0.25, "x_low": None, "x_high": None}]
    study["costs"] = [{"cpu_seconds": 1.5}]
    html = render(study)
    assert "0.5\N{NO-BREAK SPACE}[0.4,\N{NO-BREAK SPACE}0.6]" in html
    assert "<td>0.25</td>" in html
    assert "x_low" not in html
    assert "In brackets: intervals of 95 %" in html
    assert "CPU seconds of a cell" in html
    study["table"] = [{"x": 0.5}]
    del study["costs"]
    html = render(study)
    assert "In brackets" not in html
    assert "CPU seconds of a cell" not in html


def test_what_may_scroll_is_reached_by_the_keyboard_and_has_a_name() -> None:
    """WCAG 2.2, 2.1.1 and 4.1.2."""
    record = two_observations()
    record["table"] = [{"std": 0.1}]
    html = render(record)
    boxes = [part for part in Page(html).attributes("div") if part.get("class") == "scroll"]
    assert len(boxes) > 10
    assert all(part["tabindex"] == "0" and part["role"] == "group" and part["aria-label"] for part in boxes)
    assert ":focus-visible" in html


def test_seeds_have_a_table_and_means_their_intervals() -> None:
    result = make_result("dlg")
    result["intervals"] = {"psnr_db": (18.25, 31.75), "leads": (-2.0, 22.0)}
    result["repeats"] = [
        {"seed": k, "residual": 0.5, "scores": {"psnr_db": 20.0 + k}, "recovered": k, "partly": 2} for k in range(2)
    ]
    html = render(make_record(result))
    assert ["Seed", "Recovered", "In part or whole", "PSNR (dB)", "Residual"] in rows(html)
    assert ["1", "1", "2", "21.00", "0.5"] in rows(html)
    mean = next(row for row in rows(html) if row[0] == "Mean")
    assert (mean[1], mean[-1]) == ("25.00 [18.2, 31.8]", "+10.00 [−2.0, 22.0]")  # noqa: RUF001
    assert "with 95 % confidence" in Page(html).text
    assert "with 95 % confidence" not in text_of(make_record(make_result("dlg")))


def test_a_class_goes_by_its_name() -> None:
    result = make_result()
    result["labels"] = {"recovered": ["cat", "dog"], "true": ["cat", "cat"]}
    text = text_of(make_record(result))
    assert "Image 1, class cat" in text
    assert "Recovered classes cat, dog; true classes cat, cat: 1 of 2 right" in text


def test_a_picture_that_came_back_in_part_is_called_recognisable() -> None:
    result = make_result()
    result["recovered"], result["partly"] = [False, False], [True, False]
    assert "Recognisable PSNR 30.00 dB" in text_of(make_record(result))


def test_of_two_samples_or_fewer_truth_and_reconstruction_are_large() -> None:
    assert 'class="gallery big"' in render(make_record(make_result()))
    many = make_result()
    many["shown"] = {name: [*pictures, pictures[0]] for name, pictures in many["shown"].items()}
    assert 'class="gallery big"' not in render(make_record(many))
