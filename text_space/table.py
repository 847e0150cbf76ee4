"""The neighbor table of step 3: who may not be a neighbor, what is written, and what is shown of it."""

import hashlib
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.files import open_array, write_array, written_whole
from pipeline.work import NeighborFiles
from text_space.neighbors import NeighborLists

TEXTS_SHOWN, NEIGHBORS_SHOWN = 3, 10


def same_words(tokens: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A number for each of `rows` (int64), equal where two texts are the same sequence of words."""
    digests = (
        hashlib.blake2b(tokens[offsets[row] : offsets[row + 1]].tobytes(), digest_size=16).digest() for row in rows
    )
    keys = np.frombuffer(b"".join(digests), np.dtype([("high", np.uint64), ("low", np.uint64)]))
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def shorten(text: str, columns: int) -> str:
    """`text` on one line of a terminal, cut to so many columns; a Chinese character takes two."""
    text = " ".join(text.split())
    widths = [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text]
    if sum(widths) <= columns:
        return text
    ends = np.cumsum(widths)
    return text[: np.searchsorted(ends, columns - 1, side="right")] + "…"


def show_texts(texts: pa.ChunkedArray, rows: np.ndarray, found: NeighborLists, seed: int) -> None:
    """Print a few of `rows` (pair numbers that `found` speaks of, texts of all pairs in `texts`) with their nearest."""
    columns = shutil.get_terminal_size().columns
    for query in np.random.default_rng(seed).permutation(len(rows))[:TEXTS_SHOWN]:
        print("\n" + shorten(texts[rows[query]].as_py(), columns))
        for position, distance in zip(found.positions[query, :NEIGHBORS_SHOWN], found.distances[query], strict=False):
            if position >= 0:
                print(f"  {distance:7.3f}  {shorten(texts[rows[position]].as_py(), columns - 11)}")
    print()


def rows_of(vectors: np.ndarray, rows: np.ndarray, path: Path) -> np.ndarray:
    """`rows` of a memory-mapped matrix, memory-mapped too, in the file `path`."""
    some = open_array(path, (len(rows), vectors.shape[1]), np.float32)
    for start in range(0, len(rows), 10_000):
        some[start : start + 10_000] = vectors[rows[start : start + 10_000]]
    return some


def write_table(files: NeighborFiles, rows: np.ndarray, found: NeighborLists) -> None:
    """Write the neighbors of the train pairs `rows` (R,), as pair numbers, whole."""
    write_array(files.rows, rows.astype(np.int32))
    with written_whole(files.indices) as temporary:
        indices = open_array(temporary, found.positions.shape, np.int32)
        for start in range(0, len(rows), 10_000):
            positions = found.positions[start : start + 10_000]
            indices[start : start + 10_000] = np.where(positions >= 0, rows[positions], -1)
        indices.flush()
    write_array(files.distances, found.distances)
