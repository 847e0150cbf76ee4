"""Count a process's operations on files, and end the process right before one of them, as SIGKILL would.

Operations are: open for writing, each write to a file (half of it is written before the process ends), fsync, allocate,
truncate, rename, remove, mkdir, rmdir, and commits to SQLite. Those of C++ libraries (Parquet) are not seen. What they
do lies between two operations that are.
"""

import builtins
import io
import os
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

ROOT = str(Path(__file__).parents[1])
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
NO_CHANGE = ("fsync", "posix_fallocate")
KILLED = 137


class Operation(NamedTuple):
    """One operation: what it is, on which file, and the project's lines that led to it."""

    kind: str
    path: str
    lines: tuple[str, ...]
    changes: bool = True
    """Whether it changes what a kill leaves: fsync and the removal of what is not there do not."""


class Operations:
    """The operations of this process on files in `folder`. With `last` the process ends before that one, from 0."""

    def __init__(self, folder: Path, last: int | None = None) -> None:
        self.folder, self.last, self.process = str(folder), last, os.getpid()
        self.done: list[Operation] = []
        self.own = threading.RLock()
        sys.addaudithook(self._audit)
        self._patch()

    def note(self, kind: str, path: object, directory: int = -1) -> bool:
        """Count an operation; True where it is the one before which the process ends."""
        if os.getpid() != self.process or not (name := self._within(path, directory)):
            return False
        with self.own:
            if self.last is not None:
                self.done.append(Operation(kind, name, ()))
                return len(self.done) == self.last + 1
            changes = kind not in NO_CHANGE and (kind == "remove") <= os.path.lexists(name)
            self.done.append(Operation(kind, name, _lines(), changes and (kind == "mkdir") + os.path.isdir(name) < 2))
        return False

    def _within(self, path: object, directory: int) -> str:
        """The path as an absolute one where it lies in the folder, otherwise nothing."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not isinstance(path, str | bytes | os.PathLike):
            return ""
        name = os.fsdecode(path)
        base = os.readlink(f"/proc/self/fd/{directory}") if directory >= 0 else os.getcwd()
        name = os.path.join(base, name)
        return name if name.startswith(self.folder) else ""

    def _audit(self, event: str, words: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = words
            if not isinstance(path, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.before("open", path)
        elif event in EVENTS:
            directory = words[-1] if event in ("os.remove", "os.mkdir", "os.rmdir") else -1
            self.before(event.removeprefix("os."), words[0], directory)

    def before(self, kind: str, path: object, directory: int = -1) -> None:
        """Count an operation that is about to be; or end the process."""
        if self.note(kind, path, directory):
            os._exit(KILLED)

    def _patch(self) -> None:
        operations, real_open = self, io.open

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                if operations.note("write", self.name):
                    super().write(memoryview(content)[: len(memoryview(content)) // 2])
                    os._exit(KILLED)
                return super().write(content) or 0

        def open_counted(file: Any, mode: str = "r", buffering: int = -1, *words: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or not self._within(file, -1) or buffering == 0:
                return real_open(file, mode, buffering, *words, **options)
            raw = File(os.fspath(file), mode.replace("b", "").replace("t", ""))
            buffer: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, *words, **options)

        builtins.open = io.open = open_counted  # type: ignore[assignment]
        for name in ("fsync", "posix_fallocate"):
            real = getattr(os, name)

            def call(descriptor: int, *words: Any, name: str = name, real: Any = real) -> Any:
                self.before(name, descriptor)
                return real(descriptor, *words)

            setattr(os, name, call)
        if "sqlalchemy" in sys.modules:
            from sqlalchemy.engine.default import DefaultDialect

            commit = DefaultDialect.do_commit

            def do_commit(dialect: Any, connection: Any) -> None:
                self.before("commit", self.folder)
                commit(dialect, connection)

            DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]


def _lines() -> tuple[str, ...]:
    frame, lines = sys._getframe(2), []
    while frame := frame.f_back:  # type: ignore[assignment]
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and "/tests/" not in path and "site-packages" not in path:
            lines.append(f"{path.removeprefix(ROOT)}:{frame.f_lineno}")
    return tuple(lines)
