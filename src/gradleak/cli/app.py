"""The command line: `gradleak COMMAND ...`. Bad input ends in one sentence and exit code 2, with nothing overwritten."""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import Any

import torch
import tyro

from gradleak.attacks import ALL_ATTACKS, ATTACKS
from gradleak.cli import capture as capture_commands
from gradleak.cli import commands
from gradleak.cli import flags as arguments
from gradleak.errors import BadInput

COMMANDS: dict[str, tuple[type, Any]] = {
    "demo": (arguments.Demo, commands.demo),
    "capture gradient": (arguments.Capture, capture_commands.capture),
    "capture update": (arguments.CaptureUpdate, capture_commands.capture),
    "capture adapter": (arguments.CaptureAdapter, capture_commands.capture_adapter),
    "capture weights": (arguments.CaptureWeights, capture_commands.capture_weights),
    "capture pairs": (arguments.CapturePairs, capture_commands.capture_pairs),
    "train git": (arguments.Train, capture_commands.train),
    "train exact-git": (arguments.Train, capture_commands.train),
    "train lti": (arguments.Train, capture_commands.train),
    "attack": (arguments.Attack, commands.attack),
    "audit": (arguments.Audit, commands.audit),
    "reproduce": (arguments.Reproduce, commands.reproduce),
    "report": (arguments.Report, commands.report),
    "rerun": (arguments.Rerun, commands.rerun),
    "list": (arguments.List, commands.list_all),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run(argv)
    except BadInput as error:
        print(f"gradleak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gradleak: interrupted; what was finished is on disk.", file=sys.stderr)
        return 130
    return 0


def run(argv: list[str]) -> None:
    """Find the command, parse its flags, set threads, do it. Raises BadInput with a sentence."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    name = " ".join(argv[:2]) if argv[0] in ("capture", "train") else argv[0]
    if name not in COMMANDS:
        raise BadInput(f"Unknown command {name!r}{near(name, COMMANDS)} (commands: {', '.join(COMMANDS)}).")
    kind, command = COMMANDS[name]
    flags = argv[len(name.split()) :]
    attacks = selected_attacks(name, flags)
    kind = with_attack_flags(kind, attacks, optional=name == "audit")
    parsed: Any = tyro.cli(kind, args=flags, prog=f"gradleak {name}", description=kind.__doc__)
    if getattr(parsed, "threads", None):
        torch.set_num_threads(parsed.threads)
    if attacks:
        command(parsed, {attack: configured(attack, parsed) for attack in attacks}, argv)
    elif name in ("report", "list"):
        command(parsed)
    else:
        command(parsed, argv)


def selected_attacks(command: str, flags: list[str]) -> list[str]:
    """The attacks named by --attack NAME or --attacks NAME ...; all of them for a bare audit; none for other commands."""
    if command not in ("attack", "audit"):
        return []
    flags = [part for flag in flags for part in flag.split("=", 1)]
    option = "--attack" if command == "attack" else "--attacks"
    if option not in flags:
        return list(ATTACKS) if command == "audit" else []
    names = []
    for value in flags[flags.index(option) + 1 :]:
        if value.startswith("-"):
            break
        names.append(value)
        if command == "attack":
            break
    for name in names:
        if name not in ALL_ATTACKS:
            raise BadInput(f"Unknown attack {name!r}{near(name, ALL_ATTACKS)} (`gradleak list` shows all).")
    return names


def with_attack_flags(kind: type, attacks: list[str], *, optional: bool) -> type:
    """The arguments of a command, extended by the fields of the chosen attacks; None means the attack's default."""
    fields: dict[str, Any] = {}
    for name in attacks:
        for field in hyperparameters(name):
            if optional:
                fields[field.name] = (field.name, field.type | None, None)
            else:
                fields[field.name] = (field.name, field.type, field.default)
    if not fields:
        return kind
    made = dataclasses.make_dataclass(kind.__name__, fields.values(), bases=(kind,), kw_only=True, frozen=True)
    made.__doc__ = kind.__doc__
    return made


def hyperparameters(attack: str) -> list[Any]:
    """The fields of an attack that are flags: not its prior, which is made of public pictures, nor its start, a file."""
    return [field for field in dataclasses.fields(ALL_ATTACKS[attack]) if field.name not in ("prior", "start")]


def configured(attack: str, parsed: Any) -> Any:
    """The attack with the flags that were given for it."""
    names = [field.name for field in hyperparameters(attack)]
    given = {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}
    return ALL_ATTACKS[attack](**given)


def near(name: str, known: Any) -> str:
    """ ", did you mean ...?" when something similar is known."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f": did you mean {' or '.join(close)}?" if close else ""


def usage() -> str:
    """One line per command."""
    lines = [f"  {name:17} {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "usage: gradleak COMMAND [--help] ...\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
