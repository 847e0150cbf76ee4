"""Folders that readers fetch or draw: they appear whole or not at all, and killed processes leave nothing behind."""

import contextlib
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.files import is_running


@contextlib.contextmanager
def written_whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends without an error.

    A process that is killed meanwhile leaves `folder` whole, old or new, or missing. Raises OSError.
    """
    remove_leftovers(folder)
    new, old = (folder.with_name(f"{_prefix(folder)}{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this computer left beside `folder`."""
    prefix = _prefix(folder)
    for path in folder.parent.glob(f"{glob.escape(prefix)}*"):
        process = path.name.removeprefix(prefix).split(".")[0]
        if process.isdecimal() and (int(process) == os.getpid() or not is_running(int(process))):
            shutil.rmtree(path, ignore_errors=True)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.{platform.node()}."
