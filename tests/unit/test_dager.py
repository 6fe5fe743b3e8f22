"""DAGER: spans and their ends, exact texts, what is refused, and what is still told under defenses."""

from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Any

import pytest
import torch

from gradleak.attacks.dager.dager import Dager, evidence
from gradleak.attacks.dager.decoder import REPEATS, Prefix, _extended
from gradleak.attacks.dager.judge import Sentence
from gradleak.attacks.dager.path import Path
from gradleak.attacks.dager.spans import FORWARD, Span, excess, numerical_rank, span_of, spans_of
from gradleak.attacks.dager.vocabulary import Embeddings, candidates
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.text_ordering import fluent
from gradleak.audit.loop import audit
from gradleak.audit.metrics.texts import rouge1
from gradleak.audit.scoring.texts import public
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import Task
from gradleak.modalities.texts import load_texts
from gradleak.observations.defenses import GaussianNoise, defended
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, share_update
from gradleak.victims.small_language import Kind, small_model, train_tokenizer

EVERY: list[tuple[Kind, Task]] = [("bert", "classification"), ("gpt2", "classification"), ("gpt2", "causal-lm")]
EVERY += [("llama", "causal-lm")]
every = pytest.mark.parametrize(("kind", "task"), EVERY)


@cache
def model(kind: Kind = "bert", task: Task = "classification", width: int = 96) -> LanguageModel:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, kind, size=420)
    return small_model(kind, tokenizer, task, width=width, layers=3, positions=64, spread=0.1)


@cache
def captured(
    kind: Kind = "bert", task: Task = "classification", batch: int = 1, first: int = 0
) -> tuple[TextObservation, Secret]:
    return capture_gradient(model(kind, task), load_texts("embedded", indices=range(first, first + batch)))


def attack(seen: TextObservation, **settings: int) -> Reconstruction:
    return Dager(**settings)(seen, generator=torch.Generator().manual_seed(0))


def only(seen: TextObservation, *parts: str) -> TextObservation:
    """The observation with nothing but the tensors whose names contain one of the parts."""
    kept = {name: t for name, t in seen.released.items() if any(part in name for part in parts)}
    return replace(seen, released=kept)


# --- Spans ---


def low_rank(rank: int, noise: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right, E = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((90, rank), (rank, 40), (90, 40))
    )
    return left @ right + noise * E


@pytest.mark.parametrize("rank", [1, 7, 20])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-3, 0.1])
def test_the_span_ends_where_the_signal_does(rank: int, noise: float) -> None:
    span = span_of(low_rank(rank, noise), None, "float32")
    assert span.rank == rank
    # The least signal stands above sqrt 90 - sqrt rank (Gaussian products) times noise-free columns; a direction leans out by the
    # noise of 40 columns and, to second order, of all 90 rows.
    assert span.worst <= max(4 * noise, 1e-5)


def test_rounding_to_float32_is_not_taken_for_signal() -> None:
    span = span_of(low_rank(12, 0.0).float(), None, "float32")
    assert (span.rank, span.full) == (12, False)


