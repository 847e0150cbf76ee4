"""Random command lines: whatever is typed, a script does its work or ends in one line."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import script_process
from conftest import ROOT, TINY, run_script, with_libraries

pytestmark = pytest.mark.slow

LINES = 300
NOT_DRAWN = ("--serve", "--help", "--help-all", "--config", "--work")
"""Flags of lines that would not end, or that would write where no test may."""
VALUES = [
    "",
    " ",
    "-",
    "--",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "0.5",
    "-0.0",
    "1e-320",
    "1e999",
    "nan",
    "inf",
    "9" * 20,
    "9" * 5000,
]
VALUES += [
    "true",
    "false",
    "null",
    "auto",
    "cpu",
    "cuda",
    "test",
    "val",
    "all",
    "[]",
    "[1,2]",
    "{}",
    "{a: 1}",
    "[",
    "!!x",
    "*a",
]
VALUES += [
    "x",
    "x" * 300,
    "x" * 5000,
    "\x1b[2J",
    "a\nb",
    "é",
    "\udce9",
    "图",
    "%s",
    "{0}",
    "$HOME",
    "~",
    ".",
    "..",
    "nowhere/x",
]
VALUES += ["x.npy", "x.html", "x.zip", "manifest", "coco", "triplet", "hinge", "gru", "neighborhoods", "image_features"]


def random_line(draw: random.Random, base: list[list[str]], flags: list[str], paths: list[str]) -> list[str]:
    """A command line that would do, with some of it left out and a few words more."""

    def value() -> str:
        return draw.choice(VALUES if draw.random() < 0.7 else paths)

    words = [word for part in base if draw.random() < 0.85 for word in part]
    for _ in range(draw.randint(0, 3)):
        flag = draw.choice(flags)
        words += draw.choice(
            [[flag, value()], [flag, value()], [flag], [f"{flag}={value()}"], [value()], [flag, *paths[:2]]]
        )
    return words


@pytest.fixture(scope="session")
def trained(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and evaluated run on a WORK of its own."""
    work = tmp_path_factory.mktemp("lines") / "a" / "b" / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    run_script("train_cross_modal_retrieval_model.py", "1", "0.3", "0.2", *TINY, "--work", work)
    (run,) = (work / "runs").iterdir()
    run_script("evaluate.py", "--run", run)
    return run


def test_random_command_lines_end_well(trained: Path, tmp_path: Path) -> None:
    """Each script is called with hundreds of lines in one process. None ends in a traceback, or in two lines."""
    folder = trained.parents[2]  # the working directory and the home: what a line writes lies below
    odd = folder / "odd"
    odd.mkdir()
    (odd / "empty.csv").write_text("image,text\n")
    (odd / "bytes.jsonl").write_bytes(bytes(range(256)))
    (odd / "texts.txt").write_text("a red circle\n\n\x1b[2J\n")
    (odd / "config.yaml").write_text("a: [1")
    (odd / "link").symlink_to("nowhere")
    (odd / "folder.html").mkdir()
    paths = [str(trained), str(trained.parents[1]), str(odd), *map(str, sorted(odd.iterdir()))]
    run, out = ["--run", str(trained)], ["--out", str(folder / "out.npy")]
    settings = [*TINY, "--work", str(trained.parents[1]), "--training.max_epochs", "1"]
    no_rows = ["--dataset.source", "manifest", "--dataset.manifest", str(odd / "empty.csv"), "--seeds", "1"]
    bases: dict[str, list[list[str]]] = {
        "encode.py": [run, out, ["--texts", str(odd / "texts.txt")]],
        "export_run.py": [run, ["--out", str(folder / "out.zip")]],
        "evaluate.py": [run],
        "search.py": [run, ["circle"]],
        "make_report.py": [["--runs", str(trained)], ["--count", "0"]],
        "compare_runs.py": [[str(trained)]],
        "train_cross_modal_retrieval_model.py": [["1", "0.3", "0.2"]],
        "reproduce_tables.py": [],
        "tune_loss_weights.py": [["--tuning.trials", "1"]],
    }
    own = {"reproduce_tables.py": [*TINY, "--work", str(folder / "none"), *no_rows]}
    scripts = sorted(path.name for path in ROOT.glob("*.py") if "    run_script(main" in path.read_text())
    assert len(scripts) > 12
    draw, lines = random.Random(16), []
    for script in scripts:
        named = re.findall(r"(?<![\w-])--[a-z][\w.]*", run_script(script, "--help").stdout)
        flags = [*sorted(set(named) - set(NOT_DRAWN)), "--nothing"]
        always = own.get(
            script, [] if "--config" not in named or script in ("evaluate.py", "make_report.py") else settings
        )
        for _ in range(LINES // len(scripts) + 1):
            lines.append([script, *always, *random_line(draw, bases.get(script, []), flags, paths)])
    lines += [["make_report.py", "--runs", path] for path in ("/etc", "/", ".", "..")]
    lines += [["export_run.py", *run, "--out", "."], ["export_run.py", "--run", "x" * 300, *out]]
    results = tmp_path / "results.json"
    process = with_libraries().Process(
        target=script_process.run_lines, args=(str(ROOT), lines, str(folder), str(results))
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    found = json.loads(results.read_text())
    wrong = []
    for line, (code, said, trace) in zip(lines, found, strict=True):
        last = said.strip().splitlines()[-1:] or [""]
        if trace or code not in (0, 2) or (code == 2 and not last[0].startswith(f"{line[0]}: ")):
            wrong.append(f"{line}\nexit code {code}: {said[-600:]}{trace[-1500:]}")
    assert not wrong, "\n\n".join(wrong)
    assert len({line[0] for line, (code, _, _) in zip(lines, found, strict=True) if code == 0}) > 5
    assert sum(code == 2 for code, _, _ in found) > LINES / 2
