"""What README.md, CONTRIBUTING.md and docs/ name is there: files, tests, functions, settings, values of configs."""

import ast
import functools
import importlib
import itertools
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from metrics import registered
from pipeline import schema
from pipeline.registry import LOSSES
from pipeline.settings import get, load_settings
from reporting.filled_tables import short_title
from reporting.tables import BY_LOSS, TABLES, Method

DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS.append(ROOT / "benchmarks" / "README.md")
OF_THE_PROJECT = (".py", ".md", ".sh", ".yaml", ".yml", ".webp", ".svg", ".toml", ".html", ".cff")
"""Endings of the project's own files; data and outputs have others."""
OF_A_USER = {"config.yaml", "my.yaml", "FILE.yaml", "CONFIG"}
"""Files of these endings that are a user's or a run's."""
SENTENCES = {"3.3": 11, "4.0": 3, "4.1": 18, "4.2": 6, "4.3": 54, "4.4": 11}
"""Sentences of the paper by section, where the page has a row for each (4.0: before Sec. 4.1)."""
VERDICTS = ("same", "different", "not run", "no program")


@functools.cache
def project_files() -> frozenset[str]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return frozenset(name for name in listed.stdout.split("\n") if (ROOT / name).is_file())


@functools.cache
def names_of_functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def code_of(text: str) -> Iterator[str]:
    """What stands in backticks, and in blocks of code."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    yield from blocks


def is_there(name: str) -> bool:
    """Whether a file or test of the project has this name. A folder's file may be named without its folder."""
    path, _, test = name.partition("::")
    found = [ROOT / file for file in project_files() if file == path or file.endswith(f"/{path}")]
    return bool(found) and (not test or any(test in names_of_functions(file) for file in found))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = {word for code in code_of(text) for word in re.findall(r"[\w./*=-]+(?:::\w+)?", code)}
    named |= {link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link}
    files = {name for name in named if Path(name.partition("::")[0]).suffix in OF_THE_PROJECT} - OF_A_USER
    files = {name for name in files if not name.startswith((".", "work/", "data/")) and "*" not in name}
    assert files or document.name == "glossary.md"
    assert [name for name in sorted(files) if not is_there(name) and not (document.parent / name).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    """A test without its file is one of the file named before it in the line."""
    for line in document.read_text(encoding="utf-8").splitlines():
        path = None
        for name in re.findall(r"`((?:[\w/]+\.py::)?test_\w+)`", line):
            path = name.partition("::")[0] if "::" in name else path
            assert path is not None, f"{name} has no file in: {line}"
            assert is_there(name if "::" in name else f"{path}::{name}"), name


def test_every_fault_has_a_test() -> None:
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| fault |", "| --- |"))]
    assert len(rows) > 50
    assert [
        row for row in rows if "`tests/" not in row.split("|")[-2] and row.split("|")[-2].strip() != "the same"
    ] == []


# The page on faithfulness

PAGE = ROOT / "docs" / "faithfulness.md"


def rows_of_page() -> list[list[str]]:
    """The cells of the tables with four columns: number, statement, where, verdict."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows if row[0] != "no." and not set(row[0]) <= set("-: ")]


def exists(name: str) -> bool:
    """Whether a file, a test, a module's attribute, a setting, or a setting with this value is there."""
    if found := re.fullmatch(r"(?:(configs/\w+\.yaml): )?([\w.]+) = (.+)", name):
        config, setting, value = found.groups()
        settings = load_settings(ROOT / config) if config else load_settings({})
        return bool(get(settings, setting) == yaml.safe_load(value))
    if "/" in name or name in project_files() or Path(name.partition("::")[0]).suffix in OF_THE_PROJECT:
        path, _, test = name.partition("::")
        return path in project_files() and (not test or test in names_of_functions(ROOT / path))
    try:
        get(load_settings({}), name)
        return True
    except (AttributeError, KeyError):
        return is_attribute(name)


def is_attribute(name: str) -> bool:
    """Whether a dotted name is a module's attribute, such as `losses.angular_npairs_loss`."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if not ((ROOT / "/".join(parts[:length])).with_suffix(".py").is_file()):
            continue
        found: Any = importlib.import_module(".".join(parts[:length]))
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_what_the_page_names_under_where_exists() -> None:
    rows = rows_of_page()
    assert len(rows) > 150
    for number, _, where, _ in rows:
        for name in re.findall(r"`([^`]+)`", where):
            assert exists(name), f"{number}: {name}"


def test_every_row_of_the_page_has_a_verdict_and_a_place() -> None:
    for number, statement, where, verdict in rows_of_page():
        assert statement, number
        assert verdict.startswith(VERDICTS), f"{number}: {verdict}"
        assert "`" in where or verdict.startswith("no program"), f"{number} says nowhere where"
        assert verdict.partition(":")[2].strip() or verdict == "same", f"{number} says no reason"


@pytest.mark.parametrize(("section", "sentences"), SENTENCES.items())
def test_every_sentence_of_the_experiments_has_a_row(section: str, sentences: int) -> None:
    numbers = [row[0] for row in rows_of_page() if row[0].startswith(f"{section}.")]
    assert numbers == [f"{section}.{number}" for number in range(1, sentences + 1)]


def test_names_that_are_not_there_are_found() -> None:
    assert exists("losses.angular_npairs_loss") and exists("neighbors.k") and exists("neighbors.k = 200")
    assert exists("configs/coco.yaml: doc2vec.epochs = 50")
    assert exists("tests/test_documents.py::test_names_that_are_not_there_are_found")
    absent = ("losses.no_loss", "neighbors.no", "neighbors.k = 7", "configs/coco.yaml: doc2vec.epochs = 20")
    assert not [name for name in (*absent, "docs/no.md", "tests/test_losses.py::test_no", "no.module") if exists(name)]
    assert not is_there("test_survival.py::test_no") and not is_there("no.py")


def test_the_page_and_the_readme_say_what_was_not_run() -> None:
    first = " ".join(PAGE.read_text(encoding="utf-8").splitlines()[:8])
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for text in (first, readme):
        assert "None of the paper's four datasets was run here" in text


# Figures

RESULTS = sorted((ROOT / "results").glob("*/table*.json"))
DIFFERENCE = re.compile(r"([+−-]?\d\.\d{4})\s\[([+−-]?\d\.\d{4}),?\s([+−-]?\d\.\d{4})\]")
"""A difference with its interval, as tables and prose quote it."""


def in_four_digits(*values: float) -> tuple[str, ...]:
    return tuple(f"{round(value, 4) + 0.0:+.4f}" for value in values)


def intervals(difference: dict[str, Any]) -> set[tuple[str, ...]]:
    """A difference of a table's JSON as it may be quoted: with its interval over seeds, or over seeds and images."""
    ends = [difference, difference.get("seeds_and_images") or difference]
    return {in_four_digits(difference["mean"], end["low"], end["high"]) for end in ends}


def turned(difference: Sequence[float]) -> tuple[float, ...]:
    """A - B as B - A."""
    mean, low, high = difference
    return -mean, -high, -low


def differences_of(content: dict[str, Any]) -> dict[tuple[str, str], set[tuple[str, ...]]]:
    """By `A against B` and column, the differences of a table's JSON."""
    baselines = {row["group"]: row["method"] for row in reversed(content["rows"])}
    compared = [(row["method"], baselines[row["group"]], row["figures"], "difference") for row in content["rows"]]
    compared += [(line["method"], line["against"], line["figures"], None) for line in content.get("contrasts", [])]
    found = {}
    for method, against, figures, key in compared:
        for column, cell in figures.items():
            if difference := cell.get(key) if key else cell:
                found[f"{method} against {against}", column] = intervals(difference)
    return found


@functools.cache
def all_differences() -> frozenset[tuple[str, ...]]:
    tables = (differences_of(json.loads(path.read_text(encoding="utf-8"))) for path in RESULTS)
    return frozenset(quoted for of_table in tables for of_cell in of_table.values() for quoted in of_cell)


def tables_of_results(document: Path) -> Iterator[tuple[dict[str, Any], list[list[str]]]]:
    """The tables behind a comment such as `<!-- results/web_news/table1.json -->`: that file's content, and cells."""
    parts = re.split(r"^<!-- (results/\S+\.json) -->$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for path, text in zip(parts[1::2], parts[2::2], strict=True):
        lines = itertools.takewhile(lambda line: not line or line.startswith("|"), text.splitlines())
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
        yield json.loads((ROOT / path).read_text(encoding="utf-8")), rows


def mismatches(content: dict[str, Any], rows: list[list[str]]) -> list[str]:
    """What a table of a document has that is not in the JSON, by row and column."""
    columns = {short_title(metric): metric.name for metric in registered(schema.Evaluation()).values()}
    figures = {row["method"]: row["figures"] for row in content["rows"]}
    differences = differences_of(content)
    found, header = [], []
    for name, *cells in rows:
        if name in ("", "difference"):
            header = [columns[cell] for cell in cells] if any(cells) else header
        elif not set(name) <= {"-", ":", " "}:
            for column, cell in zip(header, cells, strict=True):
                numbers = tuple(re.findall(r"[+-]?\d\.\d{4}", cell))
                if name == "chance":
                    right = {(f"{content['chance'][column]:.4f}",)}
                elif " against " in name:
                    right = differences.get((name, column), set())
                    numbers = numbers[:3]
                else:
                    of_row = figures.get(name, {}).get(column)
                    right = {tuple(f"{of_row[key]:.4f}" for key in ("mean", "sd"))} if of_row else set()
                if numbers not in right:
                    found.append(f"{name}, {column}: {cell}")
    return found


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_tables_of_results_are_those_of_the_json(document: str) -> None:
    tables = list(tables_of_results(ROOT / document))
    assert tables and all(len(rows) > 2 for _, rows in tables)
    assert [found for content, rows in tables for found in mismatches(content, rows)] == []


def test_every_table_of_results_is_in_the_documents() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert [name for path in RESULTS if f"<!-- {(name := path.relative_to(ROOT).as_posix())} -->" not in text] == []


def test_a_wrong_figure_is_found() -> None:
    content, rows = next(tables_of_results(ROOT / "docs" / "results.md"))
    cell = rows[2][1]
    rows[2][1] = cell.replace(cell[0:6], "0.1234")
    assert len(mismatches(content, rows)) == 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_differences_that_prose_quotes_are_of_a_table(document: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    quoted = [tuple(float(number.replace("−", "-")) for number in found) for found in DIFFERENCE.findall(text)]
    unknown = [numbers for numbers in quoted if in_four_digits(*numbers) not in all_differences()]
    assert [numbers for numbers in unknown if in_four_digits(*turned(numbers)) not in all_differences()] == []


# Methods


def table_rows(document: str) -> list[list[str]]:
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.mark.parametrize(
    "method",
    dict.fromkeys(method for table in TABLES.values() for group in table.groups for method in group),
    ids=lambda method: method.name,
)
def test_every_row_of_the_tables_is_explained(method: Method) -> None:
    name = re.sub(r" \((loss|recall)\)$", " (…)", method.name)
    weights, settings = next(row[1:3] for row in table_rows("docs/methods.md") if row[0] == name)
    assert weights == ("by seed" if method.tuned else f"`{' '.join(f'{weight:g}' for weight in method.weights)}`")
    of_all = BY_LOSS if method.trials else {}
    own = {name: value for name, value in method.settings.items() if name not in of_all}
    flags = " ".join(f"--{name} {value}" for name, value in own.items())
    assert settings.strip("`") == flags.replace("{sentences}", "S")


def test_every_loss_is_explained() -> None:
    explained = " ".join(row[0] for row in table_rows("docs/methods.md"))
    assert [name for name in LOSSES if f"`{name}`" not in explained] == []


# The front page


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text.splitlines()) <= 200
    assert len(text) <= 10_000


def test_the_front_page_lists_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []
