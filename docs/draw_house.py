"""Draw the house from the code: `python docs/draw_house.py` writes the drawing into docs/architecture.md, between its marks.

A test keeps it true. Floors are those of tests/test_layering.py; what a file is, says the first sentence of its docstring.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PAGE = ROOT / "src" / "gradleak", ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/draw_house.py -->\n", "<!-- end of the drawing -->\n"
LONGEST = 110  # characters of what a file is
FLOORS = {  # from the ground up: a floor may import those before it
    "errors.py": "how it says no",
    "modalities": "WHAT PRIVATE DATA ARE",
    "observations": "WHAT THE ATTACKER SEES",
    "priors": "WHAT IS KNOWN BEFORE",
    "attacks": "WHAT IT DOES WITH THAT",
    "formats": "WHAT LIES ON DISK",
    "victims": "WHO SHARES",
    "report": "WHAT IS SHOWN: no torch in here",
    "audit": "WHAT IT MEANS",
    "studies": "QUESTIONS",
    "integrations": "WHERE TRAINING HAPPENS",
    "cli": "THE COMMAND LINE",
}


def sentence(file: Path) -> str:
    """The first sentence of a file's docstring, or the beginning of a long one."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    first = re.split(r"(?<!et al)[.?] ", text)[0].rstrip(".")
    return first if len(first) <= LONGEST else first[:LONGEST].rpartition(" ")[0] + " ..."


def drawing() -> str:
    """Every floor with its files; folders inside a floor stand for one paper, or one table."""
    lines = ["```", "src/gradleak/"]
    for floor, what in FLOORS.items():
        if floor.endswith(".py"):
            lines.append(f"  {floor:22} {what}: {sentence(PACKAGE / floor)}")
            continue
        lines.append(f"  {floor + '/':22} {what}")
        for file in sorted((PACKAGE / floor).rglob("*.py")):
            if file.name != "__init__.py":
                name = file.relative_to(PACKAGE / floor).as_posix()
                lines.append(f"    {name:42} {sentence(file)}")
    return "\n".join([*lines, "```"]) + "\n"


def redrawn(page: str) -> str:
    """The page with the drawing of today."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + drawing() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
