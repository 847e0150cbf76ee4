"""What step 0 does with published rows: which are left out and why, and in which split the others are."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from images.files import check_images
from pipeline.errors import UserError
from pipeline.files import written_whole
from pipeline.pairs import SCHEMA, SPLITS, distinct, numbered
from pipeline.progress import ProgressBar
from pipeline.schema import Dataset
from readers.published import Row
from readers.rejections import LINK, Rejection

PUBLISHED = pa.schema([(name, pa.string()) for name in "label image_path text image_id category split".split()])
"""The published table. It keeps rejected rows too: a row's position says which one it was."""

LONGEST = 1_000_000
"""Characters of a text that is kept, about those of a long novel. A longer one is a dump of a database."""
CHARACTERS_AT_A_TIME = 100_000_000
"""Characters of the rows that are stored at a time. A column of Arrow's holds 2^31 bytes."""

FEWEST_IMAGES = 2
"""Images that a split needs: a loss and a search need at least one negative."""
FEWEST_TO_SPLIT = 3 * FEWEST_IMAGES


# Reading


def read_table(
    rows: Iterable[Row], min_characters: int = 0, follow_links: bool = False, chunk: int = 20_000
) -> tuple[pa.Table, dict[int, Rejection]]:
    """All published rows as a table (PUBLISHED), and by position those that cannot be pairs.

    Rejected are rows that the reader rejects, and texts that are empty, shorter than `min_characters`, longer than
    LONGEST, or not Unicode. `follow_links` accepts images outside the root that a link leads to.
    """
    rejected: dict[int, Rejection] = {}
    batches = []
    waiting: list[tuple[str | None, ...]] = []
    characters = 0

    def store() -> None:
        columns = zip(*waiting, strict=True) if waiting else [()] * len(PUBLISHED)
        batches.append(pa.record_batch([pa.array(column, pa.string()) for column in columns], PUBLISHED))
        waiting.clear()

    for position, row in enumerate(ProgressBar(rows, desc="reading", unit="row")):
        values: tuple[str | None, ...]
        values = (row.label, row.image, row.text.strip(), row.image_id or row.image, row.category, row.split)
        if row.rejected and not (follow_links and row.rejected[0] == LINK):
            rejected[position] = Rejection(*row.rejected)
        elif not values[2]:
            rejected[position] = Rejection("empty text", "")
        elif len(values[2]) < min_characters:
            rejected[position] = Rejection("short text", f"{len(values[2])} characters of {min_characters}")
        unicode = tuple(value and value.encode(errors="replace").decode() for value in values)
        if unicode != values:  # a lone surrogate stands for bytes that are not UTF-8, and cannot be written
            rejected.setdefault(position, Rejection("bad row", "is not UTF-8"))
            values = unicode
        if any(len(value or "") > LONGEST for value in values):
            rejected.setdefault(position, Rejection("long text", f"of more than {LONGEST:,} characters"))
            values = tuple(value and value[:LONGEST] for value in values)
            values = (*values[:2], "", *values[3:])
        waiting.append(values)
        characters += sum(len(value or "") for value in values)
        if len(waiting) == chunk or characters > CHARACTERS_AT_A_TIME:
            store()
            characters = 0
    store()
    return pa.Table.from_batches(batches), rejected


def remaining(table: pa.Table, rejected: dict[int, Rejection]) -> np.ndarray:
    """Which rows of the published table are not rejected (yet), bool."""
    mask = np.ones(len(table), bool)
    mask[list(rejected)] = False
    return mask


# What is left out


def unusable_images(
    table: pa.Table, rejected: dict[int, Rejection], root: Path, dataset: Dataset, unfinished: Path
) -> dict[int, Rejection]:
    """Rows whose image is missing or cannot be read. Each image is checked once, whatever the number of its rows.

    Findings are kept in the folder `unfinished`: a step that was stopped resumes there.
    """
    left = remaining(table, rejected)
    names = pc.unique(table["image_path"].filter(pa.array(left))).to_pylist()
    decode = dataset.check_images == "decode"
    try:
        wrong = check_images(root, names, decode, dataset.max_pixels, unfinished / "images.jsonl")
    except MemoryError as error:
        raise UserError(f"not enough memory to check the images ({error}); lower dataset.max_pixels") from None
    affected = pc.is_in(table["image_path"], pa.array(list(wrong), pa.string())).to_numpy(zero_copy_only=False) & left
    paths = table["image_path"].filter(pa.array(affected)).to_pylist()
    return {
        position: Rejection(wrong[path].kind, str(wrong[path]))
        for position, path in zip(np.flatnonzero(affected).tolist(), paths, strict=True)
    }


