"""A published dataset as step 0 reads it: where its files lie, what to watch for changes, and a stream of rows."""

import codecs
import functools
import hashlib
import html
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import fingerprint
from pipeline.settings import Settings


@dataclass(frozen=True, slots=True)
class Row:
    """One image-text pair as published, or a line of the published lists that is none."""

    label: str
    """Where it stands in the published files, as a user would look it up."""
    image: str = ""
    """Path of the image, relative to the root."""
    text: str = ""
    image_id: str | None = None
    """What the pairs of one image share; None takes the path."""
    category: str | None = None
    split: str | None = None
    """train, val or test where the dataset publishes its splits (then in every row), else None."""
    rejected: tuple[str, str] | None = None
    """Kind and detail of why the row cannot be used."""


@dataclass(frozen=True)
class Published:
    """A dataset as it lies on disk."""

    root: Path
    """The folder that image paths are relative to."""
    rows: Callable[[], Iterator[Row]]
    """Reads the rows, in the published order."""
    lists: tuple[Path, ...]
    """Files that say what there is, watched by their content."""
    files: Callable[[], Iterable[Path | str]]
    """All other files (paths relative to the root), watched by size and time."""
    articles: Callable[[], Iterator[str]] | None = None
    """Longer texts of the train split, where there are any that Doc2Vec can be trained on in place of the pairs'."""

    def fingerprints(self) -> dict[str, str]:
        """What changes when the published files do: a digest of each of `lists`, and one of `files` together."""
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


def given_root(settings: Settings) -> Path:
    """dataset.root, which has to be a folder."""
    source, root = settings.dataset.source, settings.dataset.root
    if root is None:
        raise UserError(f"the source {source} needs dataset.root, the folder of the published files")
    if not Path(root).is_dir():
        raise UserError(f"dataset.root {root} is no folder; name the one that holds the published files of {source}")
    return Path(root)


def files_below(root: Path, *folders: str) -> Iterator[str]:
    """Paths (relative to `root`) of all files in `folders` and below, sorted."""
    for folder in folders:
        for place, below, names in os.walk(root / folder):
            below.sort()
            for name in sorted(names):
                yield os.path.relpath(os.path.join(place, name), root)


OUTSIDE, LINK = "outside the root", "link out of the root"
"""Kinds of rejected rows; `dataset.follow_links` takes the second."""


def outside(root: Path, image: str) -> tuple[str, str] | None:
    """Why `image` does not lie below `root`, as a rejected row has it; None where it does."""
    if image.startswith("/"):
        return OUTSIDE, f"{image} is an absolute path; paths are relative to {root}"
    if ".." in image.split("/"):
        return OUTSIDE, f"{image} may lead out of {root}"
    path = root / image
    try:
        inside = _resolved(path.parent).is_relative_to(_resolved(root))
        if inside and path.is_symlink():
            inside = path.resolve().is_relative_to(_resolved(root))
    except (OSError, ValueError, RuntimeError) as error:
        return OUTSIDE, f"{image}: {error}"
    return None if inside else (LINK, f"{image} is a link that leads out of {root}; dataset.follow_links allows it")


@functools.lru_cache(maxsize=4096)
def _resolved(folder: Path) -> Path:
    return folder.resolve()


# What readers share


def look_for(root: Path, names: Sequence[str], what: str, publisher: str) -> Path:
    """The first of `names` (paths relative to `root`) that is there.

    Raises UserError that names what was looked for, what was found, and where the owner publishes it.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    held = sorted(os.listdir(root))
    listed = ", ".join(held[:8]) + (f" and {len(held) - 8} more" if len(held) > 8 else "")
    raise UserError(
        f"dataset.root {root} holds no {what}: looked for {', '.join(names)}; found {listed or 'nothing'}. "
        f"It is published at {publisher}"
    )


def inside(root: Path, row: Row, *texts: str) -> Row:
    """The row, rejected where its image, or one of its files `texts`, lies outside `root`, or its text is none."""
    if row.rejected:
        return row
    if not isinstance(row.text, str):
        return replace(row, text="", rejected=("bad row", f"its text is no text but {row.text!r:.40}"))
    if not row.image:
        return replace(row, rejected=("bad row", "names no image"))
    for name in texts:
        if why := outside(root, name):
            return replace(row, text="", rejected=(OUTSIDE, why[1]))
    why = outside(root, row.image)
    return replace(row, rejected=why) if why else row


LONGEST_LINE = 10_000_000
"""Characters of a line that is read: a file without line breaks is no list, and would fill the memory."""


def lines_of(file: TextIO) -> Iterator[tuple[int, str | None]]:
    """Number and content of each line of a file; None for one longer than LONGEST_LINE, which is skipped."""
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


TOO_LONG = f"is longer than {LONGEST_LINE:,} characters"


def read_published_json(path: Path) -> Any:
    """A JSON file of the dataset's owner; raises UserError where it cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from None


