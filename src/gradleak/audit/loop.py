"""The one loop: observation -> applicable attacks -> match -> score -> check -> a row of the record each.

It knows neither kinds of release nor kinds of data: attacks say what they read (`sees`), `SCORING` says how what they return is
compared, and everything else is asked of the observation.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks.attack import Attack, placed, refusal
from gradleak.attacks.factor import with_factor_found
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.round_by_round import attacked
from gradleak.attacks.search.descend import OnStep
from gradleak.audit import privacy, rounds
from gradleak.audit.checks import check_observation, check_result, information, replay, trained_on_secret, unexplained
from gradleak.audit.explanations import at_reconstruction
from gradleak.audit.intervals import mean
from gradleak.audit.labels_told import labels_told
from gradleak.audit.repeats import Run, kept, repeated, same
from gradleak.audit.scoring import SCORING
from gradleak.audit.scoring.scoring import WRONG_OBSERVATION, Scores, Scoring
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.observation import Observation
from gradleak.report.record import Flag, Result, new_result

RANK = "identification_rank"
WHITE = 0.25  # of the range of pixels
UNABLE = (NotObserved, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
UNEVEN = "The numbers are too uneven for linear algebra."


@dataclass(frozen=True)
class Audited:
    """One attack's row of the record, and what it returned (None if it could not run)."""

    result: Result
    reconstruction: Reconstruction | None


def audit(
    observation: Observation[Any],
    attacks: Mapping[str, Attack],
    public: Any | None,
    *,
    secret: Secret | None = None,
    seed: int = 0,
    repeats: int = 1,
    device: str = "cpu",
    name: str = "",
    on_step: Callable[[str], OnStep] | None = None,
    bound: bool = True,
    told: Mechanism | None = None,
    skipped: Mapping[str, str] | None = None,
) -> Iterator[Audited]:
    """Run each attack on the observation, and score it against controls if the secret is there; yields as they finish.

    public: data of the observation's kind that everybody may know (`SCORING[...].public`); for priors, controls and decoys.
    Without them, or without the secret, nothing is scored. name: of the observation, where a record holds several.
    on_step: called with the attack's name before it runs, returns its progress callback; NotObserved out of either ends that attack.
    repeats: under how many seeds each attack runs, from `seed` on; the one that explains most is kept, as an attacker would, and all are
    told. An attack that returns the same under two seeds draws nothing, and is not run again.
    bound: whether to ask besides what the release determines at all (bound.py), which may take longer than the attacks.
    told: how private the training was, where the observation does not say so itself.
    skipped: attacks that are not tried, and why (plan.py).
    Raises BadInput for a secret of another kind or size.
    """
    model = observation.model
    scoring = SCORING[model.architecture.modality]
    if secret is not None:
        scoring.check(secret.inputs, model)
    observation = with_factor_found(observation)
    about, where = describe(observation, name), torch.device(device)
    decoys, rest = (None, None) if public is None else scoring.split(public)
    pool = cache(
        lambda: None if public is None else scoring.wider(public, model, None if secret is None else secret.inputs)
    )
    mechanism = privacy.mechanism_of(observation, told)
    general = rounds.of_each(check_observation, observation)
    general += privacy.of_observation(observation, mechanism, secret, decoys)
    observation, told_labels = labels_told(observation, rest, secret, seed)
    general += told_labels
    if secret is not None:
        inputs, labels = secret.inputs, secret.labels
        general += rounds.of_each(lambda one: replay(one, inputs, labels), observation)
        general += information(observation, inputs, labels, "at the truth") if bound else []
        general += privacy.least_error(observation, secret, rest) if bound else []
    for title, attack in attacks.items():
        if reason := refusal(attack, observation):
            yield Audited(not_run(title, attack, about, general, reason), None)
            continue
        if reason := (skipped or {}).get(title, ""):
            yield Audited({**not_run(title, attack, about, general, ""), "status": f"Not tried: {reason}"}, None)
            continue
        try:
            runs = under_seeds(attack, observation, pool, range(seed, seed + repeats), where, title, on_step)
        except UNABLE as error:
            reason = str(error) if isinstance(error, NotObserved) else UNEVEN
            yield Audited(not_run(title, attack, about, general, reason), None)
            continue
        run = kept(runs)
        ready, reconstruction = run.ready, run.reconstruction
        told_of = [*rounds.attacked_as(observation, attack), *general]
        row = new_result(title, parameters(ready), about, told_of)
        row["defense"] = about["defense"]
        row |= evidence(reconstruction, run.seconds)
        if isinstance(reconstruction.value, int):
            row["count"] = {"recovered": reconstruction.value} | ({} if secret is None else {"true": len(secret)})  # type: ignore[typeddict-item]
            yield Audited(row, reconstruction)
            continue
        row |= {"media": scoring.media, "shown": {"reconstruction": model.architecture.show(reconstruction.value)}}  # type: ignore[typeddict-item]
        row["shown"] = {**row["shown"], **invented(observation, reconstruction, range(len(reconstruction.value)))}
        fits = rounds.fit(observation, reconstruction)
        if secret is None:
            count = observation.batch_size or len(reconstruction.value)
            labels = None if reconstruction.labels is None else reconstruction.labels[:count]
            row["flags"] = [
                *told_of,
                *fits,
                *(
                    information(observation, reconstruction.value[:count], labels, "at this reconstruction")
                    if bound
                    else []
                ),
                *at_reconstruction(observation, reconstruction),
                *(unexplained(reconstruction.residual) if observation.release.replays else []),
            ]
        elif public is not None:
            other = others(observation, scoring, public, max(len(reconstruction.value), len(secret)), seed)
            try:
                draws = torch.Generator().manual_seed(run.seed)
                wrong = attacked(ready, placed(attack, other, where), generator=draws).value
            except UNABLE:
                wrong = model.architecture.blank(len(secret))
            score(row, observation, scoring, reconstruction, wrong, secret, public, decoys)
            row["flags"] = [*row["flags"], *fits, *trained_on_secret(ready, secret), *privacy.of_result(row, mechanism)]
        if len(runs) > 1:
            row["repeats"] = repeated(row, observation, scoring, runs, secret, decoys)
        yield Audited(row, reconstruction)


