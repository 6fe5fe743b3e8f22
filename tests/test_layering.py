"""The house keeps its promises: floors without circles, attacks that never see the secret, an audit that knows no kind of
release or data, imports that cost nothing, attacks that can be read."""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gradleak
from gradleak.cli.app import COMMANDS

PACKAGE = Path(gradleak.__file__).parent
ROOT = PACKAGE.parents[1]
FLOORS = (  # each may import those before it, and itself
    "errors",
    "modalities",
    "observations",
    "priors",
    "attacks",
    "formats",
    "victims",
    "report",
    "audit",
    "studies",
    "integrations",
    "cli",
)
FORBIDDEN = {"gradleak.victims", "gradleak.audit", "gradleak.formats", "gradleak.report"}  # to those before them
BLIND = ("audit", "report", "cli", "formats/observation_file.py")
EXEMPT = {  # the tables, the bound of pictures, and the words of old files
    "audit/scoring",
    "audit/metrics",
    "audit/bound.py",
    "audit/jacobian.py",
    "report/old_record.py",
}
LONGEST = 300  # lines of a file
BUDGET = 3, 500  # files and lines of `attacks/` that an attack's file opens, itself included
KNOWN = tuple(
    f"gradleak.attacks{part}" for part in ("", ".attack", ".reconstruction", ".labels")
)  # what every attack is
# Lines that a file may have beyond LONGEST, and why it is not two files.
LONG = {
    "attacks/dlg.py": 370,  # DLG and iDLG: one search
    "attacks/learned/git.py": 360,  # one network, layer by layer
    "attacks/jigsaw/jigsaw.py": 320,  # patches, places and whiteners of one search
    "attacks/dataset_size.py": 370,  # the estimate, its interval, and its zoo
    "observations/adapter.py": 350,  # every question that is asked of a release
    "modalities/networks.py": 380,  # the list of architectures
    "modalities/pictures.py": 400,  # every source of pictures
    "observations/fully_connected.py": 310,  # a derivative by hand
    "studies/sweep.py": 350,  # what a file may say, checked
    "report/record.py": 350,  # the schema, field by field
}
# Attacks that open more than BUDGET: (files, lines), and why.
DEEP = {
    # spans, vocabulary, judge, decoders, encoders; orders, replays and masks besides
    "attacks/dager/dager.py": (12, 1_870),
    "attacks/past_the_rank.py": (3, 690),  # DAGER's spans and vocabulary
    "attacks/likely_text.py": (4, 730),  # the same
    "attacks/sparse_words.py": (3, 690),  # the same
    "attacks/jigsaw/jigsaw.py": (3, 640),  # its arrangement, and the search that it begins with
    "attacks/recursion/recursive.py": (10, 1_820),  # a layer backwards, of each kind; a batch by its labels
    "attacks/exact_git/exact_git.py": (6, 1_020),  # the weights first, then the pictures
    "attacks/decoders/attacks.py": (10, 1_200),  # four decoders, and the inversion behind them
    "attacks/learned/git.py": (4, 850),  # a generator, how it is trained and kept
    "attacks/learned/lti.py": (4, 600),  # the same
    "attacks/activation_patterns/activation_patterns.py": (3, 540),  # half-spaces, and the first layer
    "attacks/weights/ntk.py": (3, 550),  # KKT's search
    "attacks/weights/kkt_search.py": (3, 520),  # KKT's own, many times
    "attacks/diffusion/daps.py": (4, 640),  # the problem that the four share, and the search that it begins with
    "attacks/diffusion/dps.py": (4, 610),  # the same
    "attacks/diffusion/red_diff.py": (5, 720),  # the same, and latents
    "attacks/adam_unmixing/adam_unmixing.py": (5, 1_040),  # a step undone, and unmixing's spans and pixels
    "attacks/unmixing/unmixing.py": (3, 720),  # the span, two layers, two ways to tell samples apart, and the replay
}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """What a module imports anywhere in its text, "from a import b" as both a and a.b."""
    found = set()
    for node in ast.walk(tree(name)):
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


def floor(name: str) -> str:
    part = name.split(".")[1]
    return "cli" if part == "__main__" else part


def place(name: str) -> str:
    return FILES[name].relative_to(PACKAGE).as_posix()


LOW = [n for n in FILES if n != "gradleak" and floor(n) in ("modalities", "observations", "priors", "attacks")]


def test_the_house_has_few_rooms() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    files = {"__init__.py", "__main__.py", "py.typed"}  # what Python itself asks for
    assert rooms - files == {*FLOORS} - {"errors"} | {"errors.py"}
    assert len(rooms - files) <= 12  # docs/architecture.md says why integrations are one


@pytest.mark.parametrize("name", [n for n in FILES if n != "gradleak"])
def test_no_import_goes_upwards(name: str) -> None:
    """Floors in a line leave no circle between folders."""
    own = FLOORS.index(floor(name))
    above = [i for i in imports(name) if i in FILES and i != "gradleak" and FLOORS.index(floor(i)) > own]
    assert not above


@pytest.mark.parametrize("name", LOW)
def test_attacks_never_import_what_knows_the_secret(name: str) -> None:
    assert not [i for i in reachable(name) if is_under(i, FORBIDDEN)]


