"""Reader of tar shards in WebDataset's format: img2dataset's, or anybody's own. Images are read in place."""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from images.tar_members import leads_out, members, without_place
from pipeline.errors import UserError
from pipeline.processes import in_order
from pipeline.schema import Dataset
from readers.columns import COLUMNS, columns_for, names_in, value_at
from readers.delimited import names_an_image
from readers.manifest import rows_of
from readers.published import Published, files_below, given_root, is_system_file
from readers.split_names import splits_by_name
from readers.tables import Named, Record

SHARDS_WORTH_A_PROCESS = 4

LONGEST_RECORD = 10_000_000  # bytes of an image's .txt or .json
ENDS = 1024  # zero bytes with which a tar file ends


class ShardFile(NamedTuple):
    """A file in a shard: what it shares with the others of its sample, its ending, its path, and its bytes."""

    key: str
    suffix: str
    path: str
    read: Callable[[], bytes]


def webdataset(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """Tar shards in dataset.root, or in folders there; or folders NNNNN/ of the same files, as img2dataset writes.

    A pair is the files of one name: NAME.jpg, and NAME.txt with its text or NAME.json with the columns of a manifest.
    Where the names of the shards, or of their folders, say train and test, these are the splits.
    Raises UserError where there is no shard.
    """
    root = given_root(dataset)
    shards = shards_of(root)
    for folder in sorted({*root.iterdir()} - {*shards}):
        shards += shards_of(folder) if folder.is_dir() and not is_system_file(folder.name) else []
    if not shards:
        packed = next(itertools.chain(root.glob("**/*.tar.gz"), root.glob("**/*.tgz")), None)
        what = f"; unpack {packed.name} and its like with gunzip, images are read in place" if packed else ""
        raise UserError(
            f"dataset.root {root} holds no tar shards: name another with --dataset.root (docs/data.md){what}"
        )

    def files() -> Iterator[str]:
        for name in (shard.relative_to(root).as_posix() for shard in shards):
            yield from [name] if (root / name).is_file() else files_below(root, name)

    records = functools.partial(_records, root, shards, dataset.columns.named())
    return Published(root, lambda: rows_of(records(), root, str(root)), (), files)


def shards_of(folder: Path) -> list[Path]:
    """The tar files and the folders with a number for a name that img2dataset left in `folder`, in order.

    `cc3m-train-0000.tar` and the like, as such shards are passed on, are shards too.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if not is_system_file(path.name)
        and ((path.suffix == ".tar" and path.is_file()) or (path.name.isdecimal() and path.is_dir()))
    )


def files_in(root: Path, shard: Path) -> Iterator[ShardFile]:
    """The files in a shard, in order, with paths relative to `root`. Those whose names lead out of it are not read."""
    if shard.is_dir():
        for file in sorted(shard.iterdir()):
            if not is_system_file(file.name) and file.is_file():
                yield ShardFile(file.stem, file.suffix.lower(), file.relative_to(root).as_posix(), file.read_bytes)
        return
    with shard.open("rb") as opened:
        for member in members(shard):
            name = PurePosixPath(member.name)
            if not leads_out(member.name) and not is_system_file(name.name):
                read = functools.partial(_read, opened, member.first, member.size)
                yield ShardFile(name.with_suffix("").as_posix(), name.suffix.lower(), member.path(root), read)


def _read(file: BinaryIO, first: int, size: int) -> bytes:
    """The bytes of a small text in a shard. Empty where it is longer than LONGEST_RECORD."""
    if size > LONGEST_RECORD:
        return b""
    file.seek(first)
    return file.read(size)


def _records(root: Path, shards: list[Path], named: Named) -> Iterator[tuple[str, Record]]:
    names = {shard: shard.relative_to(root).as_posix() for shard in shards}
    split_of = splits_by_name(names.values())
    processes = None if len(shards) > SHARDS_WORTH_A_PROCESS else 0
    found = in_order(functools.partial(_of_shard, root, named), shards, processes)
    for shard, records in zip(shards, found, strict=True):
        for key, record in records:
            if isinstance(record, dict) and split_of and record.get("split") is None:
                record["split"] = split_of[names[shard]]
            yield f"{names[shard]} {key}", record


def _of_shard(root: Path, named: Named, shard: Path) -> list[tuple[str, Record]]:
    """The samples of a shard by their names, as records by our names of columns."""
    images: dict[str, str] = {}
    texts: dict[str, str] = {}
    records: dict[str, dict[str, Any]] = {}
    try:
        for key, suffix, path, read in files_in(root, shard):
            if names_an_image(f"x{suffix}"):
                images.setdefault(key, path)
            elif suffix == ".txt":
                texts[key] = read().decode("utf-8-sig", "surrogateescape")
            elif suffix == ".json":
                records[key] = _json_object(read())
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror}") from None
    found = [(key, _sample(key, images, texts, records, named)) for key in dict.fromkeys([*images, *texts, *records])]
    return [*found, *_broken_end(shard)]


def _sample(
    key: str, images: dict[str, str], texts: dict[str, str], records: dict[str, dict[str, Any]], named: Named
) -> Record:
    if key not in images:
        return "has no picture beside its text"
    record = records.get(key, {})
    found: dict[str, Any] = {"image": images[key], "image_id": without_place(images[key])}
    for name in COLUMNS[1:]:
        candidates = columns_for(name, list(names_in(record)), named)
        if len(candidates) > 1 and not (name == "text" and key in texts):
            several = " and ".join(candidates)
            raise UserError(f"{key}.json has {several}; say with dataset.columns.{name} which holds the {name}")
        if candidates and (value := value_at(record, candidates[0])) is not None:
            found[name] = value
    if key in texts and "text" not in named:
        found["text"] = texts[key]
    return found


def _json_object(octets: bytes) -> dict[str, Any]:
    """The object in a JSON file; empty where it holds none."""
    try:
        found = json.loads(octets)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _broken_end(shard: Path) -> Iterable[tuple[str, Record]]:
    """A record that says so, where a tar file does not end as one does."""
    if shard.is_dir():
        return
    with shard.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - ENDS))
        if file.read().strip(b"\0") or size < ENDS:
            yield "", "the shard is cut off: files at its end are missing; fetch it again"
