"""The seed of an adapter: PEFT's draws are repeated bit for bit, the right seed is found after training, and no wrong one."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from gradleak.attacks import seed as seeds
from gradleak.attacks.seed import USUAL, recover_seed, with_start_recovered
from gradleak.attacks.twisters import TOGETHER, Twisters
from gradleak.errors import NotObserved
from gradleak.formats.peft import read_adapter
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.modalities.texts import load_texts
from gradleak.modalities.transformers_networks import quiet_transformers
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe
from gradleak.victims.adapter import fine_tune, share_adapter
from gradleak.victims.gradient import capture_gradient, keep_secret
from gradleak.victims.small_language import Kind, small_model, train_tokenizer

MLP = Architecture("mlp", (1, 8, 8), 10)
CONVNET = Architecture("convnet", (1, 8, 8), 10)
VIT = Architecture("vit", (1, 8, 8), 10)
UNUSUAL = 2_000_000_011  # not in USUAL
Format = Literal["float32", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def _peft_reads_what_transformers_deprecates() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def network() -> nn.Module:
    """Convolutions and linear layers in an order that is not alphabetical, with sizes that are no multiples of 16."""
    layers: dict[str, nn.Module] = {"z": nn.Conv2d(1, 6, 5, stride=2, padding=2), "y": nn.Conv2d(6, 10, 3, padding=1)}
    layers |= {"flat": nn.Flatten(), "b": nn.Linear(160, 50), "a": nn.Linear(50, 33), "head": nn.Linear(33, 10)}
    module = nn.Sequential()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


def adapted(module: nn.Module, **config: Any) -> Tensors:
    """{MODULE.lora_A, MODULE.lora_B} as PEFT draws them now, by name: their order tells nothing."""
    from peft import LoraConfig, get_peft_model

    found: Tensors = {}
    with quiet_transformers():
        whole: Any = get_peft_model(copy.deepcopy(module), LoraConfig(**config))
        for name, layer in whole.base_model.model.named_modules():
            for factor in ("lora_A", "lora_B"):
                if "default" in getattr(layer, factor, {}):
                    found[f"{name}.{factor}"] = getattr(layer, factor)["default"].weight.detach().clone()
    return dict(sorted(found.items()))


def observed(model: Model[Any], start: Tensors, moved: float = 0.0) -> Observation[Any]:
    """An adapter that began there: B has become something, and A has moved by so many of its lengths, at random."""
    generator = torch.Generator().manual_seed(UNUSUAL)
    ended = {}
    for name, tensor in start.items():
        step = torch.randn(tensor.shape, generator=generator)
        ended[name] = tensor + (moved * tensor.norm() * step / step.norm() if name.endswith("lora_A") else step)
    release = Adapter(
        start={k: v if k.endswith("lora_A") else torch.zeros_like(v) for k, v in ended.items()},
        scaling={name.removesuffix(".lora_A"): 1.0 for name in start if name.endswith("lora_A")},
    )
    return Observation(model=model, release=release, released={k: v for k, v in ended.items() if k.endswith("lora_B")})


def pictures(architecture: Architecture, count: int = 8) -> Pictures:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, *architecture.input_shape, generator=generator)
    labels = torch.randint(0, architecture.classes, (count,), generator=generator)
    return Pictures(images, labels, tuple(map(str, range(architecture.classes))), "random", "train")


def tuned(out: Path, architecture: Architecture = MLP, steps: int = 1, **arguments: Any) -> Observation[Any]:
    """An adapter of rank 4 of random pictures in batches of four: by SGD at 0.1, or as the arguments say."""
    optimizer, rate = arguments.pop("optimizer", "sgd"), arguments.pop("rate", 0.1)
    recipe = Recipe(optimizer=optimizer, learning_rate=rate, steps=steps, batch_size=4)
    model = Model.of(architecture.build(0), architecture)
    settings = {"rank": 4, "target_modules": "all", **arguments}
    return fine_tune(model, pictures(architecture), out=out, recipe=recipe, **settings)[0]


def same(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- The stream, and what PEFT draws from it ---


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 1300), (600, 60), (1247, 2), (5000, 700)])
def test_the_twisters_give_the_numbers_of_torch(first: int, count: int) -> None:
    """Bit for bit, across the ends of their blocks of 624 words, in pieces that may overlap."""
    tried = [0, 1, 42, 2**31, 2**32 - 1]
    twisters = Twisters(tried)
    for word in range(first, first + count, 20):
        numbers = twisters.numbers(word, min(TOGETHER, first + count - word))
        for column, seed in zip(numbers.T, tried, strict=True):
            drawn = torch.rand(first + count, generator=torch.Generator().manual_seed(seed))[word : word + len(column)]
            assert torch.equal(torch.from_numpy(column.copy()), drawn)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["z", "y", "b", "a"]},
        {"r": 3, "target_modules": ["a", "y"], "use_rslora": True, "lora_dropout": 0.1},
        {"r": 2, "target_modules": ["z", "y", "b", "a", "head"], "rank_pattern": {"y": 5, "a": 1}},
        {"r": 4, "target_modules": ["z", "y", "b", "a"], "init_lora_weights": "gaussian"},
        {"r": 3, "target_modules": ["b", "a"], "rank_pattern": {"b": 7}, "init_lora_weights": "gaussian"},
    ],
)
@pytest.mark.parametrize("seed", [42, 2**32 - 1])
def test_the_start_is_drawn_as_peft_draws_it(config: dict[str, Any], seed: int) -> None:
    """Bit for bit: A has not moved, so the cosine is 1 up to the rounding of sums of float64."""
    module = network()
    torch.manual_seed(seed)
    start = adapted(module, **config)
    found = recover_seed(observed(Model.of(module, MLP), start), seeds=[seed])
    assert found is not None
    assert (found.seed, found.before, found.tried) == (seed, "", 1)
    assert same(found.start, start)
    assert found.cosine == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_the_quick_test_reads_the_right_words(init: Any) -> None:
    """Of a start that has not moved, z = |u|, whose square is n, give or take sqrt(2 n): z = sqrt(n) to within 5 / sqrt(2)."""
    module = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 50))
    torch.manual_seed(42)
    start = adapted(module, r=3, target_modules=["0", "1", "2"], init_lora_weights=init)
    factors = {m: (start[f"{m}.lora_A"], start[f"{m}.lora_B"].numel()) for m in ("0", "1", "2")}
    for wanted in (seeds.FEW, seeds.FEWEST):
        test = seeds.QuickTest.of(factors, init == "gaussian", 0, wanted)
        whole = 128 if init == "gaussian" else 144  # of 150 numbers torch draws the last 16 again
        numbers = sum(len(piece) for _, piece in test.pieces)
        assert numbers == min(wanted, 3 * whole)
        assert all(len(piece) <= TOGETHER for _, piece in test.pieces)
        [z] = seeds.agreements([41, 42], [test])
        assert z[1] == pytest.approx(numbers**0.5, abs=5 / 2**0.5)
        assert abs(z[0]) < 5


@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_so_it_is_in_transformers(kind: Kind, init: Any) -> None:
    """GPT-2 stores its weights transposed, which PEFT's factors are not."""
    tokenizer = train_tokenizer(load_texts("embedded", "train", limit=40).texts, kind, size=300)
    model = small_model(kind, tokenizer, "classification", width=32, layers=1, heads=2)
    torch.manual_seed(3407)
    start = adapted(
        model.solid(), r=4, target_modules="all-linear", init_lora_weights=init, fan_in_fan_out=kind == "gpt2"
    )
    found = recover_seed(observed(model, start), seeds=[42, 3407])
    assert found is not None
    assert (found.seed, found.before) == (3407, "")
    assert same(found.start, start)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_embeddings_with_lora_are_drawn_before(kind: Kind, tmp_path: Path) -> None:
    """Their A begins at zero and their B at random (peft 0.21, `Embedding.update_layer`), here with sizes that are no multiples of 16."""
    from peft import LoraConfig, get_peft_model

    tokenizer = train_tokenizer(load_texts("embedded", "train", limit=40).texts, kind, size=301)
    model = small_model(kind, tokenizer, "classification", width=36, layers=1, heads=2)
    modules = ["word_embeddings", "query"] if kind == "bert" else ["wte", "c_attn"]
    torch.manual_seed(3407)
    with quiet_transformers():
        config = LoraConfig(r=5, target_modules=modules, fan_in_fan_out=kind == "gpt2")
        whole: Any = get_peft_model(copy.deepcopy(model.solid()), config)
        for name, tensor in whole.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor)
        whole.save_pretrained(tmp_path, save_embedding_layers=False)
    found = recover_seed(read_adapter(tmp_path, model), seeds=[42, 3407])
    assert found is not None
    assert (found.seed, found.before) == (3407, "")


