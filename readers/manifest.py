"""A manifest: a table of one's own pairs."""

import codecs
import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.settings import Settings
from readers.published import (
    LONGEST_LINE,
    TOO_LONG,
    Published,
    Row,
    given_root,
    lines_of,
    outside,
)

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "valid": "val", "test": "test"}


COLUMNS = ("image", "text", "image_id", "category", "split")


def manifest(settings: Settings) -> Published:
    """One's own pairs: CSV, TSV, JSONL or Parquet with columns image and text, optionally image_id, category and split.

    dataset.manifest is its path, as given or relative to dataset.root; image paths are relative to dataset.root, null
    being the manifest's own folder. Raises UserError where the file, a needed column or the format is missing.
    """
    name = settings.dataset.manifest
    if name is None:
        raise UserError("the source manifest needs dataset.manifest, a CSV, TSV, JSONL or Parquet file of pairs")
    root = given_root(settings) if settings.dataset.root else None
    path = Path(name) if Path(name).is_file() or root is None else root / name
    if not path.is_file():
        raise UserError(f"dataset.manifest {name} is not there" + (f", nor is {path}" if str(path) != name else ""))
    if path.suffix.lower() not in RECORDS:
        raise UserError(f"dataset.manifest {path} must end in one of {', '.join(RECORDS)}")
    root = root or path.parent
    return Published(root, lambda: read_manifest(path, root), (path,), lambda: _images_named(path))


def _images_named(path: Path) -> Iterator[str]:
    for _, record in RECORDS[path.suffix.lower()](path):
        if isinstance(record, dict) and isinstance(record.get("image"), str):
            yield record["image"]


def read_manifest(path: Path, root: Path) -> Iterator[Row]:
    """Rows of a manifest. A record that is broken, or whose image lies outside `root`, is a rejected row.

    Raises UserError for an unknown split, and where some rows have a split and others none.
    """
    with_split = without = None
    for label, record in RECORDS[path.suffix.lower()](path):
        if isinstance(record, str):
            yield Row(label, rejected=("bad row", record))
            continue
        values = {name: _as_text(record.get(name)) for name in COLUMNS}
        wrong = [name for name, value in values.items() if value is None and record.get(name) is not None]
        if wrong:
            yield Row(label, rejected=("bad row", f"{wrong[0]} is no text but {record[wrong[0]]!r:.40}"))
            continue
        split = (values["split"] or "").strip().lower() or None
        if split is not None and split not in SPLIT_NAMES:
            raise UserError(f"{path} {label}: split is {values['split']!r} and must be one of {', '.join(SPLIT_NAMES)}")
        with_split, without = (with_split or (split and label)), (without or (None if split else label))
        if with_split and without:
            raise UserError(f"{path}: {with_split} has a split, {without} has none; fill the column or leave it out")
        image = values["image"] or ""
        row = Row(
            label,
            PurePosixPath(image).as_posix() if image else "",
            values["text"] or "",
            image_id=values["image_id"] or None,
            category=values["category"] or None,
            split=split and SPLIT_NAMES[split],
        )
        if not image:
            yield replace(row, rejected=("bad row", "image is empty"))
        elif why := outside(root, row.image):
            yield replace(row, rejected=why)
        else:
            yield row


def _as_text(value: Any) -> str | None:
    """A cell as text; numbers are good enough for ids and categories. None where it is neither."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**30 else None


def _open_text(path: Path) -> TextIO:
    """A UTF-8 file, with or without a byte order mark. What is not UTF-8 stays visible: its row is rejected later."""
    try:
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{path} is UTF-16; save it as UTF-8")
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _demand_columns(path: Path, found: Iterable[str]) -> None:
    found = list(found)
    missing = [name for name in COLUMNS[:2] if name not in found]
    if missing:
        columns = ", ".join(found) or "none"
        raise UserError(f"{path} has no column {' and no column '.join(missing)}; its columns are: {columns:.200}")
    if several := [name for name in COLUMNS if found.count(name) > 1]:
        raise UserError(f"{path} has more than one column {several[0]}; which of them is meant?")


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    csv.field_size_limit(10_000_000)
    with _open_text(path) as file:
        reader = csv.reader(_short_lines(path, file), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise UserError(f"{path}: its first line cannot be read ({error})") from None
        _demand_columns(path, header)
        while True:
            label = f"line {reader.line_num + 1}"  # a quoted text may go over several lines: this is its first
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise UserError(f"{path} {label}: a quote is opened and never closed") from None
                yield label, str(error)
                continue
            if len(fields) == len(header):
                yield label, dict(zip(header, fields, strict=True))
            elif fields:
                yield label, f"has {len(fields)} fields and not {len(header)} as the first line"


def _short_lines(path: Path, file: TextIO) -> Iterator[str]:
    for number, line in lines_of(file):
        if line is None:
            raise UserError(f"{path} line {number} {TOO_LONG}: it is no table")
        yield line


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    checked = False
    with _open_text(path) as file:
        for number, line in lines_of(file):
            if line is None:
                yield f"line {number}", TOO_LONG
                continue
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", f"is no JSON: {error}"
                continue
            if not isinstance(record, dict):
                yield f"line {number}", f"is no JSON object: {line.strip():.40}"
                continue
            if not checked:
                _demand_columns(path, record)
                checked = True
            yield f"line {number}", record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    number = itertools.count(1)
    try:
        schema = pq.read_schema(path)
        _demand_columns(path, schema.names)
        wanted = [name for name in COLUMNS if name in schema.names]
        texts = [name for name in wanted if pa.types.is_string(schema.field(name).type)]
        # A file may hold one long text once and name it in all rows: as a dictionary it is one text in memory too.
        file = pq.ParquetFile(path, read_dictionary=texts)
        for batch in file.iter_batches(batch_size=10_000, columns=wanted):
            columns = {name: _python_values(batch.column(name)) for name in wanted}
            for values in zip(*columns.values(), strict=True):
                yield f"row {next(number)}", dict(zip(wanted, values, strict=True))
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Arrow raise anything
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot read {path} from row {next(number)} on: {why}") from None


def _python_values(column: pa.Array) -> list[Any]:
    """A column's values. What is not UTF-8 stays visible, as in `_open_text`, and what is too long is no text."""
    if not (pa.types.is_dictionary(column.type) and pa.types.is_string(column.type.value_type)):
        return column.to_pylist()
    octets = column.dictionary.cast(pa.binary())
    long = pc.greater(pc.binary_length(octets), LONGEST_LINE)
    texts: list[Any] = [
        None if value is None else value.decode(errors="surrogateescape")
        for value in pc.if_else(long, pa.scalar(None, pa.binary()), octets).to_pylist()
    ]
    for place in np.flatnonzero(long.fill_null(False).to_numpy(zero_copy_only=False)).tolist():
        texts[place] = [TOO_LONG]  # a list, which is no text
    return [None if place is None else texts[place] for place in column.indices.to_pylist()]


RECORDS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any] | str]]]] = {
    ".csv": functools.partial(_read_csv, delimiter=","),
    ".tsv": functools.partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""By a manifest's extension: its records in order, each with where it stands, or with what is wrong with it."""