def test_only_victims_formats_audit_studies_and_what_runs_them_open_the_secret() -> None:
    users = {floor(n) for n in FILES if n != "gradleak" and "gradleak.formats.secret_file" in imports(n)}
    assert users <= {"victims", "formats", "audit", "studies", "integrations", "cli"}


def blind_files() -> Iterator[str]:
    for name in FILES:
        where = place(name)
        blind, exempt = (any(where == p or where.startswith(p + "/") for p in paths) for paths in (BLIND, EXEMPT))
        if blind and not exempt:
            yield name


@pytest.mark.parametrize("name", list(blind_files()))
def test_audit_report_and_command_line_name_neither_releases_nor_modalities(name: str) -> None:
    """The test that keeps a second track from growing: no identifier and no text is the name of one of them."""
    from gradleak.audit.scoring import SCORING
    from gradleak.cli.flags import Attack, Audit, CapturePairs
    from gradleak.observations.releases import RELEASES

    kinds = {kind.__name__ for kind in RELEASES.values()} | {"Architecture", "LanguageArchitecture", "LanguageModel"}
    flags = {
        field.name for kind in (Attack, Audit, CapturePairs) for field in dataclasses.fields(kind)
    }  # --weights FILE
    names = (set(SCORING) | set(RELEASES)) - flags
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Name | ast.Attribute):
            assert (node.id if isinstance(node, ast.Name) else node.attr) not in kinds, f"{name}:{node.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in names, f"{name}:{node.lineno}: {node.value!r}"


@pytest.mark.parametrize("name", [n for n in FILES if len(FILES[n].read_text().splitlines()) > LONGEST])
def test_no_file_is_long_without_a_reason(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= LONG.get(place(name), LONGEST)


def known(name: str) -> bool:
    """What all attacks share, searches, and the reading of labels: as a library, known by their one-line docstrings."""
    return name in KNOWN or ".search" in name or ".label_equations" in name


def test_every_attack_can_be_read() -> None:
    from gradleak.attacks import ATTACKS

    for kind in ATTACKS.values():
        inside = [n for n in reachable(kind.__module__) if floor(n) == "attacks" and not known(n)]
        lines = sum(len(FILES[n].read_text(encoding="utf-8").splitlines()) for n in inside)
        most_files, most_lines = DEEP.get(place(kind.__module__), BUDGET)
        assert len(inside) <= most_files, f"{kind.__name__}: {len(inside)} files"
        assert lines <= most_lines, f"{kind.__name__}: {lines} lines"


def test_no_attack_inherits_from_another_class() -> None:
    for name in LOW:
        if floor(name) not in ("attacks", "priors"):
            continue
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ClassDef):  # networks, values, protocols, schemas
                bases = [ast.unparse(base) for base in node.bases]
                assert set(bases) <= {"nn.Module", "Protocol", "Enum", "NamedTuple", "msgspec.Struct"}, (
                    f"{name}: class {node.name}"
                )


def test_reports_need_no_torch() -> None:
    for name in FILES:
        if is_under(name, {"gradleak.report"}):
            assert not [i for m in reachable(name) for i in imports(m) if is_under(i, {"torch", "safetensors"})]


def test_nothing_unpickles_or_evaluates() -> None:
    for name in FILES:
        assert not imports(name) & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "torch.load"}, name
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                # One file, known by its hash.
                if called == "torch.load" and place(name) == "priors/denoisers/ffdnet.py":
                    assert "weights_only=True" in ast.unparse(node)
                    continue
                assert called not in ("eval", "exec", "compile", "__import__", "torch.load"), f"{name}:{node.lineno}"


# tokenizers, a library in Rust, raises bare Exceptions; whatever goes wrong in a cell of a study is that cell's result; another's
# package may do whatever it likes while it is imported
BROAD = {"gradleak.formats.blueprints", "gradleak.studies.study", "gradleak.attacks.own"}


def test_no_bare_or_broad_except() -> None:
    for name in FILES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}:{node.lineno}"
                broad = ast.unparse(node.type) in ("Exception", "BaseException")
                assert not broad or name in BROAD, f"{name}:{node.lineno}"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_importing_costs_nothing() -> None:
    assert run("import gradleak, sys; print([n for n in ('torch', 'numpy', 'tyro') if n in sys.modules])") == "[]"


def test_help_lists_and_errors_need_no_torch() -> None:
    code = """
import sys
from gradleak.cli.app import main
for line in {lines}:
    try:
        main(line.split())
    except SystemExit:
        pass
    assert "torch" not in sys.modules, line
"""
    lines = [
        "",
        "--help",
        "--version",
        "capture",
        "nonsense",
        "list",
        "list --json",
        "audit nothing --out x",
    ]
    lines += ["attack x --attack DLG --out x", "attack --attack dlg --help", "audit --config none"]
    lines += [f"{command} --help" for command in COMMANDS]
    run(code.format(lines=lines))


def test_using_the_package_is_light() -> None:
    heavy = ["datasets", "transformers", "peft", "skimage", "sklearn", "matplotlib", "scipy", "rich", "tyro"]
    code = f"import gradleak, sys; gradleak.DLG, gradleak.capture_gradient; print([n for n in {heavy} if n in sys.modules])"
    assert run(code) == "[]"


def test_every_public_name_exists() -> None:
    assert all(hasattr(gradleak, name) for name in gradleak.__all__)
    assert len(set(gradleak.__all__)) == len(gradleak.__all__) > 30
