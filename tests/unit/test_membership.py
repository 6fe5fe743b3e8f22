"""Membership: scores, rates, the certificate, and the owner's audit from the command line."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import beta, kstest
from sklearn.metrics import roc_auc_score
from torch import Tensor

from gradleak.attacks.membership import SCORES, one_by_one
from gradleak.attacks.membership.attribution import attribution, explained, two_groups
from gradleak.attacks.membership.base_ratio import base_ratio
from gradleak.attacks.membership.certificate import certificate
from gradleak.attacks.membership.evidence import Evidence
from gradleak.attacks.membership.rmia import A, rmia
from gradleak.attacks.membership.span_residual import span_residual
from gradleak.audit.membership.audited import PROOF, membership
from gradleak.audit.membership.rates import auc, auc_interval, rate, roc, variance
from gradleak.audit.membership.told_apart import told_apart
from gradleak.audit.membership.words import judged
from gradleak.audit.run import run_audit
from gradleak.audit.scoring import SCORING
from gradleak.cli.app import main
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.modalities import pictures
from gradleak.modalities.networks import Architecture
from gradleak.modalities.sources import named_split
from gradleak.modalities.texts import load_texts
from gradleak.observations.adapter import Adapter
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Update
from gradleak.observations.trained_weights import Weights
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import fine_tune, lora_start
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.small_language import small_model, train_tokenizer
from gradleak.victims.trainer_defaults import trained_by_defaults

GREY = Architecture("mlp", (1, 8, 8), 10)
N = 48  # members, fresh samples, others
CERTAIN = 1e-3  # what an interval misses, so that a test of chance fails once in a thousand machines, and never on the same one


def digits(first: int, count: int = N) -> pictures.Pictures:
    """In a random order: the writers of the first digits are not those of the last."""
    order = torch.randperm(1_297, generator=torch.Generator().manual_seed(0)).tolist()
    return pictures.load("digits", "train", indices=order[first : first + count])


@cache
def picture_adapter(first: int) -> PictureObservation:
    """AdamW, three epochs, batches of 8, on digits from a row on."""
    own = digits(first)
    return trained_by_defaults(Model.of(GREY.build(0), GREY), own.images, own.labels, epochs=3, rate=1e-3)


def evidence(seen: Observation[Any], first: int = 0) -> Evidence:
    """N members from a row on, N fresh ones behind them; the first quarter of those for calibration."""
    both = digits(first, 2 * N)
    return Evidence(seen, both.images, both.labels, torch.arange(N, N + N // 4))


def interval(values: Tensor, members: int = N, reference: int = N // 4) -> tuple[float, float]:
    own, fresh = values[:members], values[members + reference :]
    return auc_interval(auc(own, fresh), len(own), len(fresh), CERTAIN)


# --- rates ----------------------------------------------------------------------------------------------------------


def test_the_area_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    own, fresh = (torch.randint(0, 9, (n,), generator=generator).double() for n in (30, 20))  # with ties
    assert auc(own, fresh) == pytest.approx(roc_auc_score([1] * 30 + [0] * 20, torch.cat([own, fresh]).numpy()))


def test_the_interval_of_the_area_solves_its_equation_and_covers() -> None:
    m, n, z = 40, 60, 1.959964
    # At chance it is the variance of Mann and Whitney's statistic
    assert variance(0.5, m, n) == pytest.approx((m + n + 1) / (12 * m * n))
    for area in (0.5, 0.7, 0.95, 1.0):
        low, high = auc_interval(area, m, n)
        assert low < area <= high <= 1
        assert area - low == pytest.approx(z * variance(low, m, n) ** 0.5, rel=1e-6)
    assert auc_interval(1.0, m, n)[0] < 1
    generator = torch.Generator().manual_seed(0)
    true = 0.5 * (1 + torch.erf(torch.tensor(1.0 / 2))).item()  # of Gaussians whose means are 1 apart
    covered = 0
    for _ in range(200):
        own, fresh = torch.randn(m, generator=generator) + 1, torch.randn(n, generator=generator)
        low, high = auc_interval(auc(own, fresh), m, n)
        covered += low <= true <= high
    assert covered >= 180  # 190 are expected, with a deviation of 3


def test_true_positives_at_a_rate_of_false_alarms() -> None:
    own, fresh = torch.arange(100.0) + 50, torch.arange(200.0) / 2
    at = rate(own, fresh, 0.01)
    threshold = 99.5 - 1.0  # the third largest: two of 200 lie above
    hits = int((own > threshold).sum())
    assert at["resolved"]
    assert at["true"] == hits / 100
    assert at["low"] == pytest.approx(beta.ppf(0.025, hits, 100 - hits + 1))  # Clopper and Pearson 1934
    assert at["high"] == pytest.approx(beta.ppf(0.975, hits + 1, 100 - hits))
    few = rate(own, fresh, 0.001)
    assert not few["resolved"]
    assert few["false_high"] == pytest.approx(1 - 0.025 ** (1 / 200))  # no alarm among 200
    curve = roc(own, fresh)
    assert curve[0][0] == 0
    assert curve[-1] == (1.0, 1.0)
    assert [*curve] == sorted(curve)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_attribution_gives_every_sample_its_share_of_a_gradient() -> None:
    """The gradient of a batch is the mean of its samples' gradients: c_i = 1 / N of members, 0 of others, exactly."""
    own = digits(0)
    seen = capture_gradient(Model.of(GREY.build(0), GREY), own)[0]
    of = evidence(seen)
    c, deviation, left = explained(of.gradients, of.descent)
    values = c / deviation
    assert values[:N].min() > 10 * values[N:].abs().max()  # the ridge of 1e-3 is shared by what samples have in common
    assert left < 0.01
    ratio = attribution(of)
    assert ratio[:N].min() > 0 > ratio[N:].max()


