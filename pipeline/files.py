"""Whole files, locks and fingerprints: what is written appears whole or not at all."""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import platform
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.work import remedy, stamp_of

LOCK = ".lock"
"""In WORK and in a run's folder: names the process that writes there, or was the last to do so."""


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. A file of the same path, size and times is hashed once a process."""
    status = path.stat()
    return _fingerprint(path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=256)
def _fingerprint(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_written(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Size and fingerprint of each file, by its name in a stamp."""
    return {name: {"size": path.stat().st_size, "sha256": fingerprint(path)} for name, path in paths.items()}


def is_damaged(path: Path, written: Mapping[str, Any]) -> bool:
    """Whether a file is no longer as `as_written` noted it. Stamps of earlier versions have no fingerprint."""
    return path.stat().st_size != written["size"] or written.get("sha256") not in (None, fingerprint(path))


def demand_undamaged(path: Path) -> None:
    """Raise UserError where the stamp beside a file in WORK says that the file has changed since it was written."""
    stamp = stamp_of(path)
    if stamp is None or not (stamp.is_file() and path.is_file()):
        return
    made = read_json(stamp)
    if not isinstance(made, dict):
        raise UserError(f"{stamp} is broken{remedy(stamp)}")
    for name, written in made.get("outputs", {}).items():
        if Path(name).name == path.name and is_damaged(path, written):
            raise UserError(f"{path} is damaged: it has changed since it was written{remedy(path)}")


def write_stamp(stamp: Path, made_from: Mapping[str, Any], outputs: Iterable[Path]) -> None:
    """Note what the files `outputs` were made from, and what they are like."""
    write_json(stamp, {**made_from, "outputs": as_written({path.name: path for path in outputs})})


def is_whole(stamp: Path, made_from: Mapping[str, Any], outputs: Collection[Path]) -> bool:
    """Whether the files `outputs` are there, undamaged, and made from `made_from`, as `write_stamp` noted."""
    try:
        made = read_json(stamp)
    except UserError:
        return False
    written = made.pop("outputs", {}) if isinstance(made, dict) else {}
    return made == made_from and all(
        path.is_file() and not (path.name in written and is_damaged(path, written[path.name])) for path in outputs
    )


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder. The file there replaces `path` when the block ends without an error.

    Raises UserError where the path is a folder, and where the disk is full or not writable; the old file, if any, is
    then unchanged.
    """
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    prefix = f".{path.name}.{platform.node()}."
    temporary = path.with_name(f"{prefix}{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent, prefix)
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path), str(path.parent)):
            raise
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_notes(*paths: Path) -> None:
    """Remove files by which a stopped call would have resumed, once what they are about is finished.

    A process that is killed right after its last write leaves them, so those that find its work finished call this.
    Where the folder is read-only they stay, and do no harm.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove temporary files in `folder` that begin with `prefix` and whose process on this computer has ended."""
    for part in folder.glob(f"{glob.escape(prefix)}*.part*"):
        pid = part.name.removeprefix(prefix).split(".")[0]
        if pid.isdecimal() and not is_running(int(pid)):
            part.unlink(missing_ok=True)


def temporary_files(path: Path) -> list[Path]:
    """The temporary files of `path`, those that are being written and those that killed processes left."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.part*"))


@contextlib.contextmanager
def _where_supported() -> Iterator[None]:
    """Go on where a file system lacks a call."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def flush_to_disk(path: Path) -> None:
    """Return when the file's bytes are on the disk."""
    with path.open("rb") as file, _where_supported():
        os.fsync(file.fileno())


def is_running(pid: int) -> bool:
    """Whether this computer runs a process of that number."""
    try:
        os.kill(pid, 0)  # no signal: only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes in a folder. Raises UserError that names the process that is; or waits for it.

    The system releases the lock when its process ends, however it ends.
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
            if not wait:
                raise UserError(f"{holder} is at work in {folder}; wait until it has ended, or stop it") from None
            print(f"{holder} is at work in {folder}; waiting until it has ended", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:  # some network and user-space file systems have no locks
            print(f"warning: {folder} cannot be locked ({error.strerror}): start no second process on it")
        file.truncate(0)
        file.write(f"{Path(sys.argv[0]).name} (process {os.getpid()} on {platform.node()})\n")
        file.flush()
        yield


def checksum(text: str) -> str:
    """Eight digits that tell a text from any other with one changed byte."""
    return f"{zlib.crc32(text.encode()):08x}"


def _checksum_of_json(value: Any) -> str:
    return checksum(json.dumps(value, sort_keys=True))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole, with a checksum of what it holds: an object, or else an object with that `value`."""
    content = json.loads(json.dumps(value if isinstance(value, dict) else {"value": value}))  # as it will be read
    content["checksum"] = _checksum_of_json(content)
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The value in each line of a file that grows by lines, [] where there is none. A partial last line is cut off."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    os.truncate(path, len(whole))  # writing the lines anew could lose them all
    return [json.loads(line) for line in whole.splitlines()]


def write_text(path: Path, text: str) -> None:
    r"""Write a UTF-8 text file, whole. A byte of a path that is no UTF-8 stands as `\udce9`, which JSON reads back."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy, whole."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def open_array(path: Path, shape: tuple[int, ...], dtype: type, keep: bool = False) -> np.memmap:
    """A memory-mapped array in a .npy file, to be written piece by piece; with `keep` the existing one.

    Raises UserError where it cannot be written, or the existing one is not whole.
    """
    try:
        if keep:
            # Opening for writing would fill a file that was cut off with zeros.
            there = np.load(path, mmap_mode="r", allow_pickle=False)
            if there.shape != shape or there.dtype != dtype:
                raise ValueError(f"it holds {there.dtype} {there.shape}, not {np.dtype(dtype)} {shape}")
            return np.load(path, mmap_mode="r+", allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy raise anything
        raise UserError(f"cannot resume with {path}: {error}; remove {path.parent} to start anew") from None
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        # A full disk raises here. Later, a mapped page would kill the process.
        with path.open("r+b") as file, _where_supported():
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return array


def read_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file; raises UserError where it is missing, broken or damaged."""
    demand_undamaged(path)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy raise anything
        why = "it is no array" if "pickle" in str(error) else error  # numpy would advise to unpickle it
        raise UserError(f"cannot read {path}: {why}{remedy(path)}") from None


def read_json(path: Path) -> Any:
    """What `write_json` wrote; raises UserError where the file is missing, broken or damaged.

    Files of earlier versions have no checksum.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}{remedy(path)}") from None
    if not isinstance(value, dict) or not value:
        return value
    *rest, (name, noted) = value.items()
    content = dict(rest)
    if noted != _checksum_of_json(content):  # else the name itself may be damaged
        if name == "checksum":
            raise UserError(f"{path} is damaged: it has changed since it was written{remedy(path)}")
        return value
    return content["value"] if content.keys() == {"value"} else content
