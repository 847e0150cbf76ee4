"""Whole files, stamps, and what is said when an input has changed."""

import errno
import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline import steps as artifacts
from pipeline.errors import UserError
from pipeline.files import (
    is_running,
    open_array,
    read_array,
    read_json,
    read_json_lines,
    write_array,
    write_json,
    write_stamp,
    written_whole,
)
from pipeline.schema import Settings
from pipeline.steps import Step, is_up_to_date, making, require, what_changed

FIRST = Step("first.py", "first.json", (), ("a.txt",), ("seed", "training.batch_size"))
SECOND = Step("second.py", "second/second.json", ("a.txt",), ("second/b.npy",), ("seed", "text.max_sentences"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(work=str(tmp_path))


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "STEPS", (FIRST,))


def make_first(settings: Settings, text: str = "one") -> None:
    with making(FIRST, settings) as figures:
        (settings.work_folder / "a.txt").write_text(text)
        figures["letters"] = len(text)


def make_second(settings: Settings) -> None:
    with making(SECOND, settings):
        write_array(settings.work_folder / "second" / "b.npy", np.arange(3))


def test_a_finished_step_is_up_to_date(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    make_first(settings)
    assert f"wrote {settings.work_folder / 'a.txt'}" in capsys.readouterr().out
    assert is_up_to_date(FIRST, settings)
    assert f"up to date {settings.work_folder / 'a.txt'}" in capsys.readouterr().out
    assert require(FIRST, settings)["figures"] == {"letters": 3}


def test_other_settings_other_inputs_and_truncation_are_seen(settings: Settings) -> None:
    make_first(settings)
    make_second(settings)
    settings.text.max_sentences = 7
    assert "text.max_sentences" in str(what_changed(SECOND, settings))
    settings.text.max_sentences = 2
    assert what_changed(SECOND, settings) is None
    make_first(settings, "two")
    assert "another a.txt" in str(what_changed(SECOND, settings))
    with pytest.raises(UserError, match=r"run second.py"):
        require(SECOND, settings)
    make_second(settings)
    array = settings.work_folder / "second" / "b.npy"
    array.write_bytes(array.read_bytes()[:-1])
    assert "damaged (b.npy" in str(what_changed(SECOND, settings))


def test_the_seed_counts_for_the_step_itself_and_not_for_the_next(settings: Settings) -> None:
    make_first(settings)
    settings.seed = 1
    assert not is_up_to_date(FIRST, settings)
    require(FIRST, settings)


def test_published_files_count(settings: Settings) -> None:
    with making(FIRST, settings, {"list.tsv": "1"}):
        (settings.work_folder / "a.txt").write_text("x")
    assert what_changed(FIRST, settings, {"list.tsv": "1"}) is None
    assert "list.tsv" in str(what_changed(FIRST, settings, {"list.tsv": "2"}))


def test_a_step_that_fails_leaves_no_stamp(settings: Settings) -> None:
    make_first(settings)
    with pytest.raises(RuntimeError), making(FIRST, settings):
        raise RuntimeError
    assert not is_up_to_date(FIRST, settings)


def test_a_missing_input_names_the_step_that_makes_it(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"run first\.py first"):
        make_second(settings)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match="No space left"), written_whole(path) as beside:
        beside.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_array_for_which_the_disk_has_no_room_is_told_before_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped page that finds no room would kill the process."""
    path = tmp_path / "array.npy"
    open_array(path, (100, 1000), np.float32)
    assert path.stat().st_blocks * 512 >= 400_000

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot write .*array\.npy: .*No space left"):
        open_array(path, (100, 1000), np.float32)


def test_a_partial_last_line_is_cut_off_and_the_others_are_not_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while they are written anew would lose them all."""
    path = tmp_path / "done.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes(b'[1]\n{"a": 2}\n[3')
    for call in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, call, None)
    for _ in range(2):
        assert read_json_lines(path) == [[1], {"a": 2}]
        assert path.read_bytes() == b'[1]\n{"a": 2}\n'


def test_a_process_is_running_or_is_not() -> None:
    assert is_running(os.getpid()) and is_running(1)
    assert not is_running(10**20)


def test_an_array_that_is_not_whole_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    open_array(path, (10, 3), np.float32)[:] = 7
    assert (open_array(path, (10, 3), np.float32, keep=True) == 7).all()
    for shape, dtype in (((10, 4), np.float32), ((10, 3), np.float64)):
        with pytest.raises(UserError, match="it holds float32"):
            open_array(path, shape, dtype, keep=True)
    os.truncate(path, 200)
    with pytest.raises(UserError, match=r"cannot resume with .*array\.npy: .*; remove .* to start anew"):
        open_array(path, (10, 3), np.float32, keep=True)
    assert path.stat().st_size == 200


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path, host = tmp_path / "list[1].json", platform.node()
    dead = subprocess.Popen(["true"])
    dead.wait()
    leftover, alive = (tmp_path / f".list[1].json.{host}.{pid}.part.json" for pid in (dead.pid, os.getppid()))
    elsewhere = tmp_path / f".list[1].json.not-{host}.{dead.pid}.part.json"
    another = tmp_path / f".other.json.{host}.{dead.pid}.part.json"
    for part in (leftover, alive, elsewhere, another):
        part.write_text("half")
    write_json(path, {})
    assert sorted(tmp_path.iterdir()) == sorted([path, alive, elsewhere, another])


def test_a_stamp_holds_sizes_and_fingerprints_of_outputs(settings: Settings) -> None:
    make_first(settings)
    found = read_json(settings.work_folder / "first.json")["outputs"]
    assert found == {"a.txt": {"size": 3, "sha256": hashlib.sha256(b"one").hexdigest()}}


def test_a_stamp_of_an_earlier_version_has_sizes_alone(settings: Settings) -> None:
    make_first(settings)
    stamp = settings.work_folder / "first.json"
    stamp.write_text(json.dumps({**read_json(stamp), "outputs": {"a.txt": {"size": 3}}}))
    assert is_up_to_date(FIRST, settings)
    (settings.work_folder / "a.txt").write_text("four")
    assert not is_up_to_date(FIRST, settings)


@pytest.mark.parametrize("value", [{"a": 1.5, "b": [None, "é"]}, [1, 2], 3, {}, {"value": 1, "more": float("inf")}])
def test_json_is_read_as_it_was_written_and_any_flipped_bit_is_told(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.json"
    write_json(path, value)
    assert read_json(path) == value
    content = path.read_bytes()
    for place in range(8 * len(content)):
        path.write_bytes(flipped(content, place))
        try:
            found = read_json(path)
        except UserError as error:
            assert str(path) in str(error)
        else:  # blanks, or the name of the checksum
            assert found == value


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def test_a_file_that_changed_since_it_was_written_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path, times = tmp_path / "doc2vec" / "vectors.npy", (1, 1)
    write_array(path, np.arange(10.0))
    write_stamp(path.with_name("extract_doc2vec_vectors.json"), {}, [path])
    os.utime(path, times)
    read_array(path)
    path.write_bytes(flipped(path.read_bytes(), 1100))
    os.utime(path, times)
    with pytest.raises(UserError, match=r"vectors\.npy is damaged: .*; remove it and run extract_doc2vec_vectors\.py"):
        read_array(path)


def test_a_broken_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_array(path, np.arange(10))
    np.testing.assert_array_equal(read_array(path), np.arange(10))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot read"):
        read_array(path)
    path.write_bytes(b"")
    with pytest.raises(UserError):
        read_array(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError):
        read_array(path)
