"""What does a prior of pictures add to an adapter of one step? The convnet at rank 8 by a search, the perceptron by its activation patterns:
few and many public pictures behind the Gaussian, learned priors, with controls of equal evaluations on unseen pictures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gradleak.attacks import ATTACKS
from gradleak.attacks.search.start import Given
from gradleak.observations.observation import PictureObservation
from gradleak.studies import adapter_victims as victims
from gradleak.studies.findings import Findings
from gradleak.studies.learned_priors import behind, learned, prior_of
from gradleak.studies.plots import bars, panels
from gradleak.studies.prior_adapters import EFFORT, adapters, begun, gaussian
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

NAMES = ("model", "attack", "prior", "public", "effort", "release")


@dataclass(frozen=True)
class Setting:
    """public: pictures behind the Gaussian, few (as in the studies of adapters) or many. effort: plain; deep, as many evaluations spread over
    prior weights down to 1e-9; long, with those of the sampler besides. release: right, wrong (another's), none (the prior alone)."""

    model: str
    attack: str
    prior: str = "gaussian"
    public: str = "many"
    effort: str = "plain"
    release: str = "right"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Few and many public pictures, learned priors beside the Gaussian of equal evaluations, and blind controls."""
    if size == "smoke":
        yield Setting("convnet", "daps")
        return
    for public in ("few", "many"):
        yield from (Setting("convnet", "map-inversion", "gaussian", public, effort) for effort in ("plain", "deep"))
        yield Setting("mlp1000", "activation-patterns", "gaussian", public)
    priors = learned()
    yield Setting("convnet", "map-inversion", effort="long")
    yield from (Setting("convnet", "daps", prior) for prior in ("gaussian", *priors))
    yield Setting("convnet", "red-diff", priors[0])
    yield from (Setting("convnet", "daps", priors[0], release=release) for release in ("none", "wrong"))
    yield Setting("mlp1000", "activation-patterns", release="wrong")


def cell(setting: Setting, bench: Bench) -> Result:
    """An attack on adapters of one unseen picture each."""
    base, wrong = victims.prepare(setting.model, bench.data, bench.size), setting.release == "wrong"
    private, seen = adapters(setting.model, bench.data, bench.size, bench.seed, wrong)
    prior = gaussian(setting.model, bench.data, bench.size, setting.public)
    plain, samples, levels, evaluations = EFFORT[bench.size]
    most, attack = samples * levels * evaluations, ATTACKS[setting.attack]
    if setting.attack == "activation-patterns":
        ready: Any = attack(prior=prior)
    elif setting.attack == "map-inversion":
        efforts = {"plain": (plain, 1e-7), "deep": (plain * 6 // 8, 1e-9), "long": (plain + most // 6, 1e-7)}
        often, least = efforts[setting.effort]
        ready = attack(prior=prior, evaluations=often, least=least, pairs=victims.PAIRS[bench.size] // 2)
    else:
        shape = base.model.architecture.input_shape
        known = None if setting.prior == "gaussian" else prior_of(setting.prior, shape)
        own = {"samples": samples, "levels": levels, "evaluations": evaluations}
        own = own if setting.attack == "daps" else {"steps": most}
        solver = attack(prior=known, gaussian=prior, blind=setting.release == "none", **own)
        starts = iter(begun(bench.data, bench.size, bench.seed, wrong))

        def ready(observation: PictureObservation, **given: Any) -> Any:
            return replace(solver, start=Given(next(starts)))(observation, **given)

    return victims.attacked(base, ready, seen, victims.batched(private, 1), bench, len(private.labels))


def tell(table: Table) -> Findings:
    """The best of each model beside the Gaussian of few pictures."""
    said, right = [], [row for row in table.rows if row["release"] == "right" and row.get("psnr_db") is not None]
    for model in dict.fromkeys(row["model"] for row in right):
        rows = [row for row in right if row["model"] == model]
        best, about = max(rows, key=lambda row: row["psnr_db"]), {"public": "few", "effort": "plain"}
        plain = next((row for row in rows if all(row[name] == value for name, value in about.items())), best)
        said.append(
            f"{model}: {plain['psnr_db']:.1f} dB under a Gaussian of few public pictures, {best['psnr_db']:.1f} dB at best "
            f"({', '.join(str(best[name]) for name in NAMES[1:5])})"
        )
    figure, [axes] = panels(width=7, height=1 + 0.25 * len(right))
    if right:
        bars(axes, right, lambda row: ", ".join(str(row[name]) for name in NAMES[:5]), "psnr_db")
    axes.set(xlabel="PSNR (dB)")
    return Findings(f"{'; '.join(said) or 'Nothing yet'}.", {"Priors on adapters": figure})


def depends(setting: Setting) -> tuple[Any, ...]:
    """The attacks, and the folder of the denoiser where it is that."""
    return (ATTACKS[setting.attack], *behind(setting.prior))


STUDY = Study(
    name="priors-on-adapters",
    question="What do priors of pictures, and more public pictures, add to an adapter of one step?",
    settings=settings,
    cell=cell,
    together=lambda setting: setting.model,
    tell=tell,
    beside=("mnist",),
    depends=depends,
)
