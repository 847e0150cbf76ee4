"""Texts in files of their own, found by their names: what the readers of wikipedia, tvgraz and openclipart share."""

import codecs
import html
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from readers.published import is_system_file


def unescaped(text: str) -> str:
    """Resolve entities, those that were escaped twice (`&amp;quot;`) too."""
    for _ in range(3):
        text, before = html.unescape(text), text
        if text == before:
            break
    return text


class RejectedRow(Exception):
    """A row that cannot be used: kind and detail."""


def read_lines(path: Path) -> list[str]:
    """The lines of a list, stripped. Empty lines at the end do not count. Raises UserError."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def files_by_stem(folder: Path) -> dict[str, list[str]]:
    """The files in `folder` by their stem. Blanks around a stem, as tools of Windows leave them, do not count."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if not is_system_file(name):
            found[Path(name).stem.strip()].append(name)
    return found


def choose_file(files: dict[str, list[str]], stem: str, suffixes: tuple[str, ...], wanted: str) -> str:
    """The file of that stem with one of the suffixes: of the exact name, in the order of `suffixes`, else the only one.

    `wanted` names it in messages. Raises RejectedRow where there is none, or several to choose from.
    """
    candidates = [name for name in files.get(stem, ()) if Path(name).suffix.lower() in suffixes]
    exact = [stem + suffix for suffix in suffixes if stem + suffix in candidates]
    return exact[0] if exact else only(candidates, wanted)


def only(names: Sequence[str], wanted: str, kind: str = "missing file") -> str:
    """The one of `names`. Raises RejectedRow where there is none (of that kind), or several to choose from."""
    if not names:
        raise RejectedRow(kind, wanted)
    if len(names) > 1:
        raise RejectedRow("ambiguous file", f"{wanted} may be any of {', '.join(map(repr, names))}")
    return names[0]


def read_text(path: Path) -> str:
    """A text file. Of an XML file what stands between <text> and </text>, or all of it where there is no such element.

    Files are UTF-8, or UTF-16 with a byte order mark. XML is not parsed: not all of UCSD's files are well-formed, and
    no entity may expand. Raises RejectedRow.
    """
    try:
        octets = path.read_bytes()
        is_utf16 = octets.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        content = octets.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RejectedRow("unreadable text", f"{path.name}: {error}") from None
    if path.suffix.lower() == ".xml":
        content = "\n".join(re.findall(r"<text\b[^>]*>(.*?)</text>", content, re.DOTALL | re.IGNORECASE)) or content
        content = re.sub(r"<!\[CDATA\[(.*?)\]\]>", r"\1", content, flags=re.DOTALL)
        content = re.sub(r"<[?!/a-zA-Z][^<>]*>", " ", content)
        content = unescaped(content)
    return content
