"""Tables of pairs in the formats that people keep them in: a stream of records with the columns of columns.py."""

import codecs
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError, reason
from readers.columns import as_text, choose_columns, columns_for, names_in, value_at
from readers.delimited import names_an_image, read_records
from readers.published import LONGEST_LINE, TOO_LONG, json_items, lines_of

Record = dict[str, Any] | str
"""A record's values by our names of columns, or what is wrong with it."""
Named = Mapping[str, str]
"""Our names of columns, and those that dataset.columns gives them."""
Say = Callable[[str], None]

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon"}
LOOKED_AT = 1000
"""Records of a file without a header that are read before its columns are chosen: some may lack some."""
MANY_NAMES = 50


def ending(path: Path) -> str:
    """The ending that says what a file holds: `.csv`, and `.csv.gz` where it is packed."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix + (".gz" if name.endswith(".gz") else "")


def records_of(path: Path, named: Named | None = None, say: Say = lambda line: None) -> Iterator[tuple[str, Record]]:
    """Every record of a table with its place. `say` is told which columns are taken, and what parts them.

    Raises UserError where the file cannot be read, and as `choose_columns`.
    """
    try:
        yield from RECORDS[ending(path)](path, named or {}, say)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {why}; save it again") from None


def _open_text(path: Path) -> TextIO:
    """A UTF-8 file, with or without a byte order mark. Invalid bytes become surrogates: their row is rejected later."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path} is UTF-16; save it as UTF-8")
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=""))


# Delimited text


def _read_csv(path: Path, named: Named, say: Say) -> Iterator[tuple[str, Record]]:
    delimiter = _delimiter(path, named)
    place_of: dict[str, int] = {}
    width = 0

    def is_row(fields: list[str]) -> bool:
        return bool(place_of) and len(fields) == width and names_an_image(fields[place_of["image"]])

    with _open_text(path) as file:
        records = read_records(path, file, delimiter, is_row)
        try:
            _, first = next(records, (1, []))
        except UserError as error:
            raise UserError(f"{error}; its first line cannot be read") from None
        if isinstance(first, str):
            raise UserError(f"{path}: its first line cannot be read ({first})")
        names = [name.strip() for name in first]
        chosen = choose_columns(path, names, named)
        say(f"{path.name}, {DELIMITERS[delimiter]}-separated: {as_text(chosen)}")
        place_of |= {name: names.index(column) for name, column in chosen.items()}
        width = len(names)
        for number, fields in records:
            label = f"line {number}"
            if isinstance(fields, str):
                yield label, fields
            elif len(fields) == width:
                yield label, {name: fields[place] for name, place in place_of.items()}
            elif fields:
                yield label, f"has {len(fields)} fields and not {width} as the first line"


def _delimiter(path: Path, named: Named) -> str:
    """What parts a file's fields: that by which its first line names an image and a text, else its ending's."""
    own = "\t" if ending(path).startswith(".tsv") else ","
    with _open_text(path) as file:
        line = file.readline(LONGEST_LINE)
    csv.field_size_limit(LONGEST_LINE)
    for delimiter in sorted(DELIMITERS, key=lambda delimiter: delimiter != own):
        names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        if columns_for("image", names, named) and columns_for("text", names, named):
            return delimiter
    return own


# JSON


def _read_jsonl(path: Path, named: Named, say: Say) -> Iterator[tuple[str, Record]]:
    with _open_text(path) as file:
        yield from _with_columns(path, _json_lines(file), named, say)


def _json_lines(file: TextIO) -> Iterator[tuple[str, Record]]:
    for number, line in lines_of(file):
        label = f"line {number}"
        if line is None:
            yield label, TOO_LONG
        elif line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield label, f"is no JSON: {error}"
                continue
            yield label, record if isinstance(record, dict) else f"is no JSON object: {line.strip():.40}"


