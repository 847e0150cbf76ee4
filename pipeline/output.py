"""What scripts print: it never decides whether what they computed is kept, and it cannot command a terminal."""

import contextlib
import io
import os
import re
import sys
from typing import Any, TextIO

_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # they show what follows in another order
ESCAPED = {number: f"\\u{number:04x}" for number in (*_CONTROLS, *_TURNING) if chr(number) not in "\t\n"}
"""Characters that command a terminal, as they are printed: texts and file names may hold them. JSON stays JSON."""
_PROGRESS = re.compile(r"(?:\x1b\[A)+|\r", re.ASCII)
"""What tqdm commands: a text of nothing but steps to the line above, and a return at the beginning of a text."""


def in_one_line(name: object) -> str:
    """A name or path as it is printed within a line: what breaks lines is escaped too."""
    return str(name).translate({**ESCAPED, ord("\n"): "\\n", ord("\t"): "\\t"})


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
    """A text stream over a file descriptor. Characters that its encoding lacks, and control characters, are escaped.

    With `progress`, tqdm's own control characters pass, each only where tqdm writes it.
    """

    def __init__(self, stream: TextIO, progress: bool) -> None:
        raw = _Stream(stream.fileno())
        super().__init__(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=True,  # who pipes long work to a file sees how far it is
        )
        self.progress = progress

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        own = ""
        if self.progress and (found := _PROGRESS.match(text)) and (found[0] == "\r" or found[0] == text):
            own = found[0]
        super().write(own + text[len(own) :].translate(ESCAPED))
        return len(text)


def harden_output() -> None:
    """Replace stdout and stderr, where they are those of the process, by streams that never raise.

    Control characters are escaped. Only tqdm's own pass on stderr.
    """
    _open_standard_descriptors()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the descriptor was closed before the script started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and not isinstance(stream, Output):
            with contextlib.suppress(OSError, ValueError):  # no descriptor: whoever replaced it knows why
                stream.flush()
                setattr(sys, name, Output(stream, progress=name == "stderr"))


def _open_standard_descriptors() -> None:
    """Open 0, 1 and 2 where they are closed: a table that got one would have what C code and workers print in it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(nowhere, True)
