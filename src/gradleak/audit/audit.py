"""The one loop: observation -> applicable attacks -> match -> score -> check -> record."""

import base64
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.func import vmap

from gradleak.attacks import WEIGHTS_ATTACKS
from gradleak.attacks.dataset_size import DatasetSize
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.audit import metrics
from gradleak.audit.bound import identifiability
from gradleak.audit.checks import check_observation, check_result, flag, replay
from gradleak.audit.jacobian import MOST_UNKNOWNS
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.pictures import Pictures
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Adapter, Weights
from gradleak.priors.gaussian import GaussianPrior
from gradleak.report.record import Flag, Result, Verdict, new_result

ZOO_SIZES, ZOO_COPIES = (1, 2, 3, 4, 5, 6), 12  # of the adapters that the number of samples is estimated from
DECOYS = 99  # identification among 100: the truth and 99 public pictures
CLEAR_LEAD_DB = 3.0  # an image counts as recovered when it is identified, with half the error of any blind control


class Attack(Protocol):
    """What every attack is: a frozen dataclass of hyperparameters with one call."""

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction: ...


@dataclass(frozen=True)
class Audited:
    """One attack's row of the record, and what it returned (None if it could not run)."""

    result: Result
    reconstruction: Reconstruction | None


def audit(
    observation: PictureObservation,
    attacks: dict[str, Attack],
    public: Pictures | None,
    *,
    secret: Secret | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[str], OnStep] | None = None,
) -> Iterator[Audited]:
    """Run each attack on the observation, and score it against controls if the secret is there; yields as they finish.

    public: pictures of the observation's shape that everybody may know; for controls and decoys, not for the attacks.
    Without them, or without the secret, nothing is scored.
    on_step: called with the attack's name before it runs, returns its progress callback.
    """
    if secret is not None and tuple(secret.images.shape[1:]) != observation.model.architecture.input_shape:
        raise BadInput(
            f"The secret's images are {tuple(secret.images.shape[1:])}, the model's {observation.model.architecture.input_shape}."
        )
    where = torch.device(device)
    general = check_observation(observation)
    if isinstance(observation, Adapter) and public is not None and len(public.labels) > 2 * DECOYS:
        general += [dataset_size(observation, public, seed)]
    if secret is not None and not isinstance(observation, Weights):
        general += replay(observation, secret.images, secret.labels)
        if isinstance(observation, Adapter):
            general += [information(observation, secret.images, secret.labels, "at the true pictures")]
    for name, attack in attacks.items():
        row = new_result(name, parameters(attack), describe(observation), general)
        report = on_step(name) if on_step is not None else None
        start = time.perf_counter()
        try:
            if isinstance(observation, Weights) and not isinstance(attack, tuple(WEIGHTS_ATTACKS.values())):
                raise NotObserved("trained weights were released, and this attack reads gradients.")
            found = attack(observation.to(where), generator=torch.Generator().manual_seed(seed), on_step=report)
        except NotObserved as reason:
            yield Audited({**row, "status": f"Not run: {reason}"}, None)
            continue
        row |= {
            "seconds": time.perf_counter() - start,
            "status": found.status,
            "residual": found.residual,
            "iterations": found.iterations,
            "trace": found.trace,
            "labels": {"recovered": found.labels.tolist()},
            "pictures": {"reconstruction": pictures(found.images)},
        }
        if secret is None and isinstance(observation, Adapter):
            here = found.images[: observation.batch_size], found.labels[: observation.batch_size]
            row["flags"] = [*general, information(observation, *here, "at this reconstruction")]
        if secret is not None and public is not None:
            other = wrong_observation(observation, public, len(found.images), seed).to(where)
            wrong = attack(other, generator=torch.Generator().manual_seed(seed))
            score(row, observation, found, wrong, secret, public)
            row["flags"] = [*row["flags"], *trained_on_secret(attack, secret)]
        yield Audited(row, found)


def with_prior(attack: Any, public: Pictures | None) -> Any:
    """The attack with a prior of the public pictures, if it takes one and they are enough; decoys stay out of it.

    With fewer pictures than half the pixels of one, their covariance is worse than that of photographs in general.
    """
    takes = any(field.name == "prior" for field in fields(attack))
    if not takes or public is None or len(public.images) - DECOYS < public.images[0].numel() / 2:
        return attack
    return replace(attack, prior=GaussianPrior.fit(public.images[DECOYS:]))


def parameters(attack: Any) -> dict[str, Any]:
    """The attack's hyperparameters as plain data: of a prior, what it was made of."""
    own = {field.name: getattr(attack, field.name) for field in fields(attack)}
    if isinstance(prior := own.get("prior"), GaussianPrior):
        own["prior"] = "smooth" if prior.pictures is None else f"{len(prior.pictures)} public pictures"
    if (start := own.get("start")) is not None:
        own["start"] = type(start).__name__
    return {name: str(value) if isinstance(value, Path) else value for name, value in own.items()}


def dataset_size(observation: Adapter, public: Pictures, seed: int) -> Flag:
    """How many samples trained the adapter, from a zoo made here: its own start and recipe on public pictures.

    Without a recipe the length of the change says nothing, and only the shapes of the spectra are compared.
    """
    generator, classes = torch.Generator().manual_seed(seed), observation.model.architecture.classes
    adapters, sizes = list[Adapter](), list[int]()
    for n in ZOO_SIZES:
        rows = torch.randint(len(public.labels), (ZOO_COPIES, n), generator=generator)
        made = vmap(observation.simulate)(public.images[rows], public.labels[rows] % classes)
        for i in range(ZOO_COPIES):
            released = {name: tensor[i].detach() for name, tensor in made.items()}
            adapters.append(replace(observation, released=released, batch_size=n, labels=None))
            sizes.append(n)
    zoo = DatasetSize.fit(adapters, torch.tensor(sizes), norm=observation.recipe is not None)
    told = (
        f"against {len(sizes)} adapters of 1 to {max(sizes)} public samples; more would be answered with {max(sizes)}"
    )
    return flag("dataset_size", "info", f"{zoo(observation).sentence} ({told}.)")


def information(observation: PictureObservation, images: Tensor, labels: Tensor, where: str) -> Flag:
    """What the release determines, whether or not an attack finds it: identifiability.py, as a flag."""
    if images.numel() > MOST_UNKNOWNS:
        sentence = f"{images.numel():,} unknown pixels: too many to ask here what the release determines."
        return flag("information_unknown", "info", sentence)
    known = identifiability(observation, images, labels)
    return flag(f"information_{known.information()}", "info", f"{known.sentence()} (Linear regime, {where}.)")


def trained_on_secret(attack: Any, secret: Secret) -> list[Flag]:
    """An error if the attack's generator has seen private pictures in training."""
    if (path := getattr(attack, "generator", None)) is None:
        return []
    seen = int(torch.isin(learned.picture_hashes(secret.images), learned.pictures_behind(path)).sum())
    sentence = f"{seen} private images are among those that the generator was trained on: it has seen the secret."
    return [flag("secret_in_training", "error", sentence)] if seen else []


def score(
    row: Result, observation: PictureObservation, found: Reconstruction, wrong: Reconstruction, secret: Secret, public: Pictures
) -> None:
    """Put scores, controls, flags and pictures into the row, one entry per true image."""
    truth = secret.images
    recovered, blind_guess = (with_grey(images, len(truth)) for images in (found.images, wrong.images))
    matched = metrics.match(recovered, truth)
    candidates = {
        "reconstruction": recovered[matched],
        "mean_image": metrics.mean_image(public.images).expand_as(truth),
        "nearest_public": metrics.nearest_public(truth, public.images),
        "wrong_observation": blind_guess[metrics.match(blind_guess, truth)],
    }
    scores = {name: similarity(images, truth) for name, images in candidates.items()}
    decoys = public.images[:DECOYS]
    ranks = metrics.identification(candidates["reconstruction"], truth, decoys)
    blind = torch.maximum(*(torch.tensor(scores[name]["psnr_db"]) for name in ("mean_image", "wrong_observation")))
    row["decoys"] = len(decoys)
    row["scores"] = {**scores.pop("reconstruction"), "identification_rank": ranks.tolist()}
    row["controls"] = scores
    row["pictures"] = {"truth": pictures(truth)} | {name: pictures(images) for name, images in candidates.items()}
    labels = {"true": secret.labels.tolist()}
    if len(found.labels) == len(truth):
        labels["recovered"] = found.labels[matched].tolist()
        row["labels"] = labels  # type: ignore[typeddict-item]
    psnr_db = torch.tensor(row["scores"]["psnr_db"])
    row["flags"] = [
        *row["flags"],
        *check_result(observation, found, secret, psnr_db=psnr_db, blind_psnr_db=blind, public=public.images),
    ]


