"""A published dataset as step 0 reads it: where its files lie, what to watch for changes, and a stream of rows."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import fingerprint
from pipeline.schema import Dataset


@dataclass(frozen=True, slots=True)
class Row:
    """One image-text pair as published, or a line of the published lists that is none."""

    label: str
    """Where it stands in the published files, as a user would look it up."""
    image: str = ""
    """Path of the image, relative to the root."""
    text: str = ""
    image_id: str | None = None
    """What the pairs of one image share. None takes the path."""
    category: str | None = None
    split: str | None = None
    """train, val or test. None where the dataset publishes no splits, then in every row."""
    rejected: tuple[str, str] | None = None
    """Kind and detail of why the row cannot be used."""


@dataclass(frozen=True)
class Published:
    """A dataset as it lies on disk: what a reader returns."""

    root: Path
    """The folder that image paths are relative to."""
    rows: Callable[[], Iterator[Row]]
    """Reads the rows, in the published order."""
    lists: tuple[Path, ...]
    """Files that list the rows. They are watched by their content."""
    files: Callable[[], Iterable[Path | str]]
    """All other files, as paths relative to the root. They are watched by size and time."""
    articles: Callable[[Collection[str]], Iterator[str]] | None = None
    """Longer texts to train Doc2Vec on, given the image_ids of val and test: texts of these images are left out.
    None where there are no longer texts."""

    def fingerprints(self) -> dict[str, str]:
        """A digest of each of `lists`, and one of `files` together. They change when the published files do."""
        digest = hashlib.sha256()
        for name in tqdm(self.files(), desc="looking for changes", unit="file", disable=None, delay=1):
            try:
                status = os.stat(self.root / name)
                seen = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            except (OSError, ValueError):
                seen = f"{name}\0missing\n"
            digest.update(seen.encode(errors="surrogatepass"))
        try:
            return {str(path): fingerprint(path) for path in self.lists} | {"images and texts": digest.hexdigest()}
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


Reader = Callable[[Dataset, Path, int], Published]
"""A reader: from the section `dataset` of the settings, the folder it may write to, and the seed."""


# Where files lie


def given_root(dataset: Dataset, publisher: str) -> Path:
    """The folder dataset.root. Raises UserError that names the flag and `publisher`, where it is no folder."""
    what = f"the folder of {dataset.source}'s files"
    if dataset.root is None:
        raise UserError(f"dataset.source {dataset.source} needs dataset.root: name {what} with --dataset.root")
    if not Path(dataset.root).is_dir():
        raise UserError(
            f"dataset.root {dataset.root} is no folder: name {what} with --dataset.root; published at {publisher}"
        )
    return Path(dataset.root)


def look_for(root: Path, names: Sequence[str], what: str, publisher: str) -> Path:
    """The first of `names` (paths relative to `root`) that exists.

    Raises UserError that says what was looked for, what was found, and where the owner publishes it.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    held = sorted(name for name in os.listdir(root) if not is_system_file(name))
    listed = ", ".join(held[:8]) + (f" and {len(held) - 8} more" if len(held) > 8 else "")
    raise UserError(
        f"dataset.root {root} holds no {what}: looked for {', '.join(names)}; found {listed or 'nothing'}. "
        f"Name its folder with --dataset.root; published at {publisher}"
    )


SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx", "lost+found", "@eadir"}


def is_system_file(name: str) -> bool:
    """Whether an operating system leaves a file or folder of this name beside data.

    macOS leaves `.DS_Store`, and `._NAME` beside each NAME: these end like images and shards and are none.
    """
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def files_below(root: Path, *folders: str) -> Iterator[str]:
    """Paths (relative to `root`) of all files in `folders` and below, sorted, without system files."""
    for folder in folders:
        for place, below, names in os.walk(root / folder):
            below[:] = sorted(name for name in below if not is_system_file(name))
            for name in sorted(names):
                if not is_system_file(name):
                    yield os.path.relpath(os.path.join(place, name), root)


OUTSIDE, LINK = "outside the root", "link out of the root"
"""Kinds of rejected rows. `dataset.follow_links` accepts the second."""


