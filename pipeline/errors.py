"""Errors that end a script in one line."""

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where nothing more can be written."""


class UserError(Exception):
    """Something the user can mend. Its message is one line: what is wrong, where, and what to do."""


class Stopped(Exception):
    """A signal stopped the script in good order. Its message is one line, as UserError's."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def reason(error: BaseException, most: int | None = None) -> str:
    """An error's message in one line, of at most `most` characters; its type where it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__