def conflicting_images(table: pa.Table, rejected: dict[int, Rejection]) -> dict[int, Rejection]:
    """Rows that contradict others about an image.

    - The first row of an image_id decides its file, the first row of a file its image_id.
    - A train row whose image is published in val or test too is rejected: no test image is trained on.

    Raises UserError where an image is in val and in test: published val and test rows are never rejected for this.
    """
    rows = np.flatnonzero(remaining(table, rejected))
    some = table.drop_columns(["text"]).take(rows)
    images, image_ids = distinct(some["image_id"])
    found: dict[int, Rejection] = {}

    paths = numbered(some["image_path"])
    for these, those, kind in (
        (images, paths, "image_id of another image"),
        (paths, images, "image of another image_id"),
    ):
        first = np.unique(these, return_index=True)[1][these]
        for row in np.flatnonzero(those != those[first]).tolist():
            other = some.slice(first[row], 1).to_pylist()[0]
            detail = f"{other['label']} says that {other['image_id']} is {other['image_path']}"
            found.setdefault(int(rows[row]), Rejection(kind, detail))

    splits = pc.index_in(some["split"], pa.array(SPLITS)).to_numpy(zero_copy_only=False)
    row_of = np.full((len(SPLITS), len(image_ids)), -1)  # one row of each image in each split
    for split in range(len(SPLITS)):
        members = np.flatnonzero(splits == split)[::-1]
        row_of[split, images[members]] = members
    _, val, test = row_of
    if len(both := np.flatnonzero((val >= 0) & (test >= 0))):
        labels = some["label"].take([val[both[0]], test[both[0]]]).to_pylist()
        raise UserError(
            f"the image {image_ids[both[0]]} is published in val ({labels[0]}) and in test ({labels[1]}): "
            "a split must not part an image's rows"
        )
    held_out = np.maximum(val, test)
    for row in np.flatnonzero((splits == SPLITS.index("train")) & (held_out[images] >= 0)).tolist():
        other = some.slice(held_out[images[row]], 1).to_pylist()[0]
        detail = f"{image_ids[images[row]]} is in {other['split']} too ({other['label']})"
        found.setdefault(int(rows[row]), Rejection("image of another split", detail))
    return found


def repeated_rows(table: pa.Table, rejected: dict[int, Rejection]) -> dict[int, Rejection]:
    """Rows with the image and the text of an earlier row. Those of a published val or test split are kept."""
    images = numbered(table["image_id"])
    left = remaining(table, rejected)
    several = np.bincount(images[left], minlength=len(images)) > 1  # by image
    held_out = is_in_split(table, ("val", "test"))
    found: dict[int, Rejection] = {}
    seen: dict[tuple[int, bytes], int] = {}  # digests: the texts of COCO would take a gigabyte
    for row, text in _of_rows(table, np.flatnonzero(left & several[images]), "text"):
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        kept = seen.setdefault((int(images[row]), digest), row)
        if kept != row and not held_out[row]:
            found[row] = Rejection("duplicate", f"of {table['label'][kept].as_py()}")
    return found


def near_duplicate_texts(
    table: pa.Table, rejected: dict[int, Rejection], dataset: Dataset, unfinished: Path
) -> dict[int, Rejection]:
    """Rows whose text nearly repeats an earlier one, or one in a published val or test split. Those are kept."""
    from text_space.near_duplicates import near_duplicates  # datasketch takes half a second to import

    rows = np.flatnonzero(remaining(table, rejected))
    images = numbered(table["image_id"])
    held_out = is_in_split(table, ("val", "test"))
    texts = (text for _, text in _of_rows(table, rows, "text"))
    threshold, language = dataset.near_duplicate_threshold, dataset.language
    repeats = near_duplicates(texts, images[rows], held_out[rows], threshold, language, unfinished)
    labels = table["label"].take(rows[list(repeats.values())]).to_pylist()
    return {
        int(rows[row]): Rejection("near-duplicate", f"of {label}") for row, label in zip(repeats, labels, strict=True)
    }


