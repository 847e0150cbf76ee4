"""Graphs for approximate nearest neighbors: HNSW (Malkov and Yashunin 2016), by Euclidean distance.

A graph is built in memory from points (n, d) float32. It answers `search`. One thread always builds the same graph.
nmslib is the library that the authors used. Faiss takes over where nmslib's copies of the points take too much memory.
"""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from pipeline.progress import ProgressBar

POINTS_AT_A_TIME = 10_000
"""Points added to a graph between two moves of the progress bar."""


NMSLIB_MEMORY_SHARE = 0.5
"""Share of the machine's memory that nmslib's two copies of the points may take (`neighbors.library: auto`).

The other half is for the points themselves, the links, and the lists that are found. benchmarks/graphs.py measures
what a graph takes.
"""


class Graph(Protocol):
    """An HNSW graph of points (n, d)."""

    def search(self, queries: np.ndarray, count: int, effort: int) -> np.ndarray:
        """Positions (q, count) int64 of the points near `queries` (q, d); -1 where fewer are found.

        `effort` is efSearch, the length of the candidate list.
        """


def build_graph(library: str, points: np.ndarray, links: int, ef_construction: int, threads: int) -> Graph:
    """The graph by `nmslib` or `faiss`."""
    graph = NmslibGraph if library == "nmslib" else FaissGraph
    return graph(points, links, ef_construction, threads)


def choose_library(wanted: str, points: np.ndarray) -> str:
    """`wanted`, or for `auto` nmslib until its two copies of the points pass NMSLIB_MEMORY_SHARE of the memory."""
    if wanted != "auto":
        return wanted
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "nmslib" if 2 * points.size * 4 <= NMSLIB_MEMORY_SHARE * memory else "faiss"


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
        with ProgressBar(total=len(points), desc="building HNSW", unit="vector") as progress:
            for part in slices(len(points), POINTS_AT_A_TIME):
                self._index.add(np.ascontiguousarray(points[part]))
                progress.update(part.stop - part.start)

    def search(self, queries: np.ndarray, count: int, effort: int) -> np.ndarray:
        """As `Graph.search`."""
        self._faiss.omp_set_num_threads(self._threads)
        self._index.hnsw.efSearch = effort
        positions: np.ndarray = self._index.search(np.ascontiguousarray(queries), count)[1]
        return positions


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what C code writes to stderr."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def in_new_thread(action: Callable[[], object]) -> None:
    """Run `action` in a new thread and wait for it. Ctrl-C ends the wait, and the thread ends with the process."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    done.result()


class NmslibGraph:
    """nmslib's HNSW. It holds the points twice."""

    def __init__(self, points: np.ndarray, links: int, ef_construction: int, threads: int) -> None:
        with _without_stderr():  # its C++ code advises to compile it anew
            import nmslib  # compiled, and needed by step 3 only

        self._threads = threads
        self._index = nmslib.init(method="hnsw", space="l2")
        self._index.addDataPointBatch(np.ascontiguousarray(points, dtype=np.float32))
        parameters = {"M": links, "efConstruction": ef_construction, "indexThreadQty": threads, "post": 0}
        show = sys.__stderr__ is not None and sys.__stderr__.isatty()
        # nmslib's random generator belongs to the thread. A new thread starts it anew: the same graph every time.
        in_new_thread(functools.partial(self._index.createIndex, parameters, print_progress=show))

    def search(self, queries: np.ndarray, count: int, effort: int) -> np.ndarray:
        """As `Graph.search`."""
        self._index.setQueryTimeParams({"efSearch": effort})
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        positions = np.full((len(queries), count), -1, dtype=np.int64)
        for line, (found, _) in enumerate(self._index.knnQueryBatch(queries, k=count, num_threads=self._threads)):
            positions[line, : len(found)] = found  # answers may be fewer than were asked for
        return positions
