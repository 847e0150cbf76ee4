"""Step 3: the k nearest neighbors of every train pair, from which step 4 draws Psi of Eq. 5 (Sec. 3.2).

    python knn_document_features.py [--config FILE.yaml] [--neighbors.k 200] ...

Reads pairs.parquet and step 2's outputs in WORK. Writes into WORK/neighbors/<space> rows.npy (int32, the train pairs
whose text has a known word), indices.npy (int32, rows x k, pair numbers, nearest first, -1 where there are fewer) and
distances.npy (float32, rows x k, inf where there is none). Left out are the pair itself, pairs of its image, and pairs
whose text has the same words.
"""

import hashlib
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.errors import UserError
from pipeline.files import open_array, read_array, write_array, written_whole
from pipeline.pairs import distinct, numbered, read_pairs, rows_of_split
from pipeline.settings import Settings
from pipeline.steps import (
    EXTRACT_DOC2VEC,
    EXTRACT_IMAGES,
    FIND_NEIGHBORS,
    PREPARE,
    TRAIN_DOC2VEC,
    is_up_to_date,
    making,
    output_paths,
    require,
)
from text_space.neighbors import NeighborLists, category_share, find_neighbors

TEXTS_SHOWN, NEIGHBORS_SHOWN = 3, 10
LARGEST_K_FILLED_UP = 10_000
"""A k above this, and above the number of texts, is a mistake that would only fill memory with -1."""


def vectors_of_space(settings: Settings) -> np.ndarray:
    """Vectors (pairs, d) float32 of `neighbors.space`, memory-mapped; raises UserError where there are none."""
    step = {"doc2vec": EXTRACT_DOC2VEC, "images": EXTRACT_IMAGES}[settings.neighbors.space]
    require(step, settings)
    return read_array(output_paths(step, settings)[0])


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


def rows_of(vectors: np.ndarray, rows: np.ndarray, unfinished: Path) -> np.ndarray:
    """`rows` of a memory-mapped matrix, memory-mapped too."""
    some = open_array(unfinished / "train.npy", (len(rows), vectors.shape[1]), np.float32)
    for start in range(0, len(rows), 10_000):
        some[start : start + 10_000] = vectors[rows[start : start + 10_000]]
    return some


def main(argv: list[str] | None = None) -> None:
    settings, _, _ = parse_settings(make_parser(__doc__), argv)
    require(PREPARE, settings)
    require(TRAIN_DOC2VEC, settings)
    require(EXTRACT_DOC2VEC, settings)
    if is_up_to_date(FIND_NEIGHBORS, settings):
        return
    work, k = settings.work_folder, settings.neighbors.k
    all_vectors = vectors_of_space(settings)
    pairs = read_pairs(work, ["image_id", "category", "split"])
    tokens, offsets = read_array(work / "doc2vec" / "tokens.npy"), read_array(work / "doc2vec" / "offsets.npy")

    train = rows_of_split(pairs, "train")
    rows = train[np.diff(offsets)[train] > 0]
    if len(rows) < 2:
        raise UserError(f"{work} has {len(rows)} train texts with a known word, and neighbors take two; get more pairs")
    if k > max(len(rows), LARGEST_K_FILLED_UP):
        raise UserError(f"neighbors.k is {k} and there are {len(rows)} train texts; lower it")
    if k >= len(rows):
        print(f"neighbors.k is {k} and there are {len(rows)} train texts: the table is filled up with -1")
    groups = (numbered(pairs["image_id"])[rows], same_words(tokens, offsets, rows))

    with making(FIND_NEIGHBORS, settings) as figures:
        vectors = rows_of(all_vectors, rows, figures.unfinished)
        found, how = find_neighbors(
            vectors, groups, settings.neighbors, settings.seed, settings.deterministic, figures.unfinished
        )
        figures.update(rows=len(rows), train_pairs=len(train), **how)
        if how["method"] == "exact":
            why = f": HNSW is no faster here, and found {how['recall']:.4f} of the neighbors" if "recall" in how else ""
            print(f"exact search among {len(rows):,} texts{why}")
        else:
            print(
                f"HNSW among {len(rows):,} texts with efSearch {how['ef_search']}: recall {how['recall']:.4f}, "
                f"measured against exact search on {how['recall_sample']:,} of them"
            )

        numbers, names = distinct(pairs["category"].fill_null(""))
        categories = np.where(np.array([name != "" for name in names])[numbers], numbers, -1)[rows]
        share, chance = category_share(found.positions, categories)
        if np.isfinite(share):
            figures.update(category_share=round(share, 4), category_chance=round(chance, 4))
            print(f"{share:.3f} of the {min(k, 20)} nearest texts have the text's category; by chance {chance:.3f}")
        show_texts(read_pairs(work, ["text"])["text"], rows, found, settings.seed)

        rows_path, indices_path, distances_path = output_paths(FIND_NEIGHBORS, settings)
        write_array(rows_path, rows.astype(np.int32))
        with written_whole(indices_path) as beside:
            indices = open_array(beside, found.positions.shape, np.int32)
            for start in range(0, len(rows), 10_000):
                positions = found.positions[start : start + 10_000]
                indices[start : start + 10_000] = np.where(positions >= 0, rows[positions], -1)
            indices.flush()
        write_array(distances_path, found.distances)


if __name__ == "__main__":
    run_script(main, then="train_cross_modal_retrieval_model.py 1 0.3 0.2")
