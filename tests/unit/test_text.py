"""Observations of text: what a gradient is, what is refused, what survives a file."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.formats.model_folder import is_language_model, read_language_model, read_model, write_base
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.formats.secret_file import Secret, load_secret, save_secret
from gradleak.modalities.language_models import Task
from gradleak.modalities.texts import Texts, load_texts
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import rounding
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, share_update
from gradleak.victims.small_language import Kind, small_model, train_tokenizer
from oracles import text_gradient_by_autograd

EVERY: list[tuple[Kind, Task]] = [("bert", "classification"), ("gpt2", "classification"), ("gpt2", "causal-lm")]
EVERY += [("llama", "classification"), ("llama", "causal-lm")]
every = pytest.mark.parametrize(("kind", "task"), EVERY)


@cache
def tokenizer(kind: Kind) -> Any:
    return train_tokenizer(load_texts("embedded", "train").texts, kind, size=330)


@cache
def model(kind: Kind = "bert", task: Task = "classification") -> LanguageModel:
    return small_model(kind, tokenizer(kind), task, width=64, positions=64, spread=0.1)


def texts(count: int = 2) -> Texts:
    return load_texts("embedded", indices=range(count))


@cache
def captured(kind: Kind = "bert", task: Task = "classification", count: int = 2) -> tuple[TextObservation, Secret]:
    return capture_gradient(model(kind, task), texts(count))


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of all: the gradient of a key's bias is zero, but for rounding."""
    assert a.keys() == b.keys()
    largest = max(float(tensor.abs().max()) for tensor in b.values())
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance * largest), name


@every
def test_the_gradient_is_that_of_the_library_with_each_text_alone(kind: Kind, task: Task) -> None:
    """Without padding: the reference feeds one text at a time, so a wrong attention mask would show."""
    seen, secret = captured(kind, task)
    reference = text_gradient_by_autograd(seen.model.solid(), secret.inputs, secret.labels, causal=task == "causal-lm")
    same(seen.released, reference, 1e-3)  # float32 sums in another order, through four layers' normalisations


def test_padding_changes_nothing() -> None:
    seen, secret = captured(count=3)
    swapped = (*secret.inputs[1:], secret.inputs[0])
    assert secret.labels is not None
    labels = torch.cat([secret.labels[1:], secret.labels[:1]])
    same(seen.simulate(swapped, labels), seen.released, 1e-3)


@every
def test_an_observation_round_trips_through_a_file(kind: Kind, task: Task, tmp_path: Path) -> None:
    seen, secret = captured(kind, task)
    save_observation(seen, tmp_path / "o.safetensors")
    back = load_observation(tmp_path / "o.safetensors")
    assert back.threat_model() == seen.threat_model()
    same(back.released, seen.released, 0)
    assert back.model.architecture.encode(texts().texts) == secret.inputs
    assert back.model.architecture.show(secret.inputs) == list(texts().texts)
    same(back.simulate(secret.inputs, secret.labels), seen.released, 1e-5)
    save_secret(secret, tmp_path / "s.safetensors")
    again = load_secret(tmp_path / "s.safetensors")
    assert (again.inputs, again.source) == (secret.inputs, "embedded test")
    assert (again.labels is None) == (task == "causal-lm")


def test_updates_and_adapters_round_trip_through_files(tmp_path: Path) -> None:
    seen, secret = captured()
    update = share_update(seen, secret, Recipe(learning_rate=0.1, steps=2, batch_size=1))
    save_observation(update, tmp_path / "u.safetensors")
    assert load_observation(tmp_path / "u.safetensors").release == update.release
    names = layout_of(seen.model).queries(0)
    adapter = share_adapter(seen.model, secret, modules=names, rank=4, recipe=Recipe(learning_rate=0.1, steps=2))
    save_observation(adapter, tmp_path / "a.safetensors")
    again = load_observation(tmp_path / "a.safetensors")
    same(again.released, adapter.released, 0)
    assert [sketch.module for sketch in again.sketches()] == list(names)