def with_grey(images: Tensor, count: int) -> Tensor:
    """At least `count` images: grey ones stand for those that an attack did not return."""
    missing = max(count - len(images), 0)
    return torch.cat([images, images.new_full((missing, *images.shape[1:]), 0.5)])


def similarity(images: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Every picture metric that can be measured here, per image: LPIPS only when its weights are present."""
    scores = {"psnr_db": metrics.psnr_db(images, truth), "ssim": metrics.ssim(images, truth)}
    perceptual = metrics.lpips(images, truth)
    return {
        name: values.tolist()
        for name, values in (scores | ({} if perceptual is None else {"lpips": perceptual})).items()
    }


def wrong_observation(observation: PictureObservation, public: Pictures, batch: int, seed: int) -> PictureObservation:
    """An observation of the same kind that says nothing of the secret: the same victim, trained on public pictures."""
    classes = observation.model.architecture.classes
    rows = torch.randperm(len(public.labels), generator=torch.Generator().manual_seed(seed))[:batch]
    images, labels = public.images[rows], public.labels[rows] % classes
    released = {name: tensor.detach() for name, tensor in observation.simulate(images, labels).items()}
    return replace(observation, released=released, labels=None if observation.labels is None else labels)


def verdict(results: list[Result]) -> Verdict:
    """One sentence over all attacks: how many images were recovered, by what, and next to which control."""
    scored = [row for row in results if row["scores"]]
    if not scored:
        ran = [row for row in results if row["residual"] is not None]
        if not ran:
            return {"level": "unscored", "sentence": "No attack could run on this observation."}
        best = min(ran, key=lambda row: row["residual"] or 0.0)
        sentence = f"{best['attack']} explains the observation best (relative residual {best['residual']:.2g}); without the secret, no picture was scored."
        sentence += "".join(" " + note["sentence"] for note in best["flags"] if note["name"].startswith("information_"))
        return {"level": "unscored", "sentence": sentence}

    def recognised(row: Result) -> int:
        return sum(
            rank == 1 and ahead >= CLEAR_LEAD_DB
            for rank, ahead in zip(row["scores"]["identification_rank"], lead_db(row), strict=True)
        )

    best = max(scored, key=lambda row: (recognised(row), sum(lead_db(row))))
    total, count, lead = len(lead_db(best)), recognised(best), sum(lead_db(best)) / len(lead_db(best))
    if not count:
        told = {note["name"] for note in best["flags"]}
        known = {
            "information_absent": " The information is absent from the release.",
            "information_partial": " The release holds part of the information; no attack found it.",
            "information_present": " The information is present in the release: no attack found it, another may.",
        }
        extra = "".join(sentence for name, sentence in known.items() if name in told)
        sentence = f"None of {total} private images was recovered: the closest attack, {best['attack']}, is {lead:+.1f} dB on average against the best blind control."
        return {"level": "nothing", "sentence": sentence + extra}
    mean = sum(v or 0 for v in best["scores"]["psnr_db"]) / total
    sentence = f"{count} of {total} private images recovered by {best['attack']}: {mean:.1f} dB on average, {lead:+.1f} dB against the best blind control, identified among {best.get('decoys', 0) + 1}."
    return {"level": "recovered" if count == total else "partial", "sentence": sentence}


def lead_db(row: Result) -> list[float]:
    """PSNR of the attack minus that of the best control which saw nothing of this secret, per image."""
    controls = [row["controls"][name]["psnr_db"] for name in ("mean_image", "wrong_observation")]
    return [
        float(own or 0) - max(float(c or 0) for c in blind)
        for own, *blind in zip(row["scores"]["psnr_db"], *controls, strict=True)
    ]


def describe(observation: PictureObservation) -> dict[str, Any]:
    """The observation as plain data: kind, model, and what of it was revealed."""
    model = observation.model
    about: dict[str, Any] = {
        "kind": type(observation).__name__,
        "architecture": model.architecture.name,
        "mode": model.mode,
    }
    about |= {
        "batch_size": observation.batch_size,
        "precision": observation.precision,
        "state_hash": model.state_hash()[:16],
    }
    return about | {"revealed": [row["item"] for row in observation.threat_model() if row["revealed"]]}


def pictures(images: Tensor) -> list[str]:
    """(n, 1 or 3, height, width) in [0, 1] -> one PNG data URI each."""
    uris = []
    for image in (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu():
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, "PNG")
        uris.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return uris
