"""The verdict: for every level when it must be said, and when it must not."""

from typing import Any

import pytest

from gradleak.audit.intervals import mean
from gradleak.audit.scoring import SCORING
from gradleak.audit.scoring.scoring import legend
from gradleak.audit.verdict import overall, verdict
from gradleak.report.record import Flag, Result, Verdict, new_result
from gradleak.report.summary import in_words

PICTURES, TEXTS = (legend(SCORING[name])[0] for name in ("pictures", "texts"))


def flag(name: str, level: Any) -> Flag:
    return {"name": name, "level": level, "sentence": f"About {name}."}


def row(attack: str = "dlg", *, flags: tuple[Flag, ...] = (), **rest: Any) -> Result:
    made = new_result(attack, {}, {"name": "gradient", "kind": "gradient", "data": "images"}, flags)
    made |= {"ran": True, "residual": 0.1, "status": "Done."}
    return {**made, **rest}  # type: ignore[typeddict-item]


def scored(recovered: tuple[bool, ...], *, leads: tuple[float, ...] = (), attack: str = "dlg", **rest: Any) -> Result:
    gains = leads or tuple(20.0 if found else 0.5 for found in recovered)
    scores = {"psnr_db": [12 + gain for gain in gains], "identification_rank": [1 if r else 7 for r in recovered]}
    kept = {"partly": recovered, "leads": gains, "decoys": 99}
    return row(attack, scores=scores, recovered=recovered, **{**kept, **rest})


def judged(*rows: Result, metrics: Any = PICTURES, untried: tuple[str, ...] = ()) -> Verdict:
    return verdict(rows, metrics, untried)


def test_all_samples_recovered() -> None:
    found = judged(scored((True, True)))
    assert found["level"] == "recovered"
    assert found["headline"].startswith("2 of 2 private images came back")
    assert found["sentence"].startswith("The best attack is dlg: PSNR 32.0 dB on average, +20.0 dB against")
    assert found["sentence"].endswith("identified among 100.")


def test_some_samples_recovered_are_partial() -> None:
    found = judged(scored((True, False, False)))
    assert (found["level"], found["headline"][:31]) == ("partial", "1 of 3 private images came back")


def test_parts_of_a_sample_are_partial() -> None:
    found = judged(scored((False, False), partly=(True, False)))
    assert found["level"] == "partial"
    assert found["headline"].startswith("1 of 2 private images came back in part")


def test_the_best_attack_speaks() -> None:
    found = judged(scored((False, False), attack="weak"), scored((True, True), attack="strong"))
    assert found["level"] == "recovered"
    assert "strong" in found["sentence"]
    assert "weak" not in found["sentence"]


@pytest.mark.parametrize("information", ["partial", "present", "unknown", None])
def test_nothing_found_is_not_safe_and_says_so(information: str | None) -> None:
    flags = () if information is None else (flag(f"information_{information}", "info"),)
    found = judged(scored((False, False), flags=flags), untried=("map-inversion", "ntk"))
    assert found["level"] == "nothing"
    assert found["headline"].startswith("None of 2 private images came back with the attacks that were tried")
    assert found["sentence"].startswith("The closest attack is dlg: PSNR 12.5 dB on average, +0.5 dB")
    assert any(word in found["sentence"] for word in ("proves nothing", "no attack found it"))
    assert found["untried"] == ["map-inversion", "ntk"]
    assert in_words(found).endswith("Not tried: map-inversion, ntk.")


def test_only_a_release_without_the_information_is_absent() -> None:
    found = judged(scored((False,), flags=(flag("information_absent", "info"),)))
    assert found["level"] == "absent"
    assert found["sentence"].endswith("The information is absent from the release.")
    leaked = judged(scored((True,), flags=(flag("information_absent", "info"),)))
    assert leaked["level"] == "recovered"
    labels = {"recovered": [3], "true": [3]}
    read = judged({**scored((False,), flags=(flag("information_absent", "info"),)), "labels": labels})  # type: ignore[typeddict-item]
    assert read["level"] == "nothing"
    assert read["headline"].endswith("Their labels are another matter: 1 of 1 were read.")


@pytest.mark.parametrize("recovered", [(True, True), (False, False)])
@pytest.mark.parametrize(
    "name", ["replay", "secret_is_public", "better_than_truth", "secret_in_training", "secret_in_prior"]
)
def test_an_error_voids_the_verdict_and_says_why(name: str, recovered: tuple[bool, ...]) -> None:
    found = judged(scored(recovered, flags=(flag(name, "error"),)))
    assert found["level"] == "void"
    assert found["headline"] == "No number on this page can be relied on: a check failed."
    assert found["sentence"] == f"About {name}."


