"""What is printed never decides whether what was computed is kept."""

import contextlib
import os
import pty
import subprocess
import sys
import termios
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


PROGRESS = r"""
import sys; sys.path.insert(0, {root!r})
from pipeline.command_line import run_script
def main():
    from tqdm import tqdm
    with tqdm(total=2, desc="outer \x1b[2J\x1b[Aname", disable=None, mininterval=0) as outer:
        for _ in tqdm(range(2), desc="inner\rname", leave=False, disable=None, mininterval=0):
            outer.update()
            tqdm.write("a \x1b[2J\x9bmline", file=sys.stderr)
    raise ValueError("\x1b]0;in a traceback\x07")
run_script(main)
"""


def test_on_a_terminal_only_progress_bars_command(tmp_path: Path) -> None:
    """Bars move and are drawn anew; what their names, lines beside them and tracebacks hold is escaped."""
    script = tmp_path / "script.py"
    script.write_text(PROGRESS.format(root=str(ROOT)), encoding="utf-8")
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    done = subprocess.Popen([sys.executable, str(script)], stdin=its, stdout=its, stderr=its)
    os.close(its)
    printed = b""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while part := os.read(ours, 65536):
            printed += part
    os.close(ours)
    assert done.wait() == 1
    text = printed.decode()
    assert "\x1b[A" in text and "\r" in text, "tqdm needs no control characters, so the test would show nothing"
    assert "\x1b" not in text.replace("\x1b[A", "") and "\x9b" not in text and "\x07" not in text
    for escaped in (
        "outer \\u001b[2J\\u001b[Aname",
        "inner\\u000dname",
        "a \\u001b[2J\\u009bmline",
        "\\u001b]0;in a trace",
    ):
        assert escaped in text