@pytest.mark.parametrize("family", ["roberta", "distilbert", "vit"])
def test_a_new_head_of_transformers_may_be_drawn_before(family: str, tmp_path: Path) -> None:
    """from_pretrained draws heads of one layer and of two, here with 3 x 40 weights, which are no multiple of 16. What is saved is a classifier
    without its head: of a base model transformers 5.12 loses the encoder's names, and draws all of it anew."""
    import transformers

    sizes = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    own = {
        "vit": {**sizes, "image_size": 16, "patch_size": 8},
        "roberta": {**sizes, "vocab_size": 50},
        "distilbert": {"dim": 40, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50},
    }
    config = transformers.AutoConfig.for_model(family, num_labels=3, **own[family])
    kind = "ImageClassification" if family == "vit" else "SequenceClassification"
    auto: Any = getattr(transformers, f"AutoModelFor{kind}")
    with quiet_transformers():
        whole = auto.from_config(config)
        kept = {n: tensor for n, tensor in whole.state_dict().items() if n.startswith(whole.base_model_prefix)}
        whole.save_pretrained(tmp_path, state_dict=kept)
        transformers.set_seed(7)
        network = auto.from_pretrained(tmp_path, num_labels=3)
    start = adapted(network, r=4, target_modules="all-linear")
    found = recover_seed(observed(Model.of(network, MLP), start), seeds=[42, 7])
    assert found is not None
    assert (found.seed, found.before) == (7, "a new classification head")
    assert same(found.start, start)


