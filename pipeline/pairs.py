"""The pair table, `pairs.parquet`: one row an image-text pair; a row's number is the pair's number everywhere else."""

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.files import demand_undamaged, written_whole

SPLITS = ("train", "val", "test")

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image_path", pa.string(), nullable=False),  # relative to the dataset's root
        pa.field("text", pa.string(), nullable=False),
        pa.field("category", pa.string()),  # null where there is none
        pa.field("split", pa.string(), nullable=False),
    ],
)


def write_pairs(path: Path, batches: Iterable[pa.RecordBatch], root: Path) -> None:
    """Write the pair table, whole. Its metadata keep `root`, the folder of the image paths, as an absolute path."""
    schema = SCHEMA.with_metadata({"root": os.fsencode(root.absolute())})
    with written_whole(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def write_articles(path: Path, texts: Iterable[str], batch: int = 1000) -> int:
    """Write articles of the train split, whole, as a table with `text` and `split`. Returns their number."""
    schema = pa.schema([field for field in SCHEMA if field.name in ("text", "split")])
    texts, count = iter(texts), 0
    with written_whole(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while some := list(itertools.islice(texts, batch)):
            writer.write_batch(pa.record_batch([some, ["train"] * len(some)], schema))
            count += len(some)
    return count


def read_pairs(work: Path, columns: list[str] | None = None, table: str = "pairs.parquet") -> pa.Table:
    """Columns of WORK's pair table (all by default); raises UserError where it is missing, broken or damaged."""
    path = work / table
    demand_undamaged(path)
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; run prepare_dataset.py first") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {path}: {' '.join(str(error).split())}; remove it and run prepare_dataset.py again"
        ) from None


def image_root(work: Path) -> Path:
    """The folder that the table's image paths are relative to."""
    try:
        return Path(os.fsdecode(pq.read_schema(work / "pairs.parquet").metadata[b"root"]))
    except (OSError, pa.ArrowException, KeyError, TypeError):
        raise UserError(f"cannot read {work / 'pairs.parquet'}; run prepare_dataset.py (again)") from None


@dataclass
class Images:
    """The image files of the pair table, each once. I files, N pairs."""

    paths: list[str]
    """Relative to `root`, in the order in which the table first names them."""
    of_pair: np.ndarray
    """(N,) int64, number of each pair's image in `paths`."""
    root: Path


def load_images(work: Path) -> Images:
    """The image files of WORK's pair table; raises UserError where it is missing or broken."""
    of_pair, paths = distinct(read_pairs(work, ["image_path"])["image_path"])
    return Images(paths, of_pair, image_root(work))


def rows_of_split(pairs: pa.Table, split: str) -> np.ndarray:
    """Numbers of the pairs in `split` (int64, ascending)."""
    return np.flatnonzero(np.asarray(pairs["split"].to_numpy(zero_copy_only=False) == split))


def distinct(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """A column of strings as numbers (int64, one a row) into the list of its distinct values, as they first appear."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def numbered(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of `distinct` alone. Millions of values never become Python objects."""
    return column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
