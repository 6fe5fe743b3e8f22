"""Texts in the study of defenses: a sentence encoder with a fresh head, and a small decoder, both fine-tuned; what attacks read of unseen
texts, and what training behind a defense costs in accuracy and perplexity."""

from dataclasses import replace

from gradleak.modalities.texts import Texts, load_texts, test_split
from gradleak.observations.defense_names import Chosen
from gradleak.observations.model import LanguageModel
from gradleak.observations.training import Recipe
from gradleak.studies import text_victims
from gradleak.studies.defense_settings import ADAPTER, GRADIENT, NONE, UTILITY, Case, Kind, Setting
from gradleak.studies.defense_victims import NOTHING, attacked, proven, shared_of, tuned
from gradleak.studies.study import Bench, Result, Row
from gradleak.studies.text_victims import DECODERS, PUBLIC, STAND_IN, encoder, model_of, scored, unseen_batches
from gradleak.victims.defended import accuracy, perplexity, train_behind
from gradleak.victims.gradient import keep_secret

ENCODER, DECODER = "encoder", "decoder"
ONE, FOUR, NEXT, ADAPTED = (ENCODER, GRADIENT, 1), (ENCODER, GRADIENT, 4), (DECODER, GRADIENT, 1), (ENCODER, ADAPTER, 1)
EVERY: dict[Case, tuple[str, ...]] = {
    ONE: (
        *(NONE, "dp-sgd:1:0.8", "relative-noise:0.03", "relative-noise:0.1", "top-k:0.1", "top-k:0.01", "sign"),
        *("bits:8", "bits:4", "bits:2", "qsgd:8", "withheld-embeddings", "withheld-embeddings relative-noise:0.1"),
        *("relative-noise:1", "bits:16"),
    ),
    FOUR: (NONE, "clients:2"),
    NEXT: (
        *(NONE, "dp-sgd:1:0.8", "relative-noise:0.1", "top-k:0.1", "sign", "bits:8", "bits:4", "withheld-embeddings"),
        *("relative-noise:1", "bits:16"),
    ),
    ADAPTED: (NONE, "frozen-a", "lora-dropout:0.3", "svd:8", "relative-noise:0.1", "bits:8"),
}
OF_GRADIENTS = ("embedding-rows", "dager", "likely-text")
BATCHES = {"smoke": 1, "small": 3, "paper": 100}  # private ones
TRAINING = {"smoke": (16, 1), "small": (200, 2), "paper": (10_000, 3)}  # texts, epochs
UNSEEN = {"smoke": 16, "small": 200, "paper": 800}  # on which accuracy and perplexity are measured
BATCH, RATE = 20, 2e-4  # of Adam, fit for a pretrained network
TUNING = Recipe(optimizer="adamw", learning_rate=2e-3, steps=30, batch_size=10)
RANK = 64  # an adapter shows as many tokens


def cell(setting: Setting, bench: Bench) -> Result:
    """Accuracy or perplexity and epsilon of a training, or what an attack reads of unseen texts."""
    model = fine_tuned_of(setting, bench)
    notes = (f"a small bert, as {STAND_IN}" if STAND_IN in model.architecture.name else "",)
    if setting.attack == UTILITY:
        return Result(trained(model, setting, bench), notes=notes)
    taken = text_victims.Setting(model.architecture.name, bench.data, model.architecture.task, setting.batch)
    private, shortage = unseen_batches(bench.data, taken, BATCHES[bench.size])
    public = load_texts(bench.data, "train", limit=PUBLIC)
    plain = [model.architecture.plain(row) for row in model.architecture.encode(public.texts)]
    seen = [shared_of(model, each, setting, RANK, bench.seed + number) for number, each in enumerate(private)]
    rows = list[Row]()
    for found, true in zip(attacked(setting.attack, seen, public, bench), private, strict=True):
        rows += scored(model, found, keep_secret(model, true), plain)
    return Result(samples=rows, notes=(*notes, shortage))


def fine_tuned_of(setting: Setting, bench: Bench) -> LanguageModel:
    """The model before fine-tuning: the encoder with a fresh head, or the decoder after a few steps on public texts."""
    if setting.model == DECODER:
        return model_of(next(iter(DECODERS)), "causal-lm", bench.data, bench.size, bench.seed)
    return model_of(encoder(), "classification", bench.data, bench.size, bench.seed)


def trained(model: LanguageModel, setting: Setting, bench: Bench) -> Row:
    """Accuracy, or perplexity, on unseen texts after training behind the defense, and what is proven for each text of that."""
    (count, epochs), defenses = TRAINING[bench.size], Chosen.of(setting.names).defenses
    private = last(load_texts(bench.data, "train", limit=PUBLIC + count), count)  # the decoder began with those before
    test = last(load_texts(bench.data, test_split(bench.data)), UNSEEN[bench.size])
    measure, name = (perplexity, "perplexity") if setting.model == DECODER else (accuracy, "accuracy")
    if setting.shared == ADAPTER:
        return {name: measure(tuned(model, private, setting, RANK, TUNING, bench.seed), test), **NOTHING}
    model = train_behind(model, private, defenses, epochs=epochs, seed=bench.seed, batch=BATCH, rate=RATE)
    return {name: measure(model, test), **proven(defenses, epochs)}


def last(texts: Texts, count: int) -> Texts:
    """So many of the texts, from the end."""
    return replace(texts, texts=texts.texts[-count:], labels=texts.labels[-count:])


TEXTS = Kind(
    noun="text",
    measure="ROUGE-1",
    every=EVERY,
    smoke={ONE: (NONE, "top-k:0.1"), NEXT: (NONE, "sign")},
    by={ONE: OF_GRADIENTS, NEXT: OF_GRADIENTS, FOUR: OF_GRADIENTS[:2], ADAPTED: ("dager", "sparse-words")},
    unaware=("dager", "sparse-words"),
    untold=("embedding-rows", "likely-text"),  # their replay alone would use it
    smoke_by=("embedding-rows",),
    left_out=("relative-noise:1", "bits:16"),
    leaked=lambda row: float(row["rouge1"]) / 100,
    chance=lambda row: float(row["frequent_words_rouge1"]) / 100,
)
