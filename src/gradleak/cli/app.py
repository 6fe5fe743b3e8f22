"""The command line: `gradleak COMMAND ...`. Bad input ends in one sentence and exit code 2, with nothing overwritten.

Nothing heavy is imported before a command needs it: help, versions and typing errors cost a tenth of a second.
"""

import importlib
import inspect
import io
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import metadata
from typing import Any

from gradleak.errors import BadInput, near, shortened
from gradleak.victims import VICTIMS

FLAGS, OWNER = "gradleak.cli.flags", "gradleak.cli.owner_flags"
# Each command: its arguments, what does it, and what that is in a line.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": (
        f"{FLAGS}:Demo",
        "gradleak.cli.auditing:demo",
        "The main job on embedded pictures: capture, attack, write the report.",
    ),
    **{
        f"capture {name}": (place, "gradleak.cli.capture:capture", summary)
        for name, (place, summary) in VICTIMS.items()
    },
    "capture pairs": (
        f"{FLAGS}:CapturePairs",
        "gradleak.cli.capture:capture_pairs",
        "Make pairs of public data and gradients, for learned attacks.",
    ),
    "train git": (
        f"{FLAGS}:TrainByDescent",
        "gradleak.cli.capture:train_by_descent",
        "Train the generator of git for the observed model.",
    ),
    "train exact-git": (
        f"{FLAGS}:Train",
        "gradleak.cli.capture:train_exactly",
        "Recover the weights of the observed model, for exact-git.",
    ),
    "train lti": (
        f"{FLAGS}:TrainByDescent",
        "gradleak.cli.capture:train_by_descent",
        "Train the generator of lti for the observed model.",
    ),
    "train denoiser": (
        f"{FLAGS}:TrainDenoiser",
        "gradleak.cli.denoiser:train_denoiser",
        "Train a denoiser on public pictures, as a prior.",
    ),
    "attack": (
        f"{FLAGS}:Attack",
        "gradleak.cli.auditing:attack",
        "Reconstruct the private data with one attack. Sees no secret.",
    ),
    "audit": (
        f"{FLAGS}:Audit",
        "gradleak.cli.auditing:audit",
        "Run every applicable attack, score it if the secret is given, write a report.",
    ),
    "canaries make": (
        f"{OWNER}:MakeCanaries",
        "gradleak.cli.canaries:make",
        "Make canaries to train with, half of them by the flip of a coin.",
    ),
    "canaries score": (
        f"{OWNER}:ScoreCanaries",
        "gradleak.cli.canaries:score",
        "Which canaries were trained on? A lower bound on the epsilon of a training, from one run.",
    ),
    "extract": (
        f"{OWNER}:Extract",
        "gradleak.cli.extract:extract",
        "Which of your texts does a language model give back? Which of these candidates is in there?",
    ),
    "defend": (f"{FLAGS}:Defend", "gradleak.cli.defend:defend", "Defend a release that is at hand, to audit it again."),
    "study": (
        f"{FLAGS}:Study",
        "gradleak.cli.commands:study",
        "Run an experiment, published or your own: resumable, in processes or on Ray.",
    ),
    "reproduce": (f"{FLAGS}:Study", "gradleak.cli.commands:study", "The same, under its old name."),
    "report": (f"{FLAGS}:Report", "gradleak.cli.commands:report", "Render a record again."),
    "rerun": (
        f"{FLAGS}:Rerun",
        "gradleak.cli.commands:rerun",
        "Run the command of a record again, with the same seed and parameters.",
    ),
    "list": (f"{FLAGS}:List", "gradleak.cli.listing:listed", "Attacks, what each needs and recovers; studies; models."),
    "completion": (
        f"{FLAGS}:Completion",
        "gradleak.cli.completion:completion",
        "Complete commands, flags and names in your shell.",
    ),
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
    from gradleak.cli import arguments, config

    place, _, summary = COMMANDS[name]
    kind = kind_of(name, place)
    given = arguments.with_own_imported(name, given)
    said = config.said(name, kind, given)
    attacks = arguments.selected(name, given, said)
    about = {"prog": f"gradleak {name}", "description": kind.__doc__ or summary}
    values, options = arguments.parsed(kind, attacks, given, said, **about)
    return perform(name, values, options)


def perform(name: str, values: Any, options: dict[str, dict[str, Any]]) -> int:
    """Do a command with its arguments, and the parameters of attacks; returns the exit code."""
    from gradleak.cli.folders import check_paths, held, replaced

    check_paths(values)
    if (threads := getattr(values, "threads", None)) is not None:
        set_threads(threads)
    if not 0 <= getattr(values, "seed", 0) <= LARGEST_SEED:
        raise BadInput(f"A seed lies between 0 and {LARGEST_SEED:,}, not at {values.seed}.")
    with ExitStack() as around:
        around.enter_context(held(values))
        around.enter_context(replaced(values))
        if getattr(values, "quiet", False):
            nothing = around.enter_context(open(os.devnull, "w", encoding="utf-8"))
            around.enter_context(redirect_stderr(nothing))
            if not getattr(values, "json", False):
                around.enter_context(redirect_stdout(nothing))
        command = located(COMMANDS[name][1])
        takes = inspect.signature(command).parameters
        more: dict[str, Any] = {"name": name} if "name" in takes else {}
        return command(values, **more, **({"options": options} if "options" in takes else {})) or 0


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


def kind_of(name: str, place: str) -> type:
    """The dataclass of a command's arguments: for victims their settings, and what every command takes."""
    kind: type = located(place)
    if name.startswith("capture ") and name.removeprefix("capture ") in VICTIMS:
        from gradleak.cli.seen_flags import with_common

        return with_common(kind)
    return kind


def usage(names: Iterable[str]) -> str:
    """One line per command."""
    lines = [f"  {name:17} {COMMANDS[name][2]}" for name in names]
    return "usage: gradleak COMMAND [--help] ...\n\n" + "\n".join(lines) + "\n\nStart with: gradleak demo"


if __name__ == "__main__":
    sys.exit(main())
