"""What was observed, and what everybody can know besides: the start that a seed drew, the step behind a change,
the number of samples, the factor of a release."""

import sys
from typing import Any

from gradleak.attacks.adam_step import with_step_undone
from gradleak.attacks.factor import with_factor_found
from gradleak.attacks.merged import unmerged, with_merged_recovered
from gradleak.attacks.seed import has_open_start, with_start_recovered
from gradleak.attacks.truncated import with_truncation_undone
from gradleak.attacks.unmixing.span import with_samples_counted
from gradleak.audit.progress import OnStep, progress
from gradleak.cli import flags
from gradleak.cli.inputs import is_of_adapter, observed, seed_range
from gradleak.cli.rounds import alone, round_files, together
from gradleak.errors import BadInput
from gradleak.observations.defense_names import Chosen
from gradleak.observations.merged import was_merged
from gradleak.observations.observation import Observation
from gradleak.victims.gradient import behind


def informed(args: flags.Seen) -> Observation[Any]:
    """What was observed, or all rounds of a client as one observation; BadInput where these cannot be of the same data."""
    return together(informed_rounds(args))


def informed_rounds(args: flags.Seen) -> dict[int, Observation[Any]]:
    """Each round of a client, or what was observed by itself."""
    files = round_files(args)
    if not files:
        return {1: informed_once(args)}
    return {number: informed_once(alone(args, file)) for number, file in files.items()}


def informed_once(args: flags.Seen) -> Observation[Any]:
    """What was observed, and what everybody can know besides: where training began, where a usual seed or one of --seeds draws that."""
    more = seed_range(args.seeds)
    with progress() as start:
        observation = observed(args)
        if isinstance(args, flags.Attacked):
            observation = told(observation, args)
        observation = with_truncation_undone(observation, seeds=more, on_step=start("seed"))
        recover = with_start_recovered if has_open_start(observation) else with_merged_recovered
        if more is not None and recover is with_merged_recovered and unmerged(observation)[0] is None:
            raise BadInput(
                "--seeds says nothing about this observation: there is no start that a seed could have drawn."
            )
        observation = recover(observation, on_step=start("seed"))
        observation = observation if more is None else searched(observation, more, start("seed"))
        observation = with_step_undone(observation)
        folder = args.observation is not None and is_of_adapter(args.observation)
        if args.batch_size is None and (folder or (was_merged(observation) and observation.precision == "float32")):
            observation = with_samples_counted(observation)
        return with_factor_found(observation)


def told(observation: Observation[Any], args: flags.Attacked) -> Observation[Any]:
    """The observation behind the defenses of flags, in place of those that it says; BadInput for defenses of another release."""
    if not args.defense:
        return observation
    return behind(observation, Chosen.of(args.defense).known)


def searched(observation: Observation[Any], more: range, on_step: OnStep) -> Observation[Any]:
    """The observation with its start where one of these seeds drew it; as it is after Ctrl-C, which is told where to go on."""
    reached = more.start

    def tell(tried: int, total: int, value: float) -> None:
        nonlocal reached
        reached = more.start + tried
        on_step(tried, total, value)

    recover = with_start_recovered if has_open_start(observation) else with_merged_recovered
    try:
        return recover(observation, seeds=more, on_step=tell)
    except KeyboardInterrupt:
        left = f"gradleak: the search for the seed stops; --seeds {reached}:{more.stop} goes on with it."
        print(left, file=sys.stderr)
        return observation
