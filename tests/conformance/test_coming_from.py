"""docs/coming_from.md promises users of other tools what they are used to: every command, flag and Python name on it exists."""

import ast
import re
from pathlib import Path

import pytest

import gradleak
from gradleak.cli.app import COMMANDS, kind_of
from gradleak.cli.arguments import flags_of

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text(encoding="utf-8")
PACKAGE = Path(gradleak.__file__).parent
SPANS = re.findall(r"`(gradleak[ .][^`]+)`", PAGE)
LINES = [span for span in SPANS if span.startswith("gradleak ")]
NAMES = [
    span for span in SPANS if span.startswith("gradleak.") and span != "gradleak.attacks"
]  # that is an entry point


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_page_has_its_flags(line: str) -> None:
    words = line.split()[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert name in COMMANDS
    known = {flag.written for flag in flags_of(kind_of(name, COMMANDS[name][0]))}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("name", NAMES)
def test_every_python_name_of_the_page_is_there(name: str) -> None:
    """Those of integrations by their text: the libraries need not be installed."""
    *place, last = name.split(".")[1:]
    if not place:
        assert last in gradleak.__all__
        return
    tree = ast.parse(PACKAGE.joinpath(*place).with_suffix(".py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imported = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert last in defined | imported


def test_the_page_has_both() -> None:
    assert len(LINES) > 15
    assert len(NAMES) > 8