def test_the_two_groups_are_found_where_they_are_known() -> None:
    """c_i ~ N(b m_i, d_i^2) drawn: the ratio is the true one, up to what 400 samples tell of s^2 (sqrt(2 / 400), 7 %) and b: 25 % are three
    deviations of both. It ranks better than c_i over its deviation."""
    generator = torch.Generator().manual_seed(0)
    deviation = 10 ** (2 * torch.rand(400, generator=generator, dtype=torch.float64) - 1.5)
    c = 0.7 * (torch.arange(400) < 200) + deviation * torch.randn(400, generator=generator, dtype=torch.float64)
    ratio = two_groups(c, 3 * deviation, torch.arange(350, 400))  # deviations are known up to a factor
    true = 0.7 * (c - 0.35) / deviation.square()
    assert float((ratio / true - 1).abs().median()) < 0.25
    areas = [auc(score[:200], score[200:350]) for score in (ratio, c / deviation)]
    assert areas[0] > areas[1]


def test_candidates_at_once_are_candidates_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of several lengths, in float32: gradients and losses are those without vmap, which is told not to work."""
    model, tokens = decoder()
    seen = trained_by_defaults(model, tokens[:8], None, epochs=1)
    fast, slow = (Evidence(seen, tokens[:24], None, torch.arange(8, 16)) for _ in range(2))
    assert fast.targets.tolist() == [len(row) - 1 for row in tokens[:24]]
    gradients, after = fast.gradients, fast.after
    asked = list[int]()

    def fails(*_: Any) -> Any:
        asked.append(1)
        raise RuntimeError("vmap: data-dependent control flow")

    monkeypatch.setattr(one_by_one, "vmap", fails)
    assert torch.allclose(after, slow.after, rtol=1e-5)
    assert float((gradients - slow.gradients).norm()) < 1e-5 * float(gradients.norm())
    assert asked == [1, 1]  # once for each question


def test_an_everyday_adapter_tells_its_pictures_and_not_others() -> None:
    told = attribution(evidence(picture_adapter(0)))
    assert interval(told)[0] > 0.5
    other = attribution(evidence(picture_adapter(200)))
    low, high = interval(other)
    assert low < 0.5 < high
    plain = roc_auc_score([1] * N + [0] * N, told.numpy())
    ratio = roc_auc_score([1] * N + [0] * N, base_ratio(evidence(picture_adapter(0))).numpy())
    assert plain > ratio  # what attribution is for


@cache
def decoder(spread: float = 0.05, layers: int = 2) -> tuple[Model[Any], Any]:
    """A small GPT-2, and texts in a random order."""
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "gpt2", size=400)
    model = small_model("gpt2", tokenizer, "causal-lm", layers=layers, spread=spread)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    return model, model.architecture.feed(load_texts("embedded", "train", indices=order))[0]


def test_an_everyday_adapter_tells_its_texts_and_not_others() -> None:
    model, tokens = decoder()
    for own, told in ((slice(0, N), True), (slice(2 * N, 3 * N), False)):
        seen = trained_by_defaults(model, tokens[own], None, epochs=3)
        low, high = interval(attribution(Evidence(seen, tokens[: 2 * N], None, torch.arange(N, N + N // 4))))
        assert low > 0.5 if told else low < 0.5 < high


@cache
def encoder() -> Model[Any]:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "bert", size=400)
    return small_model("bert", tokenizer, "classification", layers=1)


def test_the_head_that_an_adapter_brings_is_used(tmp_path: Path) -> None:
    """Trained along from a start that nobody knows, or from the base model's: in both cases the losses are those of the trained head."""
    model = encoder()
    tokens, labels = model.architecture.feed(load_texts("embedded", "train", limit=16))
    seen = trained_by_defaults(model, tokens, labels, epochs=1, rate=1e-2)
    assert seen.adapter.known_at_end == ("classifier.bias", "classifier.weight")
    head = {name: seen.model.parameters[name] for name in seen.adapter.known_at_end}
    assert not torch.equal(head["classifier.weight"], model.parameters["classifier.weight"])
    changed = {name: tensor - model.parameters[name] for name, tensor in head.items()}
    release = replace(seen.adapter, known_at_end=(), beside=tuple(head), changed=changed)
    known = replace(seen, model=model, release=release)
    of = [Evidence(each, tokens, labels, torch.arange(4)) for each in (seen, known)]
    assert torch.allclose(of[0].after, of[1].after, rtol=1e-5)  # the head is a sum of two roundings
    assert not torch.allclose(of[0].before, of[1].before)
    assert sum(of[1].layers) == sum(of[0].layers) + sum(tensor.numel() for tensor in head.values())
    save_observation(known, tmp_path / "seen.safetensors")
    again = load_observation(tmp_path / "seen.safetensors").adapter
    assert all(torch.equal(again.changed[name], tensor) for name, tensor in changed.items())


