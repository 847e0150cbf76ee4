"""What is printed never decides whether what was computed is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from pipeline.command_line import run_script
from pipeline.errors import UserError
def main():
    for number in range(3000):
        print({text!r}, number)
    open("done", "w").write("all of it")
    {end}
run_script(main)
"""


def run(folder: Path, text: str = "a line", end: str = "", redirect: str = "", **environment: str) -> tuple[int, str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), text=text, end=end), encoding="utf-8")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} script.py {redirect}"],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "redirect",
    [
        "| head -n 1",
        ">&-",
        "<&- >&- 2>&-",
        ">/dev/full",
        "2>&-",
        ">&- 2>&-",
        "2>/dev/full",
        ">/dev/full 2>/dev/full",
        "| true",
    ],
)
def test_a_stream_that_cannot_be_written_discards_nothing(tmp_path: Path, redirect: str) -> None:
    code, printed = run(tmp_path, redirect=redirect)
    assert code == 0 and "Traceback" not in printed and "Exception" not in printed
    assert (tmp_path / "done").read_text() == "all of it"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
def test_text_that_the_terminal_lacks_is_escaped(tmp_path: Path, encoding: str) -> None:
    code, printed = run(tmp_path, "ﬁ 图 \udce9 é", PYTHONIOENCODING=encoding)
    assert code == 0 and "Traceback" not in printed and "2999" in printed


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    end = 'raise UserError("a file called \\x1b[2Jx\\x07")'
    code, printed = run(tmp_path, "\x1b]0;title\x07 \x9b2J\ttab", end)
    assert code == 2
    assert "\\u001b]0;title\\u0007 \\u009b2J\ttab 0\n" in printed
    assert "script.py: a file called \\u001b[2Jx\\u0007\n" in printed
    assert not {"\x1b", "\x07", "\x9b"} & set(printed)


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-"])
def test_a_mistake_that_cannot_be_told_has_its_exit_code(tmp_path: Path, redirect: str) -> None:
    code, printed = run(tmp_path, end='raise UserError("wrong")', redirect=f">/dev/null {redirect}")
    assert (code, printed) == (2, "")


@pytest.mark.parametrize("redirect", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path, redirect: str) -> None:
    """C code prints to the descriptors 1 and 2, whatever these are."""
    end = 'file = open("table", "w"); import os; [os.write(n, b"noise") for n in (1, 2)]; print("all", file=file)'
    code, _ = run(tmp_path, redirect=redirect, end=end)
    assert code == 0 and (tmp_path / "table").read_text() == "all\n"
