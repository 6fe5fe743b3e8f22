"""The parameters of attacks as plain values, checked: what flags, records and files of studies give."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from gradleak.attacks import ATTACKS
from gradleak.errors import BadInput, checked, near, shortened
from gradleak.priors.prior import Denoiser, Energy

MOST = 1_000_000  # steps, trials, candidates, ...; no parameter is negative
FROM_ONE = ("restarts", "trials")  # without one there is no result
PRIORS: dict[Any, str] = {
    Energy: "energy",
    Denoiser: "denoise",
}  # what an attack may ask for, and what a prior then has
PLAIN = (str, int, float, bool, Path)


def check_names(names: list[str]) -> None:
    """BadInput for the first name that is no attack."""
    for name in names:
        if name not in ATTACKS:
            raise BadInput(f"Unknown attack {shortened(name)!r}{near(name, ATTACKS)} (`gradleak list` shows all).")


def parameters(attack: str) -> list[dataclasses.Field[Any]]:
    """The fields of an attack that are flags: plain values. What is made of public data, or is another attack, is none."""
    hints = get_type_hints(ATTACKS[attack])
    return [
        field
        for field in dataclasses.fields(ATTACKS[attack])
        if hints[field.name] in PLAIN or hints[field.name] in [kind | None for kind in PLAIN]
    ]


def built(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The attacks with these parameters; BadInput for what is no parameter of theirs, or of another type."""
    check_names(list(options))
    attacks = {}
    for name, values in options.items():
        known = {field.name for field in parameters(name)}
        if unknown := [key for key in values if key not in known]:
            raise BadInput(f"{name} has no parameter {shortened(unknown[0])!r}.")
        hints = get_type_hints(ATTACKS[name])
        converted = {
            key: value
            if isinstance(value, Path)
            else typed(value, hints[key], f"The parameter {key} of {name} is unusable", int(key in FROM_ONE))
            for key, value in values.items()
        }
        attacks[name] = ATTACKS[name](**converted)
    return attacks


def under(attacks: Mapping[str, Any], prior: Any, text: str) -> dict[str, Any]:
    """The attacks, each that can with this prior, in the place of its own; beside each that samples or searches under a denoiser, as
    rows of their own, the same under a Gaussian, and with the prior alone. Raises BadInput where none takes such a prior."""
    placed: dict[str, Any] = {}
    for name, attack in attacks.items():
        takes = takes_prior(type(attack), prior)
        placed[name] = dataclasses.replace(attack, prior=prior) if takes else attack
        if takes and hasattr(attack, "blind"):
            placed[f"{name}-gaussian-prior"] = dataclasses.replace(attack, prior=None)
            placed[f"{name}-prior-alone"] = dataclasses.replace(attack, prior=prior, blind=True)
    if not any(takes_prior(type(attack), prior) for attack in attacks.values()):
        able = [name for name, kind in ATTACKS.items() if takes_prior(kind, prior)]
        raise BadInput(f"None of these attacks takes the prior {shortened(text)}: it goes with {', '.join(able)}.")
    return placed


def takes_prior(kind: type, prior: Any) -> bool:
    """Whether an attack has a field for such a prior: a price on pictures, a denoiser, or one kind of them."""
    wanted = get_type_hints(kind).get("prior")
    for protocol, method in PRIORS.items():
        if wanted == protocol | None:
            return hasattr(prior, method)
    return bool(wanted == type(prior) | None)


def typed(value: Any, kind: Any, what: str, least: int) -> Any:
    """A plain value as the field's type, numbers within bounds; paths are written as text."""
    if kind in (Path, Path | None):
        text = checked(value, str | None, what)  # type: ignore[arg-type]
        return None if text is None else Path(text)
    number = checked(value, kind, what)
    if isinstance(number, int | float) and not least <= number <= MOST:
        raise BadInput(f"{what}: it lies between {least} and {MOST:,}, not at {number:,}.")
    return number
