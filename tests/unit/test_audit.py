"""The one loop: every attack a row, every score next to its controls, everything writable."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from gradleak.attacks.analytic import Analytic
from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.dlg import DLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.weights.kkt import KKT
from gradleak.audit.loop import Audited, audit, others
from gradleak.audit.metrics.texts import frequent_words
from gradleak.audit.scoring import SCORING
from gradleak.audit.scoring.pictures import DECOYS
from gradleak.audit.scoring.scoring import legend
from gradleak.audit.verdict import judged
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load, png
from gradleak.modalities.texts import Texts, load_texts
from gradleak.observations.adapter import Adapter
from gradleak.observations.defenses import GaussianNoise, TopK
from gradleak.observations.model import LanguageModel, Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.report import record
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, share_update
from gradleak.victims.small_language import small_model, train_tokenizer
from oracles import psnr_db_by_hand

MLP = Architecture("mlp", (1, 8, 8), 10)
PUBLIC = load("digits", "train", limit=150)
CONTROLS = {"mean_image", "nearest_public", "wrong_observation"}
PICTURES, TEXTS = SCORING["pictures"], SCORING["texts"]


@dataclass(frozen=True, kw_only=True)
class Grey:
    """An attack that finds nothing, whatever it sees; `images` of them, or as many as there are."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = "pictures"

    images: int | None = None

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        batch = self.images or observation.batch_size or 1
        grey = torch.full((batch, *observation.model.architecture.input_shape), 0.5)
        return Reconstruction(grey, torch.zeros(batch, dtype=torch.int64), 1.0, "Grey.", Outcome.STUCK)


@dataclass(frozen=True, kw_only=True)
class Blind:
    """An attack that cannot run, for this reason."""

    reason: Exception

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient,)
    modality: ClassVar[str] = "pictures"

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        raise self.reason