def test_a_full_matrix_refuses_nobody() -> None:
    """Without a gap the spectrum may as well be noise: then the tolerance says that nothing can be told."""
    span = span_of(low_rank(40, 0.0)[:, :20], None, "float32")
    others = torch.randn(200, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert float((excess([span], others, 1e-7)[1] <= 1).double().mean()) > 0.5


def test_the_end_of_a_spectrum_by_hand() -> None:
    """Three values, and a tail at the rounding of float32: sqrt 50 roundings of what sums to about 4."""
    values = torch.tensor([3.0, 2.0, 1.5, 1e-7], dtype=torch.float64)
    assert numerical_rank(values, torch.Size((50, 4)), 1.2e-7)[0] == 3


def test_a_weak_direction_above_the_rounding_is_not_lost_behind_a_wider_gap() -> None:
    """Tokens that recur at positions leave one direction nearly empty: 1e-5 is above a flat tail of 6e-7, though the gap before
    it is wider."""
    values = torch.tensor([3.0, 2.0, 5e-3, 1e-5, 6e-7, 5.5e-7, 5.2e-7, 5e-7], dtype=torch.float64)
    assert numerical_rank(values, torch.Size((1_000, 8)), 1.2e-7)[0] == 4


@pytest.mark.parametrize("level", [1e-3, 0.1])
def test_known_noise_allows_what_members_need_and_little_more(level: float) -> None:
    """Members of a span of 12 in 40 dimensions, seen through noise of known size in 900 rows: they pass, with less than a factor of
    five to spare (five deviations of chi over 28 dimensions make 1.7)."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(900, 12, generator=generator, dtype=torch.float64) @ low_rank(12, 0.0)[:12]
    noise = torch.full((900,), level * float(clean.std()), dtype=torch.float64)
    measured = clean + noise[:, None] * torch.randn(900, 40, generator=generator, dtype=torch.float64)
    span = span_of(measured, None, "float32", noise)
    members = torch.randn(300, 900, generator=generator, dtype=torch.float64) @ clean
    ratio = excess([span], members, 1e-9)[1]
    assert span.rank == 12
    assert float(ratio.max()) <= 1
    assert float(ratio.median()) > 0.2


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_members_pass_and_others_do_not(noise: float) -> None:
    """The bound is a theorem for members of the noiseless span; random vectors are 28 of 40 dimensions away from it."""
    clean = low_rank(12, 0.0)
    span = span_of(low_rank(12, noise), None, "float32")
    generator = torch.Generator().manual_seed(5)
    members = torch.randn(200, 90, generator=generator, dtype=torch.float64) @ clean
    others = torch.randn(200, 40, generator=generator, dtype=torch.float64)
    assert float(excess([span], members, 1e-7)[1].max()) <= 1
    assert float(excess([span], others, 1e-7)[1].min()) > 1


def worst_member(span: Span, clean: torch.Tensor, rank: int) -> torch.Tensor:
    """The member of the true span that leans out of the one that was seen the most, of all it is allowed: (1, width).

    With U the true span, outside(U^T z)^2 = z^T O z and allowed^2 = z^T A z: the largest generalised eigenvector.
    """
    U, V = torch.linalg.svd(clean, full_matrices=False).Vh[:rank], span.basis
    out = U - U @ V.T @ V
    out = out - out @ V.T @ V  # twice: what is left may be as small as rounding
    inverse = torch.linalg.inv(torch.linalg.cholesky(U @ V.T @ torch.diag(span.blur.square()) @ V @ U.T))
    most = torch.linalg.eigh(inverse @ out @ out.T @ inverse.T).eigenvectors[:, -1]
    member: torch.Tensor = most @ inverse @ U
    return member[None]


# How many times what the worst member needs the allowance may be, at most.
# White noise: r directions lean into the c - r others by a Gaussian matrix of norm sqrt(c - r) + sqrt(r), 8.8 for 12 of 40,
# where sqrt(c) and five deviations of a single member allow 10.6; one direction meets 6.2 of 11.
# A gap: 2 s_(r + 1), about 2 (sqrt(90) + sqrt(40)) = 32, of which one direction meets 6.2 at the least; few rows: the same, and
# one direction meets sqrt(89) = 9.4. Rounding: s_(r + 1) is taken for what rounding all entries the same way would leave.
WIDEST = {"white": 2.0, "unknown": 2.0, "gap": 6.0, "few rows": 4.0, "rounding": 30.0}


@pytest.mark.parametrize("rank", [1, 12])
@pytest.mark.parametrize("kind", WIDEST)
def test_the_worst_member_passes_with_little_to_spare(kind: str, rank: int) -> None:
    """What proves that nothing else could be: a bound that is too narrow loses true texts, one that is too wide lets others in."""
    needed = []
    for seed in range(6):
        rows, columns = (40, 90) if kind == "few rows" else (90, 40)
        generator = torch.Generator().manual_seed(seed)
        left, right, E = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((rows, rank), (rank, columns), (rows, columns))
        )
        clean, level = left @ right, 1e-6 if kind == "gap" else 1e-2
        known = torch.full((rows,), level, dtype=torch.float64) if kind == "white" else None
        measured = clean.float() if kind == "rounding" else clean + level * E
        span = span_of(measured, None, "float32", known)
        assert span.rank == rank
        needed.append(float(excess([span], worst_member(span, clean, rank), 0.0)[1]))
    assert max(needed) <= 1
    assert max(needed) >= 1 / WIDEST[kind]


def test_a_factor_is_looked_through() -> None:
    clean = low_rank(5, 0.0)
    A = torch.randn(8, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    span = span_of(clean @ A.T, A, "float64")
    assert span.rank == 5
    assert float(excess([span], clean[:9], 1e-9)[1].max()) <= 1
    N = span.orthogonal()
    assert N.shape == (3, 40)
    assert float((N @ clean.T).abs().max()) < 1e-9 * float(clean.abs().max()) * 40


def test_rows_that_one_direction_dominates_do_not_bury_the_others() -> None:
    """Rows whose lengths differ by nine decades, rounded to float32: what is 1e-7 of the whole is far above its own row's rounding."""
    weights = torch.logspace(0, -9, 90, dtype=torch.float64)[:, None]
    clean = low_rank(12, 0.0) * weights
    span = span_of(clean.float(), None, "float32")
    assert span.rank == 12
    assert float(excess([span], low_rank(12, 0.0), 1e-6)[1].max()) <= 1


# --- An encoder's block behind its attention ---


def test_the_output_of_the_attention_is_found_for_each_token_alone() -> None:
    """Against the model's own, hooked out of its forward pass; tokens at positions where they do not stand are refused."""
    seen, secret = captured("bert", "classification", 2)
    own, layout = seen.model, layout_of(seen.model)
    exact = {name: p.double() for name, p in own.parameters.items()}
    path = Path.of(seen, exact, FORWARD)
    assert path is not None
    for tokens in secret.inputs:
        names = [layout.queries(0)[0], layout.output]
        true = layer_inputs(own, names, torch.tensor([tokens]), parameters=exact)
        # Tokens that stand at one position in both sentences have two outputs, of which one is found.
        once = [
            i for i, token in enumerate(tokens) if sum(other[i : i + 1] == (token,) for other in secret.inputs) == 1
        ]
        o, near = path.outputs(true[names[0]][0][once])
        assert bool(near.all())
        assert float((o - true[names[1]][0][once]).norm() / o.norm()) < 1e-3
        ids, places = torch.tensor([tokens[i] for i in once]), torch.tensor(once)
        elsewhere = Embeddings.of(own).inputs(ids.roll(1), places)
        wrong = [
            i
            for i, token in zip(once, ids.roll(1).tolist(), strict=True)
            if all(s[i : i + 1] != (token,) for s in secret.inputs)
        ]
        assert not bool(path.outputs(elsewhere)[1][torch.isin(places, torch.tensor(wrong))].any())


def test_larger_batches_of_an_encoder_come_back() -> None:
    seen, secret = captured("bert", "classification", 4)
    assert sum(map(len, secret.inputs)) < 96
    found = attack(seen)
    assert sorted(found.value) == sorted(secret.inputs)
    assert all(found.proven)


# --- The vocabulary ---


@every
def test_the_screen_agrees_with_the_model_token_by_token(kind: Kind, task: Task) -> None:
    """Against the model's own inputs, computed one position at a time in float64."""
    seen, secret = captured(kind, task)
    own, layout = seen.model, layout_of(seen.model)
    first = spans_of(seen, layout.queries(0))
    found = candidates(Embeddings.of(own), first, rounding=FORWARD, most=500)
    exact = {name: p.double() for name, p in own.parameters.items()}
    name = layout.queries(0)[0]
    for place, ids in enumerate(found):
        every_token = torch.arange(own.architecture.config.vocab_size)[:, None]
        sentences = every_token.expand(-1, place + 1)
        x = layer_inputs(own, [name], sentences, parameters=exact)[name][:, place]
        slow = (excess(first, x, FORWARD)[1] <= 1).nonzero()[:, 0]
        assert sorted(ids.tolist()) == slow.tolist()
    lengths = len(secret.inputs[0]) - (task == "causal-lm")  # the closing token is no input of the loss
    assert len(found) == (lengths if layout.placed else 1)


# --- Texts ---


@every
@pytest.mark.parametrize("batch", [1, 2])
def test_texts_come_back_word_for_word(kind: Kind, task: Task, batch: int) -> None:
    seen, secret = captured(kind, task, batch)
    found = attack(seen)
    assert sorted(found.value) == sorted(secret.inputs)
    assert all(found.proven)
    assert found.residual < 1e-5  # float32
    assert f"{batch} of {batch} sentences proven" in found.status
    assert {token for s in secret.inputs for token in s} - {seen.model.architecture.tokenizer.eos_token_id} <= set(
        found.bag
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_larger_batches_of_a_decoder_come_back(kind: Kind) -> None:
    seen, secret = captured(kind, "classification", 4)
    assert sum(map(len, secret.inputs)) < 96
    assert sorted(attack(seen).value) == sorted(secret.inputs)


def test_a_batch_of_unknown_size_comes_back() -> None:
    seen, secret = captured("bert", "classification", 2)
    found = attack(replace(seen, batch_size=None))
    assert sorted(t for t, proven in zip(found.value, found.proven, strict=True) if proven) == sorted(secret.inputs)


@every
def test_query_key_and_value_are_enough_for_one_text(kind: Kind, task: Task) -> None:
    seen, secret = captured(kind, task)
    parts = layout_of(seen.model).queries(0) + layout_of(seen.model).queries(1)
    for chosen in (parts, [part for part in parts if part.endswith(("value", "v_proj", "c_attn"))]):
        assert attack(only(seen, *chosen)).value == secret.inputs


def test_without_the_second_block_nothing_is_called_proven() -> None:
    seen, secret = captured()
    found = attack(only(seen, *layout_of(seen.model).queries(0)))
    assert found.value == secret.inputs  # one candidate at each position
    assert found.proven == (False,)
    assert "only one passes" in found.status
    both, pair = captured("llama", "causal-lm", 2)
    two = attack(only(both, *layout_of(both.model).queries(0)))
    assert two.value == ()
    assert "cannot be put together" in two.status
    # What the attention puts out depends on the sentence up to there: with its output projection they come back.
    assert sorted(attack(only(both, "layers.0.self_attn")).value) == sorted(pair.inputs)


def test_what_only_the_first_block_shows_is_ordered_by_gradient_distance() -> None:
    """Tokens and positions are certain; which go together is not, until the gradient of the whole agrees to float32."""
    seen, secret = captured("bert", "classification", 2)
    alone = only(seen, *layout_of(seen.model).queries(0))
    found = attack(alone)
    assert sorted(found.value) == sorted(secret.inputs)
    assert found.proven == (False, False)
    assert found.residual < 1e-5
    assert "a guess, whose gradient differs" in found.status
    short = attack(alone, orders=1)
    assert set(found.bag) == set(short.bag) == {token for row in secret.inputs for token in row}


def test_a_language_model_orders_a_few_tokens_as_its_own_loss_does() -> None:
    """Against the loss of all orders: four tokens have 24, fewer than are kept."""
    own, ids = model("llama", "causal-lm"), (300, 310, 320, 330)

    def loss(order: tuple[int, ...]) -> float:  # of every token given those before it; the first has none
        return float(own.loss({}, [(*order, own.architecture.tokenizer.eos_token_id)], None))

    assert fluent(own, ids) == min(permutations(ids), key=loss)


def test_an_order_without_positions_comes_nearer_to_the_release() -> None:
    seen, _ = captured("llama", "causal-lm")
    alone = only(seen, *layout_of(seen.model).queries(0))
    begun, found = (attack(alone, orders=budget) for budget in (1, 60))
    assert found.residual < begun.residual


def test_what_is_missing_is_named() -> None:
    seen, _ = captured()
    with pytest.raises(NotObserved, match=r"encoder.layer.0.attention.self.query"):
        attack(only(seen, "encoder.layer.1"))


def test_tokens_that_fill_the_width_are_refused() -> None:
    seen, secret = capture_gradient(model("gpt2", "classification", 32), load_texts("embedded", indices=range(8)))
    assert sum(map(len, secret.inputs)) > 32
    with pytest.raises(NotObserved, match="fill all"):
        attack(seen)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_is_read(precision: torch.dtype) -> None:
    seen, secret = capture_gradient(model(), load_texts("embedded", indices=[0]), precision=precision)
    found = attack(seen)
    # What passes may be less than all, but holds no sentence that is not the true one.
    assert all(tokens == secret.inputs[0] for tokens, p in zip(found.value, found.proven, strict=True) if p)
    if precision is torch.float16:
        assert found.value == secret.inputs


def test_noise_makes_it_worse_and_nothing_wrong_is_proven() -> None:
    quality = []
    for level in (0.0, 1e-3, 1.0):
        total = 0.0
        for first in range(3):
            seen, secret = captured("gpt2", "classification", 1, first)
            std = level * float(torch.cat([t.flatten() for t in seen.released.values()]).std())
            generator = torch.Generator().manual_seed(first)
            noisy = defended(seen.released, (GaussianNoise(std),), generator)
            try:
                found = attack(replace(seen, released=noisy), most=30, beam=8)
            except NotObserved:
                continue
            assert not [t for t, p in zip(found.value, found.proven, strict=True) if p and t not in secret.inputs]
            total += max((rouge1(tokens, secret.inputs[0]) for tokens in found.value), default=0.0)
        quality.append(total / 3)
    assert quality[0] == 1
    assert quality[0] >= quality[1] >= quality[2]
    assert quality[2] < 0.5


# --- Updates and adapters ---


def test_the_update_of_several_small_steps_gives_the_texts() -> None:
    seen, secret = captured("gpt2", "classification", 2)
    update = share_update(seen, secret, Recipe(learning_rate=1e-5, steps=4, batch_size=1))
    found = attack(update)
    assert sorted(found.value) == sorted(secret.inputs)


@pytest.mark.parametrize(("rate", "least"), [(1e-3, 0.9), (1e-4, 1.0)])
def test_an_update_that_rounding_partly_buries_still_gives_a_decoders_texts(rate: float, least: float) -> None:
    """Three texts in three local steps of two. At 1e-4 rounding buries part of the directions behind the attention. At 1e-3 training moves
    what the spans are of, and sentences are weighed as a whole: of three groups of texts under two initial weights (those of transformers
    5.12 and 5.23) the mean of ROUGE-1 was 0.92 at least. At 3e-3 it fell to 0.63, at 1e-2 to 0.62: there the outcome is that of the draw."""
    seen, secret = captured("gpt2", "classification", 3)
    update = share_update(seen, secret, Recipe(learning_rate=rate, steps=3, batch_size=2))
    found = attack(update)
    best = [max(rouge1(tokens, text) for tokens in found.value) for text in secret.inputs]
    assert sum(best) / 3 >= least
    assert all(tokens in secret.inputs for tokens, proven in zip(found.value, found.proven, strict=True) if proven)


@pytest.mark.parametrize("steps", [None, 1, 10])
def test_lora_gives_a_short_text_away(steps: int | None) -> None:
    """Tokens are checkable while there are fewer than the rank: 20 tokens, rank 32."""
    seen, secret = captured()
    assert len(secret.inputs[0]) < 32
    layout = layout_of(seen.model)
    recipe = None if steps is None else Recipe(learning_rate=1e-3, steps=steps)
    names = layout.queries(0) + layout.queries(1)
    adapter = share_adapter(seen.model, secret, modules=names, rank=32, recipe=recipe)
    assert attack(adapter).value == secret.inputs


def test_lora_below_the_number_of_tokens_is_refused() -> None:
    seen, secret = captured()
    adapter = share_adapter(seen.model, secret, modules=layout_of(seen.model).queries(0), rank=8)
    with pytest.raises(NotObserved, match="larger rank"):
        attack(adapter)


def test_the_audit_scores_beside_controls() -> None:
    seen, secret = captured("gpt2", "causal-lm", 2)
    pool = public("embedded", "train", seen.model, limit=50)
    [row] = audit(seen, {"dager": Dager()}, pool, secret=secret)
    assert row.result["scores"]["exact_match"] == [1.0, 1.0]


PASSES, GUESSES = "every token passes in all layers", "the sentences are guesses"
OUTSIDE = "a row is up to 1.4 times outside what noise allows"


@pytest.mark.parametrize(
    ("excesses", "proven", "wanted", "said"),
    [
        ((), 0, 2, "7 tokens pass, but no sentence of them does"),
        ((0.3, 0.9), 2, 2, PASSES),
        ((0.3, 0.9), 1, 2, f"{PASSES}; the others are guesses, identical to these, or their beginnings"),
        ((0.3, 0.9), 0, 2, f"{PASSES}; {GUESSES}"),
        ((0.3,), 0, None, PASSES),
        (
            (0.3, 1.4),
            1,
            2,
            f"every token of 1 of 2 sentences passes in all layers; of the others {OUTSIDE}: they are guesses",
        ),
        ((76, 82), 0, 2, f"a row is up to 82 times outside what noise allows: {GUESSES}"),
    ],
)
def test_the_evidence_is_what_the_sentences_passed(
    excesses: tuple[float, ...], proven: int, wanted: int | None, said: str
) -> None:
    """A row is inside what noise allows, or the sentence is not said to pass."""
    sentences = [
        Sentence((5, 6), 0.1, excess, Outcome.STUCK if excess > 1 else Outcome.SOLVED if i < proven else Outcome.CLOSE)
        for i, excess in enumerate(excesses)
    ]
    assert evidence(sentences, proven, wanted, 7) == said


def test_sentences_that_noise_hides_are_called_guesses() -> None:
    sentences = [Sentence((5, 6), 0.1, 0.5, Outcome.SOLVED), Sentence((7,), 0.1, 0.5, Outcome.GUESSED)]
    assert "are guesses" in evidence(sentences, 0, 2, 7)
    assert "passes" not in evidence(sentences, 0, 2, 7)


def test_one_token_over_and_over_is_not_continued_even_where_no_other_passes() -> None:
    """No sentence is left then, and the judge is not asked about none."""
    judge: Any = None
    assert _extended(judge, [Prefix((5,) * REPEATS)], [5], limit=1.0, neutral=1.0) == []