def not_run(name: str, attack: Attack, about: Mapping[str, Any], flags: list[Flag], reason: str) -> Result:
    """The row of an attack that could not run, with the reason."""
    row = new_result(name, parameters(attack), about, flags)
    return {**row, "defense": about["defense"], "ran": False, "status": f"Not run: {reason}"}


def evidence(found: Reconstruction, seconds: float) -> Any:
    """What a row says of a reconstruction by itself."""
    row: dict[str, Any] = {
        "ran": True,
        "seconds": seconds,
        "status": found.status,
        "outcome": found.outcome.name.lower(),
        "residual": found.residual,
        "iterations": found.iterations,
        "trace": found.trace,
    }
    if found.proven:
        row["proven"] = list(found.proven)
    if found.labels is not None:
        row["labels"] = {"recovered": found.labels.tolist()}
    return row


def under_seeds(
    attack: Attack,
    observation: Observation[Any],
    public: Callable[[], Any],
    seeds: Iterable[int],
    where: torch.device,
    title: str,
    on_step: Callable[[str], OnStep] | None,
) -> list[Run]:
    """The attack under one seed after the other, until two of them return the same."""
    runs = list[Run]()
    for seed in seeds:
        start = time.perf_counter()
        report = on_step(title) if on_step is not None else None
        ready = prepared(attack, observation, public, seed)
        generator = torch.Generator().manual_seed(seed)
        found = attacked(ready, placed(attack, observation, where), generator=generator, on_step=report)
        runs.append(Run(seed, ready, found, time.perf_counter() - start))
        if len(runs) == 2 and same(*(run.reconstruction for run in runs)):
            return runs[:1]
    return runs


def prepared(attack: Any, observation: Observation[Any], public: Callable[[], Any], seed: int) -> Any:
    """The attack with what it makes of public data beforehand (a prior, a decoder, a zoo), if it has any use for them."""
    if not hasattr(attack, "prepared") or (data := public()) is None:
        return attack
    return attack.prepared(observation, data, generator=torch.Generator().manual_seed(seed))


def others(observation: Observation[Any], scoring: Scoring, public: Any, count: int, seed: int) -> Observation[Any]:
    """An observation of the same kind that says nothing of the secret: the same victim, trained on public data."""
    return observation.of_others(*scoring.sample(observation.model, public, count, seed))


