"""Reader of a manifest: a table of one's own pairs."""

import codecs
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.schema import Dataset
from readers.delimited import names_an_image, read_records
from readers.published import LONGEST_LINE, TOO_LONG, Published, Row, given_root, lines_of, outside, shown

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "valid": "val", "test": "test"}


COLUMNS = ("image", "text", "image_id", "category", "split")


def manifest(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """One's own pairs: CSV, TSV, JSONL or Parquet with columns image and text, optionally image_id, category and split.

    dataset.manifest is its path, as given or relative to dataset.root. Image paths are relative to dataset.root, or to
    the manifest's folder where that is null. Raises UserError where the file or a needed column is missing, and for an
    unknown format.
    """
    name = dataset.manifest
    if name is None:
        raise UserError("the source manifest needs dataset.manifest, a CSV, TSV, JSONL or Parquet file of pairs")
    root = given_root(dataset, "your own place: paths of images are relative to it") if dataset.root else None
    path = Path(name) if Path(name).is_file() or root is None else root / name
    if not path.is_file():
        raise UserError(f"dataset.manifest {name} is not there" + (f", nor is {path}" if str(path) != name else ""))
    if path.suffix.lower() not in RECORDS:
        raise UserError(f"dataset.manifest {path} must end in one of {', '.join(RECORDS)}")
    root = root or path.parent
    return Published(root, lambda: read_manifest(path, root), (path,), lambda: images_named(path))


def images_named(path: Path) -> Iterator[str]:
    """The image paths in a manifest, as they stand there."""
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
        given = {name: value for name in COLUMNS if not _is_missing(value := record.get(name))}
        values = {name: _as_text(name, given.get(name)) for name in COLUMNS}
        wrong = [name for name in given if values[name] is None]
        if wrong:
            yield Row(label, rejected=("bad row", f"{wrong[0]} is no text but {shown(given[wrong[0]])}"))
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


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty: table libraries write nan for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


LABELS = ("image_id", "category")
"""Columns whose values only have to differ: numbers and truth values are good enough."""


def _as_text(column: str, value: Any) -> str | None:
    """A cell as text. None where it is neither text nor a number.

    A table library writes whole numbers as 3.0 where a row has none: in LABELS that is 3, as in the other formats.
    """
    if isinstance(value, str):
        found = WHOLE_FLOAT.fullmatch(value) if column in LABELS else None
        return found[1] if found else value
    if isinstance(value, bool):
        return str(value) if column in LABELS else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float) and math.isfinite(value) and column in LABELS:
        return str(value)
    return str(value) if isinstance(value, int) and abs(value) < 10**30 else None


WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+", re.ASCII)


def _open_text(path: Path) -> TextIO:
    """A UTF-8 file, with or without a byte order mark. Invalid bytes become surrogates: their row is rejected later."""
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
    header: list[str] = []

    def is_row(fields: list[str]) -> bool:
        return bool(header) and len(fields) == len(header) and names_an_image(fields[header.index("image")])

    with _open_text(path) as file:
        records = read_records(path, file, delimiter, is_row)
        try:
            _, first = next(records, (1, []))
        except UserError as error:
            raise UserError(f"{error}; its first line cannot be read") from None
        if isinstance(first, str):
            raise UserError(f"{path}: its first line cannot be read ({first})")
        names = [name.strip() for name in first]
        _demand_columns(path, names)
        header += names
        for number, fields in records:
            label = f"line {number}"
            if isinstance(fields, str):
                yield label, fields
            elif len(fields) == len(header):
                yield label, dict(zip(header, fields, strict=True))
            elif fields:
                yield label, f"has {len(fields)} fields and not {len(header)} as the first line"


MANY_KEYS = 20  # columns that a message may list


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    keys: dict[str, None] = {}  # of all records: those that write empty fields leave out keys
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
            keys |= dict.fromkeys(name for name in record if name in COLUMNS or len(keys) < MANY_KEYS)
            yield f"line {number}", record
    if keys:
        _demand_columns(path, keys)


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
    """A column's values. What is not UTF-8 becomes surrogates, as in `_open_text`. What is too long becomes no text."""
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
"""By a manifest's extension: a reader of its records, each with its place, or with what is wrong with it."""
