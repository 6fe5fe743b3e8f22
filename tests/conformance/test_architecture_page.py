"""The architecture page draws the house as it is."""

import ast
import importlib.util
from pathlib import Path

import test_layering

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("draw_house", ROOT / "docs" / "draw_house.py")
assert SPEC is not None
assert SPEC.loader is not None
draw_house = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw_house)


def test_the_drawing_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == draw_house.redrawn(page), "draw it again: python docs/draw_house.py"


def test_the_floors_are_those_that_imports_keep() -> None:
    assert tuple(name.removesuffix(".py") for name in draw_house.FLOORS) == test_layering.FLOORS


def test_every_file_says_what_it_is() -> None:
    for file in (ROOT / "src" / "gradleak").rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file
