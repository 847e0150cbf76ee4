"""A published dataset as step 0 reads it: where its files lie, what to watch for changes, and a stream of rows."""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from images.tar_members import file_of
from pipeline.errors import UserError
from pipeline.files import fingerprint
from pipeline.progress import ProgressBar
from pipeline.schema import Dataset
from readers.rejections import ADDRESS, FOREIGN_PATH, LINK, OUTSIDE


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


TEXT_FILES = (".txt", ".xml", ".html", ".json")
"""Endings of files whose content counts, where a correction may leave the size as it was."""


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
    """All other files, as paths relative to the root. Texts are watched by their content, images by their
    size: neither by time, which copies do not keep."""
    articles: Callable[[Collection[str]], Iterator[str]] | None = None
    """Longer texts to train Doc2Vec on, given the image_ids of val and test: texts of these images are left out.
    None where there are no longer texts."""

    def fingerprints(self) -> dict[str, str]:
        """A digest of each of `lists`, and one of `files` together. They change when the published files do."""
        digest = hashlib.sha256()
        for name in ProgressBar(self.files(), desc="looking for changes", unit="file", delay=1):
            try:
                path = self.root / name
                is_text = path.suffix.lower() in TEXT_FILES
                seen = f"{name}\0{fingerprint(path) if is_text else os.stat(path).st_size}\n"
            except (OSError, ValueError):
                seen = f"{name}\0missing\n"
            digest.update(seen.encode(errors="surrogatepass"))
        try:
            return {str(path): fingerprint(path) for path in self.lists} | {"images and texts": digest.hexdigest()}
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


# Where files lie


def given_root(dataset: Dataset, publisher: str | None = None) -> Path:
    """The folder dataset.root. Raises UserError that names the flag, where it is no folder.

    It names `publisher` too, or, for one's own pairs, docs/data.md.
    """
    what = f"the folder of {dataset.source}'s files"
    where = f"published at {publisher}" if publisher else "docs/data.md says what it holds"
    if dataset.root is None:
        raise UserError(f"dataset.source {dataset.source} needs dataset.root: name {what} with --dataset.root")
    if not Path(dataset.root).is_dir():
        raise UserError(f"dataset.root {dataset.root} is no folder: name {what} with --dataset.root; {where}")
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


def outside(root: Path, image: str) -> tuple[str, str] | None:
    """Why `image` does not lie below `root`, as kind and detail of a rejected row. None where it does.

    Folders may be links, as a data disk is linked in. A link to a single file, or shard, may lead to another file of
    its folder or of the root, and nowhere else.
    """
    if image.startswith("/"):
        return OUTSIDE, f"{image} is an absolute path that does not lie in {root}"
    if ".." in image.split("/"):
        return OUTSIDE, f"{image} may lead out of {root}"
    try:
        file = file_of(root / image)
        folder = _resolved(file.parent)
        target = file.resolve() if file.is_symlink() else None
        is_inside = target is None or target.is_relative_to(folder) or target.is_relative_to(_resolved(root))
    except (OSError, ValueError, RuntimeError) as error:
        return OUTSIDE, f"{image}: {error}"
    return None if is_inside else (LINK, f"{image} is a link that leads out of {root}; dataset.follow_links allows it")


def placed(root: Path, image: str) -> tuple[str, tuple[str, str] | None]:
    """A path as users write it, relative to `root` and without `./`; and why it cannot be taken, None where it can.

    An absolute path that lies in `root` is taken. Addresses and paths of Windows are told as such.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", image):
        return image, (ADDRESS, f"{image:.100} is an address and not a file")
    if image != image.strip() and not _exists(root / image):
        image = image.strip()
    if image.startswith("/"):
        image = _below(root, image)
    image = PurePosixPath(image).as_posix()
    if ("\\" in image or re.match("[a-zA-Z]:/", image)) and not _exists(root / image):
        return image, (FOREIGN_PATH, f"{image:.100} is a path as Windows writes it")
    return image, outside(root, image)


def _below(root: Path, image: str) -> str:
    """An absolute path relative to `root`, however links spell it. Unchanged where it leads elsewhere."""
    path = Path(image)
    if ".." in path.parts:
        return image
    try:
        for folder, base in ((path.parent, root.absolute()), (_resolved(path.parent), _resolved(root))):
            if folder.is_relative_to(base):
                return (folder.relative_to(base) / path.name).as_posix()
    except (OSError, ValueError, RuntimeError):
        pass
    return image


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


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


def json_items(file: TextIO, path: Path, chunk: int = 1 << 20) -> Iterator[Any]:
    """The items of the list in an open JSON file, one at a time, each of LONGEST_LINE characters at most.

    Raises UserError, which names `path`, where the file cannot be read or holds no list.
    """
    try:
        yield from _Members(file, chunk, LONGEST_LINE).items()
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; save it again") from None


class _Members:
    """The members of a JSON object or list, parsed from a buffer that is filled as needed. Raises ValueError."""

    def __init__(self, file: TextIO, chunk: int, longest: int | None = None) -> None:
        self.file, self.chunk, self.longest = file, chunk, longest
        self.buffer, self.place, self.ended = "", 0, False

    def items(self) -> Iterator[Any]:
        """The items of a list."""
        if self._next_character() != "[":
            raise ValueError("it is no JSON list")
        self.place += 1
        if self._next_character() == "]":
            return
        while True:
            yield self._value()
            character = self._next_character()
            self.place += 1
            if character == "]":
                return
            if character != ",":
                raise ValueError("a comma is missing" if character else "it ends before its last bracket")
            self._next_character()
            if self.place >= self.chunk:
                self.buffer, self.place = self.buffer[self.place :], 0

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
        if self.longest is not None and len(self.buffer) - self.place > self.longest:
            raise ValueError(f"an item {TOO_LONG}")
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
                if self.ended or self.buffer[end : end + 1] in [*" \t\r\n,:}]"]:  # else a number may go on
                    self.place = end
                    return found
            except ValueError:
                if self.ended:
                    raise
            self._fill()


_DECODER = json.JSONDecoder()
