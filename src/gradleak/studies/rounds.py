"""What do further rounds of one client add? The same pictures at other global weights each time, attacked as one observation: LeNet, one
picture under noise, sparse or private, and a batch with more pixels than one round shares. Control: the same rounds of other pictures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradleak.attacks.diffusion.daps import DAPS
from gradleak.attacks.map_inversion import MapInversion
from gradleak.audit.privacy import spent
from gradleak.audit.scoring import SCORING
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.defense_names import Chosen
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import Recipe
from gradleak.studies.data_sets import blueprint, rows_of, shrunk, unseen
from gradleak.studies.findings import Findings
from gradleak.studies.plots import curve
from gradleak.studies.prior_victims import gaussian
from gradleak.studies.samples import compared
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table
from gradleak.victims.gradient import capture_gradient, share_update
from gradleak.victims.rounds import federated

FIRST = 8_200  # test row
EVALUATIONS: dict[Size, int] = {"smoke": 2, "small": 50, "paper": 75}
SAMPLED: dict[Size, tuple[int, int, int]] = {"smoke": (2, 2, 2), "small": (2, 8, 8), "paper": (4, 16, 12)}
LOCAL = Recipe(learning_rate=0.01, steps=5, batch_size=1)


@dataclass(frozen=True)
class Setting:
    """shared: the gradient, or the update of five local steps. defense: as flags say it, "" for none. batch: private pictures."""

    shared: str
    defense: str
    batch: int
    rounds: int
    attack: str = "map-inversion"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Noise as large as the gradient over rounds; then other defenses, batches, and local training, by one round and by four."""
    counts = (1, 2) if size == "smoke" else (1, 2, 4, 8)
    yield from (Setting("gradient", "relative-noise:1.0", 1, rounds) for rounds in counts)
    few = () if size == "smoke" else (1, 4)
    yield from (Setting("gradient", "relative-noise:1.0", 1, rounds, "daps") for rounds in few)
    for defense in ("top-k:0.01", "dp-sgd:1:0.05"):
        yield from (Setting("gradient", defense, 1, rounds) for rounds in few)
    yield from (Setting("update", "relative-noise:1.0", 1, rounds) for rounds in few)
    yield from (Setting("gradient", "", 8, rounds) for rounds in few)


def cell(setting: Setting, bench: Bench) -> Result:
    """One client, its rounds as one observation, and the control."""
    (shape, classes), (prior, public) = blueprint(bench.data, bench.size), gaussian(bench.data, bench.size)
    architecture = Architecture("lenet", shape, classes)
    private = unseen(bench.data, FIRST + 8 * bench.seed, setting.batch, shape)
    seen = shared(setting, Model.of(architecture.build(bench.seed), architecture), private, public, bench.seed)
    attack: Any = MapInversion(prior=prior, pairs=0, evaluations=EVALUATIONS[bench.size])
    if setting.attack == "daps":
        samples, levels, evaluations = SAMPLED[bench.size]
        attack = DAPS(gaussian=prior, samples=samples, levels=levels, evaluations=evaluations)
    others = rows_of(public, 8 * bench.seed, setting.batch)
    truth, match = architecture.original(private.images, private.labels), SCORING[architecture.modality].match
    found, wrong = (
        match(one.model, attack(one, generator=torch.Generator().manual_seed(bench.seed)).value, truth)[0]
        for one in (seen, seen.of_others(others.images, others.labels))
    )
    rows = compared(found, private.images, prior.mean.float(), public.images[-100:])
    for row, control in zip(rows, compared(wrong, private.images), strict=True):
        row["wrong_rounds_psnr_db"] = control["psnr_db"]
    return Result(spent(seen), rows, notes=(shrunk(shape, bench.size),))


def shared(setting: Setting, model: Any, private: Pictures, public: Pictures, seed: int) -> PictureObservation:
    """What the server sees of the client; labels are told."""
    defenses = Chosen.of((setting.defense,) if setting.defense else ()).defenses

    def play(moved: Any, draw: int) -> PictureObservation:
        seen, secret = capture_gradient(moved, private, defenses=defenses, reveal_labels=True, seed=draw)
        return seen if setting.shared == "gradient" else share_update(seen, secret, LOCAL, seed=draw)

    return federated(model, public, setting.rounds, play, seed=seed)


def tell(table: Table) -> Findings:
    """What the most rounds are ahead of one, of each that differs in nothing else; PSNR over rounds."""
    said, names = [], ("shared", "defense", "batch", "attack")
    for row in table.where(rounds=1):
        last = max(table.where(**{name: row[name] for name in names}), key=lambda one: int(one["rounds"]))
        what = ", ".join(str(row[name] or "no defense") for name in names)
        said.append(f"{what}: {row['psnr_db']:.1f} dB from one round, {last['psnr_db']:.1f} from {last['rounds']}")
    labels = {"xlabel": "rounds", "ylabel": "PSNR (dB)"}
    figure = curve(table, "rounds", "psnr_db", names, "wrong_rounds_psnr_db", **labels)
    return Findings(f"{'; '.join(said) or 'Nothing yet'}.", {"Rounds attacked jointly": figure})


STUDY = Study(
    name="rounds",
    question="What do several rounds of one client tell that one does not?",
    settings=settings,
    cell=cell,
    together=lambda setting: "all",
    tell=tell,
    seeds=lambda size: {"smoke": 1, "small": 2, "paper": 10}[size],
)
