"""The lines of docs/integrations.md, run as they are printed."""

import re
import runpy
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"


def run_page(library: str, given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The names that the blocks about a library leave behind, from these names on; each block is five lines at most, imports apart."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    mine = [block for block in blocks if f"gradleak.integrations.{library} " in block]
    assert mine
    for block in mine:
        assert len([line for line in block.splitlines() if line and not line.startswith("from ")]) <= 5
        (folder / "page.py").write_text(block, encoding="utf-8")
        given = runpy.run_path(str(folder / "page.py"), init_globals=given)
    return given
