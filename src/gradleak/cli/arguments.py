"""A command line as values: flags under headings, with their defaults, from dataclasses; those of attacks under the names of the attacks,
as their files describe them (`sources`). Nothing that a command does is imported for that."""

import ast
import dataclasses
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from gradleak.cli import sources
from gradleak.errors import BadInput, near, shortened

OPTION = {"attack": "--attack", "audit": "--attacks"}
HEADINGS = (
    "observation",
    "model",
    "training",
    "private training",
    "membership",
    "pairs",
    "attack",
    "output",
)  # in this order
WORDS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH", bool: "True|False"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One argument of a command, as its dataclass has it."""

    name: str
    kind: Any
    default: Any
    help: str
    group: str

    @property
    def parts(self) -> tuple[Any, ...]:
        """Its type, and what is said about that."""
        return get_args(self.kind) if get_origin(self.kind) is Annotated else (self.kind,)

    @property
    def written(self) -> str:
        """As it stands on a command line."""
        named = [part.name for part in self.parts[1:] if getattr(part, "name", None)]
        return f"--{named[0] if named else self.name.rstrip('_').replace('_', '-')}"

    @property
    def positional(self) -> bool:
        """Whether it is given by its place."""
        return any("Positional" in str(part) or part is tyro.conf.Positional for part in self.parts[1:])


def flags_of(kind: type) -> list[Flag]:
    """The arguments of a command, those of one heading beside each other."""
    hints = get_type_hints(kind, include_extras=True)
    texts, groups = dict[str, str](), dict[str, str]()
    for one in reversed(kind.__mro__):
        for name in inspect.get_annotations(one):
            groups[name] = vars(one).get("GROUP", "options")
        texts |= help_of(one) if dataclasses.is_dataclass(one) else {}
    found = [
        Flag(f.name, hints[f.name], f.default, texts.get(f.name, ""), groups[f.name]) for f in dataclasses.fields(kind)
    ]
    return sorted(found, key=lambda flag: HEADINGS.index(flag.group) if flag.group in HEADINGS else -1)


@cache
def help_of(kind: type) -> dict[str, str]:
    """{field: the string under it} of a class as it is written; nothing of one that was made while running."""
    file = sys.modules[kind.__module__]
    tree = ast.parse(inspect.getsource(file))
    written = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    texts: dict[str, str] = {}
    for node in written[:1]:
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                texts[field.target.id] = " ".join(text_of(below).split())
    return texts


def text_of(node: ast.stmt) -> str:
    """The string that a line consists of, or nothing."""
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def parsed(
    kind: type, attacks: Sequence[str], given: Sequence[str], said: Mapping[str, Any], *, prog: str, description: str
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """(the arguments, the parameters of each attack) of a command line; said: what files say where it says nothing. Ends the program, as
    `tyro` does, after help and what cannot be parsed."""
    flags, fields = flags_of(kind), list[Any]()
    for group in dict.fromkeys(flag.group for flag in flags):
        members = [flag for flag in flags if flag.group == group]
        fields.append((identifier(group), tyro.conf.OmitArgPrefixes[made(group, members, said)]))  # type: ignore[misc]
    for name in attacks:
        told = [Flag(p.name, p.kind, p.default, p.help, name) for p in sources.attack(name).parameters]
        if told:
            own = made(name, told, said.get(name, {}))
            fields.append((identifier(name), own, dataclasses.field(default=own())))
    whole = dataclasses.make_dataclass(kind.__name__, fields, kw_only=True, frozen=True)
    whole.__doc__ = description
    found: Any = tyro.cli(whole, args=list(given), prog=prog, description=description)
    values = {flag.name: getattr(getattr(found, identifier(flag.group)), flag.name) for flag in flags}
    options = {
        name: dataclasses.asdict(getattr(found, identifier(name))) if sources.attack(name).parameters else {}
        for name in attacks
    }
    return kind(**values), options


def made(title: str, flags: Sequence[Flag], said: Mapping[str, Any]) -> type:
    """A dataclass of these arguments, for tyro: with help, and with defaults where there are some to show."""
    fields = []
    for flag in flags:
        default = said.get(flag.name, flag.default)
        plain, *about = flag.parts
        aliases = next((part.aliases for part in about if hasattr(part, "aliases")), None)
        told = tyro.conf.arg(
            name=flag.written.removeprefix("--"),
            aliases=aliases,
            help=flag.help,
            metavar=metavar(plain) if optional(plain) else None,
            help_behavior_hint="" if default is None else None,
        )
        marks = [part for part in about if not hasattr(part, "aliases")]
        kind = Annotated[(plain, told, *marks)]  # type: ignore[valid-type]
        required = default is dataclasses.MISSING
        fields.append((flag.name, kind) if required else (flag.name, kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(identifier(title).title(), fields, kw_only=True, frozen=True)


def optional(kind: Any) -> bool:
    """Whether None is one of its values."""
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def metavar(kind: Any) -> str:
    """What stands for a value in the help, without the None that nobody types."""
    if optional(kind):
        [kind] = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        word = metavar(first)
        return f"[{word} [{word} ...]]" if others == [...] else " ".join([word, *map(metavar, others)])
    return WORDS[kind]


def identifier(name: str) -> str:
    """A name as Python has them."""
    return name.replace("-", "_").replace(" ", "_")


def selected(command: str, given: list[str], said: Mapping[str, Any]) -> list[str]:
    """The attacks whose parameters are flags: those named, all for a bare audit, none for other commands. Raises BadInput for
    an unknown one, and for the option without a name."""
    if command not in OPTION:
        return []
    parts = [part for flag in given for part in flag.split("=", 1)]
    names: list[str] = []
    if OPTION[command] in parts:
        for value in parts[parts.index(OPTION[command]) + 1 :]:
            if value.startswith("-") or (command == "attack" and names):
                break
            names.append(value)
    elif (named := said.get(OPTION[command].removeprefix("--"))) is not None:
        names = [named] if isinstance(named, str) else list(named)
    else:
        return sources.attack_names() if command == "audit" else []
    known = sources.attack_names()
    if not names:
        raise BadInput(f"{OPTION[command]} needs a name: one of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise BadInput(f"Unknown attack {shortened(name)!r}{near(name, known)} (`gradleak list` shows all).")
    return list(dict.fromkeys(names))


def with_own_imported(command: str, given: list[str]) -> list[str]:
    """The flags, with names in place of attacks as package.module:Class, which are imported and known from here on."""
    told, is_attack = [], False
    for part in (part for flag in given for part in (flag.split("=", 1) if flag.startswith("--attack") else [flag])):
        if part.startswith("-"):
            is_attack = part == OPTION.get(command)
        elif is_attack and ":" in part:
            from gradleak.attacks import ATTACKS
            from gradleak.attacks.own import imported

            part, kind = imported(part)
            if ATTACKS.setdefault(part, kind) is not kind:
                raise BadInput(f"There is an attack {part} already: give yours another name.")
        told.append(part)
    return told