def _read_json(path: Path, named: Named, say: Say) -> Iterator[tuple[str, Record]]:
    """A list of records. JSON Lines have this ending too: a file that begins with a record."""
    with _open_text(path) as file:
        first = next((character for character in iter(lambda: file.read(1), "") if not character.isspace()), "")
    if first not in ("[", "{"):
        raise UserError(f"{path} holds no list of records, nor a record a line")
    with _open_text(path) as file:
        if first == "{":
            _, line = next(lines_of(file))
            try:
                json.loads(line or "")
            except (ValueError, RecursionError):
                raise UserError(f"{path} holds no list of records, nor a record a line") from None
            file.seek(0)
            records = _json_lines(file)
        else:
            records = (
                (f"record {number}", item if isinstance(item, dict) else "is no JSON object")
                for number, item in enumerate(json_items(file, path), start=1)
            )
        yield from _with_columns(path, records, named, say)


def _with_columns(
    path: Path, records: Iterable[tuple[str, Record]], named: Named, say: Say
) -> Iterator[tuple[str, Record]]:
    """Records without a header, by our names of columns. Those that write empty fields leave out keys."""
    records = iter(records)
    first = list(itertools.islice(records, LOOKED_AT))
    found: dict[str, None] = {}
    for _, record in first:
        if isinstance(record, dict):
            names = (name for name in names_in(record) if name in named.values() or len(found) < MANY_NAMES)
            found |= dict.fromkeys(names)
    chosen = choose_columns(path, list(found), named) if found else {}
    if found:
        say(f"{path.name}: {as_text(chosen)}")
    for label, record in itertools.chain(first, records):
        if isinstance(record, dict):
            record = {name: value_at(record, chosen.get(name, name)) for name in {**chosen, **OPTIONAL}}
        yield label, record


OPTIONAL = dict.fromkeys(("image_id", "category", "split"))
"""Columns that may begin behind the records that were looked at."""


# Parquet


def _read_parquet(path: Path, named: Named, say: Say) -> Iterator[tuple[str, Record]]:
    number = itertools.count(1)
    try:
        schema = pq.read_schema(path)
        chosen = choose_columns(path, schema.names, named)
        say(f"{path.name}: {as_text(chosen)}")
        if _holds_images(schema.field(top_column(chosen["image"], schema.names)).type, chosen["image"]):
            raise UserError(
                f"{path} holds the images themselves; take dataset.source huggingface, with dataset.root {path.parent}"
            )
        wanted = list(dict.fromkeys(top_column(column, schema.names) for column in chosen.values()))
        texts = [name for name in wanted if pa.types.is_string(schema.field(name).type)]
        # A file may hold one long text once and name it in all rows: as a dictionary it is one text in memory too.
        file = pq.ParquetFile(path, read_dictionary=texts)
        for batch in file.iter_batches(batch_size=10_000, columns=wanted):
            for record in records_of_batch(batch, chosen):
                yield f"row {next(number)}", record
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Arrow raise anything
        raise UserError(f"cannot read {path} from row {next(number)} on: {reason(error, 300)}") from None


def _holds_images(kind: pa.DataType, column: str) -> bool:
    """Whether a column holds files of images, as Hugging Face's library writes them, and no field is named."""
    if pa.types.is_struct(kind):
        return "." not in column and kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def records_of_batch(batch: pa.RecordBatch, chosen: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a batch by our names of columns."""
    names = batch.schema.names
    tops = {name: top_column(column, names) for name, column in chosen.items()}
    columns = {top: _python_values(batch.column(top)) for top in set(tops.values())}
    for row in range(len(batch)):
        yield {
            name: columns[top][row] if top == chosen[name] else value_at({top: columns[top][row]}, chosen[name])
            for name, top in tops.items()
        }


def top_column(column: str, names: list[str]) -> str:
    """The column of a table that a chosen column is, or is a field of."""
    return next((name for name in names if column == name or column.startswith(f"{name}.")), column)


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
        texts[place] = {TOO_LONG: None}  # an object, which is no text
    return [None if place is None else texts[place] for place in column.indices.to_pylist()]


RECORDS: dict[str, Callable[[Path, Named, Say], Iterator[tuple[str, Record]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv.gz": _read_csv,
    ".tsv.gz": _read_csv,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_json,
}
"""By a file's ending: a reader of its records, each with its place, or with what is wrong with it."""