def test_a_base_in_bfloat16_rounds_the_start() -> None:
    """PEFT draws in float32, and brings A to the format of the layer before it trains in float32."""
    module = network().bfloat16()
    torch.manual_seed(42)
    start = adapted(module, r=4, target_modules=["z", "y", "b", "a"])
    assert {tensor.dtype for tensor in start.values()} == {torch.float32}
    found = recover_seed(observed(Model.of(module, MLP), start), seeds=[42])
    assert found is not None
    assert same(found.start, start)


def test_a_new_last_layer_of_torch_may_be_drawn_before() -> None:
    module = network()
    torch.manual_seed(7)
    module.head = nn.Linear(33, 10)
    start = adapted(module, r=4, target_modules=["y", "b"])
    found = recover_seed(observed(Model.of(module, MLP), start), seeds=[42, 7])
    assert found is not None
    assert (found.seed, found.before) == (7, "a new classification head")
    assert same(found.start, start)


# --- After training ---


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("optimizer", "rate", "steps", "least"), [("sgd", 0.1, 1, 0.99), ("sgd", 0.1, 50, 0.8), ("adamw", 1e-3, 200, 0.4)]
)
def test_the_seed_is_found_after_training(
    optimizer: str, rate: float, steps: int, least: float, precision: Format, tmp_path: Path
) -> None:
    """Measured: cosines of 1.00, .87-.89 and .52; on 2,320 numbers, chance has a deviation of .02."""
    arguments = {"optimizer": optimizer, "rate": rate, "steps": steps, "precision": getattr(torch, precision)}
    observation = tuned(tmp_path, seed=2**32 - 1, **arguments)
    found = recover_seed(observation, seeds=[*range(500), 2**32 - 1])
    assert found is not None
    assert found.seed == 2**32 - 1
    assert found.cosine > least
    assert found.false_alarm <= seeds.ALARM
    torch.manual_seed(2**32 - 1)
    module = observation.model.solid()
    assert same(found.start, adapted(module, r=4, target_modules=["2", "4", "6"]))


