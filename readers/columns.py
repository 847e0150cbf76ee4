"""Which columns of a table hold the image, the text and the rest: those that are named, else those of usual names."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

COLUMNS = ("image", "text", "image_id", "category", "split")
USUAL = {
    "image": ("image", "filepath", "file_name", "filename", "image_path", "file_path", "image_file", "path"),
    "text": ("text", "caption", "captions", "title"),
}
"""Names that people give to a column, beside our own."""


def choose_columns(path: Path, found: Sequence[str], named: Mapping[str, str]) -> dict[str, str]:
    """The table's column for each of COLUMNS that it has.

    - `named` are the columns that dataset.columns names. A dot leads into a field of a column: `meta.caption`.
    - Without it our own name is taken, then our own in any case and with blanks around it, then a usual name.

    Raises UserError where image or text is missing, and where two columns fit one name.
    """
    chosen = {}
    missing = []
    for name in COLUMNS:
        candidates = columns_for(name, found, named)
        if len(candidates) > 1 and len(set(candidates)) == 1:
            raise UserError(f"{path} has more than one column {candidates[0]}; which of them is meant?")
        if len(candidates) > 1:
            several = " and ".join(dict.fromkeys(candidates))
            raise UserError(f"{path} has the columns {several}; say with dataset.columns.{name} which holds the {name}")
        if candidates:
            chosen[name] = candidates[0]
        elif name in named:
            missing.append(f"{named[name]} (dataset.columns.{name})")
        elif name in COLUMNS[:2]:
            missing.append(name)
    if missing:
        columns = ", ".join(found) or "none"
        message = f"{path} has no column {' and no column '.join(missing)}; its columns are: {columns:.200}"
        if "url" in {_plain(name) for name in found}:
            message += "; for images at addresses download them with img2dataset and take dataset.source webdataset"
        elif not missing[0].endswith(")") and len(found) > 1:
            message += "; dataset.columns says which is meant"
        raise UserError(message)
    return chosen


def columns_for(name: str, found: Sequence[str], named: Mapping[str, str]) -> list[str]:
    """The columns among `found` that fit one of COLUMNS: those whose names are nearest to it.

    A field of a column, such as `meta.caption`, is only taken where it is named.
    """
    wanted = named.get(name, name)
    usual = () if name in named else USUAL.get(name, ())
    for candidates in (
        [column for column in found if column == wanted],
        [column for column in found if _plain(column) == _plain(wanted)],
        [column for column in found if _plain(column) in usual],
    ):
        if candidates:
            return candidates
    holds_field = name in named and any(wanted.startswith(f"{column}.") for column in found)
    return [wanted] if holds_field else []


def _plain(name: str) -> str:
    return name.strip().lower()


def as_text(chosen: Mapping[str, str]) -> str:
    """The choice as a line to read: `image from filepath, text from caption, category`."""
    return ", ".join(name if name == column else f"{name} from {column!r}" for name, column in chosen.items())


def value_at(record: Mapping[str, Any], column: str) -> Any:
    """A record's value in a column, or in a field of one. None where there is none."""
    if column in record:
        return record[column]
    value: Any = record
    for place, part in enumerate(column.split(".")):
        if not isinstance(value, Mapping):
            return None
        rest = ".".join(column.split(".")[place:])
        if rest in value:
            return value[rest]
        value = value.get(part)
    return value


def names_in(record: Mapping[str, Any]) -> Iterator[str]:
    """The names of a record's columns, and of the fields of those that hold objects."""
    for name, value in record.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{field}" for field in value)
