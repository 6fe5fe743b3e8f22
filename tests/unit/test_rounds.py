"""Several rounds of one client as one observation: what each would have released, what all tell together, and when they do not belong together."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from conftest import Run
from gradleak.attacks.analytic import Analytic
from gradleak.attacks.attack import check_sees
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.labels import recover_labels
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.round_by_round import attacked, put_together
from gradleak.audit.explanations import flag
from gradleak.audit.privacy_loss import epsilon
from gradleak.audit.rounds import apart, of_each, shared
from gradleak.cli.rounds import one_or_all, together
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.observation_file import save_observation
from gradleak.formats.round_folder import is_run, rounds_in
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.defenses import GaussianNoise
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.private_step import ClippedNoise
from gradleak.observations.rounds import Rounds
from gradleak.observations.training import Recipe
from gradleak.report import record
from gradleak.report.record import Flag
from gradleak.victims.gradient import capture_gradient, share_update
from gradleak.victims.rounds import federated

ROUNDING = 1e-4  # relative, of a float32 gradient that is summed in another order


def client(count: int, rows: tuple[int, ...] = (3,), *, update: bool = False, **about: Any) -> tuple[Rounds[Any], Any]:
    """A client of an MLP on digits, and its pictures."""
    architecture = Architecture("mlp", (1, 8, 8), 10)
    private = load("digits", "test", indices=rows)

    def play(model: Model[Any], seed: int) -> Observation[Any]:
        seen, secret = capture_gradient(model, private, seed=seed, **about)
        return share_update(seen, secret, Recipe(learning_rate=0.1, steps=5), seed=seed) if update else seen

    model = Model.of(architecture.build(0), architecture)
    seen = federated(model, load("digits", "train"), count, play)
    assert isinstance(seen, Rounds)
    return seen, private


def gradient_of(model: Model[Any], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """By torch.autograd, on the module itself."""
    module = model.architecture.build(0)
    module.load_state_dict({**model.parameters, **(model.buffers or {})})
    torch.nn.functional.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_each_round_is_simulated_at_its_own_weights() -> None:
    seen, private = client(3)
    simulated = seen.simulate(private.images, private.labels)
    for number, one in seen.each.items():
        for name, truth in gradient_of(one.model, private.images, private.labels).items():
            torch.testing.assert_close(simulated[f"{number}: {name}"], truth, rtol=ROUNDING, atol=1e-6)
    assert seen.residual(private.images, private.labels) <= ROUNDING
    moved = (seen.each[1].model.parameters, seen.each[3].model.parameters)
    assert all(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])  # others have trained it


@pytest.mark.parametrize("update", [False, True])
def test_the_control_says_nothing_of_the_secret(update: bool) -> None:
    seen, private = client(2, update=update)
    others = load("digits", "test", indices=(8,))
    other = seen.of_others(others.images, others.labels)
    assert other.residual(others.images, others.labels) <= 1e-3  # five steps in float32, in another order
    assert other.residual(private.images, private.labels) > 0.1
    assert list(other.released) == list(seen.released)


def test_noise_is_each_rounds_own() -> None:
    seen, _ = client(2, defenses=(GaussianNoise(0.1),))
    clean, _ = client(2)
    first, second = (
        torch.cat([(seen.each[n].released[name] - t).flatten() for name, t in clean.each[n].released.items()])
        for n in (1, 2)
    )
    assert float(first.std()) == pytest.approx(0.1, rel=0.1)  # of thousands of numbers
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1
    assert {round(float(noise), 3) for noise in seen.noise().values()} == {0.1}


def test_attacks_that_read_one_gradient_refuse_several() -> None:
    seen, _ = client(2)
    with pytest.raises(NotObserved, match="one round at a time"):
        check_sees(Analytic(), seen)
    check_sees(InvertingGradients(), seen)
    for ask in (seen.as_gradient, seen.sketches, seen.descended):
        with pytest.raises(NotObserved, match="Several rounds"):
            ask()


def test_labels_of_all_rounds() -> None:
    seen, private = client(3, rows=(3, 4, 5, 6))
    assert recover_labels(seen).tolist() == private.labels.sort().values.tolist()
    noisy, one = client(
        8, defenses=(GaussianNoise(0.3),)
    )  # of p - e_y: the mean of 8 has a deviation of .11, six below 1
    assert recover_labels(noisy).tolist() == one.labels.tolist()


def test_what_cannot_be_of_the_same_data_is_not_joined() -> None:
    a, _ = client(2)
    b, _ = client(2, rows=(3, 4))
    with pytest.raises(BadInput, match="Round 2 has another number of samples than round 1: they are not joined"):
        Rounds.of({1: a.each[1], 2: b.each[2]})
    noisy, _ = client(2, defenses=(GaussianNoise(0.1),))
    with pytest.raises(BadInput, match="another defense"):
        Rounds.of({1: a.each[1], 2: noisy.each[2]})
    with pytest.raises(BadInput, match="two or more"):
        Rounds.of({1: a.each[1]})
    other, _ = client(2, rows=(4,))  # of another digit
    with pytest.raises(BadInput, match="other labels than round 1, as their gradients tell"):
        together({1: a.each[1], 2: other.each[2]})
    seen, said = one_or_all({1: a.each[1], 2: b.each[2]})
    assert list(seen) == ["round 1", "round 2"]
    assert [(one["name"], one["level"]) for one in said] == [("rounds", "warning")]


def test_a_closed_form_is_read_from_each_round_and_joined() -> None:
    seen, private = client(2)
    found = attacked(Analytic(), seen, generator=torch.Generator())
    assert found.status.startswith("From 2 rounds one by one: they agree on 1 sample.")
    assert float((found.value - private.images).abs().max()) <= 1e-3  # exact but for float32
    assert found.residual <= 1e-3


def test_the_mean_of_copies_has_less_noise_than_each() -> None:
    """Of four copies half the noise, up to what 128 numbers leave of a deviation: 1 / sqrt(2 x 128) = 6 %, here four times that."""
    seen, private = client(4, rows=(3, 4))
    draws = torch.randn(4, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    turn = torch.tensor([1, 0])  # rounds need not agree on an order
    each = {
        n: Reconstruction((private.images + 0.02 * draw)[turn], private.labels[turn], 0.0, "Read.", Outcome.CLOSE)
        if n % 2
        else Reconstruction(private.images + 0.02 * draw, private.labels, 0.0, "Read.", Outcome.CLOSE)
        for n, draw in enumerate(draws, 1)
    }
    found = put_together(seen, each)
    assert "they agree on 2 samples. Together they explain them best" in found.status
    found = replace(found, value=found.value[turn])
    left = (found.value - private.images).square().mean().sqrt()
    assert abs(float(left) / 0.01 - 1) <= 0.25


def test_texts_of_more_rounds_come_first_and_bags_are_what_half_of_them_hold() -> None:
    seen, _ = client(3, rows=(3, 4))  # two samples
    texts = ((1, 5, 2), (1, 6, 2)), ((1, 6, 2), (1, 9, 2)), ((1, 6, 2), (1, 7, 2))
    proofs, bags = ((False, False), (True, True), (False, False)), ((5, 6, 9), (6,), (6, 7, 9))
    each = {
        n: Reconstruction(value, None, 0.5, "Read.", Outcome.GUESSED, proven, bag)
        for n, (value, proven, bag) in enumerate(zip(texts, proofs, bags, strict=True), 1)
    }
    found = put_together(seen, each)
    assert found.value == ((1, 6, 2), (1, 9, 2))
    assert found.proven == (True, True)
    assert found.bag == (6, 9)


def test_private_rounds_are_composed() -> None:
    """Rounds of the Gaussian mechanism in which a sample is for sure: mu of K is sqrt(K) times that of one (Dong et al. 2022, corollary 3.3)."""
    seen, _ = client(4, defenses=(ClippedNoise(1.0, 1.0),))
    each = {
        n: replace(one, release=replace(one.release, private=replace(one.release.private, sample_rate=1.0, steps=n)))  # type: ignore[attr-defined]
        for n, one in seen.each.items()
    }
    spent = Rounds.of(each).privacy()
    assert spent is not None
    assert not isinstance(spent, str)
    assert (spent.steps, spent.certain) == (4, 4)
    mu, eps = 4**0.5 / 1.0, epsilon(spent)
    delta = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)  # Balle and Wang 2018, theorem 8
    assert delta == pytest.approx(1e-5, rel=1e-3)


def test_rounds_that_stand_apart() -> None:
    assert apart({1: 0.01, 2: 0.02, 3: 0.9}) == (3,)
    assert apart({1: 0.01, 2: 0.9}) == ()  # which of two is the odd one, nobody knows
    assert apart({1: 0.9, 2: 0.8, 3: 0.9}) == ()  # nothing is explained
    assert apart({}) == ()
    [differ] = shared({1: 0.9, 2: 0.8}, {1: 0.01, 2: 0.02})
    assert differ["sentence"].startswith("The rounds do not fit together: jointly up to 0.90")
    [unsure] = shared({1: 0.9, 2: 0.8}, {1: 0.9, 2: 0.02})
    assert unsure["sentence"].startswith("Whether the rounds share their data is not known")


def test_the_gravest_of_each_kind_of_flag_is_said_with_its_round() -> None:
    seen, _ = client(2)
    said_of: Iterator[Flag] = iter([flag("replay", level, "It does.") for level in ("info", "error")])
    [said] = of_each(lambda one: [next(said_of)], seen)
    assert said == {"name": "replay", "level": "error", "sentence": "Round 2: It does."}


# -- on the command line


def run_folder(out: Path, each: dict[str, Observation[Any]]) -> Path:
    for name, one in each.items():
        (out / name).mkdir(parents=True)
        save_observation(one, out / name / "observation.safetensors")
    return out


def test_captured_rounds_are_audited_as_one(tmp_path: Path, ok: Run) -> None:
    run = tmp_path / "run"
    what = ("--data", "digits", "--model", "mlp", "--indices", 3)
    said = ok("capture", "gradient", *what, "--rounds", 2, "--out", run)
    assert f"gradleak audit {run} --secret" in said
    asked = ("--secret", run / "secret.safetensors", "--data", "digits", "--attacks", "analytic", "inverting-gradients")
    ok("audit", run, *asked, "--inverting-gradients.steps", 5, "--out", tmp_path / "audit")
    made = record.read(tmp_path / "audit" / "record.json")
    assert made["verdict"]["level"] == "recovered"
    assert made["verdict"]["sentence"].count("Rounds 1 and 2 of one client were attacked jointly.") == 1
    assert {row["attack"]: row["status"][:25] for row in made["results"][:2]} == {
        "analytic": "From 2 rounds one by one:",
        "inverting-gradients": "From 2 rounds jointly. Fi",
    }
    assert len(made["command"]["inputs"]) == 3
    files = [run / f"round-{n}" / "observation.safetensors" for n in (1, 2)]
    ok("audit", files[0], "--rounds", files[1], "--attacks", "analytic", "--out", tmp_path / "again")
    again = record.read(tmp_path / "again" / "record.json")
    assert again["results"][0]["observation"]["name"] == "gradient in rounds 1 and 2"
    ok("rerun", tmp_path / "again" / "record.json", "--out", tmp_path / "rerun")
    assert record.read(tmp_path / "rerun" / "record.json")["results"][0]["residual"] == again["results"][0]["residual"]


def test_a_round_of_other_data_is_named_and_left_out(tmp_path: Path, ok: Run) -> None:
    """Round 2 is of another picture of the same digit, so that nothing but the pictures tells."""
    labels = load("digits", "test").labels
    first, second = (int(i) for i in (labels == 3).nonzero()[:2, 0])
    (a, _), (b, _) = client(3, rows=(first,)), client(3, rows=(second,))
    run = run_folder(tmp_path / "run", {"round-1": a.each[1], "round-2": b.each[2], "round-3": a.each[3]})
    ok("audit", run, "--data", "digits", "--attacks", "analytic", "--out", tmp_path / "audit")
    made = record.read(tmp_path / "audit" / "record.json")
    names = [row["observation"]["name"] for row in made["results"]]
    assert names == ["gradient in rounds 1, 2 and 3", "gradient in rounds 1 and 3", "round 2"]
    assert "Round 2 is not explained by what explains the others" in made["verdict"]["sentence"]
    assert all((row["residual"] or 0) <= 1e-3 for row in made["results"][1:])


def test_rounds_of_other_data_are_audited_one_by_one(tmp_path: Path, ok: Run) -> None:
    labels = load("digits", "test").labels
    first, second = (int(i) for i in (labels == 3).nonzero()[:2, 0])
    (a, _), (b, _), (c, _) = client(2, rows=(first,)), client(2, rows=(second,)), client(2, rows=(3, 4))
    run = run_folder(tmp_path / "two", {"round-1": a.each[1], "round-2": b.each[2]})
    ok("audit", run, "--data", "digits", "--attacks", "analytic", "--out", tmp_path / "audit")
    made = record.read(tmp_path / "audit" / "record.json")
    assert [row["observation"]["name"] for row in made["results"]][1:] == ["round 1", "round 2"]
    assert "The rounds do not fit together" in made["verdict"]["sentence"]
    run = run_folder(tmp_path / "sizes", {"round-1": a.each[1], "round-4": c.each[2]})
    ok("audit", run, "--data", "digits", "--attacks", "analytic", "--out", tmp_path / "sizes audit")
    made = record.read(tmp_path / "sizes audit" / "record.json")
    assert [row["observation"]["name"] for row in made["results"]] == ["round 1", "round 4"]
    assert "Round 4 has another number of samples than round 1: they are not joined." in made["verdict"]["sentence"]


def test_clients_are_named(tmp_path: Path, ok: Run, refused: Run) -> None:
    seen, _ = client(2)
    each = {f"round-{n}/client-{who}": seen.each[n] for n in (1, 2) for who in "ab"}
    run = run_folder(tmp_path / "run", each | {"round-7/client-b": seen.each[2]})
    assert is_run(run)
    assert not is_run(run / "round-1")
    assert list(rounds_in(run, "client-b")) == [1, 2, 7]
    out = ("--attacks", "analytic", "--out", tmp_path / "out")
    assert "holds rounds of 2 clients: name one with --client (client-a, client-b)." in refused("audit", run, *out)
    assert "holds no round of a client 'c'" in refused("audit", run, "--client", "c", *out)
    assert "and this is none" in refused(
        "audit", run / "round-1/client-a/observation.safetensors", "--client", "c", *out
    )
    assert "leave --rounds out" in refused(
        "audit", run, "--rounds", run / "round-1/client-a/observation.safetensors", *out
    )
    assert "one round" in refused(
        "audit", run, "--client", "client-a", "--members", "digits", "--out", tmp_path / "out"
    )
    ok("audit", run, "--client", "client-b", *out)


def test_rounds_of_a_masked_language_model_are_of_other_masks(tmp_path: Path, refused: Run) -> None:
    """Each step draws its own: what one round was made of explains no other."""
    what = ("--model", "all-MiniLM-L6-v2", "--task", "masked-lm", "--data", "embedded", "--indices", 0, "--rounds", 2)
    assert "Round 2 has other masks than round 1" in refused("capture", "gradient", *what, "--out", tmp_path / "run")
