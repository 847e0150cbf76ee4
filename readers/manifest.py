"""Reader of a manifest: a table of one's own pairs."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.progress import ProgressBar
from pipeline.schema import Dataset
from readers.columns import COLUMNS
from readers.published import Published, Row, given_root, placed, shown
from readers.split_names import SPLIT_NAMES
from readers.tables import RECORDS, Named, Record, Say, ending, records_of


def manifest(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """One's own pairs: a table with columns for image and text, and perhaps for image_id, category and split.

    dataset.manifest is its path, as given or relative to dataset.root. Its ending is one of RECORDS. dataset.columns
    names its columns. Image paths are relative to dataset.root, or to the manifest's folder where that is null.
    Raises UserError where the file or a needed column is missing, and for an unknown format.
    """
    name = dataset.manifest
    if name is None:
        raise UserError("the source manifest needs dataset.manifest, a CSV, TSV, JSON, JSONL or Parquet file of pairs")
    root = given_root(dataset) if dataset.root else None
    path = Path(name) if Path(name).is_file() or root is None else root / name
    if not path.is_file():
        raise UserError(f"dataset.manifest {name} is not there" + (f", nor is {path}" if str(path) != name else ""))
    if ending(path) not in RECORDS:
        raise UserError(f"dataset.manifest {path} must end in one of {', '.join(RECORDS)}")
    root, named = root or path.parent, dataset.columns.named()

    def rows() -> Iterator[Row]:
        return read_manifest(path, root, named, ProgressBar.write)

    return Published(root, rows, (path,), lambda: images_named(path, named))


def images_named(path: Path, named: Named | None = None) -> Iterator[str]:
    """The image paths in a manifest, as they stand there."""
    for _, record in records_of(path, named):
        if isinstance(record, dict) and isinstance(record.get("image"), str):
            yield record["image"]


def read_manifest(path: Path, root: Path, named: Named | None = None, say: Say = lambda line: None) -> Iterator[Row]:
    """Rows of a manifest, as `rows_of` makes them. `named` and `say` as in `records_of`."""
    yield from rows_of(records_of(path, named, say), root, str(path))


def rows_of(records: Iterable[tuple[str, Record]], root: Path, where: str) -> Iterator[Row]:
    """Rows of records by our names of columns. A broken one, or one whose image lies outside `root`, is rejected.

    A text that is a list gives a row for each of its texts. Raises UserError, which names the place `where`, for an
    unknown split, and where some rows have a split and others none.
    """
    with_split = without = None
    for label, record in records:
        if isinstance(record, str):
            yield Row(label, rejected=("bad row", record))
            continue
        row = _row(label, record, root)
        texts = _texts(record.get("text"))
        if row.rejected and row.rejected[0] == "bad row":
            yield _with_text(row, texts[0])
            continue
        split = (row.split or "").strip().lower() or None
        if split is not None and split not in SPLIT_NAMES:
            raise UserError(f"{where} {label}: split is {row.split!r} and must be one of {', '.join(SPLIT_NAMES)}")
        with_split, without = (with_split or (split and label)), (without or (None if split else label))
        if with_split and without:
            raise UserError(f"{where}: {with_split} has a split, {without} has none; fill the column or leave it out")
        row = replace(row, split=split and SPLIT_NAMES[split])
        for number, text in enumerate(texts, start=1):
            yield _with_text(row if len(texts) == 1 else replace(row, label=f"{label} text {number}"), text)


def _row(label: str, record: Mapping[str, Any], root: Path) -> Row:
    """A record without its text. A value that is no text makes it a bad row."""
    given = {name: value for name in COLUMNS if name != "text" and not _is_missing(value := record.get(name))}
    values = {name: _as_text(name, value) for name, value in given.items()}
    if wrong := [name for name, value in values.items() if value is None]:
        value = given[wrong[0]]
        hint = f"; dataset.columns.{wrong[0]} names a field of it with a dot" if isinstance(value, Mapping) else ""
        return Row(label, rejected=("bad row", f"{wrong[0]} is no text but {shown(value)}{hint}"))
    row = Row(
        label, image_id=values.get("image_id") or None, category=values.get("category") or None,
        split=values.get("split"),
    )  # fmt: skip
    if not (image := values.get("image") or "").strip():
        return replace(row, rejected=("bad row", "image is empty"))
    image, why = placed(root, image)
    return replace(row, image=image, rejected=why)


def _texts(value: Any) -> list[Any]:
    """The texts in a cell: the items of a list, or of one that a table of text holds as JSON, else the one."""
    if isinstance(value, str) and value.startswith('["') and value.endswith('"]'):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        return found if all(isinstance(item, str) for item in found) else [value]
    return (value or [None]) if isinstance(value, list) else [value]


def _with_text(row: Row, value: Any) -> Row:
    if _is_missing(value):
        return row
    text = _as_text("text", value)
    if text is None:
        return replace(row, rejected=row.rejected or ("bad row", f"text is no text but {shown(value)}"))
    return replace(row, text=text)


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