def is_in_split(table: pa.Table, splits: tuple[str, ...]) -> np.ndarray:
    """Which rows are in one of these published splits, bool."""
    return pc.is_in(table["split"], pa.array(splits)).to_numpy(zero_copy_only=False)


def _of_rows(table: pa.Table, rows: np.ndarray, *columns: str) -> Iterator[tuple]:
    """The numbers in `rows` (ascending), each with that row's values in `columns`, read 10,000 rows at a time."""
    first = 0
    for batch in table.select(columns).to_batches(max_chunksize=10_000):
        some = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(batch))]
        values = batch.take(pa.array(some - first))
        yield from zip(some.tolist(), *(values[name].to_pylist() for name in columns), strict=True)
        first += len(batch)


def write_rejected(path: Path, table: pa.Table, rejected: dict[int, Rejection]) -> None:
    """One JSON object a rejected row, in the published order.

    It holds its place, its image, the beginning of its text, the kind, the reason, and what to do about it.
    """
    with written_whole(path) as temporary_path, temporary_path.open("w", encoding="utf-8") as file:
        for row, label, image, text in _of_rows(table, np.array(sorted(rejected), int), "label", "image_path", "text"):
            why = rejected[row]
            place = {"row": label, "image": image, "text": text[:80]}
            record = place | {"kind": why.kind, "reason": str(why), "remedy": why.remedy}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# Splits


def assign_splits(
    images: np.ndarray,
    image_ids: list[str],
    published: np.ndarray | None,
    seed: int,
    val_share: float | None,
    test_share: float,
) -> np.ndarray:
    """The split of every row as a position in SPLITS, int64 (rows,). All rows of an image get the same.

    - `images` (rows,) numbers each row's image_id in `image_ids`. `published` (rows,) are the published splits.
    - Where `published` is None, val and test get their shares of the images, 10 % each in the paper (Sec. 3.3).
    - Where it has no val, val gets `val_share` of the train images.
    - Without `val_share` val gets as many images as test has, and at most half of the train images.
    - An image's place in the draw depends on the seed and its id only.
    """
    splits = np.zeros(len(images), np.int64) if published is None else published.astype(np.int64)
    if published is not None and (splits == SPLITS.index("val")).any():
        return splits
    drawn = np.unique(images[splits == SPLITS.index("train")])
    draw = [hashlib.blake2b(f"{seed} {image_ids[image]}".encode(), digest_size=8).digest() for image in drawn.tolist()]
    drawn = drawn[np.argsort(np.array(draw, dtype="S8").view(">u8"), kind="stable")]
    split_of = np.full(len(image_ids), -1)
    test = round(len(drawn) * test_share)
    if published is not None:
        test = min(len(np.unique(images[splits == SPLITS.index("test")])), len(drawn) // 2)
    test = max(FEWEST_IMAGES, test)
    val = test if val_share is None else max(FEWEST_IMAGES, round(len(drawn) * val_share))
    split_of[drawn[:val]] = SPLITS.index("val")
    if published is None:
        split_of[drawn[val : val + test]] = SPLITS.index("test")
    return np.where(split_of[images] >= 0, split_of[images], splits)


def held_out_images(table: pa.Table, kept: pa.Table, splits: np.ndarray) -> set[str]:
    """image_ids of val and test: of the published rows in `table`, and of the `kept` rows by their `splits` (rows,)."""
    published = table["image_id"].filter(pa.array(is_in_split(table, ("val", "test"))))
    drawn = kept["image_id"].filter(pa.array(splits != SPLITS.index("train")))
    return {*pc.unique(published).to_pylist(), *pc.unique(drawn).to_pylist()}


def without_splits(table: pa.Table) -> pa.Table:
    """The published table as if no splits were published."""
    return table.set_column(table.column_names.index("split"), "split", pa.nulls(len(table), pa.string()))


def with_splits(table: pa.Table, splits: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The kept rows as batches of the pair table."""
    names = pa.array(SPLITS).take(pa.array(splits))
    table = table.set_column(table.column_names.index("split"), "split", names).select(SCHEMA.names)
    yield from table.cast(SCHEMA).to_batches(max_chunksize=20_000)