def outside(root: Path, image: str) -> tuple[str, str] | None:
    """Why `image` does not lie below `root`, as kind and detail of a rejected row. None where it does."""
    if image.startswith("/"):
        return OUTSIDE, f"{image} is an absolute path; paths are relative to {root}"
    if ".." in image.split("/"):
        return OUTSIDE, f"{image} may lead out of {root}"
    path = root / image
    try:
        is_inside = _resolved(path.parent).is_relative_to(_resolved(root))
        if is_inside and path.is_symlink():
            is_inside = path.resolve().is_relative_to(_resolved(root))
    except (OSError, ValueError, RuntimeError) as error:
        return OUTSIDE, f"{image}: {error}"
    return None if is_inside else (LINK, f"{image} is a link that leads out of {root}; dataset.follow_links allows it")


@functools.lru_cache(maxsize=4096)
def _resolved(folder: Path) -> Path:
    return folder.resolve()


def checked(root: Path, row: Row, *texts: str) -> Row:
    """The row, rejected where its text is no text, or its image or one of its files `texts` lies outside `root`."""
    if row.rejected:
        return row
    if not isinstance(row.text, str):
        return replace(row, text="", rejected=("bad row", f"its text is no text but {shown(row.text)}"))
    if not row.image:
        return replace(row, rejected=("bad row", "names no image"))
    for name in texts:
        if why := outside(root, name):
            return replace(row, text="", rejected=(OUTSIDE, why[1]))
    why = outside(root, row.image)
    return replace(row, rejected=why) if why else row


def shown(value: Any) -> str:
    """The beginning of a value of any type, for messages. Deeply nested ones are named by their type."""
    try:
        return f"{value!r:.40}"
    except (RecursionError, ValueError):
        return type(value).__name__


# What is in files

LONGEST_LINE = 10_000_000
"""Characters of a line that is read. A file without line breaks is no list, and would fill the memory."""

TOO_LONG = f"is longer than {LONGEST_LINE:,} characters"


def lines_of(file: TextIO) -> Iterator[tuple[int, str | None]]:
    """Number and content of each line of a file. A line longer than LONGEST_LINE is skipped, its content None."""
    for number in itertools.count(1):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) <= LONGEST_LINE:
            yield number, line
            continue
        while line and line[-1] not in "\r\n":
            line = file.readline(LONGEST_LINE)
        yield number, None


def read_published_json(path: Path) -> Any:
    """A JSON file of the dataset's owner. Raises UserError where it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from None


def json_members(path: Path, chunk: int = 1 << 20) -> Iterator[tuple[str, Any]]:
    """Key and value of each member of the object in a JSON file, one at a time: files may be larger than memory.

    At least `chunk` characters are read at a time. Raises UserError where the file cannot be read or holds no object.
    This is not ijson: its fast parser turns a lone surrogate into `?`, refuses a file for one number of 2^63, and its
    `kvitems` needs gigabytes for 100,000 brackets.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _Members(file, chunk)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from None


class _Members:
    """The members of a JSON object, parsed from a buffer that is filled as needed. Raises ValueError."""

    def __init__(self, file: TextIO, chunk: int) -> None:
        self.file, self.chunk = file, chunk
        self.buffer, self.place, self.ended = "", 0, False

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        if self._next_character() != "{":
            raise ValueError("it is no JSON object")
        self.place += 1
        while self._next_character() != "}":
            key = self._value()
            if not isinstance(key, str) or self._next_character() != ":":
                raise ValueError(f"a member is broken near {self.buffer[self.place : self.place + 40]!r}")
            self.place += 1
            self._next_character()
            yield key, self._value()
            character = self._next_character()
            if character == ",":
                self.place += 1
            elif character != "}":
                raise ValueError("a comma is missing" if character else "it ends before its last brace")
            if self.place >= self.chunk:
                self.buffer, self.place = self.buffer[self.place :], 0

    def _fill(self) -> None:
        # A member that is incomplete is parsed again from its beginning. The buffer doubles, so the cost is linear.
        read = self.file.read(max(self.chunk, len(self.buffer)))
        self.buffer, self.ended = self.buffer + read, not read

    def _next_character(self) -> str:
        """Move to the next character that is no blank and return it. "" at the end of the file."""
        while True:
            while self.place < len(self.buffer) and self.buffer[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.buffer) or self.ended:
                return self.buffer[self.place : self.place + 1]
            self._fill()

    def _value(self) -> Any:
        """Parse the value at `place` and move behind it."""
        while True:
            try:
                found, end = _DECODER.raw_decode(self.buffer, self.place)
                if self.ended or self.buffer[end : end + 1] in [*" \t\r\n,:}"]:  # else a number may go on
                    self.place = end
                    return found
            except ValueError:
                if self.ended:
                    raise
            self._fill()


_DECODER = json.JSONDecoder()
