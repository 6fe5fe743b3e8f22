"""The folder of a command's results: fresh, gone on with (--resume), or replaced (--overwrite); and which command has made it. Importing this
costs nothing."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from gradleak.cli.seen_flags import PRESENTED, Common, Kept
from gradleak.errors import BadInput, checked, read_json, shortened

COMMAND = "command.json"  # beside what is captured or trained: which command made it
MARKS = (
    "record.json",
    "study.json",
    "observation.safetensors",
    "generator.safetensors",
    "pairs.json",
    "provenance.json",
    COMMAND,
)
INPUTS = ("observation", "secret", "after")
FREE = (
    *PRESENTED,
    "out",
    "threads",
    "json",
    "fail_on",
    "pdf",
)  # arguments that may be others when results are gone on with


def check_paths(args: Any) -> None:
    """BadInput for inputs that are not there, before anything is imported that would read them."""
    for name in INPUTS:
        path = getattr(args, name, None)
        if isinstance(path, Path) and not exists(path.expanduser()):
            raise BadInput(f"There is no file {shortened(str(path))}.")


def exists(path: Path) -> bool:
    """Whether there is anything; not behind a name that is too long, or holds what no name can."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def fresh_folder(path: Path) -> Path:
    """BadInput if the folder holds anything: results are never overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"{path} holds other results already: choose another --out.")
    return path


def folder_for(args: Kept) -> Path:
    """The folder of a command that may go on with it. BadInput where it holds anything else."""
    path: Path = args.out
    if args.resume and path.is_dir() and any((path / mark).is_file() for mark in MARKS):
        return path
    try:
        return fresh_folder(path)
    except BadInput as error:
        more = "" if args.resume else " Or go on with them (--resume), or replace them (--overwrite)."
        raise BadInput(f"{error}{more}") from error


@contextmanager
def held(args: Any) -> Iterator[None]:
    """Inside, the folder of a command's results is there, and no other process has it: it is locked, and the lock ends with the process, however
    that ends. Behind it the folder is gone where nothing came into it. BadInput where another gradleak has it; what cannot be locked is not."""
    try:
        import fcntl
    except ImportError:  # Windows has other locks
        yield
        return
    if not isinstance(args, Common):
        yield
        return
    made = [folder for folder in (args.out, *args.out.parents) if not exists(folder)]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(args.out, os.O_RDONLY)
    except (OSError, ValueError):  # the command will say what is wrong with it
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BadInput(f"Another gradleak is writing to {args.out}: let it end, or choose another --out.") from error
    except OSError:  # some network disks lock nothing
        pass
    try:
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def replaced(args: Any) -> Iterator[None]:
    """Inside, the folder of a command with --overwrite is not there; behind it what was in it is gone, or back where the input was bad."""
    if (
        not getattr(args, "overwrite", False)
        or not exists(args.out)
        or (args.out.is_dir() and not any(args.out.iterdir()))
    ):
        yield
        return
    out = replaceable(args)
    aside = out.with_name(f".{out.name}.replaced.{os.getpid()}")
    out.rename(aside)
    try:
        with held(args):  # the lock has gone with what was there
            yield
    except BadInput:
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replaceable(args: Any) -> Path:
    """The folder itself; BadInput where it is none of gradleak's, or holds what is read or what is worked in."""
    out = Path(args.out).resolve()
    if args.resume:
        raise BadInput("--resume goes on with what --overwrite removes: give one of them.")
    if args.out.is_symlink() or not out.is_dir() or not any((out / mark).is_file() for mark in MARKS):
        raise BadInput(f"{args.out} is no folder that gradleak has written: --overwrite leaves it alone.")
    if out in (Path.cwd(), *Path.cwd().parents, Path.home(), *Path.home().parents):
        raise BadInput(f"{args.out} is more than a folder of results: --overwrite leaves it alone.")
    given = [
        value for field in fields(args) if (value := getattr(args, field.name)) is not None and field.name != "out"
    ]
    for value in given:
        if isinstance(value, str | Path) and exists(Path(value)) and Path(value).resolve().is_relative_to(out):
            raise BadInput(f"{value} lies in {args.out}, which --overwrite would remove: choose another --out.")
    return out


def plain(value: Any) -> Any:
    """Arguments as JSON has them: paths are text."""
    return msgspec.to_builtins(value, enc_hook=str)


def arguments_of(args: Any) -> dict[str, Any]:
    """The value of every argument that changes what a command finds."""
    given: dict[str, Any] = plain({f.name: getattr(args, f.name) for f in fields(args) if f.name not in PRESENTED})
    return given


def same_command(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """BadInput where the results in a folder were made by another command, naming the first argument that differs."""
    if stored.get("name") != now["name"]:
        raise BadInput(f"{path} was made by `gradleak {shortened(str(stored.get('name')))}`: choose another --out.")
    now = json.loads(json.dumps(now))
    before, after = stored.get("arguments", {}), now.get("arguments", {})
    others = [key for key in {**before, **after} if key not in FREE and before.get(key) != after.get(key)]
    if others:
        raise BadInput(f"{path} was made with another --{others[0].replace('_', '-')}: choose another --out.")
    for attack in {**stored.get("attacks", {}), **now.get("attacks", {})}:
        if stored.get("attacks", {}).get(attack) != now.get("attacks", {}).get(attack):
            raise BadInput(f"{path} was made with other attacks, or another --{attack}: choose another --out.")
    if stored.get("inputs", {}) != now.get("inputs", {}):
        raise BadInput(f"{path} was made of files that have changed since: choose another --out.")


def is_finished(name: str, args: Kept) -> bool:
    """Whether a command that captures or trains has finished this folder already. BadInput where another command has."""
    path = args.out / COMMAND
    if not args.resume or not path.is_file():
        return False
    same_command(args.out, checked(read_json(path), dict[str, Any], f"{path} names no command"), told(name, args))
    return True


def told(name: str, args: Kept) -> dict[str, Any]:
    """A command as data."""
    return {"name": name, "arguments": arguments_of(args)}


def tell(name: str, args: Kept) -> None:
    """Write down which command has finished this folder."""
    path = args.out / COMMAND
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # which rows are private is private
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(told(name, args)), indent=1) + b"\n")
