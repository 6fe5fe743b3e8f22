"""What --prior and --refine make of the attacks."""

from dataclasses import replace
from typing import Any

from gradleak.attacks import ATTACKS
from gradleak.attacks.parameters import built, under
from gradleak.cli import flags
from gradleak.errors import BadInput
from gradleak.observations.observation import Observation
from gradleak.priors.named import load_prior

UNDER_PRIOR = ("daps",)  # attacks that a bare audit adds where a prior is given
REFINING = "guide"  # the attack that --refine is about


def with_prior(
    attacks: dict[str, Any], args: flags.Attacked, observation: Observation[Any], public: Any
) -> dict[str, Any]:
    """The attacks, with one that cleans up after another, under the prior of the flags, and what is to be seen beside them."""
    if args.refine is not None:
        [after] = built({args.refine: {}}).values()
        attacks = {**attacks, REFINING: replace(attacks.get(REFINING, ATTACKS[REFINING]()), after=after)}
    if args.prior is None:
        return attacks
    shape = getattr(observation.model.architecture, "input_shape", None)
    if shape is None:
        raise BadInput("--prior says what is known of pictures, and the observed model takes none.")
    return under(attacks, load_prior(args.prior, shape, public.images), args.prior)
