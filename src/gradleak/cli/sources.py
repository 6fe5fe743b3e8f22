"""What there is, read off the sources of this package: `gradleak list`, help and typing errors name attacks, defenses, models and studies
without importing one of them, which would take seconds. Attacks of one's own, which were imported already, are asked themselves.
`literal_eval` takes numbers, texts and their collections alone, out of files of this package: nothing is run."""

import ast
import dataclasses
import inspect
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

PLAIN = {"str": str, "int": int, "float": float, "bool": bool, "Path": Path}  # types of parameters, as they are written
PLAIN |= {f"{name} | None": kind | None for name, kind in PLAIN.items()}  # type: ignore[misc]
PACKAGE = Path(__file__).parents[1]
ATTACKS, GROUP = "gradleak.attacks", "gradleak.attacks"  # the module with the table; the entry point of other packages


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of an attack, as a flag."""

    name: str
    kind: Any
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class Attack:
    """What the file of an attack says of it."""

    name: str
    place: str
    sees: str
    recovers: str
    parameters: tuple[Parameter, ...]


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module of this package, which is not run, and neither is the folder that it lies in."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def assigned(module: str, name: str) -> ast.expr:
    """The value that a module gives to a name."""
    for node in tree(module).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert node.value is not None
            return node.value
    raise LookupError(name)


def places(module: str, table: str) -> dict[str, tuple[str, str]]:
    """{name: (module, class)} of a table of classes."""
    written = assigned(module, table)
    assert isinstance(written, ast.Dict)
    imports = [node for node in tree(module).body if isinstance(node, ast.ImportFrom)]
    origin = {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}
    keys = [ast.literal_eval(key) for key in written.keys if key is not None]
    return {
        key: origin[value.id] for key, value in zip(keys, written.values, strict=True) if isinstance(value, ast.Name)
    }


def keys(module: str, table: str) -> list[str]:
    """The names in a table."""
    written = assigned(module, table)
    assert isinstance(written, ast.Dict)
    return [ast.literal_eval(key) for key in written.keys if key is not None]


def class_of(module: str, name: str) -> ast.ClassDef:
    """The definition of a class."""
    return next(node for node in tree(module).body if isinstance(node, ast.ClassDef) and node.name == name)


def written_fields(module: str, kind: ast.ClassDef) -> list[tuple[str, str, Any]]:
    """(name, type as it is written, default) of the fields with plain values; the default of another class of the file where it is named."""
    found = []
    for line in kind.body:
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and ast.unparse(line.annotation) in PLAIN
        ):
            value = line.value
            if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
                others = written_fields(module, class_of(module, value.value.id))
                default = next(default for name, _, default in others if name == value.attr)
            else:
                default = None if value is None else ast.literal_eval(value)
            found.append((line.target.id, ast.unparse(line.annotation), default))
    return found


def attack_names() -> list[str]:
    """Of those in this package and, where packages that are installed offer some, of these."""
    if metadata.entry_points(group=GROUP) or ATTACKS in sys.modules:
        from gradleak import attacks

        return list(attacks.ATTACKS)
    return keys(ATTACKS, "ATTACKS")


def attack(name: str) -> Attack:
    """The attack of this name: as it was imported, where it was, else as it is written."""
    if ATTACKS in sys.modules or name not in keys(ATTACKS, "ATTACKS"):
        return imported(name)
    module, kind = places(ATTACKS, "ATTACKS")[name]
    definition = class_of(module, kind)
    classes = [node for node in tree(module).body if isinstance(node, ast.ClassDef)]
    texts = explained(*(ast.get_docstring(one) or "" for one in (*classes, definition)))
    written = written_fields(module, definition)
    told = tuple(Parameter(field, PLAIN[kind], default, texts.get(field, "")) for field, kind, default in written)
    return Attack(name, f"{module}:{kind}", *header(ast.get_docstring(tree(module)) or ""), told)


def imported(name: str) -> Attack:
    """An attack by its class."""
    from gradleak import attacks
    from gradleak.attacks.parameters import parameters

    kind = attacks.ATTACKS[name]
    file, hints = sys.modules[kind.__module__], get_type_hints(kind)
    classes = [one for one in vars(file).values() if isinstance(one, type) and one.__module__ == kind.__module__]
    texts = explained(*(inspect.getdoc(one) or "" for one in (*classes, kind)))
    told = tuple(Parameter(f.name, hints[f.name], f.default, texts.get(f.name, "")) for f in parameters(name))
    return Attack(name, f"{kind.__module__}:{kind.__name__}", *header(file.__doc__ or ""), told)


def header(docstring: str) -> tuple[str, str]:
    """What the head of a file says that its attack sees, and recovers."""
    lines = {word: re.search(rf"^{word} +(.*(?:\n +.*)*)", docstring, re.MULTILINE) for word in ("Sees", "Recovers")}
    sees, recovers = ("" if found is None else " ".join(found[1].split()) for found in lines.values())
    return sees, recovers


def explained(*docstrings: str) -> dict[str, str]:
    """{field: what its class says of it}: lines like "steps, step_size  signed Adam, in pixels", with what is indented below. Of several
    classes of a file the last says it; those before it tell of what it has of them."""
    texts: dict[str, str] = {}
    for docstring in docstrings:
        names: list[str] = []
        for line in docstring.splitlines():
            if start := re.fullmatch(r"\s*([a-z_]+(?:, [a-z_]+)*)(?:  +|: )(\S.*)", line):
                names = start[1].split(", ")
                texts |= dict.fromkeys(names, start[2])
            elif names and line.strip():
                texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
            else:
                names = []
    return texts


def defenses() -> dict[str, str]:
    """{as `--defense` takes it: what it does, in a sentence}."""
    told, names = {}, "gradleak.observations.defense_names"
    short = {name: alias for alias, name in ast.literal_eval(assigned(names, "ALIASES")).items()}
    for name, (module, kind) in places(names, "DEFENSES").items():
        definition = class_of(module, kind)
        held = definition if written_fields(module, definition) else next(base for base in bases(module, definition))
        form = ":".join([name, *(field.upper() for field, *_ in written_fields(module, held))])
        about = " ".join((ast.get_docstring(definition) or "").partition("\n\n")[0].split())
        told[form] = re.split(r"(?<=\.) (?=[A-Z])", about)[0]
        told[form] += f" Also called {short[name]}." if name in short else ""
    return told


def bases(module: str, kind: ast.ClassDef) -> list[ast.ClassDef]:
    """The classes that a class inherits from and that its file has; the class itself, where there are none."""
    known = {node.name: node for node in tree(module).body if isinstance(node, ast.ClassDef)}
    found = [known[base.id] for base in kind.bases if isinstance(base, ast.Name) and base.id in known]
    return found or [kind]


def models() -> list[str]:
    """The networks that can be built by name."""
    return keys("gradleak.modalities.networks", "MODELS")


def studies() -> dict[str, str]:
    """{study: its question}."""
    catalogue = "gradleak.studies.catalogue"
    table = assigned(catalogue, "STUDIES")
    assert isinstance(table, ast.DictComp)
    listed = table.generators[0].iter
    assert isinstance(listed, ast.Tuple)
    told = {}
    for entry in listed.elts:
        assert isinstance(entry, ast.Attribute)
        call = assigned(f"gradleak.studies.{ast.unparse(entry.value)}", entry.attr)
        assert isinstance(call, ast.Call)
        said = {word.arg: word.value for word in call.keywords}
        told[ast.literal_eval(said["name"])] = ast.literal_eval(said["question"])
    return told
