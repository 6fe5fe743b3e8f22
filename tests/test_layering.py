"""The folders keep their promises: attacks never see the secret, the report needs no torch, importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradleak

PACKAGE = Path(gradleak.__file__).parent
SECRETIVE = ("attacks", "priors")
FORBIDDEN = {"gradleak.victims", "gradleak.audit.metrics", "gradleak.formats.secret_file", "gradleak.audit.loop"}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """What a module imports anywhere in its text, "from a import b" as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_under(name: str, parents: set[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def reachable(name: str) -> set[str]:
    """All modules of gradleak that importing `name` runs; the packages above them only carry docstrings and names."""
    seen, todo = set(), [name]
    while todo:
        if (current := todo.pop()) not in seen:
            seen.add(current)
            todo += [i for i in imports(current) if i in FILES and i != "gradleak"]
    return seen


ATTACKING = [name for name in FILES if is_under(name, {f"gradleak.{folder}" for folder in SECRETIVE})]


@pytest.mark.parametrize("name", ATTACKING)
def test_attacks_never_import_what_knows_the_secret(name: str) -> None:
    assert not [i for i in imports(name) if is_under(i, FORBIDDEN)]
    assert not [i for i in reachable(name) if is_under(i, FORBIDDEN)]  # nor anything that does


def test_every_attack_file_is_walked() -> None:
    assert {"gradleak.attacks.dlg", "gradleak.attacks.analytic", "gradleak.priors.total_variation"} <= set(ATTACKING)
    assert is_under("gradleak.formats.secret_file", FORBIDDEN)
    assert not is_under("gradleak.formats.secret_files", FORBIDDEN)


def test_only_victims_files_checks_and_what_runs_them_open_the_secret() -> None:
    allowed = {"victims", "formats", "audit", "cli", "studies"}
    users = {
        name.split(".")[1] for name in FILES if name != "gradleak" and "gradleak.formats.secret_file" in imports(name)
    }
    assert users <= allowed


def test_no_attack_inherits_from_another_class() -> None:
    for name in ATTACKING:
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):  # networks are modules, and choices of a kind are protocols
                bases = [ast.unparse(base) for base in node.bases]
                assert set(bases) <= {"nn.Module", "Protocol"}, f"{name}: class {node.name}"


def test_reports_need_no_torch() -> None:
    for name in FILES:
        if is_under(name, {"gradleak.report"}):
            assert not [i for i in imports(name) if is_under(i, {"torch", "safetensors"})]
            # What it reaches in gradleak needs none either.
            assert not [m for m in reachable(name) for i in imports(m) if is_under(i, {"torch"})]


def test_nothing_unpickles_or_evaluates() -> None:
    for name, file in FILES.items():
        assert not imports(name) & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "torch.load"}, name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "torch.load"), f"{name}:{node.lineno}"


def test_no_bare_or_broad_except() -> None:
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}:{node.lineno}"
                assert ast.unparse(node.type) not in ("Exception", "BaseException"), f"{name}:{node.lineno}"


def test_importing_is_light() -> None:
    heavy = ["datasets", "transformers", "peft", "skimage", "sklearn", "matplotlib", "scipy", "rich", "tyro"]
    code = f"import gradleak, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert all(hasattr(gradleak, name) for name in gradleak.__all__)
    assert len(set(gradleak.__all__)) == len(gradleak.__all__)
