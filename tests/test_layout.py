"""The layout that CONTRIBUTING.md describes: sizes, names, and the direction of imports."""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("pipeline", "text_space", "images", "readers", "training", "reporting")
LEVELS = {
    "pipeline": 0,
    "text_space": 1,
    "images": 2,
    "readers": 3,
    "losses": 4,
    "ranking": 4,
    "metrics": 5,
    "models": 6,
    "datasets": 7,
    "training": 8,
    "reporting": 9,
}
"""A module imports only what has a lower level, or what is in its own room. Scripts are above all."""
PRODUCT = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
TOP = [path.stem for path in ROOT.glob("*.py")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """The first parts of the names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_a_file_and_its_functions_fit_a_reader(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
    assert not {"utils", "helpers", "common", "misc"} & {*path.relative_to(ROOT).with_suffix("").parts}


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own not in LEVELS:  # a script imports anything but what only scripts may
        return
    for other in imported(path) & {*LEVELS, *TOP}:
        assert other == own or LEVELS.get(other, 99) < LEVELS[own], f"{name_of(path)} imports {other}"


def test_few_files_stand_at_the_top() -> None:
    assert len(TOP) <= 20


def test_tests_lie_in_folders_of_the_same_names() -> None:
    listed = subprocess.run(["git", "ls-files", "tests"], cwd=ROOT, capture_output=True, text=True, check=False)
    folders = {Path(name).parts[1] for name in listed.stdout.split() if len(Path(name).parts) > 2}
    assert folders <= {*ROOMS}