@pytest.mark.parametrize("architecture", [CONVNET, VIT], ids=lambda a: a.name)
def test_so_it_is_of_convolutions_and_of_transformers(architecture: Architecture, tmp_path: Path) -> None:
    observation = tuned(tmp_path, architecture, steps=20, optimizer="adamw", rate=1e-3, seed=1234)
    found = recover_seed(observation, seeds=range(1000, 1500))
    assert found is not None
    assert found.seed == 1234


def test_the_seed_is_found_when_little_of_the_start_is_left(tmp_path: Path) -> None:
    """500 steps of AdamW at ten times the usual rate: a cosine of .36-.40, of 1 after none; A has moved by twice its length."""
    observation = tuned(tmp_path, steps=500, optimizer="adamw", rate=5e-3, seed=42)
    found = recover_seed(observation)
    assert found is not None
    assert found.seed == 42
    assert 0.25 < found.cosine < 0.5


def test_seeds_are_cut_to_32_bits(tmp_path: Path) -> None:
    """As torch.manual_seed cuts them on the CPU."""
    observation = tuned(tmp_path, seed=2**32 + 5)
    for tried in ([5], [2**32 + 5], [3 * 2**32 + 5]):
        found = recover_seed(observation, seeds=tried)
        assert found is not None
        assert found.seed == 5


# --- Wrong seeds ---


def test_the_sieve_misses_one_right_seed_in_1_000() -> None:
    """At a cosine of .3, z = .3 sqrt(320) = 5.37 with a deviation below 1, so P(z < 2.2) < Phi(-3.17) = .00076; of 8,000 right
    seeds, 6 are expected, 6 + 5 sqrt(6) = 18 at most. One of 72 wrong seeds passes: Phi(-2.2) = .0139."""
    tried, generator = list(range(8000)), torch.Generator().manual_seed(0)
    twisters = Twisters(tried)
    drawn = torch.cat([torch.from_numpy(twisters.numbers(word, 32)) for word in range(0, seeds.FEW, 32)])
    u = (drawn - 0.5) * 12**0.5
    ended = 0.3 * u + (1 - 0.3**2) ** 0.5 * torch.randn(u.shape, generator=generator)
    z = (ended * u).sum(0) / ended.norm(dim=0)
    assert int((z <= seeds.LOW).sum()) <= 18
    wrong = (ended * u.roll(1, 1)).sum(0) / ended.norm(dim=0)
    assert int((wrong > seeds.LOW).sum()) == pytest.approx(8000 * 0.0139, abs=5 * (8000 * 0.0139) ** 0.5)


def test_wrong_seeds_agree_as_chance_says() -> None:
    """z of 3,000 wrong seeds has mean 0 and deviation 1, to within five deviations of their estimates, and no z is 5."""
    torch.manual_seed(UNUSUAL)
    start = adapted(network(), r=4, target_modules=["z", "y", "b", "a"])
    factors = {m: (start[f"{m}.lora_A"], start[f"{m}.lora_B"].numel()) for m in ("z", "y", "b", "a")}
    for gaussian in (False, True):
        test = seeds.QuickTest.of(factors, gaussian, 0, seeds.FEWEST)
        z = torch.from_numpy(seeds.agreements(list(range(3000)), [test])[0])
        assert abs(float(z.mean())) < 5 / 3000**0.5
        assert abs(float(z.std()) - 1) < 5 / 6000**0.5
        assert float(z.max()) < 5  # one in 3.5 million


