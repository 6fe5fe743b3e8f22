"""Words and their order out of the embeddings' gradient: exact without a defense, and what each defense leaves of it."""

from dataclasses import replace

import pytest
import torch

from gradleak.attacks.embedding_rows import ABOVE, EmbeddingRows, embeddings_of, standing
from gradleak.attacks.reconstruction import Outcome
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import Task
from gradleak.modalities.texts import load_texts
from gradleak.observations.defense_names import Chosen
from gradleak.observations.observation import TextObservation
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.small_language import Kind, small_model, train_tokenizer


def zero() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def shared(
    *defenses: str, kind: Kind = "bert", task: Task = "classification", rows: tuple[int, ...] = (0,)
) -> tuple[TextObservation, Secret]:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, kind, size=420)
    model = small_model(kind, tokenizer, task, width=96, layers=2, positions=64, spread=0.1)
    return capture_gradient(model, load_texts("embedded", indices=rows), defenses=Chosen.of(defenses).defenses)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("row", [0, 3, 5])
def test_a_text_comes_back_exactly_and_is_proven(kind: Kind, row: int) -> None:
    """Of a classifier: the rows of all other words are exactly zero, and the replay agrees to float32."""
    seen, secret = shared(kind=kind, rows=(row,))
    found = EmbeddingRows()(seen, generator=zero())
    assert found.value == (tuple(secret.inputs[0]),)
    assert found.bag == tuple(sorted(set(secret.inputs[0])))
    assert found.outcome is Outcome.SOLVED
    assert found.proven == (True,)
    assert found.residual < 1e-5
    assert found.labels is not None
    assert secret.labels is not None
    assert torch.equal(found.labels, secret.labels)


# Each leaves the difference between a row and none: of the noise, a row of 96 numbers has 1.4 times the length that it would hide at.
LEAVES = ["sign", "top-k:0.1", "bits:8", "bits:4", "relative-noise:0.1"]


@pytest.mark.parametrize("defense", LEAVES)
@pytest.mark.parametrize("told", [True, False])
def test_no_word_is_hidden_by_what_leaves_rows_apart(defense: str, told: bool) -> None:
    seen, secret = shared(defense)
    found = EmbeddingRows()(seen if told else replace(seen, defenses=None), generator=zero())
    assert found.bag == tuple(sorted(set(secret.inputs[0])))
    assert found.value == (tuple(secret.inputs[0]),)
    assert found.proven == (False,)  # the replay says how well, and proves nothing


def test_noise_as_large_as_many_gradients_hides_them() -> None:
    seen, secret = shared("relative-noise:1000")
    found = EmbeddingRows()(seen, generator=zero())
    assert len(set(found.bag) & set(secret.inputs[0])) <= 1
    assert found.outcome is not Outcome.SOLVED


def test_of_several_texts_the_words_are_told_and_no_order() -> None:
    seen, secret = shared(rows=(0, 3))
    found = EmbeddingRows()(seen, generator=zero())
    assert found.value == ()
    assert found.bag == tuple(sorted({token for row in secret.inputs for token in row}))
    assert "of several texts" in found.status


def test_the_floor_is_above_noise_and_below_a_row_as_large() -> None:
    """Of 30,000 Gaussian rows none, of rows with a signal as large as the noise every one."""
    rows = torch.randn(30_000, 96, generator=zero(), dtype=torch.float64)
    assert float(standing([(rows, rows)]).max()) < ABOVE
    signal = torch.nn.functional.normalize(torch.randn(20, 96, generator=zero(), dtype=torch.float64), dim=1)
    rows[:20] += 1.5 * 96**0.5 * signal
    assert float(standing([(rows[:20], rows)]).min()) > ABOVE


def test_rounds_show_rows_that_one_round_hides() -> None:
    """Signals of 1.05 times the noise add 1.05^2 x 96 = 106 to an energy of deviation (2 x 96)^.5 = 13.9, hence 7.6 deviations, below the floor of
    8; over four rounds 15, with a deviation of 1.8."""
    signal = (
        1.05
        * 96**0.5
        * torch.nn.functional.normalize(torch.randn(20, 96, generator=zero(), dtype=torch.float64), dim=1)
    )
    rounds = []
    for seed in range(1, 5):
        words = torch.randn(30_000, 96, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        words[:20] += signal
        rounds.append((words, words))
    assert int((standing(rounds[:1]) > ABOVE).sum()) < 20
    found = standing(rounds) > ABOVE
    assert found[:20].all()
    assert not found[20:].any()


def test_the_tables_are_found_without_names() -> None:
    assert embeddings_of(shared(kind="bert")[0].model) == (
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
    )
    assert embeddings_of(shared(kind="gpt2")[0].model) == ("transformer.wte.weight", "transformer.wpe.weight")


def test_what_it_does_not_read_is_refused_in_a_sentence() -> None:
    seen, _ = shared()
    frozen = replace(seen, released={name: t for name, t in seen.released.items() if "word_embeddings" not in name})
    with pytest.raises(NotObserved, match="was not released"):
        EmbeddingRows()(frozen, generator=zero())
    placeless = replace(seen, released={name: t for name, t in seen.released.items() if "position" not in name})
    assert "without a gradient of positions" in EmbeddingRows()(placeless, generator=zero()).status


def test_where_the_output_layer_shares_them_nothing_wrong_is_called_proven() -> None:
    """Every row is filled then. Whatever stands out, the replay is the judge."""
    seen, secret = shared(kind="gpt2", task="causal-lm")
    found = EmbeddingRows()(seen, generator=zero())
    assert (found.proven == (True,)) == (found.value == (tuple(secret.inputs[0]),))
