"""Scripts run without a home folder, and no folder is called `~` or `$NAME`."""

import getpass
import os
import pwd
from pathlib import Path

import pytest

import evaluate
from pipeline.command_line import Parser
from pipeline.errors import UserError
from pipeline.home import NONE, demand_home, expanded
from pipeline.settings import load_settings


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither HOME nor an entry in /etc/passwd, as in a container with a user of its own."""

    def unknown(_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_libraries_find_a_home_and_a_user_where_there_is_none(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """gensim asks for the first when it is imported, torch's compiler for the second."""
    with monkeypatch.context() as changed:
        for name in ("HOME", "USER"):
            changed.setenv(name, "")  # so that they are as before at the end
            del os.environ[name]
        demand_home()
        assert Path.home() == Path(NONE) and getpass.getuser() == str(os.getuid())
        with pytest.raises(ValueError, match="no home folder"):
            expanded("~/x")


def test_a_home_and_a_user_that_are_known_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("USER", "x")
    demand_home()
    assert (os.environ["HOME"], os.environ["USER"]) == ("/home/x", "x")


@pytest.mark.parametrize("path", ["$NO_SUCH_NAME/x", "a/${NO_SUCH_NAME}", "~no-such-user/x", "~no-such-user"])
def test_what_stands_for_nothing_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_NAME", raising=False)
    with pytest.raises(UserError, match="(work|dataset.root) is .* and must be a path without [$~].*no"):
        load_settings({"work": path})
    with pytest.raises(UserError, match="must be a path without"):
        load_settings({"dataset": {"root": path}})
    parser = Parser("")
    parser.add_argument("--out", type=Path)
    with pytest.raises(UserError, match="must be a path without"):
        parser.parse_args([f"--out={path}"])


def test_paths_behind_an_equals_sign_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell does that."""
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.chdir(tmp_path)
    Path("~there$").touch()
    parser = Parser("")
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out=~/a.npy"]).out == Path("/home/x/a.npy")
    assert parser.parse_args(["--out", "~there$"]).out == Path("~there$")
    with pytest.raises(UserError, match="/home/x/no_run"):
        evaluate.main(["--run=~/no_run"])