def test_no_wrong_seed_is_taken() -> None:
    """Twenty adapters whose seeds are not tried. By the bound, 20 x 2,000 / 2^32 x 1e-3 = 1e-8 of them are expected."""
    model = Model.of(network(), MLP)
    for seed in range(UNUSUAL, UNUSUAL + 20):
        torch.manual_seed(seed)
        start = adapted(model.solid(), r=4, target_modules=["z", "y", "b", "a"])
        assert recover_seed(observed(model, start, moved=0.5), seeds=USUAL[:2000]) is None


@pytest.mark.parametrize("moved", [1.0, 3.0])
@pytest.mark.parametrize("tried", [USUAL[:1000], range(len(USUAL) + 1)], ids=["few", "sieved"])
def test_a_random_step_away_the_seed_is_found(moved: float, tried: Sequence[int]) -> None:
    """A step of 3 lengths leaves a cosine of 1 / sqrt(10) = .32, give or take 1 / sqrt(1404) = .03: a z of 5.7 in the sieve."""
    model = Model.of(network(), MLP)
    torch.manual_seed(123)
    start = adapted(model.solid(), r=4, target_modules=["z", "y", "b", "a"])
    found = recover_seed(observed(model, start, moved=moved), seeds=tried)
    assert found is not None
    assert found.seed == 123
    assert found.cosine == pytest.approx((1 + moved**2) ** -0.5, abs=0.12)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva"])
def test_other_draws_are_not_recovered(init: str) -> None:
    """Neither as they are, nor where somebody says that B began at zero. EVA needs data: normal numbers stand for it."""
    model = Model.of(network(), MLP)
    torch.manual_seed(42)
    if init == "eva":
        start = {k: torch.randn_like(v) for k, v in adapted(model.solid(), r=4, target_modules=["b", "a"]).items()}
    else:
        start = adapted(model.solid(), r=4, target_modules=["b", "a"], init_lora_weights=init)
    assert recover_seed(observed(model, start), seeds=range(200)) is None


def test_a_start_that_is_known_not_to_be_zero_is_not_searched(tmp_path: Path) -> None:
    observation = tuned(tmp_path, seed=42, init="pissa", target_modules="all-linear", rank=4)
    assert recover_seed(observation, seeds=[42]) is None
    usual = tuned(tmp_path / "usual", seed=42)
    release = replace(usual.adapter, start={k: t + k.endswith("lora_B") for k, t in usual.adapter.start.items()})
    assert recover_seed(usual, seeds=[42]) is not None
    assert recover_seed(replace(usual, release=release), seeds=[42]) is None
    forced = read_adapter(tmp_path / "adapter", observation.model, start="B=0")
    assert recover_seed(forced, seeds=[42]) is None


def test_an_adapter_that_began_at_another_is_not_recovered() -> None:
    """Trained so far before that nothing of the first start is left: A is random."""
    model = Model.of(network(), MLP)
    torch.manual_seed(42)
    start = adapted(model.solid(), r=4, target_modules=["b", "a"])
    assert recover_seed(observed(model, start, moved=1000.0), seeds=range(200)) is None


def test_a_start_that_fits_in_part_is_not_taken() -> None:
    """The first three modules are PEFT's, before the last something else was drawn: its start would be wrong."""
    model = Model.of(network(), MLP)
    torch.manual_seed(42)
    start = adapted(model.solid(), r=4, target_modules=["z", "y", "b", "a"])
    assert recover_seed(observed(model, start), seeds=[42]) is not None
    start["a.lora_A"] = (2 * torch.rand(start["a.lora_A"].shape) - 1) / 50**0.5
    assert recover_seed(observed(model, start), seeds=[42]) is None


