"""The revision of what a cell uses: a hash of every definition that it can reach by name.

Change a sentence of a report, and finished cells stay valid; change an attack, and those that run it do not. Comments, docstrings
and layout do not count. What is reached through strings like "gradleak.victims.play:CaptureGradient" counts.
"""

import ast
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradleak

PACKAGE = Path(gradleak.__file__).parent
REGISTRIES = {
    ("gradleak.attacks", "ATTACKS"),
    ("gradleak.victims", "VICTIMS"),
}  # tables of names: nobody uses all of them
LAZY = re.compile(r"(gradleak(?:\.\w+)+)(?::(\w+))?")
Definitions = dict[
    str, list[ast.stmt]
]  # name -> the statements of a module that bind it; "" holds those that bind none


@cache
def revision(*roots: Callable[..., Any] | None) -> str:
    """SHA-256 (16 hex digits) of all that these functions can reach within gradleak, and in the files that they are written in."""
    reached: dict[tuple[str, str], list[str]] = {}
    todo = [named(root) for root in roots if root is not None]
    while todo:
        module, name = todo.pop()
        if (module, name) in reached or (module, name) in REGISTRIES:
            continue
        statements = definitions(module).get(name, []) if name != "*" else every(module)
        reached[module, name] = [ast.dump(without_docstrings(statement)) for statement in statements]
        for statement in statements:
            todo += mentions(statement, module)
    text = "\n".join(f"{key} {dumps}" for key, dumps in sorted(reached.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def whole() -> str:
    """SHA-256 (16 hex digits) of the source of this gradleak: what a worker compares with its own."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def named(root: Any) -> tuple[str, str]:
    """(module, name) of a function or class, of the class of an object that is called, or of a module for what has no name."""
    thing = root if inspect.isroutine(root) or inspect.isclass(root) else getattr(root, "func", type(root))
    name = thing.__qualname__.split(".")[0]
    return thing.__module__, name if name in definitions(thing.__module__) else "*"


@cache
def definitions(module: str) -> Definitions:
    """What a module defines at its top."""
    bound: Definitions = {}
    for statement in every(module):
        names = list(binds(statement))
        for name in names or [""]:
            bound.setdefault(name, []).append(statement)
    return bound


@cache
def every(module: str) -> list[ast.stmt]:
    """All statements of a module; none where its source is not to be had."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None and module.startswith("gradleak"):
        spec = find_spec(module)
        file = spec.origin if spec is not None else None
    if file is None or not Path(file).is_file():
        return []
    return ast.parse(Path(file).read_text(encoding="utf-8")).body


def binds(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of a module gives a meaning."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.split(".")[0] for alias in statement.names)
    elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
        yield from (n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def mentions(statement: ast.stmt, module: str) -> list[tuple[str, str]]:
    """(module, name) of what a statement refers to, in its own module and in gradleak."""
    found: list[tuple[str, str]] = []
    own = definitions(module)
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id in own:
            found.append((module, node.id))
        elif isinstance(node, ast.ImportFrom) and ours(node.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, "*") if is_module(inner) else (str(node.module), alias.name))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "*") for alias in node.names if ours(alias.name)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (lazy := LAZY.fullmatch(node.value)):
            found.append((lazy[1], lazy[2] or "*"))
    return found


def ours(module: str | None) -> bool:
    """Whether a module is of gradleak."""
    return module is not None and module.partition(".")[0] == "gradleak"


@cache
def is_module(name: str) -> bool:
    """Whether this names a module of gradleak, rather than something in one."""
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def without_docstrings(statement: ast.stmt) -> ast.stmt:
    """The statement as it acts."""
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return statement
