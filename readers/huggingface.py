"""Reader of Hugging Face's datasets: Parquet files with the images in them, or a folder that `save_to_disk` wrote.

Both are read with Arrow: its `datasets` library is not needed. The images are written once as they are, into tar shards
in WORK, where training reads them in place.
"""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from images.tar_members import without_place
from pipeline.errors import UserError, reason
from pipeline.files import read_json, write_json
from pipeline.progress import ProgressBar
from pipeline.schema import Dataset
from readers.columns import as_text, choose_columns
from readers.folder import files_through_links
from readers.manifest import rows_of
from readers.published import Published, Row, given_root
from readers.split_names import splits_by_name
from readers.tables import Named, Record, Say, records_of_batch, top_column
from readers.whole_folder import written_whole_folder

VERSION = 1  # raise it when the same files give other shards
ROWS_AT_A_TIME = 64  # their images are in memory together
HEADER = 512  # bytes of a tar member in front of its content
NO_IMAGE = "holds no image: save it with its bytes, not only its path"


def huggingface(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """A dataset of Hugging Face's in dataset.root: its Parquet files, or what `save_to_disk` wrote.

    Of the columns the image holds the file's bytes. Rows with the same bytes are texts of one image. Where the names of
    the files, or of their folders, say train and test, these are the splits.
    Raises UserError where there is no such file, no such column, or no room for the shards.
    """
    root = given_root(dataset)
    tables = tables_in(root)
    if not tables:
        raise UserError(
            f"dataset.root {root} holds no Parquet files and nothing that save_to_disk wrote: name another with "
            "--dataset.root (docs/data.md)"
        )
    named = dataset.columns.named()
    folder = shards_of_images(root, tables, named, published_folder / "huggingface")

    def rows() -> Iterator[Row]:
        yield from rows_of(_records(root, tables, named, folder), folder, str(root))

    files = [*(root.absolute() / name for name in tables), *sorted(folder.absolute().glob("*.tar"))]
    return Published(folder, rows, (), lambda: files)


def tables_in(root: Path) -> list[str]:
    """Paths of the tables below `root`, relative to it: those that a state.json lists, else all but caches."""
    names = [name for name in files_through_links(root) if name.endswith((".parquet", ".arrow"))]
    listed = {}
    for folder in {Path(name).parent for name in names}:
        try:
            state = json.loads((root / folder / "state.json").read_text(encoding="utf-8"))
            listed[folder] = {file["filename"] for file in state["_data_files"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return [
        name
        for name in names
        if Path(name).name in listed.get(Path(name).parent, {Path(name).name})
        and not Path(name).name.startswith("cache-")
    ]


def shards_of_images(root: Path, tables: list[str], named: Named, folder: Path) -> Path:
    """`folder` with the images of each table as a shard, and the path of each row's image; made where it is not there.

    A table's shard NNNNN.tar goes with NNNNN.json, the list of its rows' images: a path, or null where there is none.
    """
    stamp = folder / "made_from.json"
    files = [(name, (root / name).stat()) for name in tables]
    made: dict[str, Any] = {
        "version": VERSION,
        "column": named.get("image"),
        "tables": [[str(root.absolute() / name), status.st_size, status.st_mtime_ns] for name, status in files],
    }
    try:
        if read_json(stamp) == made and len([*folder.glob("*.tar")]) == len(tables):
            return folder
    except UserError:
        pass
    try:
        with written_whole_folder(folder) as new:
            seen: dict[bytes, str] = {}
            for number, name in enumerate(ProgressBar(tables, desc="taking out images", unit="table")):
                paths = _write_shard(new / f"{number:05}.tar", _images(root / name, named), seen)
                write_json(new / f"{number:05}.json", paths)
            write_json(new / stamp.name, made)
    except OSError as error:
        raise UserError(f"cannot write the images into {folder}: {error.strerror or error}") from None
    return folder


def _write_shard(shard: Path, images: Iterator[bytes | None], seen: dict[bytes, str]) -> list[str | None]:
    """Write each image once; `seen` are the paths of those written before, by digest. Returns the path of every one."""
    paths: list[str | None] = []
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as archive:
        for octets in images:
            if not octets:
                paths.append(None)
                continue
            digest = hashlib.blake2b(octets, digest_size=16).digest()
            if digest not in seen:
                member = tarfile.TarInfo(digest.hex())
                member.size = len(octets)
                seen[digest] = f"{shard.name}/{member.name}@{archive.offset + HEADER}+{member.size}"  # type: ignore[attr-defined]
                archive.addfile(member, io.BytesIO(octets))
            paths.append(seen[digest])
    return paths


# The tables


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise UserError, which names the table, for whatever Arrow raises of a damaged one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {path}: {reason(error, 300)}; fetch it again") from None


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a table, some rows at a time."""
    if path.suffix == ".parquet":
        yield from pq.ParquetFile(path).iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns)
        return
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            batch.validate(full=True)
            for start in range(0, len(batch), ROWS_AT_A_TIME):
                yield batch.slice(start, ROWS_AT_A_TIME).select(columns)


def _schema(path: Path) -> pa.Schema:
    if path.suffix == ".parquet":
        return pq.read_schema(path)
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.schema


def _images(path: Path, named: Named) -> Iterator[bytes | None]:
    """The bytes of every row's image; None where there are none. Raises UserError."""
    with _readable(path):
        schema = _schema(path)
        column = choose_columns(path, schema.names, named)["image"].partition(".")[0]
        kind = schema.field(column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            raise UserError(f"{path} holds paths of images; take dataset.source manifest, with dataset.manifest {path}")
        for batch in _batches(path, [column]):
            for value in batch.column(column).to_pylist():
                octets = value.get("bytes") if isinstance(value, Mapping) else value
                yield octets if isinstance(octets, bytes) else None


def _records(root: Path, tables: list[str], named: Named, folder: Path) -> Iterator[tuple[str, Record]]:
    """The rows of the tables, by our names of columns, their images as paths in the shards of `folder`."""
    split_of = splits_by_name(tables)
    for table, name in enumerate(tables):
        paths = read_json(folder / f"{table:05}.json")
        with _readable(root / name):
            say = (lambda line: None) if table else ProgressBar.write
            for row, (path, record) in enumerate(zip(paths, _texts(root / name, named, say), strict=True), start=1):
                label = f"{name} row {row}"
                if path is None:
                    yield label, NO_IMAGE
                    continue
                record |= {"image": path, "image_id": record.get("image_id") or without_place(path).partition("/")[2]}
                if split_of and record.get("split") is None:
                    record["split"] = split_of[name]
                yield label, record


def _texts(path: Path, named: Named, say: Say) -> Iterator[dict[str, Any]]:
    """The rows of a table without their images."""
    schema = _schema(path)
    chosen = choose_columns(path, schema.names, named)
    say(f"{path.name}: {as_text(chosen)}")
    others = {ours: column for ours, column in chosen.items() if ours != "image"}
    names = _category_names(schema, chosen.get("category"))
    columns = list(dict.fromkeys(top_column(column, schema.names) for column in others.values()))
    for batch in _batches(path, columns):
        for record in records_of_batch(batch, others):
            if names and isinstance(number := record.get("category"), int) and 0 <= number < len(names):
                record["category"] = names[number]
            yield record


def _category_names(schema: pa.Schema, column: str | None) -> list[str]:
    """The names that stand for the numbers of a column of categories; none where there are none."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []
