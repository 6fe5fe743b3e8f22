"""The one loop: every attack a row, every score next to its controls, everything writable."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gradleak.attacks.analytic import Analytic
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.audit.loop import DECOYS, Attack, Audited, audit, lead_db, pictures, verdict, wrong_observation
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.observation import Gradient
from gradleak.report import record
from gradleak.victims.gradient import capture_gradient
from oracles import psnr_db_by_hand

MLP = Architecture("mlp", (1, 8, 8), 10)
PUBLIC = load("digits", "train", limit=150)
CONTROLS = {"mean_image", "nearest_public", "wrong_observation"}


@dataclass(frozen=True, kw_only=True)
class Grey:
    """An attack that finds nothing, whatever it sees; `images` of them, or as many as there are."""

    images: int | None = None

    def __call__(
        self, observation: Gradient, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        batch = self.images or observation.batch_size or 1
        grey = torch.full((batch, *observation.model.architecture.input_shape), 0.5)
        return Reconstruction(grey, torch.zeros(batch, dtype=torch.int64), 1.0, "Grey.")


@dataclass(frozen=True, kw_only=True)
class Blind:
    """An attack that cannot run."""

    def __call__(
        self, observation: Gradient, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        raise NotObserved("The moon was not revealed.")


@dataclass(frozen=True)
class By:
    """An attack by any function of the observation."""

    function: Callable[[Gradient], Reconstruction]

    def __call__(
        self, observation: Gradient, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        return self.function(observation)


def captured(*rows: int, **arguments: Any) -> tuple[Gradient, Secret]:
    return capture_gradient(MLP.build(0), MLP, load("digits", indices=rows or (3, 4)), **arguments)


def run(attacks: dict[str, Attack], observation: Gradient, secret: Secret | None = None, **rest: Any) -> list[Audited]:
    return list(audit(observation, attacks, PUBLIC, secret=secret, **rest))


def written(rows: list[Audited], observation: Gradient, path: Path) -> record.Record:
    """Through the file and back."""
    made = record.new_record({"name": "audit", "arguments": {}}, 0, observation.threat_model())  # type: ignore[arg-type]
    made["results"] = [row.result for row in rows]
    made["verdict"] = verdict(made["results"])
    record.write(made, path)
    return record.read(path)


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
    assert "2 of 2" in back["verdict"]["sentence"]
    assert {flag["name"] for flag in row["flags"] if flag["level"] != "info"} == set()
    assert "replay" in {flag["name"] for flag in row["flags"]}
    assert row["parameters"] == {"tolerance": Analytic().tolerance}
    assert row["observation"]["kind"] == "Gradient"
    assert row["observation"]["batch_size"] == 2


def test_scores_and_controls_are_in_the_order_of_the_secret() -> None:
    observation, secret = captured(3, 4, 5)
    (done,) = run({"analytic": Analytic()}, observation, secret)
    shown = {name: [decoded(uri) for uri in uris] for name, uris in done.result["pictures"].items()}
    for i in range(3):
        assert (shown["truth"][i] - secret.images[i]).abs().max() <= 0.5 / 255 + 1e-6
        assert (shown["reconstruction"][i] - secret.images[i]).abs().max() <= 1 / 255
    assert done.result["labels"] == {"true": secret.labels.tolist(), "recovered": secret.labels.tolist()}
    mean = PUBLIC.images.mean(0)
    expected = [psnr_db_by_hand(mean, truth) for truth in secret.images]
    assert done.result["controls"]["mean_image"]["psnr_db"] == pytest.approx(expected, abs=1e-3)
    nearest = [max(psnr_db_by_hand(p, truth) for p in PUBLIC.images) for truth in secret.images]
    assert done.result["controls"]["nearest_public"]["psnr_db"] == pytest.approx(nearest, abs=1e-3)


def decoded(uri: str) -> torch.Tensor:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(image.height, image.width, -1)
    return pixels.permute(2, 0, 1) / 255


def test_pictures_are_pngs_of_the_pixels() -> None:
    for channels in (1, 3):
        images = torch.rand(2, channels, 5, 7, generator=torch.Generator().manual_seed(0))
        for uri, image in zip(pictures(images), images, strict=True):
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
    assert "None of 2" in back["verdict"]["sentence"]
    # What a picture scores that says nothing: the wrong observation gives the same one.
    assert row["scores"]["psnr_db"] == row["controls"]["wrong_observation"]["psnr_db"]
    assert max(lead_db(row)) <= 0


def test_identification_is_among_one_hundred() -> None:
    observation, secret = captured(3)
    (done,) = run({"grey": Grey()}, observation, secret)
    grey = torch.full((1, 8, 8), 0.5)
    own = psnr_db_by_hand(grey, secret.images[0])
    closer = sum(psnr_db_by_hand(grey, decoy) >= own for decoy in PUBLIC.images[:DECOYS])
    assert DECOYS == 99
    assert done.result["scores"]["identification_rank"] == [1 + closer]


def test_part_of_a_batch_is_partial_and_what_is_missing_counts_as_grey() -> None:
    observation, secret = captured(3, 4, 5)
    (exact,) = run({"analytic": Analytic()}, observation, secret)
    assert exact.reconstruction is not None
    alone = replace(exact.reconstruction, images=exact.reconstruction.images[:1])

    def one(seen: Gradient) -> Reconstruction:
        same = all(torch.equal(seen.released[name], t) for name, t in observation.released.items())
        return alone if same else replace(alone, images=torch.full_like(alone.images, 0.5))

    (done,) = run({"one": By(one)}, observation, secret)
    scores = [value or 0 for value in done.result["scores"]["psnr_db"]]
    assert sum(value >= 80 for value in scores) == 1
    assert len(scores) == 3
    told = verdict([done.result])
    assert told["level"] == "partial"
    assert told["sentence"].startswith("1 of 3")


def test_without_the_secret_nothing_is_scored(tmp_path: Path) -> None:
    observation, _ = captured(3)
    back = written(run({"analytic": Analytic()}, observation), observation, tmp_path / "record.json")
    (row,) = back["results"]
    assert row["scores"] == {}
    assert row["controls"] == {}
    assert set(row["pictures"]) == {"reconstruction"}
    assert "true" not in row["labels"]
    assert back["verdict"]["level"] == "unscored"
    assert "without the secret" in back["verdict"]["sentence"]
    assert row["residual"] is not None
    assert row["residual"] < 1e-5


def test_an_attack_that_cannot_run_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    observation, secret = captured(3)
    attacks: dict[str, Attack] = {"blind": Blind(), "analytic": Analytic()}
    rows = run(attacks, observation, secret)
    back = written(rows, observation, tmp_path / "record.json")
    blind, analytic = back["results"]
    assert blind["status"] == "Not run: The moon was not revealed."
    assert blind["residual"] is None
    assert blind["scores"] == {}
    assert rows[0].reconstruction is None
    assert analytic["scores"]
    assert back["verdict"]["level"] == "recovered"
    assert verdict([blind])["sentence"] == "No attack could run on this observation."


def test_a_withheld_batch_size_can_be_audited(tmp_path: Path) -> None:
    observation, secret = captured(3, 4, reveal_batch_size=False)
    attacks: dict[str, Attack] = {"analytic": Analytic(), "inverting": InvertingGradients(steps=2)}
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

    attacks: dict[str, Attack] = {"inverting": InvertingGradients(steps=3), "blind": Blind()}
    rows = audit(observation, attacks, PUBLIC, on_step=start)
    assert next(rows).result["attack"] == "inverting"
    assert begun == ["inverting"]
    assert reports[-1][:2] == (3, 3)
    assert next(rows).result["attack"] == "blind"


def test_the_same_seed_gives_the_same_row() -> None:
    observation, secret = captured(3)
    attacks: dict[str, Attack] = {"inverting": InvertingGradients(steps=4)}
    first, again, other = (run(attacks, observation, secret, seed=seed)[0].result for seed in (1, 1, 2))
    first["seconds"] = again["seconds"] = 0.0
    assert first == again
    assert first["scores"] != other["scores"]


def test_the_wrong_observation_knows_nothing_of_the_secret() -> None:
    observation, secret = captured(3, 4, reveal_labels=True)
    wrong = wrong_observation(observation, PUBLIC, 2, 0)
    assert wrong.batch_size == observation.batch_size
    assert wrong.model is observation.model
    found = Analytic()(wrong, generator=torch.Generator())
    for image in found.images:  # exact, so it is public pictures that it was made from
        assert max(psnr_db_by_hand(image, public) for public in PUBLIC.images) >= 80
        assert max(psnr_db_by_hand(image, truth) for truth in secret.images) < 40
    assert wrong.labels is not None
    assert sorted(wrong.labels.tolist()) == sorted(found.labels.tolist())


def test_a_secret_of_another_size_is_refused() -> None:
    observation, secret = captured(3)
    wrong = replace(secret, images=torch.zeros(1, 3, 32, 32))
    with pytest.raises(BadInput, match=r"\(3, 32, 32\)"):
        run({"analytic": Analytic()}, observation, wrong)


def test_wrong_weights_are_flagged_in_every_row() -> None:
    observation, secret = captured(3)
    model = replace(observation.model, parameters={k: 1.1 * v for k, v in observation.model.parameters.items()})
    (done,) = run({"analytic": Analytic()}, replace(observation, model=model), secret)
    levels = {flag["name"]: flag["level"] for flag in done.result["flags"]}
    assert levels["replay"] == "error"
