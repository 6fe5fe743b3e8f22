"""Observations of text: what a gradient is, what is refused, what survives a file."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.formats.language_folder import is_language_model, read_language_model
from gradleak.formats.text_files import (
    load_text_observation,
    load_text_secret,
    save_text_observation,
    save_text_secret,
)
from gradleak.modalities.texts import Texts, load_texts
from gradleak.observations.tensors import rounding
from gradleak.observations.text import LanguageModel, Task, TextGradient, TextUpdate
from gradleak.observations.training import Recipe
from gradleak.victims.small_language import Kind, small_model, train_tokenizer
from gradleak.victims.text import capture_text_gradient, share_adapter, share_text_update
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
def captured(kind: Kind = "bert", task: Task = "classification", count: int = 2) -> tuple[TextGradient, Any]:
    return capture_text_gradient(model(kind, task), texts(count).texts, texts(count).labels)


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
    reference = text_gradient_by_autograd(seen.model, secret.tokens, secret.labels, causal=task == "causal-lm")
    same(seen.released, reference, 1e-3)  # float32 sums in another order, through four layers' normalisations


def test_padding_changes_nothing() -> None:
    seen, secret = captured(count=3)
    swapped = (*secret.tokens[1:], secret.tokens[0])
    labels = torch.cat([secret.labels[1:], secret.labels[:1]])
    same(seen.simulate(swapped, labels), seen.released, 1e-3)


@every
def test_an_observation_round_trips_through_a_file(kind: Kind, task: Task, tmp_path: Path) -> None:
    seen, secret = captured(kind, task)
    save_text_observation(seen, tmp_path / "o.safetensors")
    back = load_text_observation(tmp_path / "o.safetensors")
    assert back.threat_model() == seen.threat_model()
    same(back.released, seen.released, 0)
    assert back.model.encode(secret.texts) == secret.tokens
    same(back.simulate(secret.tokens, secret.labels), seen.released, 1e-5)
    save_text_secret(secret, tmp_path / "s.safetensors")
    again = load_text_secret(tmp_path / "s.safetensors")
    assert (again.texts, again.tokens) == (secret.texts, secret.tokens)


def test_updates_and_adapters_round_trip_through_files(tmp_path: Path) -> None:
    seen, secret = captured()
    update = share_text_update(seen, secret, learning_rate=0.1, local_steps=2, local_batch_size=1)
    save_text_observation(update, tmp_path / "u.safetensors")
    back = load_text_observation(tmp_path / "u.safetensors")
    assert isinstance(back, TextUpdate)
    assert (back.learning_rate, back.local_steps, back.local_batch_size) == (0.1, 2, 1)
    names = seen.model.family.queries(0)
    adapter = share_adapter(seen.model, secret, modules=names, rank=4, recipe=Recipe(learning_rate=0.1, steps=2))
    save_text_observation(adapter, tmp_path / "a.safetensors")
    again = load_text_observation(tmp_path / "a.safetensors")
    same(again.released, adapter.released, 0)
    assert [view.module for view in again.views()] == list(names)


def test_one_local_step_on_everything_is_the_gradient() -> None:
    seen, secret = captured()
    update = share_text_update(seen, secret, learning_rate=0.5, local_steps=1, local_batch_size=2)
    same({k: -v / 0.5 for k, v in update.released.items()}, seen.released, 1e-3)
    told = {row["item"]: row["detail"] for row in update.threat_model()}
    assert told["local training"] == "1 SGD steps, learning rate 0.5, local batch 2"


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
    steps = {"learning_rate": 1e-3, "local_steps": 2, "local_batch_size": 1}
    update = share_text_update(seen, secret, **steps)  # type: ignore[arg-type]
    own = seen.model
    exact = replace(
        own, parameters={k: p.double() for k, p in own.parameters.items()}, module=deepcopy(own.module).double()
    )
    wide = replace(update, model=exact, released={k: t.double() for k, t in update.released.items()})
    true = wide.simulate(secret.tokens, secret.labels)
    for view in update.views():
        change = true[f"{view.module}.weight"].T
        error = (view.measured.double() - change).square().mean().sqrt()
        assert view.noise is not None
        assert float(view.noise.square().mean().sqrt() / error) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_gradient_of_b_is_the_whole_gradient_seen_through_a(kind: Kind) -> None:
    """From B = 0: dL/dB = s G A^T exactly; GPT-2 stores its weights the other way round."""
    seen, secret = captured(kind)
    names = seen.model.family.queries(0)
    adapter = share_adapter(seen.model, secret, modules=names, rank=4)
    for view, whole in zip(adapter.views(), seen.views(), strict=False):
        assert view.factor is not None
        expected = whole.measured @ view.factor.T
        assert torch.allclose(view.measured, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_folder_of_save_pretrained_is_read(kind: Kind, tmp_path: Path) -> None:
    task: Task = "classification" if kind == "bert" else "causal-lm"
    own = model(kind, task)
    own.module.load_state_dict(own.parameters, strict=False)
    module: Any = own.module
    module.save_pretrained(tmp_path)
    assert not is_language_model(tmp_path)
    own.tokenizer.save_pretrained(tmp_path)
    back = read_language_model(tmp_path, task)
    same(back.parameters, own.parameters, 0)
    assert back.encode(texts().texts) == own.encode(texts().texts)


def test_empty_and_overlong_texts_are_refused() -> None:
    with pytest.raises(BadInput, match="empty"):
        model().encode(["  "])
    with pytest.raises(BadInput, match="64 positions"):
        model().encode(["a long story " * 60])


def test_labels_have_to_fit() -> None:
    with pytest.raises(BadInput, match="one label per text"):
        capture_text_gradient(model(), texts().texts, None)
    with pytest.raises(BadInput, match="beyond the model's 2 classes"):
        capture_text_gradient(model(), texts().texts, torch.tensor([0, 5]))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    own = model()
    other = train_tokenizer(load_texts("embedded", "train").texts, "bert", size=350)
    with pytest.raises(BadInput, match="do not belong together"):
        replace(own, tokenizer=other)


def test_tensors_of_another_architecture_are_refused() -> None:
    seen, _ = captured()
    with pytest.raises(BadInput, match="no parameter of the model"):
        replace(seen, released={"nothing": torch.zeros(1)})
    name = next(iter(seen.released))
    with pytest.raises(BadInput, match="another architecture"):
        replace(seen, released={name: torch.zeros(3)})
    with pytest.raises(BadInput, match="NaN"):
        replace(seen, released={name: seen.released[name] * torch.nan})


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    seen, _ = captured()
    path = tmp_path / "o.safetensors"
    save_text_observation(seen, path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(seen.model.state_hash().encode(), b"0" * 64))
    with pytest.raises(BadInput, match="altered"):
        load_text_observation(path)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match="not a readable"):
        load_text_observation(path)


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