@pytest.mark.parametrize("level", ["info", "warning"])
def test_a_reservation_does_not_void_it(level: str) -> None:
    assert judged(scored((True,), flags=(flag("replay", level),)))["level"] == "recovered"


def test_errors_of_attacks_that_did_not_run_count_for_nothing() -> None:
    absent = {**row("other", flags=(flag("replay", "error"),)), "ran": False, "residual": None}
    assert judged(scored((True,)), absent)["level"] == "recovered"  # type: ignore[arg-type]


@pytest.mark.parametrize(("proven", "level"), [((True, True), "recovered"), ((True, False), "partial")])
def test_what_is_proven_needs_no_secret(proven: tuple[bool, ...], level: str) -> None:
    found = judged(row("dager", proven=proven), metrics=TEXTS)
    assert found["level"] == level
    assert found["sentence"].startswith(f"{sum(proven)} of 2 private samples proven by dager")


def test_what_is_only_guessed_is_unscored() -> None:
    found = judged(row("dager", proven=(False, False)), metrics=TEXTS)
    assert found["level"] == "unscored"
    assert "without the secret, nothing was scored" in found["sentence"]
    assert "proven" not in found["sentence"]


def test_a_proof_stands_beside_an_error() -> None:
    found = judged(row("dager", proven=(True,), flags=(flag("replay", "error"),)), metrics=TEXTS)
    assert found["level"] == "void"
    assert "What needs no secret stands: 1 of 1 private samples proven by dager" in found["sentence"]


def test_without_a_secret_the_best_explanation_is_named() -> None:
    found = judged(row("dlg", residual=0.5), row("analytic", residual=1e-7), row("count", residual=None))
    assert found["level"] == "unscored"
    assert found["sentence"].startswith("analytic explains the observation best (relative residual 1e-07)")


def test_nothing_is_said_to_explain_that_has_no_residual() -> None:
    found = judged(row("lti", residual=float("nan")), row("count", residual=None))
    assert found["level"] == "unscored"
    assert found["sentence"].startswith("lti, count ran; without the secret, nothing was scored.")
    found = judged(row("lti", residual=float("nan")), row("dlg", residual=0.5))
    assert found["sentence"].startswith("dlg explains the observation best (relative residual 0.5)")


def test_the_number_of_samples_is_told() -> None:
    counted = row("dataset-size", residual=None, status="Trained on 3 samples.", count={"recovered": 3})
    assert "Trained on 3 samples." in judged(row(), counted)["sentence"]


def test_no_attack_could_run() -> None:
    absent = {**row("kkt", status="Not run: It reads weights."), "ran": False, "residual": None}
    found = judged(absent)  # type: ignore[arg-type]
    assert found["level"] == "unscored"
    assert found["headline"] == "No attack could run on this observation."
    assert found["sentence"] == "kkt: Not run: It reads weights."


def test_texts_are_told_in_their_own_metric() -> None:
    scores = {"rouge1": [0.25, 0.25], "exact_match": [0.0, 0.0]}
    guessed = row("dager", scores=scores, leads=(-0.1, -0.1), recovered=(False, False), partly=(False, False))
    found = judged(guessed, metrics=TEXTS)
    assert found["level"] == "nothing"
    assert "-0.10 ROUGE-1 against the best blind control" in found["sentence"]


def test_the_most_serious_of_several_observations_is_told_first() -> None:
    levels: list[Any] = ["absent", "nothing", "void", "recovered"]
    several: list[Verdict] = [{"level": level, "sentence": f"It is {level}.", "observation": level} for level in levels]
    assert overall(several)["level"] == "recovered"
    assert overall(several[:3])["level"] == "void"
    assert overall(several[:2])["level"] == "nothing"
    assert overall(several[:1]) == several[0]
    told: list[Verdict] = [{**one, "headline": f"So {one['level']}."} for one in several]
    assert (
        overall(told)["headline"] == "Absent: So absent. Nothing: So nothing. Void: So void. Recovered: So recovered."
    )
    assert "Nothing: It is nothing." in overall(several)["sentence"]


def test_words_that_were_seen_in_no_order_are_told_whether_or_not_a_text_was_recovered() -> None:
    seen: Flag = {"name": "bag", "level": "info", "sentence": "34 distinct words were seen."}
    for recovered in (True, False):
        verdict = judged(scored((recovered,), flags=(seen,)))
        assert "34 distinct words were seen." in verdict["sentence"]
        assert verdict["level"] == ("recovered" if recovered else "nothing")
    assert "words were seen" not in judged(scored((True,)))["sentence"]


