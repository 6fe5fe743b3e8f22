"""Pages of the site that are made from the code: what each command says of itself, the public names, the attacks.

mkdocs calls these functions by their names (https://www.mkdocs.org/user-guide/plugins/#events).
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gradleak import _MODULES
from gradleak.attacks import ATTACKS
from gradleak.cli import app

ROOT = Path(__file__).parents[1]
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "reference/commands.md": commands(),
        "reference/python.md": python(),
        "reference/attacks.md": attacks(),
        "security.md": (ROOT / "SECURITY.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "]("),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links to files beside the documentation lead to the repository."""
    here = (ROOT / "docs" / page.file.src_uri).parent

    def outside(found: re.Match[str]) -> str:
        target = (here / found[1]).resolve()
        if not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "docs"):
            return found[0]
        return f"]({config.repo_url}/blob/main/{target.relative_to(ROOT).as_posix()}"

    return re.sub(r"\]\((\.\./[^)#\s]+)", outside, markdown)


def on_post_page(output: str, **_: Any) -> str:
    """The theme's search is a dialog without a name, which readers of the screen need."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def commands() -> str:
    """The help of every command, as the terminal shows it."""
    said = {name: helped([*name.split(), "--help"]) for name in app.COMMANDS if name != "reproduce"}
    parts = [f"## gradleak {name}\n\n```text\n{text.strip()}\n```\n" for name, text in said.items()]
    return "# Commands\n\n" + "\n".join(parts)


def helped(argv: list[str]) -> str:
    os.environ |= {"COLUMNS": "90", "NO_COLOR": "1"}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        app.main(argv)
    return ESCAPES.sub("", output.getvalue())


def python() -> str:
    """Every name that `from gradleak import ...` knows."""
    told = {attack.__name__ for attack in ATTACKS.values()}  # on a page of their own
    names = sorted(_MODULES.keys() - told, key=str.lower)
    parts = [f"::: {_MODULES[name]}.{name}\n" for name in names]
    return (
        "# Python\n\nAll of these are imported by `from gradleak import ...`; so are "
        "[the attacks](attacks.md).\n\n" + "\n".join(parts)
    )


def attacks() -> str:
    """What each attack says of itself, in its file, and its parameters."""
    parts = []
    for name, attack in ATTACKS.items():
        told = (sys.modules[attack.__module__].__doc__ or "").strip()
        parts.append(f"## {name}\n\n```text\n{told}\n```\n\n::: {attack.__module__}.{attack.__qualname__}\n")
    return (
        "# Attacks\n\nThe flags of an attack are its parameters, with its name before them: `--dlg.restarts 5`.\n\n"
        + "\n".join(parts)
    )