def test_losses_are_those_of_the_two_models() -> None:
    own = digits(0)
    model = Model.of(GREY.build(0), GREY)
    release = Update(recipe=Recipe(learning_rate=0.01, steps=5))
    change = {k: v.detach() for k, v in release.simulate(model, model.parameters, own.images, own.labels).items()}
    of = evidence(PictureObservation(model=model, release=release, released=change))
    network, labels = model.solid().eval(), digits(0, 2 * N).labels
    with torch.no_grad():
        before = F.cross_entropy(network(of.inputs), labels, reduction="none").double()
        for name, parameter in network.named_parameters():
            parameter.add_(change[name])
        after = F.cross_entropy(network(of.inputs), labels, reduction="none").double()
    assert torch.allclose(base_ratio(of), before - after, atol=1e-6)  # sums of some dozen float32
    p, base = torch.exp(-after), torch.exp(-before)
    ratio = [float(p[i] / ((1 + A) / 2 * base[i] + (1 - A) / 2)) for i in range(2 * N)]
    share = [sum(ratio[i] > ratio[z] for z in range(N, N + N // 4)) / (N // 4) for i in range(2 * N)]
    assert torch.allclose(rmia(of), torch.tensor(share, dtype=torch.float64), atol=1.01 / (N // 4))  # a tie may fall
    # The midpoint rule: <gradient half way, theta_0 - theta_T> is the fall of the loss up to the third order of the change. That moves
    # losses by less than a tenth of themselves here, so that a tenth squared is left
    fall = (of.gradients @ of.descent).double()
    assert float((fall - (before - after)).norm()) < 1e-2 * float((before - after).norm())


def test_weights_alone_tell_losses_and_no_more() -> None:
    model = Model.of(GREY.build(0), GREY)
    of = evidence(PictureObservation(model=model, release=Weights(), released=dict(model.parameters)))
    assert len(SCORES["low-loss"](of)) == 2 * N
    for name in ("base-ratio", "rmia", "alignment", "attribution"):
        with pytest.raises(NotObserved, match="before training"):
            SCORES[name](of)


# --- certificate ----------------------------------------------------------------------------------------------------


def synthetic(seed: int, data: Tensor, rank: int = 16) -> PictureObservation:
    """An adapter whose B and A moved as equations (1) and (2) of unmixing/span.py say, trained on these pictures."""
    model, generator = Model.of(GREY.build(0), GREY).to(torch.float64), torch.Generator().manual_seed(seed)
    x = FullyConnected.of(model.module, model.parameters, GREY.input_shape).inputs(data)
    start = lora_start(model, ("2",), rank, generator)
    out = len(start["2.lora_B"])
    d, e = (torch.randn(out, len(x), generator=generator, dtype=torch.float64) for _ in range(2))
    B = d @ (x @ start["2.lora_A"].T)
    released = {"2.lora_A": -0.01 * B.T @ e @ x, "2.lora_B": B}
    release = Adapter(start=start, scaling={"2": 1.0}, origin="given", recipe=Recipe(learning_rate=0.1, steps=1))
    return PictureObservation(model=model, release=release, released=released)


def test_p_values_of_strangers_are_uniform() -> None:
    """Over the draw of A_0, which is where the chance of the certificate comes from; members have none."""
    both = digits(0, 5).images.double()
    p = torch.stack([certificate(synthetic(seed, both[:4]), both) for seed in range(100)])
    assert p[:, :4].max() < PROOF
    assert kstest(p[:, 4].numpy(), "uniform").pvalue > CERTAIN


def test_the_certificate_of_texts() -> None:
    """Two texts in 20 steps of SGD: what is proven are they, by every token in its place."""
    model, tokens = decoder(spread=0.2, layers=1)
    modules = list(layout_of(model).queries(0))
    start = lora_start(model, modules, 60, torch.Generator().manual_seed(0))
    recipe = Recipe(learning_rate=0.1, steps=20, batch_size=1)
    release = Adapter(start=start, scaling=dict.fromkeys(modules, 1.0), recipe=recipe, origin="given")
    moved = {k: t.detach() for k, t in release.simulate(model, start, tokens[:2], None).items()}
    seen = Observation(model=model, release=release, released=moved)
    for origin in ("given", "unknown"):
        p = certificate(replace(seen, release=replace(release, origin=origin)), tokens[:60])
        assert p[:2].max() < PROOF
        assert p[2:].min() > PROOF
    left = span_residual(Evidence(seen, tokens[:60], None, torch.arange(2, 10)))
    assert left[:2].min() > -0.05  # twenty steps of float32 in the smallest direction that counts
    assert (
        left[2:].max() < -0.3
    )  # of two random vectors of 64 dimensions outside a span of 26 each keeps .77, and words are alike
    adam = replace(seen, released={k: t.sign() for k, t in moved.items()}, release=replace(release, recipe=None))
    with pytest.raises(NotObserved, match="SGD"):
        certificate(adam, tokens[:4])


# --- the owner's audit ----------------------------------------------------------------------------------------------


def test_sources_that_differ_are_told_apart_without_the_model() -> None:
    features, model = SCORING["pictures"].features, Model.of(GREY.build(0), GREY)
    one, other = digits(0, 100).images, digits(100, 100).images
    member = [True] * 100 + [False] * 100
    _, low, _ = told_apart(features(torch.cat([one, other]), model), member, 0)
    assert low <= 0.5  # what was left out of a fold makes it a little less than chance
    assert told_apart(features(torch.cat([one, 0.7 * other]), model), member, 0)[1] > 0.6  # darker: anybody sees it


def words(**rest: Any) -> Any:
    score = {"auc": 0.6, "low": 0.45, "high": 0.7, "rates": [rate(torch.ones(5), torch.zeros(30), 0.01)], "roc": []}
    found = {"members": 5, "fresh": 30, "best": "base-ratio", "scores": {"base-ratio": score}, "flags": []}
    return judged({**found, "certificate": None, "not_run": {"certificate": "No."}, **rest})  # type: ignore[typeddict-item]


def test_not_found_is_not_safe() -> None:
    assert words()["verdict"] == "nothing"
    assert "Not found is not safe" in words()["sentence"]
    proof = {"level": 1e-6, "proven": 3, "alarms": 0, "expected": 5e-6}
    assert words(certificate=proof)["verdict"] == "members"
    assert "3 of 5" in words(certificate=proof)["sentence"]
    error = {"name": "apart", "level": "error", "sentence": "They differ."}
    assert words(flags=[error])["verdict"] == "void"
    assert words(flags=[error], certificate=proof)["verdict"] == "members"
    alone = words(best="", fresh=0, scores={})
    assert alone["verdict"] == "unscored"
    assert "cannot be said" in alone["sentence"]


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with its base, and pictures as folders: members, fresh."""
    out = tmp_path_factory.mktemp("owned")
    model, own = Model.of(GREY.build(0), GREY), digits(0, 40)
    recipe = Recipe(optimizer="adamw", learning_rate=1e-3, steps=15, batch_size=8)
    fine_tune(model, own, rank=8, out=out, recipe=recipe, seed=7)
    for name, some in (("members", own), ("fresh", digits(300, 40)), ("few", digits(400, 4))):
        for i, (image, label) in enumerate(zip(some.images, some.labels.tolist(), strict=True)):
            place = out / name / str(label) / f"{i:03}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(place)
    (out / "texts.txt").write_text("A text.\nAnother one.\n")
    return out


def audited(owned: Path, out: Path, *more: str) -> int:
    return main(["audit", str(owned / "adapter"), "--base", str(owned / "base"), "--out", str(out), *more])


def test_the_owners_audit(owned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ("--members", str(owned / "members"), "--non-members", str(owned / "fresh"))
    assert audited(owned, tmp_path / "a", *both) == 0
    assert "Membership: " in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    found = record["membership"]
    assert (found["members"], found["fresh"], found["reference"]) == (40, 30, 10)
    assert set(found["scores"]) | set(found["not_run"]) == {*SCORES, "certificate"}
    assert record["results"] == []
    assert len(found["exposed"]) == 10
    assert found["exposed"][0]["shown"].startswith("data:image/png;base64,")
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Most exposed samples" in page
    assert "polyline" in page
    assert audited(owned, tmp_path / "b", *both, "--redact", "--attacks", "adam-epsilon") == 0
    hidden = json.loads((tmp_path / "b" / "record.json").read_text())
    assert all("shown" not in row for row in hidden["membership"]["exposed"])
    assert [row["attack"] for row in hidden["results"]] == ["adam-epsilon"]
    assert audited(owned, tmp_path / "e", *both, "--limit", "24") == 0
    some = json.loads((tmp_path / "e" / "record.json").read_text())["membership"]
    assert (some["members"], some["fresh"], some["reference"]) == (24, 18, 6)
    said = [flag["sentence"] for flag in some["flags"] if flag["name"] == "sampled"]
    assert [sentence.split(" samples")[0] for sentence in said] == ["24 of the 40"] * 2
    assert hidden["verdict"]["sentence"].startswith("Membership: ")
    assert audited(owned, tmp_path / "c", *both[:2]) == 0
    alone = json.loads((tmp_path / "c" / "record.json").read_text())
    assert alone["verdict"]["level"] == "unscored"
    assert "cannot be said" in alone["verdict"]["sentence"]
    assert main(["rerun", str(tmp_path / "a" / "record.json"), "--out", str(tmp_path / "d")]) == 0
    again = json.loads((tmp_path / "d" / "record.json").read_text())
    assert again["membership"]["sentence"] == found["sentence"]


def test_python_asks_as_the_command_does(owned: Path) -> None:
    both: dict[str, Any] = {"members": str(owned / "members"), "non_members": str(owned / "fresh")}
    report = run_audit(owned / "adapter", base=owned / "base", **both, limit=24, progress=False)
    found = report.record["membership"]
    assert (found["members"], found["fresh"]) == (24, 18)
    assert report.record["results"] == []
    assert report.verdict["sentence"] == found["sentence"]
    with pytest.raises(BadInput, match="go with members"):
        run_audit(owned / "adapter", base=owned / "base", non_members="digits")


def test_what_the_owner_may_have_got_wrong(owned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members, fresh = ("--members", str(owned / "members")), "--non-members"
    cases: dict[tuple[str, ...], str] = {
        (*members, fresh, str(owned / "members")): "none is fresh",
        (*members, fresh, str(owned / "few")): "are not the same",
        (*members, fresh, "embedded"): "are not the same",
        (*members, fresh, str(owned / "texts.txt")): "give a folder",
        (*members, fresh, str(owned / "members:test")): "has no split",
        (*members, fresh, str(tmp_path / "nothing")): "does not exist",
        ("--members", "digits:nowhere"): "has no split",
        (fresh, "digits"): "goes with --members",
        ("--limit", "30"): "goes with --members",
        (*members, fresh, str(owned / "fresh"), "--limit", "19"): "too small",
        (*members, fresh, str(owned / "members"), "--limit", "20"): "none is fresh",
    }
    for number, (more, reason) in enumerate(cases.items()):
        assert audited(owned, tmp_path / str(number), *more) == 2, reason
        assert reason in capsys.readouterr().err


def test_overlaps_missing_labels_and_small_numbers_are_told(tmp_path: Path) -> None:
    seen = picture_adapter(0)
    with pytest.raises(BadInput, match="none is fresh"):
        membership(seen, "digits:train", "digits:train")
    flat, other = tmp_path / "flat", tmp_path / "other"
    for folder, first in ((flat, 0), (other, 20)):
        folder.mkdir()
        for i, image in enumerate(digits(first, 40).images):
            Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(folder / f"{i:03}.png")
    found = membership(seen, str(flat), str(other))
    names = {flag["name"]: flag["sentence"] for flag in found["flags"]}
    assert "20 fresh samples are among the members" in names["overlap"]
    assert "class that the model prefers" in names["labels"]
    assert found["fresh"] == 15
    assert not any(at["resolved"] for score in found["scores"].values() for at in score["rates"])


def test_texts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "One.", "label": 1}\n{"text": "Two.", "label": 0}\n')
    (tmp_path / "c.csv").write_text('sentence,label\n"One, two.",2\nThree.,0\n')
    assert load_texts(str(tmp_path / "a.txt")).texts == ("One.", "Two.")
    assert not load_texts(tmp_path / "a.txt").labelled
    assert load_texts(tmp_path / "b.jsonl").labels.tolist() == [1, 0]
    assert load_texts(tmp_path / "c.csv").texts == ("One, two.", "Three.")
    assert named_split(str(tmp_path / "a.txt"), ("train",))[1] == "train"
    assert named_split("embedded:test", ("train",)) == ("embedded", "test")
    for text, reason in {
        "[1]\n": "no rows",
        '{"a": "b"}\n': "no texts",
        "{\n": "cannot be read",
        "": "no rows",
    }.items():
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(BadInput, match=reason):
            load_texts(tmp_path / "d.jsonl")
    (tmp_path / "d.txt").write_text("\n \n")
    with pytest.raises(BadInput, match=r"d.txt holds no texts"):
        load_texts(tmp_path / "d.txt")
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": "good"}\n')
    with pytest.raises(BadInput, match="whole numbers"):
        load_texts(tmp_path / "d.jsonl")
    model = encoder()
    with pytest.raises(BadInput, match="label 2"):
        SCORING["texts"].candidates(str(tmp_path / "c.csv"), "train", model, 10, 0)
    some = SCORING["texts"].candidates(str(tmp_path / "a.txt"), "train", model, 10, 0)
    assert sorted(some.rows) == [0, 1]
    assert not some.labelled