def test_few_numbers_prove_nothing() -> None:
    """Rank 1 of 50 inputs: even a cosine of 1 is z = 7, and one of 2^32 x 4 seeds reaches 7.8 with probability 1e-3."""
    model = Model.of(network(), MLP)
    torch.manual_seed(42)
    start = adapted(model.solid(), r=1, target_modules=["a"])
    assert recover_seed(observed(model, start), seeds=[42]) is None


# --- The observation with its start ---


def test_the_changes_of_both_factors_follow(tmp_path: Path) -> None:
    """The adapter ends where it ended, up to one rounding of float32, and A's change is the true one."""
    observation = tuned(tmp_path, steps=50, seed=3407)
    assert observation.adapter.origin == "unknown"
    known = with_start_recovered(observation)
    assert (known.adapter.origin, known.adapter.seed) == ("recovered", 3407)
    torch.manual_seed(3407)
    start = adapted(observation.model.solid(), r=4, target_modules=["2", "4", "6"])
    assert same(known.adapter.start, start)
    assert known.released.keys() == start.keys()
    ended = observation.adapter.ended(observation.released)
    for name, change in known.released.items():
        assert torch.allclose(start[name] + change, ended[name], rtol=0, atol=1e-6)
    assert known.adapter.start["2.lora_B"].count_nonzero() == 0


def test_what_has_nothing_to_recover_stays_the_same(tmp_path: Path) -> None:
    observation = tuned(tmp_path, seed=42)
    secret = keep_secret(observation.model, pictures(MLP))
    for other in (
        replace(observation, release=replace(observation.adapter, origin="given")),
        replace(observation, release=replace(observation.adapter, gradient=True)),
        share_adapter(observation.model, secret, modules=["2"], rank=4),  # gradients of the factors
        capture_gradient(observation.model, pictures(MLP))[0],
    ):
        assert with_start_recovered(other) is other


def test_no_usual_seed_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "USUAL", USUAL[:100])
    observation = tuned(tmp_path, seed=UNUSUAL)
    known = with_start_recovered(observation)
    assert known == replace(observation, release=replace(observation.adapter, tried=100))
    assert "none of 100 seeds draws" in next(told for name, _, told in known.reservations() if name == "no_seed")
    again = with_start_recovered(known, seeds=range(100, 150))
    assert (again.adapter.tried, again.adapter.origin) == (150, "unknown")
    assert with_start_recovered(again, seeds=range(UNUSUAL - 5, UNUSUAL + 5)).adapter.seed == UNUSUAL


def test_the_search_reports_and_ends_in_time(tmp_path: Path) -> None:
    observation = tuned(tmp_path, seed=UNUSUAL)
    told: list[tuple[int, int, float]] = []
    assert recover_seed(observation, seeds=range(2000), on_step=lambda *step: told.append(step)) is None
    assert [step[:2] for step in told] == [(2000, 2000)] * 2  # as few are not sieved: all of them are many at once
    told.clear()
    recover_seed(observation, seeds=range(50_000), on_step=lambda *step: told.append(step))
    assert [step[0] for step in told] == sorted({step[0] for step in told})
    assert (told[-1][0], {step[1] for step in told}) == (50_000, {50_000})
    assert len(told) > 2
    told.clear()
    assert recover_seed(observation, seeds=iter(range(2**32)), on_step=lambda *s: told.append(s), seconds=0.05) is None
    assert 0 < len(told) < 100
    assert recover_seed(observation, seeds=[]) is None


def test_only_adapters_have_a_start() -> None:
    with pytest.raises(NotObserved, match="adapter"):
        recover_seed(capture_gradient(Model.of(MLP.build(0), MLP), pictures(MLP))[0])


def test_what_people_type_comes_first() -> None:
    assert USUAL[:3] == (42, 0, 1)
    assert len(set(USUAL)) == len(USUAL)
    assert set(range(10_000)) <= set(USUAL)
    assert UNUSUAL not in USUAL