@dataclass(frozen=True)
class By:
    """An attack by any function of the observation."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient,)
    modality: ClassVar[str] = "pictures"

    function: Callable[[PictureObservation], Reconstruction]

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        return self.function(observation)


def captured(*rows: int, **arguments: Any) -> tuple[PictureObservation, Secret]:
    return capture_gradient(Model.of(MLP.build(0), MLP), load("digits", indices=rows or (3, 4)), **arguments)


def run(attacks: dict[str, Any], observation: Any, secret: Secret | None = None, **rest: Any) -> list[Audited]:
    return list(audit(observation, attacks, rest.pop("public", PUBLIC), secret=secret, **rest))


def written(rows: list[Audited], observation: Observation[Any], path: Path) -> record.Record:
    """Through the file and back."""
    made = record.new_record({"name": "audit", "arguments": {}}, 0, observation.threat_model())  # type: ignore[arg-type]
    made["metrics"], made["controls"] = legend(SCORING[observation.model.architecture.modality])
    made["results"] = [row.result for row in rows]
    judged(made, {})
    record.write(made, path)
    return record.read(path)


def judge(rows: list[Audited], observation: Observation[Any]) -> record.Verdict:
    made = record.new_record({"name": "audit", "arguments": {}}, 0, [])
    made["metrics"], made["controls"] = legend(SCORING[observation.model.architecture.modality])
    made["results"] = [row.result for row in rows]
    judged(made, {})
    return made["verdict"]


def flags_of(row: Any) -> dict[str, str]:
    return {flag["name"]: flag["level"] for flag in row["flags"]}


def test_an_exact_attack_is_recovered_and_ahead_of_every_control(tmp_path: Path) -> None:
    observation, secret = captured(3, 4)
    rows = run({"analytic": Analytic()}, observation, secret)
    back = written(rows, observation, tmp_path / "record.json")
    (row,) = back["results"]
    assert set(row["controls"]) == CONTROLS
    for i in range(2):
        # Exact in float32 is above 100 dB; no other digit, mean or decoy comes near: half of the range is 6 dB.
        assert (row["scores"]["psnr_db"][i] or 0) >= 80
        for scores in row["controls"].values():
            assert (scores["psnr_db"][i] or 0) < 40
    assert row["scores"]["identification_rank"] == [1, 1]
    assert [round(v or 0, 3) for v in row["scores"]["ssim"]] == [1, 1]
    assert back["verdict"]["level"] == "recovered"
    assert back["verdict"]["headline"].startswith("2 of 2")
    assert {flag["name"] for flag in row["flags"] if flag["level"] != "info"} == set()
    assert "replay" in {flag["name"] for flag in row["flags"]}
    assert row["parameters"] == {"tolerance": Analytic().tolerance}
    assert row["observation"]["kind"] == "gradient"
    assert row["observation"]["batch_size"] == 2


def test_scores_and_controls_are_in_the_order_of_the_secret() -> None:
    observation, secret = captured(3, 4, 5)
    (done,) = run({"analytic": Analytic()}, observation, secret)
    shown = {name: [decoded(uri) for uri in uris] for name, uris in done.result["shown"].items()}
    for i in range(3):
        assert (shown["truth"][i] - secret.inputs[i]).abs().max() <= 0.5 / 255 + 1e-6
        assert (shown["reconstruction"][i] - secret.inputs[i]).abs().max() <= 1 / 255
    assert secret.labels is not None
    names = [secret.classes[label] for label in secret.labels.tolist()]
    assert done.result["labels"] == {"true": names, "recovered": names}
    mean = PUBLIC.images.mean(0)
    expected = [psnr_db_by_hand(mean, truth) for truth in secret.inputs]
    assert done.result["controls"]["mean_image"]["psnr_db"] == pytest.approx(expected, abs=1e-3)
    nearest = [max(psnr_db_by_hand(p, truth) for p in PUBLIC.images) for truth in secret.inputs]
    assert done.result["controls"]["nearest_public"]["psnr_db"] == pytest.approx(nearest, abs=1e-3)


def decoded(uri: str) -> torch.Tensor:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(image.height, image.width, -1)
    return pixels.permute(2, 0, 1) / 255


def test_pictures_are_pngs_of_the_pixels() -> None:
    for channels in (1, 3):
        images = torch.rand(2, channels, 5, 7, generator=torch.Generator().manual_seed(0))
        for uri, image in zip(map(png, images), images, strict=True):
            assert uri.startswith("data:image/png;base64,")
            assert (decoded(uri) - image).abs().max() <= 0.5 / 255 + 1e-6


def test_an_attack_that_finds_nothing_is_reported_as_that(tmp_path: Path) -> None:
    observation, secret = captured(3, 4)
    rows = run({"grey": Grey()}, observation, secret)
    back = written(rows, observation, tmp_path / "record.json")
    (row,) = back["results"]
    flags = {flag["name"] for flag in row["flags"]}
    assert {"no_better_than_blind", "unexplained"} <= flags
    assert back["verdict"]["level"] == "nothing"
    assert back["verdict"]["headline"].startswith("None of 2")
    # What a picture scores that says nothing: the wrong observation gives the same one.
    assert row["scores"]["psnr_db"] == row["controls"]["wrong_observation"]["psnr_db"]
    assert max(value or 0 for value in row["leads"]) <= 0


def test_identification_is_among_one_hundred() -> None:
    observation, secret = captured(3)
    (done,) = run({"grey": Grey()}, observation, secret)
    grey = torch.full((1, 8, 8), 0.5)
    own = psnr_db_by_hand(grey, secret.inputs[0])
    closer = sum(psnr_db_by_hand(grey, decoy) >= own for decoy in PUBLIC.images[:DECOYS])
    assert DECOYS == 99
    assert done.result["scores"]["identification_rank"] == [1 + closer]


def test_part_of_a_batch_is_partial_and_what_is_missing_counts_as_grey() -> None:
    observation, secret = captured(3, 4, 5)
    (exact,) = run({"analytic": Analytic()}, observation, secret)
    assert exact.reconstruction is not None
    alone = replace(exact.reconstruction, value=exact.reconstruction.value[:1])

    def one(seen: PictureObservation) -> Reconstruction:
        same = all(torch.equal(seen.released[name], t) for name, t in observation.released.items())
        return alone if same else replace(alone, value=torch.full_like(alone.value, 0.5))

    (done,) = run({"one": By(one)}, observation, secret)
    scores = [value or 0 for value in done.result["scores"]["psnr_db"]]
    assert sum(value >= 80 for value in scores) == 1
    assert len(scores) == 3
    conclusion = judge([done], observation)
    assert conclusion["level"] == "partial"
    assert conclusion["headline"].startswith("1 of 3")


def test_without_the_secret_nothing_is_scored(tmp_path: Path) -> None:
    observation, _ = captured(3)
    back = written(run({"analytic": Analytic()}, observation), observation, tmp_path / "record.json")
    (row,) = back["results"]
    assert row["scores"] == {}
    assert row["controls"] == {}
    assert set(row["shown"]) == {"reconstruction"}
    assert "true" not in row["labels"]
    assert back["verdict"]["level"] == "unscored"
    assert "without the secret" in back["verdict"]["sentence"]
    assert row["residual"] is not None
    assert row["residual"] < 1e-5


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (NotObserved("The moon was not revealed."), "The moon was not revealed."),
        (torch.linalg.LinAlgError("eigh: error 3"), "The numbers are too uneven for linear algebra."),  # type: ignore[attr-defined]
    ],
)
def test_an_attack_that_cannot_run_says_why_and_the_others_go_on(tmp_path: Path, reason: Exception, said: str) -> None:
    observation, secret = captured(3)
    attacks: dict[str, Any] = {"blind": Blind(reason=reason), "analytic": Analytic()}
    rows = run(attacks, observation, secret)
    back = written(rows, observation, tmp_path / "record.json")
    blind, analytic = back["results"]
    assert blind["status"] == f"Not run: {said}"
    assert blind["residual"] is None
    assert blind["scores"] == {}
    assert rows[0].reconstruction is None
    assert analytic["scores"]
    assert back["verdict"]["level"] == "recovered"
    assert judge(rows[:1], observation)["headline"] == "No attack could run on this observation."
    assert judge(rows[:1], observation)["level"] == "unscored"


def test_a_withheld_batch_size_can_be_audited(tmp_path: Path) -> None:
    observation, secret = captured(3, 4, reveal_batch_size=False)
    attacks: dict[str, Any] = {"analytic": Analytic(), "inverting": InvertingGradients(steps=2)}
    back = written(run(attacks, observation, secret), observation, tmp_path / "record.json")
    analytic, inverting = back["results"]
    assert "batch size" in inverting["status"]
    assert analytic["scores"]["identification_rank"] == [1, 1]


def test_results_are_yielded_as_they_finish_and_progress_is_passed_on() -> None:
    observation, _ = captured(3)
    begun: list[str] = []
    reports: list[tuple[int, int, float]] = []

    def start(name: str) -> OnStep:
        begun.append(name)
        return lambda *report: reports.append(report)

    attacks: dict[str, Any] = {
        "inverting": InvertingGradients(steps=3),
        "blind": Blind(reason=NotObserved("The moon was not revealed.")),
    }
    rows = audit(observation, attacks, PUBLIC, on_step=start)
    assert next(rows).result["attack"] == "inverting"
    assert begun == ["inverting"]
    assert reports[-1][:2] == (3, 3)
    assert next(rows).result["attack"] == "blind"


def test_the_same_seed_gives_the_same_row() -> None:
    observation, secret = captured(3)
    attacks: dict[str, Any] = {"inverting": InvertingGradients(steps=4)}
    first, again, other = (run(attacks, observation, secret, seed=seed)[0].result for seed in (1, 1, 2))
    first["seconds"] = again["seconds"] = 0.0
    assert first == again
    assert first["scores"] != other["scores"]


def test_the_wrong_observation_knows_nothing_of_the_secret() -> None:
    observation, secret = captured(3, 4, reveal_labels=True)
    wrong = others(observation, PICTURES, PUBLIC, 2, 0)
    assert wrong.batch_size == observation.batch_size
    assert wrong.model is observation.model
    found = Analytic()(wrong, generator=torch.Generator())
    for image in found.value:  # exact, so it is public pictures that it was made from
        assert max(psnr_db_by_hand(image, public) for public in PUBLIC.images) >= 80
        assert max(psnr_db_by_hand(image, truth) for truth in secret.inputs) < 40
    assert wrong.labels is not None
    assert found.labels is not None
    assert sorted(wrong.labels.tolist()) == sorted(found.labels.tolist())


def test_a_secret_of_another_size_is_refused() -> None:
    observation, secret = captured(3)
    wrong = replace(secret, inputs=torch.zeros(1, 3, 32, 32))
    with pytest.raises(BadInput, match=r"\(3, 32, 32\)"):
        run({"analytic": Analytic()}, observation, wrong)


def test_wrong_weights_are_flagged_in_every_row() -> None:
    observation, secret = captured(3)
    model = replace(observation.model, parameters={k: 1.1 * v for k, v in observation.model.parameters.items()})
    (done,) = run({"analytic": Analytic()}, replace(observation, model=model), secret)
    assert flags_of(done.result)["replay"] == "error"


# --- What an audit knows of neither releases nor modalities ---


def language_model(kind: Any = "bert") -> LanguageModel:
    texts = load_texts("embedded", "train").texts
    task = "classification" if kind == "bert" else "causal-lm"
    return small_model(kind, train_tokenizer(texts, kind, size=420), task, width=96, layers=2, spread=0.1)  # type: ignore[arg-type]


def some_texts(*rows: int) -> Texts:
    return load_texts("embedded", indices=rows)


def public_texts(model: LanguageModel) -> Texts:
    public: Texts = TEXTS.public("embedded", "train", model, 60)
    return public


def test_an_attack_that_does_not_read_the_release_or_the_kind_of_data_is_not_run() -> None:
    observation, secret = captured(3)
    rows = run({"kkt": KKT(), "dager": Dager(), "analytic": Analytic()}, observation, secret)
    kkt, dager, analytic = (row.result for row in rows)
    assert kkt["status"] == "Not run: It reads weights, and what was released is a gradient."
    assert dager["status"] == "Not run: It recovers texts, and the observed model takes pictures."
    assert not kkt["ran"]
    assert not dager["ran"]
    assert analytic["ran"]


def test_texts_are_scored_with_truth_controls_and_flags(tmp_path: Path) -> None:
    model = language_model()
    observation, secret = capture_gradient(model, some_texts(0))
    rows = run({"dager": Dager()}, observation, secret, public=public_texts(model))
    (row,) = written(rows, observation, tmp_path / "record.json")["results"]
    assert row["media"] == "text/plain"
    assert row["shown"]["truth"] == row["shown"]["reconstruction"]
    assert row["scores"]["exact_match"] == [1]
    assert set(row["controls"]) == {"frequent_words", "wrong_observation"}
    assert all((scores["rouge1"][0] or 0) < 1 for scores in row["controls"].values())
    assert flags_of(row)["replay"] == "info"
    assert row["proven"] == [True]
    assert judge(rows, observation)["level"] == "recovered"


def test_the_wrong_observation_is_of_the_same_kind_for_texts_too() -> None:
    """A control that was another kind of release: for an adapter the attack refused it, and the control was 0."""
    model = language_model()
    gradient, secret = capture_gradient(model, some_texts(0))
    adapter = share_adapter(
        model, secret, modules=layout_of(model).queries(0), rank=8, recipe=Recipe(learning_rate=1e-3, steps=1)
    )
    update = share_update(gradient, secret, Recipe(learning_rate=1e-3, steps=2, batch_size=1))
    for seen in (gradient, adapter, update):
        other = others(seen, TEXTS, public_texts(model), 1, 0)
        assert type(other.release) is type(seen.release)
        assert set(other.released) == set(seen.released)
        assert any(not torch.equal(other.released[name], tensor) for name, tensor in seen.released.items())


def test_what_is_proven_is_recovered_without_a_secret() -> None:
    model = language_model()
    observation, _ = capture_gradient(model, some_texts(0))
    rows = run({"dager": Dager()}, observation, public=public_texts(model))
    conclusion = judge(rows, observation)
    assert conclusion["level"] == "recovered"
    assert conclusion["sentence"].startswith("1 of 1 private samples proven by dager")


def test_a_secret_of_another_kind_is_refused() -> None:
    observation, secret = captured(3)
    texts = replace(secret, inputs=((1, 2, 3),))
    with pytest.raises(BadInput, match="holds texts"):
        run({"analytic": Analytic()}, observation, texts)
    model = language_model()
    seen, _ = capture_gradient(model, some_texts(0))
    with pytest.raises(BadInput, match="holds pictures"):
        run({"dager": Dager()}, seen, secret, public=public_texts(model))


def test_a_wrong_secret_voids_the_verdict() -> None:
    observation, _ = captured(3, 4)
    _, other = captured(5, 6)
    rows = run({"analytic": Analytic(), "grey": Grey()}, observation, other)
    conclusion = judge(rows, observation)
    assert conclusion["level"] == "void"
    assert "does not reproduce the release" in conclusion["sentence"]


def test_a_public_secret_voids_the_verdict() -> None:
    observation, secret = captured(3)
    both = replace(
        PUBLIC,
        images=torch.cat([secret.inputs, PUBLIC.images]),
        labels=torch.cat([secret.labels, PUBLIC.labels]),  # type: ignore[list-item]
    )
    conclusion = judge(run({"analytic": Analytic()}, observation, secret, public=both), observation)
    assert conclusion["level"] == "void"
    assert "in the public pool" in conclusion["sentence"]


@pytest.mark.parametrize(
    ("defense", "level"), [(GaussianNoise(0.01), "warning"), (TopK(0.5), "info")], ids=["random", "certain"]
)
def test_a_defense_that_is_named_is_no_error(defense: Any, level: str) -> None:
    """Noise leaves a difference that is told; what is certain is replayed exactly."""
    observation, secret = captured(3, 4, defenses=(defense,))
    (done,) = run({"grey": Grey()}, observation, secret)
    flags = flags_of(done.result)
    assert flags["replay"] == level
    assert "error" not in flags.values()
    assert done.result["defense"] == {"kind": str(defense)}


def test_the_lead_is_over_the_best_blind_control() -> None:
    """The number behind every verdict: not over the worst control, and not over an oracle."""
    observation, secret = captured(3, 4)
    (done,) = run({"analytic": Analytic()}, observation, secret)
    row = done.result
    for i in range(2):
        blind = max(row["controls"][name]["psnr_db"][i] or 0 for name in ("mean_image", "wrong_observation"))
        worst = min(row["controls"][name]["psnr_db"][i] or 0 for name in ("mean_image", "wrong_observation"))
        assert blind > worst
        assert row["leads"][i] == pytest.approx((row["scores"]["psnr_db"][i] or 0) - blind, abs=1e-9)


def test_priors_are_made_of_pictures_that_are_no_decoys() -> None:
    """Who is told apart from the truth must not have been seen by the attack."""
    seen: list[Pictures] = []

    @dataclass(frozen=True)
    class Prepared(Grey):
        def prepared(self, observation: Any, public: Pictures, *, generator: torch.Generator) -> "Prepared":
            seen.append(public)
            return self

    observation, secret = captured(3)
    run({"prepared": Prepared()}, observation, secret)
    (public,) = seen
    assert len(public.images) == len(PUBLIC.images) - DECOYS
    assert torch.equal(public.images, PUBLIC.images[DECOYS:])


def test_one_record_holds_several_observations_each_with_its_verdict() -> None:
    observation, secret = captured(3, 4)
    made = record.new_record({"name": "audit", "arguments": {}}, 0, [])
    made["metrics"], made["controls"] = legend(PICTURES)
    for name, attack in (("first", Analytic()), ("second", Grey())):
        rows = audit(observation, {"attack": attack}, PUBLIC, secret=secret, name=name)
        made["results"] += [row.result for row in rows]
    judged(made, {"second": ["dlg"]})
    assert [(v["observation"], v["level"]) for v in made["verdicts"]] == [("first", "recovered"), ("second", "nothing")]
    assert made["verdict"]["level"] == "recovered"  # the most serious
    assert made["verdicts"][1]["untried"] == ["dlg"]


def test_dlg_refuses_an_adapter_and_says_what_it_reads() -> None:
    from gradleak.attacks.attack import refusal

    observation, secret = captured(3)
    adapter = share_adapter(
        observation.model, secret, modules=("2",), rank=4, recipe=Recipe(learning_rate=0.1, steps=1)
    )
    assert refusal(DLG(), adapter) == "It reads a gradient or an update, and what was released is an adapter."


def test_words_in_no_order_tell_a_part_of_a_text_where_they_are_its_own() -> None:
    """Not where most of them are somebody else's, nor where as many frequent words hold as much of it."""
    model, scoring = language_model(), SCORING["texts"]
    architecture, public = model.architecture, scoring.public("embedded", "train", language_model())
    frequent = frequent_words([architecture.plain(row) for row in architecture.encode(public.texts)], 8)
    rare = [token for token in range(200, 400) if token not in frequent][:32]
    assert scoring.in_bag is not None
    own, common = tuple(rare[:8]), tuple(token for token in frequent if isinstance(token, int))
    assert scoring.in_bag(model, own, (own,), public)[0] == [True]
    assert scoring.in_bag(model, rare[:5], (own,), public)[0] == [True]
    assert scoring.in_bag(model, rare[:3], (own,), public)[0] == [False]
    assert scoring.in_bag(model, rare, (own,), public)[0] == [False]
    assert scoring.in_bag(model, common, (common,), public)[0] == [False]
    told, sentence = scoring.in_bag(model, rare[:8], (own, common), public)
    assert told == [True, False]
    assert sentence.startswith("8 distinct words were seen, 8 of them among the 16 of the private texts")
