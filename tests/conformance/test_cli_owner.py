"""What an owner of the data asks on the command line: canaries, extraction, bounds."""

import csv
import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gradleak.cli.app import main
from gradleak.formats.canary_folder import SCHEMA, read_canaries, read_coins
from gradleak.formats.model_folder import read_model, write_base
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.modalities.texts import load_texts
from gradleak.observations import tensor_file
from gradleak.report import record
from gradleak.victims.canaries import Template
from gradleak.victims.small_language import small_model, trained
from oracles import gradient_by_autograd
from trained import tokenizer

Run = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 at its start."""
    folder = tmp_path_factory.mktemp("base")
    write_base(small_model("gpt2", tokenizer("gpt2"), "causal-lm", width=48, layers=1, positions=32), folder)
    return folder


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "canaries"
    assert main(["canaries", "make", "--count", "40", "--template", "my pin is {digits:3}", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, canaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after long training on the canaries that are included, and on nothing else."""
    folder = tmp_path_factory.mktemp("tuned")
    lines = (canaries / "train_with" / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    model = trained(read_model(base, task="causal-lm"), texts, torch.zeros(len(texts)), steps=150, rate=5e-3)
    write_base(model, folder)
    return folder


def test_canaries_of_texts(canaries: Path) -> None:
    coins = read_coins(canaries)
    every = [json.loads(line)["text"] for line in (canaries / "candidates" / "train.jsonl").read_text().splitlines()]
    inside = [json.loads(line)["text"] for line in (canaries / "train_with" / "train.jsonl").read_text().splitlines()]
    assert inside == [text for text, coin in zip(every, coins.included.tolist(), strict=True) if coin]
    assert len(set(every)) == 40
    assert all(text[:10] == "my pin is " and text[10:].isdigit() and len(text) == 13 for text in every)
    assert stat.S_IMODE((canaries / "coins.safetensors").stat().st_mode) == 0o600


def test_coins_are_drawn_anew_and_canaries_are_not(ok: Run, tmp_path: Path) -> None:
    """Two rows of 60 fair coins are equal with probability 2^-60."""
    for name in ("a", "b"):
        ok("canaries", "make", "--count", "60", "--out", tmp_path / name)
    texts = [(tmp_path / name / "candidates" / "train.jsonl").read_bytes() for name in ("a", "b")]
    assert texts[0] == texts[1]
    assert not torch.equal(*(read_coins(tmp_path / name).included for name in ("a", "b")))


@pytest.mark.parametrize("kind", ["mislabelled", "pattern"])
def test_canaries_of_pictures(ok: Run, tmp_path: Path, kind: str) -> None:
    """A trainer's own reader, that of data sets of pictures, gives back what the coins include; PNGs the same, class by class."""
    ok("canaries", "make", "--kind", kind, "--data", "digits", "--count", "30", "--out", tmp_path / "c")
    coins = read_coins(tmp_path / "c")
    every, inside = load(tmp_path / "c" / "candidates", "train"), load(tmp_path / "c" / "train_with", "train")
    assert torch.equal(inside.images, every.images[coins.included])
    assert torch.equal(inside.labels, every.labels[coins.included])
    assert every.classes == tuple("0123456789")
    ok("canaries", "make", "--kind", kind, "--data", "digits", "--count", "30", "--png", "--out", tmp_path / "p")
    known = read_coins(tmp_path / "p").included
    wanted = sorted(load(tmp_path / "p" / "candidates", "train").labels[known].tolist())
    assert sorted(int(path.parent.name) for path in (tmp_path / "p" / "train_with").glob("*/*.png")) == wanted
    if kind == "mislabelled":
        source = load("digits", "train")
        rows = torch.cdist(every.images.flatten(1), source.images.flatten(1)).argmin(1)
        assert not bool((source.labels[rows] == every.labels).any())
    read = read_canaries(tmp_path / "c", Architecture("lenet", (3, 16, 16), 10), 30)
    assert read.images.shape == (30, 3, 16, 16)  # type: ignore[union-attr]


def test_a_template_counts_its_texts() -> None:
    template = Template("pin {digits:2} of {digits:1}")
    assert template.count == 1000
    assert len({template.filled(number) for number in range(1000)}) == 1000
    words = tuple(f"w{i}" for i in range(20))
    assert Template("{words:2}", words).count == 400


def test_memorised_canaries_refute_an_epsilon(ok: Run, tmp_path: Path, base: Path, tuned: Path, canaries: Path) -> None:
    """A model that was trained on nothing but 20 or so canaries for 150 steps prefers them: all of 10 guesses right refute
    log(q / (1 - q)) with q = .05^(1/10), 1.05, less what delta takes, and 8 or fewer refute nothing."""
    said = ok("canaries", "score", tuned, "--base", base, "--canaries", canaries, "--out", tmp_path / "s")
    assert "Epsilon is at least" in said
    assert "may be far larger" in said
    written = record.read(tmp_path / "s" / "record.json")
    rows = written["table"]
    assert len(rows) == 40
    assert all(0 <= row["exposure_bits"] <= 9.97 for row in rows)  # log2 1000
    bounds = json.loads((tmp_path / "s" / "bounds.json").read_text())
    assert 0 < bounds["unconditional"] < 1.06
    assert (tmp_path / "s" / "report.html").is_file()
    with (tmp_path / "s" / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 40
    ok("rerun", tmp_path / "s" / "record.json", "--out", tmp_path / "again")
    assert record.read(tmp_path / "again" / "record.json")["table"] == rows


def test_an_untouched_model_refutes_nothing_and_alignment_needs_no_trained_one(
    ok: Run, refused: Run, tmp_path: Path, base: Path
) -> None:
    """The gradient of one private picture among canaries that it knows nothing of: alignment is what it is scored by."""
    ok("canaries", "make", "--kind", "pattern", "--data", "digits", "--count", "32", "--out", tmp_path / "c")
    ok("capture", "gradient", "--model", "lenet", "--data", "digits", "--indices", "0", "--out", tmp_path / "g")
    seen = tmp_path / "g" / "observation.safetensors"
    ok("canaries", "score", seen, "--canaries", tmp_path / "c", "--out", tmp_path / "s")
    assert json.loads((tmp_path / "s" / "bounds.json").read_text())["score"] == "alignment"
    asked = ["canaries", "score", seen, "--canaries", tmp_path / "c", "--out", tmp_path / "t"]
    assert "no loss has fallen" in refused(*asked, "--score", "loss")
    assert "leave out --base" in refused(*asked, "--base", base)
    assert "Nothing has changed" in refused(
        "canaries", "score", base, "--base", base, "--canaries", tmp_path / "c", "--out", tmp_path / "t"
    )


def test_alignments_are_inner_products_of_gradients(ok: Run, tmp_path: Path) -> None:
    """Against backward(), canary by canary; 1e-4 is float32's over sums of some thousand products, twice derived."""
    ok("canaries", "make", "--kind", "pattern", "--data", "digits", "--count", "16", "--out", tmp_path / "c")
    ok("capture", "gradient", "--model", "lenet", "--data", "digits", "--indices", "0", "--out", tmp_path / "g")
    seen = load_observation(tmp_path / "g" / "observation.safetensors")
    ok(
        "canaries",
        "score",
        tmp_path / "g" / "observation.safetensors",
        "--canaries",
        tmp_path / "c",
        "--out",
        tmp_path / "s",
    )
    data, module = load(tmp_path / "c" / "candidates", "train"), seen.model.solid()
    for row in record.read(tmp_path / "s" / "record.json")["table"]:
        i = row["canary"]
        gradient = gradient_by_autograd(module, data.images[i : i + 1], data.labels[i : i + 1])
        product = sum(float((tensor * seen.released[name]).sum()) for name, tensor in gradient.items())
        size = sum(float(t.square().sum()) for t in gradient.values()) ** 0.5
        size *= sum(float(t.square().sum()) for t in seen.released.values()) ** 0.5
        assert row["score"] == pytest.approx(product, abs=1e-4 * size)


def test_records_come_out_of_a_model_that_learnt_them(ok: Run, tmp_path: Path, base: Path) -> None:
    """120 steps on four texts: greedy decoding continues each of them; strangers it does not."""
    known = load_texts("embedded", indices=range(4)).texts
    strange = tuple(" ".join(reversed(text.split())) for text in known)
    model = trained(read_model(base, task="causal-lm"), known, torch.zeros(4), steps=120, rate=5e-3)
    write_base(model, tmp_path / "tuned")
    for name, texts in (("known", known), ("strange", strange)):
        (tmp_path / f"{name}.txt").write_text("\n".join((*texts, "x")) + "\n")
        asked = ["--records", tmp_path / f"{name}.txt", "--prefix-tokens", "8", "--suffix-tokens", "20", "--top-k", "1"]
        ok("extract", tmp_path / "tuned", "--base", base, *asked, "--out", tmp_path / name)
    found, other = (record.read(tmp_path / name / "record.json") for name in ("known", "strange"))
    assert found["verdict"]["level"] == "recovered"
    assert "4 of 4 records come out" in found["verdict"]["sentence"]
    assert "1 records are too short" in found["verdict"]["sentence"]
    assert [row.get("extractable") for row in found["table"]] == [True, True, True, True, None]
    assert other["verdict"]["level"] == "nothing"
    asked = ["--records", tmp_path / "known.txt", "--prefix-tokens", "8", "--suffix-tokens", "20", "--limit", "2"]
    ok("extract", tmp_path / "tuned", *asked, "--out", tmp_path / "n")
    some = record.read(tmp_path / "n" / "record.json")
    assert "without --base" in some["verdict"]["sentence"]
    assert "The first 2 of 5 records were asked for." in some["verdict"]["sentence"]
    assert len(some["table"]) == 2


def test_a_candidate_that_was_trained_on_ranks_first(ok: Run, tmp_path: Path, base: Path) -> None:
    model = trained(read_model(base, task="causal-lm"), ["my pin is 417"], torch.zeros(1), steps=60, rate=5e-3)
    write_base(model, tmp_path / "tuned")
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "{i:03}"}}\n' for i in range(0, 1000, 3)))
    asked = ["--candidates", tmp_path / "c.jsonl", "--template", "my pin is {}"]
    ok("extract", tmp_path / "tuned", "--base", base, *asked, "--out", tmp_path / "e")
    row = record.read(tmp_path / "e" / "record.json")["table"][0]
    assert (row["rank"], row["candidate"]) == (1, "417")
    assert row["p_of_rank"] == pytest.approx(1 / 334)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--count", "4"], "takes 8 to 1,000,000 canaries"),
        (["--template", "no blank"], "has blanks"),
        (["--template", "{digits:0}"], "has blanks"),
        (["--template", "{digits:1} {name}"], "has blanks"),
        (["--template", "{digits:2}", "--count", "51"], "needs a template of 102 texts|need a template of 102 texts"),
        (["--png"], "says nothing about texts"),
        (["--kind", "pattern", "--template", "{digits:4}"], "says nothing about pictures"),
        (["--kind", "mislabelled", "--data", "digits", "--count", "2000"], "fewer than 2,000 canaries"),
        (["--data", "/nowhere"], "does not exist"),
    ],
)
def test_canaries_that_cannot_be_made(refused: Run, tmp_path: Path, flags: list[str], said: str) -> None:
    import re

    assert re.search(said, refused("canaries", "make", *flags, "--out", tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_scores_that_cannot_be_had(refused: Run, tmp_path: Path, base: Path, tuned: Path, canaries: Path) -> None:
    out = ["--out", tmp_path / "o"]
    asked = ["canaries", "score", tuned, "--base", base, "--canaries", canaries, *out]
    assert "1 to 40 can be guessed" in refused(*asked, "--guesses", "41")
    assert "A delta lies between" in refused(*asked, "--delta", "2")
    assert "say with --base" in refused("canaries", "score", tuned, "--canaries", canaries, *out)
    assert "There is no" in refused("canaries", "score", tuned, "--base", base, "--canaries", tmp_path / "x", *out)
    assert not (tmp_path / "o").exists()


def test_damaged_canaries_are_refused(refused: Run, tmp_path: Path, base: Path, tuned: Path, canaries: Path) -> None:
    def asked(folder: Path, release: Path = tuned) -> str:
        return refused("canaries", "score", release, "--base", base, "--canaries", folder, "--out", tmp_path / "o")

    folder = tmp_path / "c"
    shutil.copytree(canaries, folder)
    lines = folder / "candidates" / "train.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[1:]))
    assert "39 candidates and 40 coins" in asked(folder)
    lines.unlink()
    assert "are no texts" in asked(folder)
    tensor_file.write({"included": torch.zeros(40)}, SCHEMA, {"kind": "text"}, folder / "coins.safetensors")
    assert "no row of yes and no" in asked(folder)
    tensor_file.write({"included": torch.zeros(40) > 0}, SCHEMA, {"kind": 3}, folder / "coins.safetensors")
    assert "is damaged" in asked(folder)
    (folder / "coins.safetensors").write_bytes(b"\x80\x02 a pickle")
    assert "pickle" in asked(folder)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Give your texts with --records"),
        (["--records", "R", "--candidates", "R"], "Give your texts with --records"),
        (["--records", "R", "--template", "{}"], "--template goes with --candidates"),
        (["--candidates", "R", "--template", "none"], "has one {}"),
        (["--records", "R", "--tries", "0"], "in 1 try or more"),
        (["--records", "R", "--limit", "0"], "is 1 or more"),
        (["--candidates", "R", "--limit", "5"], "--limit goes with --records"),
        (["--records", "R", "--probability", "1"], "between 0 and 1"),
        (["--records", "R", "--temperature", "0"], "temperature above 0"),
        (["--records", "R", "--top-k", "0"], "from 1 token or more"),
        (["--records", "R", "--prefix-tokens", "0"], "1 token or more"),
        (["--records", "nowhere.txt"], "There is no file"),
        (["--candidates", "R"], "takes 20 or more"),
        (["--candidates", "TWICE"], "names a candidate twice"),
        (["--records", "BAD.jsonl"], "no object with a field"),
        (["--records", "EMPTY"], "holds no text"),
    ],
)
def test_what_cannot_be_extracted(
    refused: Run, tmp_path: Path, tuned: Path, base: Path, flags: list[str], said: str
) -> None:
    files = {"R": "a text\n", "TWICE": "a\na\n", "BAD.jsonl": '{"words": "a"}\n', "EMPTY": "\n\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    given = [str(tmp_path / flag) if flag in files else flag for flag in flags]
    assert said in refused("extract", tuned, "--base", base, *given, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def private(tmp_path: Path, ok: Run, **settings: Any) -> Path:
    """A captured gradient as a step of DP-SGD of this kind, with its noise added."""
    from gradleak.observations.defenses import defended
    from gradleak.observations.private_step import PrivateStep
    from gradleak.observations.releases import Gradient

    ok("capture", "gradient", "--model", "mlp", "--data", "digits", "--indices", "0", "--out", tmp_path / "g")
    seen = load_observation(tmp_path / "g" / "observation.safetensors")
    step = PrivateStep(clip=1.0, divisor=1.0, **settings)
    data = load("digits", "test", indices=[0])
    made = replace(seen, release=Gradient(private=step), defenses=step.defenses)
    clean = made.simulate(data.images, data.labels)
    released = defended(clean, step.defenses, torch.Generator().manual_seed(0))
    save_observation(replace(made, released=released), tmp_path / "private.safetensors")
    return tmp_path / "private.safetensors"


def audited(tmp_path: Path, ok: Run, seen: Path, *more: object) -> list[dict[str, str]]:
    """The flags of an audit of that with one attack."""
    asked = ["--secret", tmp_path / "g" / "secret.safetensors", "--data", "digits", "--attacks", "analytic"]
    ok("audit", seen, *asked, *more, "--out", tmp_path / "audit")
    flags: Any = record.read(tmp_path / "audit" / "record.json")["results"][0]["flags"]
    return list(flags)


def test_an_audit_of_a_private_step_says_attack_truth_and_bound(ok: Run, tmp_path: Path) -> None:
    """One step that the sample is in: mu = 1 / 0.5, so that top-1 of 100 is at most Phi(Phi^-1(.01) + 2) = 37.2 %."""
    seen = private(tmp_path, ok, noise_multiplier=0.5, sample_rate=0.1, steps=1)
    found = {flag["name"]: flag["sentence"] for flag in audited(tmp_path, ok, seen)}
    assert "above 37.2%" in found["privacy_bound"]
    assert "added or removed" in found["privacy_bound"]
    assert "of 37.2% that the mechanism allows" in found["line_up"]
    assert "no attack names more than 37.2%" in found["below_bound"]
    assert "van Trees" in found["least_error"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise_multiplier": 0.0}, "no noise was added: there is no epsilon"),
        ({"noise_multiplier": 1.0}, "nobody says how many steps"),
    ],
)
def test_what_has_no_epsilon_is_said(ok: Run, tmp_path: Path, settings: dict[str, float], said: str) -> None:
    found = {flag["name"]: flag["sentence"] for flag in audited(tmp_path, ok, private(tmp_path, ok, **settings))}
    assert said in found["no_epsilon"]
    assert not {"privacy_bound", "line_up", "below_bound"} & set(found)


def test_a_private_training_may_be_told(ok: Run, refused: Run, tmp_path: Path) -> None:
    seen = private(tmp_path, ok, noise_multiplier=1.0)
    told = ["--noise-multiplier", "1", "--sample-rate", "1", "--dp-steps", "4", "--delta", "1e-6"]
    found = {flag["name"]: flag["sentence"] for flag in audited(tmp_path, ok, seen, *told)}
    assert "at delta 1e-06" in found["privacy_bound"]
    assert "no_epsilon" not in found
    out = ["--out", tmp_path / "o"]
    assert "give --sample-rate and --dp-steps too" in refused("audit", seen, "--noise-multiplier", "1", *out)
    assert "sample rate above 0" in refused(
        "audit", seen, "--noise-multiplier", "1", "--sample-rate", "2", "--dp-steps", "4", *out
    )
    own = private(tmp_path / "own", ok, noise_multiplier=1.0, sample_rate=0.1, steps=1)
    assert "says itself how private" in refused("audit", own, *told, *out)
