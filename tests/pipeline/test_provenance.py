"""What figures were made with."""

import subprocess
from pathlib import Path

from pipeline.provenance import commit, made_with, processor

NONE = {"commit": None, "dirty": None}


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *names, *words], check=True, capture_output=True, text=True).stdout


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    folder.mkdir()
    assert commit(folder) == NONE
    git(folder, "init", "-q")
    assert commit(folder) == NONE  # nothing is committed
    (folder / "file").write_text("a")
    (folder / "results").mkdir()
    (folder / "results" / "table.json").write_text("a")
    git(folder, "add", "file", "results")
    git(folder, "commit", "-qm", "first")
    head = git(folder, "rev-parse", "HEAD").strip()
    (folder / "table.json").write_text("a result is no change of the code")
    (folder / "results" / "table.json").write_text("b")
    assert commit(folder) == {"commit": head, "dirty": False}
    (folder / "file").write_text("b")
    assert commit(folder) == {"commit": head, "dirty": True}
    (folder / "copy").mkdir()
    assert commit(folder / "copy") == NONE  # within a checkout of something else


def test_what_figures_note() -> None:
    made = made_with(threads=3)
    assert made["threads"] == 3 and made["versions"]["numpy"] and made["processor"] == processor() != ""
    assert len(made["date"].split("-")) == 3
