"""How long search.py's answers take once the query is embedded.

    python benchmarks/search.py [--queries 50]

Draws random unit vectors of 256 dimensions as indexes in a temporary folder (1 GB for the largest), memory-maps them as
search.py does, and searches the 10 images nearest to each random query, with their paths and texts. Prints the table of
benchmarks/README.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # before this folder, whose search.py is another one

from timing import machine  # noqa: E402

from pipeline.files import read_array  # noqa: E402
from pipeline.pairs import Images  # noqa: E402
from reporting.answers import search_index  # noqa: E402
from reporting.retrieval_index import EmbeddedItems, Index  # noqa: E402

DIMENSIONS, TOP = 256, 10
SIZES = [(10_000, 1, np.float32), (250_000, 1, np.float32), (250_000, 1, np.float16), (250_000, 2, np.float32)]
SIZES += [(1_000_000, 1, np.float32)]
PART = 50_000  # vectors drawn at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=50, help="queries of each size; of float16 a tenth of them")
    queries = parser.parse_args().queries
    print("| pairs | embeddings each | stored as | first answer | median | slowest |")
    print("| ---: | ---: | --- | ---: | ---: | ---: |")
    for items, several, dtype in SIZES:
        asked = queries if dtype is np.float32 else max(queries // 10, 3)
        with tempfile.TemporaryDirectory() as folder:
            index = make_index(Path(folder) / "images.npy", items, several, dtype)
            first, *others = seconds(index, several, asked)
        cells = [f"{1000 * value:.1f} ms" for value in (first, float(np.median(others)), max(others))]
        print(f"| {items:,} | {several} | {np.dtype(dtype).name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{machine()}")


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random float32 unit vectors."""
    drawn = rng.standard_normal(shape, dtype=np.float32)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def make_index(path: Path, items: int, several: int, dtype: type) -> Index:
    """An index of `items` images with `several` embeddings each, its vectors in a file."""
    rng = np.random.default_rng(0)
    shape = (items, several, DIMENSIONS) if several > 1 else (items, DIMENSIONS)
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    for start in tqdm(range(0, items, PART), desc="vectors", unit="part", leave=False, disable=None):
        part = vectors[start : start + PART]
        part[:] = unit(rng, *part.shape)
    vectors.flush()
    pairs = np.arange(items)
    images = EmbeddedItems(read_array(path), pairs, np.zeros(items, dtype=np.int8))
    table = pa.table(
        {
            "image_path": [f"images/{pair:07}.jpg" for pair in range(items)],
            "text": [f"what image {pair} shows" for pair in range(items)],
            "split": ["train"] * items,
        }
    )
    return Index(images, images, table, Images([], pairs, Path("images")), np.ones(items, dtype=np.int64))


def seconds(index: Index, several: int, queries: int) -> list[float]:
    """Seconds that each of `queries` random queries takes."""
    rng = np.random.default_rng(1)
    taken = []
    for query in unit(rng, queries, several, DIMENSIONS):
        started = time.perf_counter()
        search_index(index, query, ("images",), TOP)
        taken.append(time.perf_counter() - started)
    return taken


if __name__ == "__main__":
    main()
