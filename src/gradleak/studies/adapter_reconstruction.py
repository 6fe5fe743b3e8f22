"""Does a released adapter lead back to its training pictures, and when does that end? Per model: (a) the adapter decoded into a
gradient (ridge), which is inverted; (b) the adapter matched directly; (c) the same from a better start, (a)'s result or a regression;
activation patterns for the ReLU network, jigsaw for the transformer, and its whole gradient; controls: B A taken for a gradient, another
victim's adapter, the mean image. Then steps, optimisers; then rank against batch size, beside what is identifiable at all."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gradleak.attacks.activation_patterns.activation_patterns import ActivationPatterns
from gradleak.attacks.jigsaw.jigsaw import Jigsaw
from gradleak.attacks.labels import candidate_labels
from gradleak.audit.bound import identifiability
from gradleak.modalities.pictures import Pictures
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import Recipe
from gradleak.studies import adapter_victims as victims
from gradleak.studies.adapter_victims import ONE_STEP, Base, Decoder
from gradleak.studies.findings import Findings
from gradleak.studies.plots import heat_map, panels
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

DECODED, MATCHED = "(a) decoded, then inverted", "(b) adapter matched"
AFTER, LEARNED = "(c) adapter matched, start (a)", "(c) adapter matched, learned start"
OTHER, RAW = "control: another's adapter", "control: B A as gradient"
WHOLE, PATTERNS, JIGSAW = "full gradient, learned start", "activation patterns", "jigsaw"
KNOWN, UNKNOWN, MAP = "recipe known", "recipe unknown", "map"
ADAM = Recipe(optimizer="adam", learning_rate=1e-3, steps=1)
USUAL, FEW = (DECODED, MATCHED, AFTER, LEARNED, OTHER, RAW), 4
# rank, attacks on all pictures; the usual others, which take up to half a minute a picture, on FEW
MODELS = {"convnet": (8, USUAL), "vit": (16, (LEARNED, WHOLE, JIGSAW)), "mlp1000": (8, (PATTERNS,))}


@dataclass(frozen=True)
class Setting:
    """pictures: private ones, at most, an adapter for each batch of them."""

    model: str
    attack: str
    pictures: int
    rank: int = 8
    batch: int = 1
    recipe: Recipe = ONE_STEP


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Attacks and controls on so many pictures of each model; other recipes; the map, with so many batches in a field."""
    smoke = size == "smoke"
    counts, ablation, per_field = {
        "smoke": ({"convnet": 1}, 1, 1),
        "small": ({"convnet": 16, "vit": 16, "mlp1000": 50}, 4, 2),
        "paper": ({"convnet": 200, "vit": 50, "mlp1000": 200}, 20, 10),
    }[size]
    for model, count in counts.items():
        rank, thorough = MODELS[model]
        for attack in dict.fromkeys((*USUAL, *thorough)):
            yield Setting(model, attack, count if attack in thorough else min(count, FEW), rank)
    for steps in (2,) if smoke else (2, 5, 10):
        yield Setting("convnet", KNOWN, ablation, recipe=replace(ONE_STEP, steps=steps))
    yield from (Setting("convnet", UNKNOWN, ablation, recipe=recipe) for recipe in (ONE_STEP, ADAM))
    for batch in (1,) if smoke else (1, 2, 4):
        yield from (Setting("convnet", MAP, per_field * batch, r, batch) for r in ((8,) if smoke else (2, 4, 8, 16)))


def cell(setting: Setting, bench: Bench) -> Result:
    """One attack on the adapters of private pictures; for the map also what is identifiable."""
    base, name = victims.prepare(setting.model, bench.data, bench.size), setting.attack
    private = victims.batched(base.private(setting.pictures), setting.batch)
    shown = victims.batched(base.public, 1)[: len(private)] if name == OTHER else private
    start = victims.blank(base, setting.rank, setting.recipe, batch=setting.batch, seed=bench.seed)
    pairs, decoder = victims.PAIRS[bench.size], "ridge" if name in (DECODED, AFTER) else "B A as gradient"
    decode, _, _ = victims.fitted(decoder, setting.model, bench.data, bench.size, bench.seed, setting.rank, pairs)
    seen = [view(name, base, victims.trained(start, some), some, decode) for some in shown]
    learnt = pairs if name in (LEARNED, OTHER, WHOLE) else pairs // 2 if name in (KNOWN, UNKNOWN, MAP) else 0
    search = victims.search(base, bench.size, learnt, decode if name == AFTER else None)
    patterns = name == PATTERNS or (name == OTHER and setting.model == "mlp1000")
    exact = ActivationPatterns(prior=base.prior) if patterns else Jigsaw(prior=base.prior) if name == JIGSAW else None
    result = victims.attacked(base, exact or search, seen, private, bench, setting.pictures)
    if name == MAP and setting.batch <= 2:
        known = identifiability(seen[0], private[0].images, private[0].labels, noise_levels=(1e-3,))
        result.facts.update(determined=known.determined[0], explained=known.explained[0])
    return result


def view(attack: str, base: Base, adapter: PictureObservation, some: Pictures, decode: Decoder) -> PictureObservation:
    """What an attack sees of an adapter of these pictures: itself, a gradient made of it, or for comparison the true gradient."""
    if attack == UNKNOWN:  # A is released as it ended; the attacker takes it for where it began
        adapter = replace(adapter, release=replace(adapter.adapter, recipe=None))
    labels = some.labels[None] if attack == MAP else candidate_labels(adapter)  # one, where the last layer tells it
    adapter = replace(adapter, labels=labels[0] if len(labels) == 1 else None)
    if attack == WHOLE:
        return replace(victims.full_gradient(base, some), labels=adapter.labels)
    return decode(adapter) if attack in (DECODED, RAW) else adapter


def tell(table: Table) -> Findings:
    """The best attack per model in words; both maps."""
    parts, fields, plots = list[str](), table.where(attack=MAP), {}
    for model in MODELS:
        if rows := table.where(model=model, attack=lambda name: name in (*USUAL[:4], PATTERNS, JIGSAW)):
            parts.append(victims.in_words(max(rows, key=lambda row: float(row["psnr_db"]))))
    if fields:
        figure, both = panels(2)
        titles = {"psnr_above_mean_db": "PSNR above the mean image (dB)", "explained": "variance explained, noise 1e-3"}
        for axes, column in zip(both, titles, strict=True):
            heat_map(axes, fields, "rank", "batch", column)
            axes.set(title=titles[column], xlabel="rank of the adapter", ylabel="batch size (pictures)")
        plots = {"When a convnet's adapter gives its pictures away": figure}
    return Findings(f"From the adapter of one step alone. {'; '.join(parts) or 'Nothing yet'}.", plots)


STUDY = Study(
    name="adapter-reconstruction",
    question="Does an adapter that somebody shares give away the pictures that it was trained on, and when does that end?",
    settings=settings,
    cell=cell,
    together=lambda s: (s.model, s.rank) if s.attack in (DECODED, AFTER) else s,
    tell=tell,
    beside=("mnist",),
)
