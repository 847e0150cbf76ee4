"""Delimited text, a record at a time. Every line is a record, part of one, or a reported fault."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from pipeline.errors import UserError
from readers.published import LONGEST_LINE, TOO_LONG, lines_of

IMAGE_NAME = re.compile(
    r"\S.*\.(jpe?g|png|gif|webp|bmp|tiff?|p[bgnp]m|jp2|j2k|avif|hei[cf])(@\d+\+\d+)?", re.IGNORECASE
)


def read_records(
    path: Path,
    file: TextIO,
    delimiter: str,
    is_row: Callable[[list[str]], bool],
    first_line: int = 1,
    strict: bool = True,
) -> Iterator[tuple[int, list[str] | str]]:
    """Number of the first line, and fields, of each record of an open CSV or TSV file.

    A text in place of the fields says what is wrong. A quoted field may hold several lines. Where one of these is a row
    of its own by `is_row`, its quote was never closed: reading goes on with that line. `first_line` is the number of
    the next line of `file`. Text behind a closing quote is a fault if `strict`, else part of the field.
    Raises UserError for a line without an end, and for a quote that is open at the end of the file.
    """
    csv.field_size_limit(LONGEST_LINE)
    lines = _Lines(path, file, delimiter, is_row, first_line)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            first, last = lines.number - len(lines.record) + 1, lines.number
            if lines.is_interrupted:
                span = f" (lines {first} to {last})" if last > first else ""
                yield first, f"opens a quote{span} that is not closed before line {last + 1}, a row of its own"
                lines.is_interrupted = False
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
            elif "unexpected end of data" in str(error):
                raise UserError(f"{path} line {first}: a quote is opened and never closed") from None
            elif not strict:
                yield first, next(csv.reader(lines.record, delimiter=delimiter))
            else:
                yield first, str(error) + (f" (lines {first} to {last})" if last > first else "")
            continue
        yield lines.number - len(lines.record) + 1, fields


class _Lines:
    """The lines of a file for csv.reader. They end, and go on later, at a row inside of a record."""

    def __init__(
        self, path: Path, file: TextIO, delimiter: str, is_row: Callable[[list[str]], bool], first_line: int
    ) -> None:
        self.path, self.delimiter, self.is_row = path, delimiter, is_row
        self.numbered = lines_of(file)
        self.offset = first_line - 1
        self.number = self.offset
        self.record: list[str] = []
        """The lines of the record that is being read."""
        self.is_interrupted = False
        self.waiting: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, self.waiting = self.waiting, None
        if line is None:
            number, line = next(self.numbered)
            if line is None:
                raise UserError(f"{self.path} line {number + self.offset} {TOO_LONG}: it is no table")
        if self.record and self.is_row(next(csv.reader([line], delimiter=self.delimiter), [])):
            self.waiting, self.is_interrupted = line, True
            raise StopIteration
        self.record.append(line)
        self.number += 1
        return line


def names_an_image(field: str) -> bool:
    """Whether a field looks like the path of an image, by its extension."""
    return IMAGE_NAME.fullmatch(field.strip()) is not None
