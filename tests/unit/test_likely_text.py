"""One text through any defense: the spectrum of a layer, the search, what it recovers, and what it refuses."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from gradleak.attacks.dager.vocabulary import Embeddings
from gradleak.attacks.likely_text import LikelyText, Spectrum, cooling, energy, spectra_of, swept
from gradleak.attacks.nearest_label import nearest_label
from gradleak.attacks.reconstruction import Outcome
from gradleak.audit.metrics.texts import frequent_words, rouge1
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import Task
from gradleak.modalities.texts import load_texts
from gradleak.observations.defense_names import Chosen
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.transformer import layout_of
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.small_language import Kind, small_model, train_tokenizer


def zero() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@cache
def model(kind: Kind = "bert", task: Task = "classification") -> LanguageModel:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, kind, size=420)
    return small_model(kind, tokenizer, task, width=96, layers=2, positions=64, spread=0.1)


def shared(
    defense: str, kind: Kind = "bert", task: Task = "classification", *rows: int
) -> tuple[TextObservation, Secret]:
    chosen = Chosen.of((defense,) if defense else ())
    return capture_gradient(model(kind, task), load_texts("embedded", indices=rows or (0,)), defenses=chosen.defenses)


def test_a_spectrum_is_capons() -> None:
    """Against the inverse, and at power 1 for the eye: f^T R^-1.5 f / f^T f with f whitened, through eigenvectors of numpy's kind."""
    generator = zero()
    random, measured = torch.randn(400, 6, generator=generator), torch.randn(30, 6, generator=generator)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    C = random.double().T @ random.double() / len(random)
    white = torch.linalg.inv(torch.linalg.cholesky(C))
    f, M = x @ white.T, measured.double() @ white.T
    R = M.T @ M / M.square().sum()
    w, U = torch.linalg.eigh(R)
    power = U @ torch.diag((w + 1e-4 / 6) ** -1.5) @ U.T
    expected = ((f @ power * f).sum(1) / f.square().sum(1)).log()
    assert torch.allclose(
        Spectrum.of(measured, random).unlikely(x), expected, atol=1e-4
    )  # the ridge of 1e-6, to a power


def test_what_makes_up_a_gradient_is_likely_in_it_and_nothing_else_is() -> None:
    """Of 12 inputs among 96 dimensions: every one is likelier than each of 200 others, without noise and with as much as signal."""
    generator = zero()
    inside, outside = torch.randn(12, 96, generator=generator), torch.randn(200, 96, generator=generator)
    G = torch.randn(400, 12, generator=generator) @ inside
    noise = float(G.square().mean().sqrt()) * torch.randn(G.shape, generator=generator)
    for measured in (G, G + noise):
        spectrum = Spectrum.of(measured, torch.randn(2_000, 96, generator=generator))
        assert float(spectrum.unlikely(inside).max()) < float(spectrum.unlikely(outside).min())


def test_the_vocabulary_is_ranked_as_inputs_one_by_one_are() -> None:
    """The sums over token and position agree with the layer's inputs themselves."""
    seen, _ = shared("relative-noise:0.1")
    first = layout_of(seen.model).queries(0)[0]
    spectrum, embeddings = spectra_of(seen, zero())[first], Embeddings.of(seen.model)
    costs = LikelyText(longest=9).ranked(embeddings, spectrum)
    ids = torch.arange(0, 400, 37)
    for place in (0, 3, 8):
        alone = spectrum.unlikely(embeddings.inputs(ids, torch.full_like(ids, place)))
        assert torch.allclose(costs[ids, place].double(), alone, atol=1e-3)  # float32


def test_an_exchange_is_undone() -> None:
    seen, secret = shared("")
    spectra = spectra_of(seen, zero())
    costs = LikelyText().ranked(Embeddings.of(seen.model), spectra[layout_of(seen.model).queries(0)[0]])
    true = torch.tensor(secret.inputs[0])
    wrong = true.clone()
    wrong[[2, 5]] = true[[5, 2]]
    both = energy(seen.model, spectra, torch.stack([true, wrong]))
    assert float(both[0]) < float(both[1])
    found, _ = swept(seen.model, spectra, wrong, costs, 5, 0.0, zero())
    assert torch.equal(found, true)


# "" is the control of the method: where nothing stands between, DAGER proves the text. 16 bits and 1e-3 hide nothing either.
THROUGH = ["", "bits:16", "relative-noise:0.001"]


@pytest.mark.parametrize("defense", THROUGH)
@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("gpt2", "causal-lm")])
def test_what_hides_nothing_hides_no_word(defense: str, kind: Kind, task: Task) -> None:
    """The span has fewer dimensions than the width, and noise of a thousandth leaves it: every word but the last of a decoder,
    which is only a target."""
    seen, secret = shared(defense, kind, task)
    found = LikelyText()(seen, generator=zero())
    true = secret.inputs[0]
    short = true if task == "classification" else true[:-1]
    assert rouge1(found.value[0], short) > 0.9
    assert found.outcome is Outcome.GUESSED
    assert found.proven == (False,)


def test_pruning_and_bits_do_not_protect_and_an_attacker_need_not_be_told() -> None:
    """Nine words in ten through each, told or not, against less than half of somebody who guesses frequent words. Three in ten of
    96 x 288 numbers are half again as many as the unknowns of 14 tokens, 14 (96 + 288)."""
    public = [tuple(row) for row in model().architecture.encode(load_texts("embedded", "train").texts)]
    for defense in ("top-k:0.3", "bits:6"):
        seen, secret = shared(defense)
        blind = rouge1(frequent_words(public, len(secret.inputs[0])), secret.inputs[0])
        assert blind < 0.5
        told, untold = (LikelyText()(o, generator=zero()).value[0] for o in (seen, replace(seen, defenses=None)))
        assert rouge1(told, secret.inputs[0]) > 0.9
        assert rouge1(untold, secret.inputs[0]) > 0.9


def test_noise_as_large_as_a_thousand_gradients_leaves_nothing() -> None:
    seen, secret = shared("relative-noise:1000")
    assert (
        rouge1(LikelyText(sweeps=2)(seen, generator=zero()).value[0], secret.inputs[0]) < 0.5
    )  # two special tokens of some 15


def test_the_label_is_the_one_that_explains_more() -> None:
    seen, secret = shared("relative-noise:0.01")
    residual, label = nearest_label(seen, torch.tensor(secret.inputs[0]))
    assert label is not None
    assert secret.labels is not None
    assert int(label) == int(secret.labels)
    assert residual < 0.02


def test_temperatures_fall_and_end_without_chance() -> None:
    assert cooling(5) == pytest.approx([0.1, (0.1 * 0.02) ** 0.5, 0.02, 0.0, 0.0])
    assert cooling(1) == [0.0]


def test_what_it_does_not_read_is_refused_in_a_sentence() -> None:
    several, _ = shared("", "bert", "classification", 0, 1)
    with pytest.raises(NotObserved, match="This is for one text"):
        LikelyText()(several, generator=zero())
    masked, _ = shared("", "bert", "masked-lm")
    with pytest.raises(NotObserved, match="no text can be replayed"):
        LikelyText()(masked, generator=zero())
    llama, _ = shared("", "llama", "causal-lm")
    with pytest.raises(NotObserved, match="sees no positions"):
        LikelyText()(llama, generator=zero())
    seen, _ = shared("")
    late = {name: t for name, t in seen.released.items() if ".1." in name}
    with pytest.raises(NotObserved, match="Neither query, key nor value"):
        LikelyText()(replace(seen, released=late), generator=zero())
