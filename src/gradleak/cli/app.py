"""The command line: `gradleak COMMAND ...`. Bad input ends in one sentence and exit code 2, with nothing overwritten.

Nothing heavy is imported before a command needs it: help, versions and typing errors cost a tenth of a second.
"""

import importlib
import inspect
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, get_type_hints

from gradleak.errors import BadInput, near, shortened
from gradleak.victims import VICTIMS

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("gradleak.cli.auditing:demo", "The main job on embedded pictures: capture, attack, write the report."),
    **{f"capture {name}": ("gradleak.cli.capture:capture", summary) for name, (_, summary) in VICTIMS.items()},
    "capture pairs": (
        "gradleak.cli.capture:capture_pairs",
        "Make pairs of public data and gradients, for learned attacks.",
    ),
    "train git": ("gradleak.cli.capture:train_by_descent", "Train the generator of git for the observed model."),
    "train exact-git": (
        "gradleak.cli.capture:train_exactly",
        "Recover the weights of the observed model, for exact-git.",
    ),
    "train lti": ("gradleak.cli.capture:train_by_descent", "Train the generator of lti for the observed model."),
    "train denoiser": ("gradleak.cli.denoiser:train_denoiser", "Train a denoiser on public pictures, as a prior."),
    "attack": ("gradleak.cli.auditing:attack", "Reconstruct the private data with one attack. Sees no secret."),
    "audit": (
        "gradleak.cli.auditing:audit",
        "Run every applicable attack, score it if the secret is given, write a report.",
    ),
    "canaries make": ("gradleak.cli.canaries:make", "Make canaries to train with, half of them by the flip of a coin."),
    "canaries score": (
        "gradleak.cli.canaries:score",
        "Which canaries were trained on? A lower bound on the epsilon of a training, from one run.",
    ),
    "extract": (
        "gradleak.cli.extract:extract",
        "Which of your texts does a language model give back? Which of these candidates is in there?",
    ),
    "defend": ("gradleak.cli.defend:defend", "Defend a release that is at hand, to audit it again."),
    "study": (
        "gradleak.cli.commands:study",
        "Run an experiment, published or your own: resumable, in processes or on Ray.",
    ),
    "reproduce": ("gradleak.cli.commands:study", "The same, under its old name."),
    "report": ("gradleak.cli.commands:report", "Render a record again."),
    "rerun": ("gradleak.cli.commands:rerun", "Run the command of a record again, with the same seed and parameters."),
    "list": ("gradleak.cli.commands:list_all", "Attacks, what each needs and recovers; studies; models."),
}
GROUPS = ("capture", "train", "canaries")  # whose commands have two words
LONGEST = 1_000  # characters of a sentence on the terminal
LARGEST_SEED = 2**32 - 1
OUT_OF_MEMORY = (
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "Storage size calculation overflowed",
)  # as torch says it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C; of an audit with a bar also 1 and 3, as `gate` says."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what no terminal can write
    try:
        return run(argv) or 0
    except BadInput as error:
        return complain(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return complain("This needs more memory than there is: take a smaller model, fewer samples or another machine.")
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return 0
        return complain(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ") + ".")
    except KeyboardInterrupt:
        print("gradleak: interrupted; what was finished is on disk.", file=sys.stderr)
        return 130


def complain(sentence: str) -> int:
    """One printable line on stderr, whatever a file may have put into it; returns the exit code of bad input."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(sentence.split()))
    print(f"gradleak: {line[:LONGEST]}", file=sys.stderr)
    return 2


def run(argv: list[str]) -> int:
    """Find the command, parse its flags, set threads, do it; returns the exit code. Raises BadInput with a sentence."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(COMMANDS))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"gradleak {metadata.version('gradleak')}")
        return 0
    words = 2 if argv[0] in GROUPS else 1
    name = " ".join(argv[:words])
    if argv[0] in GROUPS and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        print(usage(known for known in COMMANDS if known.startswith(f"{argv[0]} ")))
        return 0
    if name not in COMMANDS:
        raise BadInput(f"Unknown command {shortened(name)!r}{near(name, COMMANDS)} (commands: {', '.join(COMMANDS)}).")
    return start(name, argv[words:])


def start(name: str, given: list[str]) -> int:
    """Parse the flags of a command of this name, and do it; returns the exit code."""
    import tyro

    from gradleak.cli import attack_flags

    place, summary = COMMANDS[name]
    command = located(place)
    kind = kind_of(name, command)
    given = attack_flags.with_own_imported(name, given)
    attacks = attack_flags.selected(name, given)
    parsed: Any = tyro.cli(
        attack_flags.extended(kind, attacks), args=given, prog=f"gradleak {name}", description=kind.__doc__ or summary
    )
    return perform(name, parsed, attack_flags.options(parsed, attacks))


def perform(name: str, parsed: Any, options: dict[str, dict[str, Any]]) -> int:
    """Do a command with its arguments, and the parameters of attacks; returns the exit code."""
    if (threads := getattr(parsed, "threads", None)) is not None:
        set_threads(threads)
    if not 0 <= getattr(parsed, "seed", 0) <= LARGEST_SEED:
        raise BadInput(f"A seed lies between 0 and {LARGEST_SEED:,}, not at {parsed.seed}.")
    command = located(COMMANDS[name][0])
    takes = inspect.signature(command).parameters
    more: dict[str, Any] = {"name": name} if "name" in takes else {}
    return command(parsed, **more, **({"options": options} if "options" in takes else {})) or 0


def set_threads(count: int) -> None:
    """CPU threads of torch; BadInput for a number that makes no sense."""
    import torch

    if not 1 <= count <= 1_024:
        raise BadInput(f"The number of threads lies between 1 and 1,024, not at {count}.")
    torch.set_num_threads(count)


def located(place: str) -> Any:
    """What "module:name" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def kind_of(name: str, command: Callable[..., Any]) -> type:
    """The dataclass of a command's arguments: a victim's settings, or what its function takes."""
    group, _, victim = name.partition(" ")
    if group == "capture" and victim in VICTIMS:
        from gradleak.cli.capture import with_common

        return with_common(located(VICTIMS[victim][0]))
    hints = get_type_hints(command)
    kind: type = hints[next(iter(inspect.signature(command).parameters))]
    return kind


def usage(names: Iterable[str]) -> str:
    """One line per command."""
    lines = [f"  {name:17} {COMMANDS[name][1]}" for name in names]
    return "usage: gradleak COMMAND [--help] ...\n\n" + "\n".join(lines) + "\n\nStart with: gradleak demo"


if __name__ == "__main__":
    sys.exit(main())