def score(
    row: Result,
    observation: Observation[Any],
    scoring: Scoring,
    found: Reconstruction,
    wrong: Any,
    secret: Secret,
    public: Any,
    decoys: Any,
) -> None:
    """Put scores, controls, leads, flags and what is to be seen into the row, one entry per true sample."""
    model = observation.model
    truth = model.architecture.original(secret.inputs, secret.labels)
    matched, order = scoring.match(model, found.value, truth)
    guesses = {control.name: control.guess(model, truth, public) for control in scoring.controls}
    guesses[WRONG_OBSERVATION.name] = scoring.match(model, wrong, truth)[0]
    scores = scoring.score(model, matched, truth)
    controls: dict[str, Scores] = {name: scoring.score(model, guess, truth) for name, guess in guesses.items()}
    leads = scoring.leads(scores, controls)
    if (ranks := scoring.rank(matched, truth, decoys)) is not None:
        scores[RANK] = ranks.tolist()
        row["decoys"] = len(decoys.labels)
    row |= {"scores": scores, "controls": controls, "leads": leads}
    measured = {key: values for key, values in {**scores, "leads": leads}.items() if key != RANK}
    row["intervals"] = {key: ends for key, values in measured.items() if (ends := mean(values)) is not None}
    row["recovered"], row["partly"] = scoring.recovered(scores, leads), scoring.partly(scores, leads)
    if found.bag and scoring.in_bag is not None and not all(row["recovered"]):
        told, sentence = scoring.in_bag(model, found.bag, truth, public)
        row["partly"] = [a or b for a, b in zip(row["partly"], told, strict=True)]
        row["flags"] = [*row["flags"], {"name": "bag", "level": "info", "sentence": sentence}]
    if found.proven:
        row["proven"] = [found.proven[i] if 0 <= i < len(found.proven) else False for i in order]
    show = model.architecture.show
    own = {"truth": show(truth), "reconstruction": show(matched), **invented(observation, found, order)}
    row["shown"] = own | {name: show(guess) for name, guess in guesses.items()}
    if secret.labels is not None and found.labels is not None and len(found.labels) == len(secret):
        row["labels"] = {
            "recovered": called(found.labels[order], secret.classes),
            "true": called(secret.labels, secret.classes),
        }
    row["flags"] = [*row["flags"], *check_result(observation, scoring, found, secret, leads=leads, public=public)]


def called(labels: torch.Tensor, names: Sequence[str]) -> list[int | str]:
    """Labels by their names, where these are known."""
    return [names[label] if isinstance(label, int) and 0 <= label < len(names) else label for label in labels.tolist()]


def invented(observation: Observation[Any], found: Reconstruction, order: Iterable[int]) -> dict[str, list[str]]:
    """What the prior has added, as a picture of each sample: white where samples are `WHITE` apart. Nothing where there is one answer."""
    if found.spread is None:
        return {}
    apart = torch.cat([found.spread, torch.zeros_like(found.spread[:1])])[list(order)]  # -1: what was not returned
    return {"invented": observation.model.architecture.show((apart / WHITE).clamp(0, 1))}


def parameters(attack: Any) -> dict[str, Any]:
    """The attack's hyperparameters as plain data; of what was prepared or trained, what it was made of."""
    values = {field.name: getattr(attack, field.name) for field in fields(attack)}
    plain = (str, int, float, bool, type(None))
    return {
        name: value if isinstance(value, plain) else str(value) if isinstance(value, Path) else summary(value)
        for name, value in values.items()
    }


def summary(value: Any) -> str:
    """A value that is no plain data, in a few words."""
    return str(value) if "__str__" in vars(type(value)) else type(value).__name__


def describe(observation: Observation[Any], name: str = "") -> dict[str, Any]:
    """The observation as plain data: kind, model, and what of it was revealed."""
    model, defenses = observation.model, observation.defenses
    return {
        "name": name or observation.name,
        "kind": observation.release.name,
        "data": model.architecture.secret,
        "architecture": model.architecture.name,
        "mode": model.mode,
        "batch_size": observation.batch_size,
        "precision": observation.precision,
        "state_hash": model.state_hash()[:16],
        "revealed": [str(row["item"]) for row in observation.threat_model() if row["revealed"]],
        "defense": None
        if defenses == ()
        else {"kind": "unknown" if defenses is None else ", ".join(map(str, defenses))},
    }
