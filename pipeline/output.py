"""What scripts print: it never decides whether what they computed is kept, and it cannot command a terminal."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO

ESCAPED = {number: f"\\x{number:02x}" for number in (*range(0x20), *range(0x7F, 0xA0)) if chr(number) not in "\t\n\r"}
"""Control characters, which texts and file names may hold, as they are printed."""


class _Stream(io.RawIOBase):
    """A file descriptor to write to. When its reader has left or its disk is full, what is written is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        rest = memoryview(content).cast("B")
        count = len(rest)
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
        return count


class Output(io.TextIOWrapper):
    """A text stream over a file descriptor. Characters that its encoding lacks, and control characters, are escaped."""

    def __init__(self, stream: TextIO, escaped: dict[int, str]) -> None:
        raw = _Stream(stream.fileno())
        super().__init__(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=raw.isatty() or stream is sys.stderr,
        )
        self.escaped = escaped

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        super().write(text.translate(self.escaped) if self.escaped else text)
        return len(text)


def harden_output() -> None:
    """Replace stdout and stderr, where they are those of the process, by streams that never raise.

    On stdout, control characters are escaped. Progress bars on stderr need theirs.
    """
    _open_standard_descriptors()
    for name, escaped in (("stdout", ESCAPED), ("stderr", {})):
        stream = getattr(sys, name)
        if stream is None:  # the descriptor was closed before the script started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and not isinstance(stream, Output):
            with contextlib.suppress(OSError, ValueError):  # no descriptor: whoever replaced it knows why
                stream.flush()
                setattr(sys, name, Output(stream, escaped))


def _open_standard_descriptors() -> None:
    """Open 0, 1 and 2 where they are closed: a table that got one would have what C code and workers print in it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(nowhere, True)
