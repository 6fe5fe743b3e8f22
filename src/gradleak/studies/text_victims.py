"""What the studies of texts share: setting, models, unseen batches, a row of scores per private text, findings."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial

import torch

from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.likely_text import LikelyText
from gradleak.attacks.past_the_rank import PastTheRank
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.metrics.texts import TEXT_METRICS, frequent_words, match_texts, rouge1
from gradleak.errors import NotObserved
from gradleak.formats.model_folder import read_language_model
from gradleak.formats.secret_file import Secret
from gradleak.modalities.hub import PACKAGED, packaged
from gradleak.modalities.language_models import Task
from gradleak.modalities.texts import Texts, load_texts, test_split
from gradleak.observations.defense_names import Chosen
from gradleak.observations.defenses import GaussianNoise, TopK
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import flatten
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.studies.data_sets import IN_WHEELS, beside
from gradleak.studies.findings import Findings, name_of, shortage, stands_in
from gradleak.studies.plots import bars, panels
from gradleak.studies.study import Bench, Result, Row, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, share_update
from gradleak.victims.small_language import Kind, small_model, train_tokenizer, trained

BATCHES = {"smoke": 1, "small": 10, "paper": 100}  # unseen batches per row
FIRST = 100  # rows before that were looked at while the attacks were written
PUBLIC = 2_000
BESIDE = ("rotten_tomatoes", "sst2")
PRETRAINED = "all-MiniLM-L6-v2"  # of the extra `text`
STAND_IN = f"{PACKAGED[PRETRAINED].replace('_', '-')} is not installed"
DECODERS: dict[str, Kind] = {"small gpt2": "gpt2", "small llama": "llama"}
NOISE = {f"noise {s:g}": s for s in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}  # its norm over that of the release, about
KEPT = {f"largest {s:.0%}": s for s in (0.5, 0.1)}  # share of the entries
DEFENDED = (
    "relative-noise:0.03",
    "relative-noise:0.1",
    "top-k:0.1",
    "bits:16",
    "bits:8",
    "bits:4",
    "sign",
)  # as --defense takes them
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """words: how many a text has. rank: of LoRA, where that is trained. shared: gradient, its defense, or training. reader: the name
    of the attack."""

    model: str
    data: str
    task: Task = "classification"
    batch: int = 1
    words: str = "any"
    rank: int | None = None
    shared: Recipe | str = "gradient"
    attack: Dager | PastTheRank | LikelyText = field(default=Dager(), repr=False)
    reader: str = "dager"


def sources(data: str) -> dict[str, str]:
    """Data sets of texts, {name: where}: rotten_tomatoes and sst2 if they lie beside `data`, else `data` itself."""
    if data in IN_WHEELS:
        return {"embedded": "embedded"}
    found = {name: str(folder) for name in BESIDE if (folder := beside(data, name)) is not None}
    return found or {name_of(data): data}


def encoder() -> str:
    """The pretrained encoder where its package is installed; else a small BERT that says so in its name."""
    return PRETRAINED if packaged(PRETRAINED) else f"small bert, not pretrained ({STAND_IN})"


@lru_cache(maxsize=2)
def model_of(name: str, task: Task, source: str, size: Size, seed: int) -> LanguageModel:
    """The encoder with a fresh head; or a small transformer with a tokenizer of public texts, decoders trained."""
    if name == PRETRAINED and (folder := packaged(name)):
        model = read_language_model(folder, task, seed=seed)
    else:
        kind, public = DECODERS.get(name, "bert"), load_texts(source, "train", limit=20_000)
        tokenizer = train_tokenizer(public.texts, kind, size=4_000 if len(public.texts) > PUBLIC else 400)
        width, steps = (256, 0) if kind == "bert" else (64, 5) if size == "smoke" else (384, 60)
        model = small_model(kind, tokenizer, task, width=width, layers=4, positions=128, seed=seed, spread=0.05)
        model = trained(model, public.texts[:PUBLIC], public.labels[:PUBLIC], steps=steps) if steps else model
    return replace(model, architecture=replace(model.architecture, name=name))


def unseen_batches(source: str, setting: Setting, count: int) -> tuple[list[Texts], str]:
    """Batches of consecutive unseen texts, and a note if they are not as asked."""
    unseen = load_texts(source, test_split(source))
    size, (least, _, most) = setting.batch, setting.words.partition(" to ")
    every = range(len(unseen.texts))
    fit = [i for i in every if not most or int(least) <= len(unseen.texts[i].split()) <= int(most)]
    note = "" if fit else f"no text has {setting.words} words: any were taken"
    fit = fit or list(every)
    first = FIRST if len(fit) > FIRST + size * count else 0
    rows = [[fit[(first + number * size + i) % len(fit)] for i in range(size)] for number in range(count)]
    taken = [replace(unseen, texts=tuple(unseen.texts[i] for i in some), labels=unseen.labels[some]) for some in rows]
    return taken, note or shortage("unseen texts", size * count, len(fit))


def share(setting: Setting, model: LanguageModel, texts: Texts, seed: int) -> tuple[TextObservation, Secret]:
    """What a client shares of a batch. Adapters are LoRA on query, key and value of every block."""
    shared, architecture = setting.shared, model.architecture
    if shared in DEFENDED:
        first = ("withheld-embeddings",) if setting.reader == "likely-text" else ()  # they would tell all
        return capture_gradient(model, texts, defenses=Chosen.of((*first, str(shared))).defenses, seed=seed)
    if shared in KEPT:
        return capture_gradient(model, texts, defenses=(TopK(KEPT[shared]),))
    seen, secret = capture_gradient(model, texts, precision=PRECISIONS.get(str(shared), torch.float32))
    if shared in NOISE:
        flat = flatten(seen.released)
        noise = GaussianNoise(NOISE[shared] * float(flat.norm()) / len(flat) ** 0.5)
        return capture_gradient(model, texts, defenses=(noise,), seed=seed)
    recipe = shared if isinstance(shared, Recipe) else None
    if setting.rank is not None:
        blocks = range(architecture.config.num_hidden_layers)
        modules = [name for block in blocks for name in layout_of(model).queries(block)]
        return share_adapter(model, secret, modules=modules, rank=setting.rank, recipe=recipe, seed=seed), secret
    return seen if recipe is None else share_update(seen, secret, recipe), secret


def cell(setting: Setting, bench: Bench) -> Result:
    """Attack unseen batches, one after another."""
    source, count = sources(bench.data)[setting.data], BATCHES[bench.size]
    model = model_of(setting.model, setting.task, source, bench.size, bench.seed)
    batches, note = unseen_batches(source, setting, count)
    encoded = model.architecture.encode(load_texts(source, "train", limit=PUBLIC).texts)
    public = [model.architecture.plain(row) for row in encoded]
    samples, tokens, seconds = list[Row](), 0, 0.0
    for number, texts in enumerate(batches, 1):
        seen, secret = share(setting, model, texts, bench.seed)
        began, found = time.process_time(), None
        with suppress(NotObserved):
            found = setting.attack(seen, generator=torch.Generator().manual_seed(bench.seed))
        seconds += time.process_time() - began
        tokens += sum(map(len, secret.inputs))
        samples += scored(model, found, secret, public)
        bench.on_step(number, count, -samples[-1]["rouge1"])
    facts = {"width": model.architecture.config.hidden_size, "batches": count, "tokens": tokens / count}
    facts |= vars(setting.shared) if isinstance(setting.shared, Recipe) else {}
    stand_in = f"a small bert, as {STAND_IN}" if STAND_IN in setting.model else ""
    notes = stands_in(setting.data, bench.data) if bench.data in IN_WHEELS else "", stand_in, note
    return Result(facts, samples, notes=notes, cost={"attack_seconds": seconds / count})


def scored(
    model: LanguageModel, found: Reconstruction | None, secret: Secret, public: Sequence[tuple[int, ...]]
) -> list[Row]:
    """A row per true text, in per cent, without special tokens: every metric, and ROUGE-1 of frequent public tokens."""
    plain = model.architecture.plain
    truth = [plain(row) for row in model.architecture.original(secret.inputs, secret.labels)]
    value, proofs = ([], ()) if found is None else ([plain(row) for row in found.value], found.proven)
    proven = {text for text, proof in zip(value, proofs, strict=False) if proof}
    blind = match_texts([frequent_words(public, len(row)) for row in truth], truth)
    return [
        {name: 100 * metric(text, true) for name, metric in TEXT_METRICS.items()}
        | {"frequent_words_rouge1": 100 * rouge1(frequent, true), "proven": text in proven, "refused": found is None}
        for text, true, frequent in zip(match_texts(value, truth), truth, blind, strict=True)
    ]


def told(table: Table) -> Findings:
    """ROUGE-1 in words and as bars, rows told apart by what differs."""
    names = [f.name for f in fields(Setting) if len({row.get(f.name) for row in table.rows}) > 1] or ["shared"]

    def label(row: Row) -> str:
        """The setting in words."""
        return ", ".join(f"{name} {row[name]}" for name in names)

    parts = [f"{label(row)}: {row['rouge1']:.1f} ({100 * row['proven']:.1f} % proven)" for row in table.rows]
    figure, [axes] = panels(width=7, height=1 + 0.4 * len(table.rows))
    bars(axes, table.rows, label, "rouge1", "frequent_words_rouge1")
    axes.set(xlabel="ROUGE-1 (%)", xlim=(0, 105))
    axes.legend(["recovered texts", "frequent words"], loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    data = " and ".join(dict.fromkeys(row["data"] for row in table.rows))
    return Findings(f"ROUGE-1 in per cent on {data}. {'; '.join(parts)}.", {"ROUGE-1 of recovered texts": figure})


of_texts = partial(Study[Setting], cell=cell, tell=told, beside=BESIDE)
