"""Building an HNSW index of nmslib's in a process of its own, whose memory goes back when it ends.

nmslib holds the vectors one by one while it links them, and then copies them into the index that it searches fastest.
Saved without its data and loaded again, that index is all that is left: one copy of the vectors.
"""

import multiprocessing
from pathlib import Path

import numpy as np

from processes import serve

VECTORS_AT_A_TIME = 20_000


def build(points: Path, index: Path, m: int, ef_construction: int, threads: int, progress: bool) -> None:
    """Index the vectors in `points` (.npy, float32) by Euclidean distance and save the index as `index`.

    By one thread the index is always the same: nmslib draws a vector's level from a state of the thread's own, which a
    fresh process has fresh. Raises MemoryError where the process that builds was killed.
    """
    arguments = (points, index, m, ef_construction, threads, progress)
    process = multiprocessing.get_context("spawn").Process(target=_build, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise MemoryError(f"the process that builds the index ended with {process.exitcode}")


def _build(points: Path, index: Path, m: int, ef_construction: int, threads: int, progress: bool) -> None:
    import nmslib  # compiled, and needed by large datasets only

    serve()
    vectors = np.load(points, mmap_mode="r", allow_pickle=False)
    built = nmslib.init(method="hnsw", space="l2")
    for start in range(0, len(vectors), VECTORS_AT_A_TIME):
        some = np.ascontiguousarray(vectors[start : start + VECTORS_AT_A_TIME])
        built.addDataPointBatch(some, np.arange(start, start + len(some), dtype=np.int32))
    settings = {"M": m, "efConstruction": ef_construction, "indexThreadQty": threads, "post": 0}
    built.createIndex(settings, print_progress=progress)
    built.saveIndex(str(index), save_data=False)
