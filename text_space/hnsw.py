"""Graphs for approximate nearest neighbors: HNSW (Malkov and Yashunin 2016), by Euclidean distance.

A graph is built in memory from points (n, d) float32. It answers `search`. One thread always builds the same graph.
"""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

POINTS_AT_A_TIME = 10_000
"""Points added to a graph between two moves of the progress bar."""


def slices(count: int, size: int) -> Iterator[slice]:
    """`count` rows as consecutive slices of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class FaissGraph:
    """Faiss's HNSW. It holds the points once."""

    def __init__(self, points: np.ndarray, links: int, ef_construction: int, threads: int) -> None:
        import faiss  # compiled, and needed by step 3 only

        self._faiss, self._threads = faiss, threads
        self._index = faiss.IndexHNSWFlat(points.shape[1], links)
        self._index.hnsw.efConstruction = ef_construction
        faiss.omp_set_num_threads(threads)
        with tqdm(total=len(points), desc="building HNSW", unit="vector", disable=None) as progress:
            for part in slices(len(points), POINTS_AT_A_TIME):
                self._index.add(np.ascontiguousarray(points[part]))
                progress.update(part.stop - part.start)

    def search(self, queries: np.ndarray, count: int, effort: int) -> np.ndarray:
        """Positions (q, count) int64 of the points near `queries` (q, d); -1 where fewer are found.

        `effort` is efSearch, the length of the candidate list.
        """
        self._faiss.omp_set_num_threads(self._threads)
        self._index.hnsw.efSearch = effort
        positions: np.ndarray = self._index.search(np.ascontiguousarray(queries), count)[1]
        return positions
