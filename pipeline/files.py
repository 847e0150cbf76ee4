"""Whole files, locks and fingerprints: what is written appears whole or not at all."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError

LOCK = ".lock"
"""In WORK and in a run's folder: names the process that writes there, or was the last to do so."""


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it is flushed and takes `path`'s place when the block ends without an error.

    Raises UserError where the disk is full or not writable; the old file, if any, then stands as it was.
    """
    prefix = f".{path.name}.{platform.node()}."
    beside = path.with_name(f"{prefix}{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent, prefix)
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        if error.filename not in (None, str(beside), str(path), str(path.parent)):
            raise
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what killed processes of this computer left half-written in `folder`, by the beginning of the names."""
    for part in folder.glob(f"{glob.escape(prefix)}*.part*"):
        pid = part.name.removeprefix(prefix).split(".")[0]
        if pid.isdecimal() and not _is_running(int(pid)):
            part.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # no signal: only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Be the only process that writes in a folder; raises UserError that says who holds it, where another does.

    The system lets go of a lock when its process ends, however it ends.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{holder} is at work in {folder}; wait until it has ended, or stop it") from None
        file.truncate(0)
        file.write(f"{Path(sys.argv[0]).name} (process {os.getpid()} on {platform.node()})\n")
        file.flush()
        yield


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole."""
    with written_whole(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy, whole."""
    with written_whole(path) as beside, beside.open("wb") as file:
        np.save(file, array)


def open_array(path: Path, shape: tuple[int, ...], dtype: type, keep: bool = False) -> np.ndarray:
    """An array in a .npy file to write to piece by piece, memory-mapped; with `keep` the one that is there already.

    Raises UserError where it cannot be written, or the one that is to be kept is not whole.
    """
    try:
        if keep:
            # For reading first: what is cut off would be filled up with zeros.
            there = np.load(path, mmap_mode="r", allow_pickle=False)
            if there.shape != shape or there.dtype != dtype:
                raise ValueError(f"it holds {there.dtype} {there.shape}, not {np.dtype(dtype)} {shape}")
            return np.load(path, mmap_mode="r+", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot go on with {path}: {error}; remove {path.parent} to begin anew") from None
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with path.open("r+b") as file:  # a disk that is full is told now; later, the process would be killed
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return array


def move_into_place(path: Path, target: Path) -> None:
    """Flush a file that was written piece by piece, and give it its name."""
    with written_whole(target) as beside:
        path.replace(beside)


def _remedy(path: Path) -> str:
    from pipeline.steps import remedy

    return remedy(path)


def read_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file; raises UserError where it is missing or broken."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = "it is no array" if "pickle" in str(error) else error  # numpy would advise to unpickle it
        raise UserError(f"cannot read {path}: {why}{_remedy(path)}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}{_remedy(path)}") from None