def test_one_local_step_on_everything_is_the_gradient() -> None:
    seen, secret = captured()
    update = share_update(seen, secret, Recipe(learning_rate=0.5, steps=1))
    same(update.as_gradient(), seen.released, 1e-3)
    same({k: -v / 0.5 for k, v in update.released.items()}, seen.released, 1e-3)
    told = {row["item"]: row["detail"] for row in update.threat_model()}
    assert told["local training"] == "1 sgd steps, learning rate 0.5, all samples a step"


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32])
def test_the_deviation_of_rounding_is_what_rounding_does(precision: torch.dtype) -> None:
    exact = torch.randn(20, 4_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.logspace(
        -3, 3, 20, dtype=torch.float64
    ).unsqueeze(1)
    error = (exact.to(precision).double() - exact).square().mean(1).sqrt()
    assert torch.allclose(rounding(exact, precision), error, rtol=0.05)


def test_the_noise_of_an_update_is_known_beforehand() -> None:
    """Against the same two steps in float64: what float32 parameters lose, of every layer, within a quarter."""
    seen, secret = captured("gpt2", "classification", 2)
    update = share_update(seen, secret, Recipe(learning_rate=1e-3, steps=2, batch_size=1))
    true = update.to(torch.float64).simulate(secret.inputs, secret.labels)
    for sketch in update.sketches():
        mean = -true[f"{sketch.module}.weight"] / (1e-3 * 2)  # of the two gradients
        error = (sketch.measured.double() - (mean.T if sketch.module != "score" else mean)).square().mean().sqrt()
        assert sketch.noise is not None
        assert float(sketch.noise.square().mean().sqrt() / error) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_gradient_of_b_is_the_whole_gradient_seen_through_a(kind: Kind) -> None:
    """From B = 0: dL/dB = s G A^T exactly; GPT-2 stores its weights the other way round."""
    seen, secret = captured(kind)
    names = layout_of(seen.model).queries(0)
    adapter = share_adapter(seen.model, secret, modules=names, rank=4)
    for sketch, whole in zip(adapter.sketches(), seen.sketches(names), strict=True):
        assert sketch.module == whole.module
        expected = whole.measured @ sketch.through.T
        assert torch.allclose(sketch.measured, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_folder_of_save_pretrained_is_read(kind: Kind, tmp_path: Path) -> None:
    task: Task = "classification" if kind == "bert" else "causal-lm"
    own = model(kind, task)
    module: Any = own.solid()
    module.save_pretrained(tmp_path)
    assert not is_language_model(tmp_path)
    own.architecture.tokenizer.save_pretrained(tmp_path)
    back = read_language_model(tmp_path, task)
    same(back.parameters, own.parameters, 0)
    assert back.architecture.encode(texts().texts) == own.architecture.encode(texts().texts)


def test_a_model_that_was_written_is_read(tmp_path: Path) -> None:
    own = model("gpt2", "causal-lm")
    write_base(own, tmp_path)
    back = read_model(tmp_path, task="causal-lm")
    same(back.parameters, own.parameters, 0)
    tokens = own.architecture.encode(texts().texts)
    with torch.no_grad():
        torch.testing.assert_close(back.logits({}, tokens), own.logits({}, tokens), rtol=1e-5, atol=1e-5)  # float32


def test_empty_and_overlong_texts_are_refused() -> None:
    with pytest.raises(BadInput, match="empty"):
        model().architecture.encode(["  "])
    with pytest.raises(BadInput, match="64 positions"):
        model().architecture.encode(["a long story " * 60])


def test_labels_have_to_fit() -> None:
    seen, secret = captured()
    with pytest.raises(BadInput, match="A classifier needs labels"):
        seen.simulate(secret.inputs, None)
    with pytest.raises(BadInput, match="beyond the model's 2 classes"):
        capture_gradient(model(), replace(texts(), labels=torch.tensor([0, 5])))


@pytest.mark.parametrize(("kind", "task"), [("gpt2", "causal-lm"), ("bert", "masked-lm")])
def test_labels_that_are_the_text_are_not_revealed(kind: Kind, task: Task) -> None:
    with pytest.raises(BadInput, match="reveal"):
        capture_gradient(model(kind, task), texts(), reveal_labels=True)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    other = train_tokenizer(load_texts("embedded", "train").texts, "bert", size=350)
    with pytest.raises(BadInput, match="do not belong together"):
        replace(model().architecture, tokenizer=other)


def test_tensors_of_another_architecture_are_refused() -> None:
    seen, _ = captured()
    with pytest.raises(BadInput, match="not a trained parameter of the model"):
        replace(seen, released={"nothing": torch.zeros(1)})
    name = next(iter(seen.released))
    with pytest.raises(BadInput, match="another architecture"):
        replace(seen, released={name: torch.zeros(3)})
    with pytest.raises(BadInput, match="NaN"):
        replace(seen, released={name: seen.released[name] * torch.nan})


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    seen, _ = captured()
    path = tmp_path / "o.safetensors"
    save_observation(seen, path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(seen.model.state_hash().encode(), b"0" * 64))
    with pytest.raises(BadInput, match="altered"):
        load_observation(path)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match="not a readable"):
        load_observation(path)


def test_texts_are_read_from_parquet(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"sentence": ["one", "two"], "label": [0, 1]})
    table.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    found = load_texts(tmp_path, indices=[1])
    assert (found.texts, found.labels.tolist()) == (("two",), [1])
    with pytest.raises(BadInput, match="Row 2 does not exist"):
        load_texts(tmp_path, indices=[2])


def test_embedded_splits_share_no_text() -> None:
    train, test = load_texts("embedded", "train"), load_texts("embedded", "test")
    assert not set(train.texts) & set(test.texts)
    assert len(test.texts) == 96