def json_members(path: Path, chunk: int = 1 << 20) -> Iterator[tuple[str, Any]]:
    """Key and value of each member of the object that a JSON file consists of, one at a time.

    Only the member at hand is held, so that files larger than memory can be read. Raises UserError where the file
    cannot be read or is no such object.
    """
    decode = json.JSONDecoder().raw_decode
    buffer, ended = "", False

    def more(file: TextIO) -> None:
        # As much again as there is: a member that is not whole yet is parsed from its beginning, so its cost is linear.
        nonlocal buffer, ended
        read = file.read(max(chunk, len(buffer)))
        buffer, ended = buffer + read, not read

    def skip(at: int, file: TextIO) -> int:
        """The place of the next character that is no blank; the buffer's length only at the end of the file."""
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer) or ended:
                return at
            more(file)

    def value(at: int, file: TextIO) -> tuple[Any, int]:
        while True:
            try:
                found, end = decode(buffer, at)
                if ended or buffer[end : end + 1] in [*" \t\r\n,:}"]:  # else a number may go on
                    return found, end
            except ValueError:
                if ended:
                    raise
            more(file)

    try:
        with path.open(encoding="utf-8-sig") as file:
            at = skip(0, file)
            if buffer[at : at + 1] != "{":
                raise ValueError("it is no JSON object")
            at = skip(at + 1, file)
            while buffer[at : at + 1] != "}":
                key, at = value(at, file)
                at = skip(at, file)
                if not isinstance(key, str) or buffer[at : at + 1] != ":":
                    raise ValueError(f"a member is broken near {buffer[at : at + 40]!r}")
                found, at = value(skip(at + 1, file), file)
                yield key, found
                at = skip(at, file)
                if buffer[at : at + 1] == ",":
                    at = skip(at + 1, file)
                elif buffer[at : at + 1] != "}":
                    raise ValueError("it ends before its last brace" if at == len(buffer) else "a comma is missing")
                if at >= chunk:
                    buffer, at = buffer[at:], 0
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from None


def _unescaped(text: str) -> str:
    """Entities resolved, also those that were escaped again (`&amp;quot;`)."""
    for _ in range(3):
        text, before = html.unescape(text), text
        if text == before:
            break
    return text


class _Rejected(Exception):
    """A row that cannot be used: kind and detail."""


def _read_lines(path: Path) -> list[str]:
    """A list file's lines without what stands around them; empty lines at the end do not count."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _by_stem(folder: Path) -> dict[str, list[str]]:
    """The files in `folder` by their name without extension and without blanks around it, as Windows' tools leave."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        found[Path(name).stem.strip()].append(name)
    return found


def _one_file(files: dict[str, list[str]], stem: str, suffixes: tuple[str, ...], wanted: str) -> str:
    """The file of that stem and one of the suffixes: by its exact name, in the order of `suffixes`, else the only one.

    Raises _Rejected where there is none, or several to choose from.
    """
    candidates = [name for name in files.get(stem, ()) if Path(name).suffix.lower() in suffixes]
    exact = [stem + suffix for suffix in suffixes if stem + suffix in candidates]
    if not candidates:
        raise _Rejected("missing file", wanted)
    if not exact and len(candidates) > 1:
        raise _Rejected("ambiguous file", f"{wanted} may be any of {', '.join(map(repr, candidates))}")
    return (exact or candidates)[0]


def _read_text(path: Path) -> str:
    """A text file, or what stands between <text> and </text> in an XML file, all of it where nothing does.

    UTF-8, or UTF-16 where a byte order mark says so. They are not parsed as XML: not all of UCSD's are well-formed, and
    no entity may grow. Raises _Rejected.
    """
    try:
        octets = path.read_bytes()
        is_utf16 = octets.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        content = octets.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _Rejected("unreadable text", f"{path.name}: {error}") from None
    if path.suffix.lower() == ".xml":
        content = "\n".join(re.findall(r"<text\b[^>]*>(.*?)</text>", content, re.DOTALL | re.IGNORECASE)) or content
        content = re.sub(r"<!\[CDATA\[(.*?)\]\]>", r"\1", content, flags=re.DOTALL)
        content = re.sub(r"<[?!/a-zA-Z][^<>]*>", " ", content)
        content = _unescaped(content)
    return content
