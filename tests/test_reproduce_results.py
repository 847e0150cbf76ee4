"""reproduce_results.sh: what it runs, skips and resumes; and that its commands make what is in results/."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from reproduce_tables import read_request

COMMANDS = """# a comment
first | WEB_NEWS | 2 | echo "$WORK $JOBS $OMP_NUM_THREADS" >>made
second | | 4 | echo second >>made; [ -f again ] || { touch again; exit 130; }
third | no-such-program | 8 | echo third >>made
fourth | POSTERS bash | 1 | echo fourth >>made; echo why; [ -f "mended it" ]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with commands that only note that they ran, and data of one kind."""
    shutil.copy(ROOT / "reproduce_results.sh", tmp_path)
    (tmp_path / "setup_environment.sh").write_text("")
    (tmp_path / "losses.py").write_text("# code\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "commands.txt").write_text(COMMANDS)
    (tmp_path / "news").mkdir()
    (tmp_path / "data" / "posters").mkdir(parents=True)
    return tmp_path


def call(project: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "reproduce_results.sh", *words],
        cwd=project,
        capture_output=True,
        text=True,
        env={**os.environ, "WEB_NEWS": "news", "JOBS": "3", **environment},
    )


def test_a_stopped_call_resumes_and_what_fails_is_tried_again(project: Path) -> None:
    stopped = call(project)
    assert stopped.returncode == 130 and "the same command resumes" in stopped.stderr
    assert (project / "made").read_text().splitlines() == ["work/reproduced/first 3 1", "second"]
    assert "first is done; 1 of 3 done, about" in stopped.stdout

    failed = call(project)
    assert failed.returncode == 1 and failed.stderr.splitlines() == [
        "fourth failed: why",
        "failed: fourth; the same command tries them again",
    ]
    assert (project / "made").read_text().splitlines()[2:] == ["second", "fourth"]
    assert "third is skipped: there is no no-such-program" in failed.stdout

    (project / "mended it").touch()
    assert call(project).stdout.splitlines()[-1] == "3 of 3 done"
    done = call(project)
    assert done.returncode == 0 and done.stdout.splitlines()[:2] == ["first is done", "second is done"]
    assert len((project / "made").read_text().splitlines()) == 5


def test_what_is_left_is_told_by_the_seconds_of_what_is_done(project: Path) -> None:
    shown = call(project, "--list", WEB_NEWS="nowhere").stdout.splitlines()
    assert [line.split(maxsplit=1)[1] for line in shown[:4]] == [
        "skipped: WEB_NEWS names no folder (nowhere)",
        "left, about 4 min",
        "skipped: there is no no-such-program",
        "left, about 1 min",
    ]
    assert shown[4:] == ["0 of 2 done, about 5 min left"]
    assert not (project / "work").exists()
    # A line of 2 estimated minutes took 6: 5 further ones take 15.
    assert call(project, "first").returncode == 0
    note = project / "work" / "reproduced" / "first.done"
    note.write_text("\n".join(["360", *note.read_text().splitlines()[1:]]))
    assert call(project, "--list").stdout.splitlines()[-1] == "1 of 3 done, about 15 min left"


def test_a_changed_command_is_run_again_and_changed_code_begins_anew(project: Path) -> None:
    assert call(project, "first").returncode == 0
    (project / "results" / "commands.txt").write_text(COMMANDS.replace("$WORK $JOBS", "$WORK, $JOBS"))
    assert call(project, "first").returncode == 0
    assert (project / "made").read_text().splitlines() == ["work/reproduced/first 3 1", "work/reproduced/first, 3 1"]
    (project / "losses.py").write_text("# other code\n")
    refused = call(project, "first")
    assert refused.returncode == 2 and "the code has changed since" in refused.stderr
    assert call(project, "--keep", "first").returncode == 0
    assert call(project, "first").returncode == 0


@pytest.mark.parametrize(("words", "message"), [(["--frist"], "usage: "), (["frist"], "has no line frist")])
def test_wrong_calls_end_in_one_line(project: Path, words: list[str], message: str) -> None:
    done = call(project, *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (project / "made").exists()


def test_the_commands_make_every_table_of_results(tmp_path: Path) -> None:
    made = set()
    for line in (ROOT / "results" / "commands.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, _, minutes, command = (field.strip() for field in line.split("|", 3))
        assert int(minutes) > 0
        for variable, value in (("WORK", f"work/reproduced/{name}"), ("JOBS", "2")):
            command = command.replace(f"${variable}", value)
        command = re.sub(r"\$[A-Z_]+", str(tmp_path), command)  # folders of data, which need not be there to be read
        *before, tables = (shlex.split(part) for part in command.split("&&"))
        assert [(ROOT / words[1]).is_file() for words in before] == [True] * len(before)
        assert tables[:2] == ["python", "reproduce_tables.py"]
        words = tables[2:]
        config = words[words.index("--config") + 1]
        words[words.index("--config") + 1] = str(ROOT / config)
        # Without a root OpenClipart would be fetched.
        request = read_request([*words, *([] if "--dataset.root" in words else ["--dataset.root", str(tmp_path)])])
        assert request.out == Path("results") / name
        made |= {request.out / f"table{table.number}.json" for table in request.tables}
    there = {path.relative_to(ROOT) for path in ROOT.glob("results/*/*.json")}
    assert there <= made
    assert not [path for path in ROOT.glob("results/*/*") if not re.fullmatch(r"table\d\.(json|md)", path.name)]
