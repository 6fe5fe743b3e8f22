"""Several rounds of one client on the command line: which files they are, and what is audited of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradleak.attacks.labels import recover_labels
from gradleak.audit.explanations import flag
from gradleak.audit.loop import Audited
from gradleak.audit.rounds import EXPLAINED, apart, left, shared
from gradleak.cli import flags
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.round_folder import is_run, number_of, rounds_in
from gradleak.observations.observation import Observation
from gradleak.observations.rounds import Rounds
from gradleak.report.record import Flag

Run = Callable[[Observation[Any], dict[str, Any], str], Sequence[Audited]]

HALF = 0.5  # of the labels, that rounds of the same data have in common at least: recovered ones may be wrong


def round_files(args: flags.Seen) -> dict[int, Path]:
    """{round: file} of a folder of rounds or of --rounds; empty where one thing was shared. BadInput for a client that nothing is known of."""
    path, (more, client) = args.observation, named(args) if isinstance(args, flags.Attacked) else ((), None)
    if path is not None and is_run(path):
        if more:
            raise BadInput(f"{path} holds the rounds of a client already: leave --rounds out.")
        return rounds_in(path, client)
    if client is not None:
        raise BadInput("--client names one of the clients in a folder of rounds, and this is none.")
    if path is None or not more:
        return {}
    files = (path, *more)
    numbers = [number_of(file) for file in files]
    if None in numbers or len(set(numbers)) < len(numbers):
        return dict(enumerate(files, 1))
    return {n: file for n, file in zip(numbers, files, strict=True) if n is not None}


def named(args: flags.Attacked) -> tuple[tuple[Path, ...], str | None]:
    """--rounds and --client."""
    return args.rounds, args.client


def alone(args: Any, file: Path) -> Any:
    """The same command on one of the rounds."""
    other = {"rounds": (), "client": None} if isinstance(args, flags.Attacked) else {}
    return replace(args, observation=file, **other)


def together(each: Mapping[int, Observation[Any]]) -> Observation[Any]:
    """The rounds as one observation, or the only one. BadInput where they cannot be of the same data, by what is told of these or by what
    gradients tell of their labels."""
    if len(each) == 1:
        return next(iter(each.values()))
    joined = Rounds.of(each)
    labels = {number: told for number, one in each.items() if (told := labels_of(one)) is not None}
    for number, own in list(labels.items())[1:]:
        first = next(iter(labels))
        common = sum(min(own.count(c), labels[first].count(c)) for c in set(own))
        if common < HALF * len(own):
            raise BadInput(
                f"Round {number} has other labels than round {first}, as their gradients tell: they are not joined."
            )
    return joined


def one_or_all(each: Mapping[int, Observation[Any]]) -> tuple[dict[str, Observation[Any]], list[Flag]]:
    """{name: observation} of what is audited: all rounds as one, under no name of its own; where they cannot be of the same data, each by
    itself, with the reason."""
    try:
        return {"": together(each)}, []
    except BadInput as reason:
        return {f"round {number}": one for number, one in each.items()}, [flag("rounds", "warning", str(reason))]


def labels_of(observation: Observation[Any]) -> list[int] | None:
    """The labels that an exact gradient tells; None where it tells none for sure."""
    is_text = not hasattr(observation.model.architecture, "input_shape")
    if is_text or observation.defenses != () or observation.labels is not None or not observation.batch_size:
        return None
    try:
        return [int(label) for label in recover_labels(observation)]
    except NotObserved:
        return None


def audited_rounds(
    seen: Mapping[str, Observation[Any]], apart_for: Sequence[Flag], attacks: Mapping[str, Any], run: Run
) -> bool:
    """Audit what `one_or_all` gives, and what there is to audit after that; whether anything came after all. run: audits an observation by
    these attacks, under this name."""
    for name, one in seen.items():
        done = run(one, dict(attacks), name)
        for row in done:
            row.result["flags"] = [*row.result["flags"], *apart_for]
    return bool(apart_for) or audited_apart(one, done, attacks, run)


def audited_apart(observation: Observation[Any], done: Sequence[Audited], attacks: Mapping[str, Any], run: Run) -> bool:
    """What is audited once all rounds were audited together, if anything: the others without those rounds that their explanation does not
    fit, and those alone; where it fits most of them badly, each alone, by the attack that explained most, which tells whether the
    rounds belong together."""
    found = [(one, one.reconstruction) for one in done if one.reconstruction is not None]
    judged = [(rest, one) for one, what in found if (rest := left(observation, what))]
    own = observation.alone()
    if len(own) == 1 or not judged:
        return False
    rest, best = min(judged, key=lambda one: sum(one[0].values()))
    title = best.result["attack"]
    if odd := apart(rest):
        kept = together({n: one for n, one in own.items() if n not in odd})
        run(kept, dict(attacks), kept.name)
    elif max(rest.values()) <= EXPLAINED:
        return False
    each = dict[int, float]()
    for number in odd or own:
        for again in run(own[number], {title: attacks[title]}, f"round {number}"):
            if again.reconstruction is not None and (told := left(own[number], again.reconstruction)):
                each[number] = max(told.values())
    if not odd and len(each) == len(own):
        best.result["flags"] = [*best.result["flags"], *shared(rest, each)]
    return True
