"""File systems that lack calls, and names that are no UTF-8."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

import encode
from pipeline.errors import UserError
from pipeline.files import lock, open_array, read_json, write_json, write_text
from pipeline.pairs import image_root, write_pairs

LATIN = os.fsdecode(b"caf\xe9")


def failing(number: int) -> object:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    with lock(tmp_path):
        pass
    assert capsys.readouterr().out == (
        f"warning: {tmp_path} cannot be locked ({os.strerror(number)}): start no second process on it\n"
    )


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_holds_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    with pytest.raises(UserError, match="is at work in"), lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_files_are_written_where_room_cannot_be_taken_nor_files_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    write_text(tmp_path / "text", "words")
    open_array(tmp_path / "array.npy", (2,), np.int64)[:] = 7
    assert (tmp_path / "text").read_text() == "words" and np.load(tmp_path / "array.npy").tolist() == [7, 7]


@pytest.mark.parametrize("call", ["fsync", "posix_fallocate"])
def test_a_disk_that_is_full_is_no_missing_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(UserError, match="cannot write .*No space left"):
        write_text(tmp_path / "text", "words")
        open_array(tmp_path / "array.npy", (2,), np.int64)


def test_a_root_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("pairs.parquet"), [], Path("data/images"))
    monkeypatch.chdir("/")
    assert image_root(tmp_path) == tmp_path / "data" / "images"


def test_a_root_whose_name_is_no_utf8_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a folder that was unpacked from an old archive, in which a script is started."""
    root = tmp_path / LATIN
    root.mkdir()
    monkeypatch.chdir(root)
    write_pairs(tmp_path / "pairs.parquet", [], Path("images"))
    assert image_root(tmp_path) == root / "images"


def test_a_path_that_is_no_utf8_is_kept_in_json(tmp_path: Path) -> None:
    write_json(tmp_path / "note.json", {"folder": LATIN})
    assert read_json(tmp_path / "note.json") == {"folder": LATIN}


def test_images_whose_names_are_no_utf8_are_listed(tmp_path: Path) -> None:
    (tmp_path / f"{LATIN}.png").touch()
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"caf\xe9.png\nother.png\n")
    assert encode.list_images(listed)[0][0] == encode.list_images(tmp_path)[0][0] == tmp_path / f"{LATIN}.png"
    encode.write_rows(tmp_path / "out.csv", "path", [LATIN, "b"], {0: f"{LATIN} is empty"}, {})
    wanted = "row,path,problem\n0,caf\\udce9,caf\\udce9 is empty\n1,b,\n"
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == wanted