@pytest.mark.parametrize(
    ("rows", "level"),
    [
        ((scored((False,), flags=(flag("information_absent", "info"),)),), "partial"),
        ((row(ran=False, residual=None),), "partial"),
        ((scored((True,)),), "recovered"),
        ((scored((True,), flags=(flag("replay", "error"),)),), "void"),
    ],
)
def test_what_is_told_with_no_attack_is_said_and_nothing_is_called_safe_beside(
    rows: tuple[Result, ...], level: str
) -> None:
    told = tuple(one | {"flags": [*one["flags"], flag("embeddings", "warning")]} for one in rows)
    found = verdict(told, PICTURES)
    assert (found["level"], found["sentence"].count("About embeddings.")) == (level, 1)
    silent = tuple(one | {"flags": [*one["flags"], flag("embeddings", "info")]} for one in rows)
    assert verdict(silent, PICTURES) == verdict(rows, PICTURES)


def test_a_headline_says_what_so_few_samples_tell_of_others() -> None:
    """Clopper and Pearson: of n that all came back, the share is at least .025^(1/n); of n that did not, at most 1 - .025^(1/n)."""
    assert f"it would be {100 * 0.025 ** (1 / 2):.0f} to 100 in 100" in judged(scored((True, True)))["headline"]
    assert f"it would be 0 to {100 * (1 - 0.025 ** (1 / 4)):.0f} in 100" in judged(scored((False,) * 4))["headline"]
    assert "one sample does not tell how often" in judged(scored((True,)))["headline"]


def test_a_headline_counts_what_came_whole_and_what_in_part() -> None:
    found = judged(scored((True, False, False), partly=(True, True, False)))
    assert found["headline"].startswith("1 of 3 private images came back, 1 more in part,")


@pytest.mark.parametrize(("revealed", "told"), [((), True), (("labels",), False)])
def test_labels_that_were_read_are_told_where_nothing_else_came_back(revealed: tuple[str, ...], told: bool) -> None:
    labels: Any = {"recovered": ["cat", "dog", "dog"], "true": ["dog", "cat", "cat"]}
    one = scored((False,) * 3, labels=labels)
    one["observation"] = {**one["observation"], "revealed": revealed}
    assert ("2 of 3 were read" in judged(one)["headline"]) == told


def test_a_level_without_a_secret_asks_to_look_at_what_came_out() -> None:
    found = judged(row("map-inversion", residual=0.015))
    assert found["headline"].startswith(
        "Something came out that explains more than 99 % of what was shared. Look at it"
    )
    assert "explains 75 %" in judged(row(residual=0.5))["headline"]
    assert "explains much" in judged(row(residual=0.9))["headline"]


def test_seeds_are_counted() -> None:
    repeats: Any = [{"seed": k, "residual": 0.1, "scores": {}, "recovered": k} for k in range(3)]
    assert "Under 3 seeds 0 to 2 came back" in judged(scored((True, True), repeats=repeats))["sentence"]
    assert "Under each of 2 seeds 1 came back." in judged(scored((True, False), repeats=repeats[1:2] * 2))["sentence"]


def test_a_mean_has_its_interval() -> None:
    """Student's t of two degrees of freedom leaves 2.5 % above 4.303 (Abramowitz and Stegun, table 26.10)."""
    assert mean([1.0, 2.0]) is None
    low, high = mean([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    told = judged(scored((True,) * 3, intervals={"psnr_db": (30.0, 34.0), "leads": (18.0, 22.0)}))["sentence"]
    assert "PSNR 32.0 dB (30.0 to 34.0) on average, +20.0 dB (+18.0 to +22.0) against" in told


@pytest.mark.parametrize(
    ("psnr", "lead", "rank", "whole", "part"),
    [
        (15.6, 3.8, 1, False, True),
        (25.0, 12.0, 1, True, True),
        (25.0, 2.0, 1, False, False),
        (25.0, 12.0, 2, False, False),
    ],
)
def test_a_smudge_that_can_be_told_from_others_came_back_in_part(
    psnr: float, lead: float, rank: int, whole: bool, part: bool
) -> None:
    """At 20 dB the root of the mean squared error is a tenth of a pixel's range: 10^(-20/20)."""
    scores = {"psnr_db": [psnr], "identification_rank": [float(rank)]}
    assert SCORING["pictures"].recovered(scores, [lead]) == [whole]
    assert SCORING["pictures"].partly(scores, [lead]) == [part]


def test_a_text_came_back_in_part_only_where_it_is_ahead_of_a_blind_guess() -> None:
    scores = {"rouge1": [0.6, 0.6, 1.0], "exact_match": [0.0, 0.0, 1.0]}
    assert SCORING["texts"].recovered(scores, [0.4, 0.1, 0.7]) == [False, False, True]
    assert SCORING["texts"].partly(scores, [0.4, 0.1, 0.7]) == [True, False, True]
