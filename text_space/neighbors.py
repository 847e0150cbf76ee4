"""Nearest neighbors of every row of a matrix: exact, or approximate (HNSW) with measured recall.

Rows are positions 0 … n - 1. A row is no neighbor of itself, nor of a row of the same group. `groups` are arrays (n,)
of numbers, equal where two rows belong together (one image, one text). Results are `NeighborLists`.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.files import open_array, read_json, write_json
from pipeline.progress import ProgressBar
from pipeline.schema import Neighbors
from text_space.hnsw import build_graph, choose_library, slices
from text_space.points import ROWS_AT_A_TIME, Points, points_of, points_of_both

EXACT_UP_TO = 150_000
"""Rows up to which `neighbors.method: auto` searches exactly.

Measured on two cores with k 200 and Doc2Vec vectors of the glosses of WordNet, 200 dimensions; seconds of exact search
against HNSW's, with raising its recall to 0.95: 20,000 rows 3.0 against 4.4, 50,000 rows 13 against 24, 100,000 rows 40
against 53, 150,000 rows 88 against 93 (benchmarks/README.md). Exact search grows with the square of the rows.
"""

ROWS_A_STEP = 1000
"""Rows for each step of `efSearch` from which HNSW takes longer than exact search, which `auto` then turns to.

Measured on two cores, 200 dimensions, milliseconds a row: among 2,923,961 rows exact search 9.7, HNSW at efSearch
12,992 60; among 100,000 rows exact search 0.38, HNSW at efSearch 203 0.29 and at 400 0.65.
"""

SPARE_ANSWERS = 16
"""Answers that exact search asks for beyond those it needs: its matrix products round."""
ANSWERS_AT_A_TIME = 1_000_000
"""Answers that exact search holds at a time."""
COLUMNS_AT_A_TIME = 65_536
"""Points that the torch product compares a row with at a time."""


class NeighborLists(NamedTuple):
    """Neighbors of q rows: positions (q, k) int64 (int32 on disk) and distances (q, k) float32.

    The nearest come first; of two at the same distance, the lower position. A row with fewer than k neighbors ends in
    positions -1 at distance inf.
    """

    positions: np.ndarray
    distances: np.ndarray


Search = Callable[[np.ndarray], NeighborLists]
"""From rows (q,) to their neighbors by Euclidean distance."""
Queries = Callable[[np.ndarray], np.ndarray]
"""From rows (q,) to the points (q, d) from which their neighbors are searched."""


def find_neighbors(
    vectors: np.ndarray,
    groups: Sequence[np.ndarray],
    settings: Neighbors,
    seed: int,
    deterministic: bool,
    unfinished: Path | None = None,
    images: np.ndarray | None = None,
) -> tuple[NeighborLists, dict[str, Any]]:
    """Neighbors of every row of `vectors` (n, d) by `neighbors.method`, and figures on how they were found.

    With `images` (n, e), further vectors of the same rows, neighbors are near in both, as `points_of_both` says; up to
    EXACT_UP_TO rows they are exact by any method. With the folder `unfinished`, the results lie in it, memory-mapped.
    A stopped search resumes there; a graph is rebuilt. Raises UserError where HNSW cannot reach `neighbors.min_recall`.
    """
    if images is None:
        searched = points_of(vectors, settings.distance, unfinished)
    else:
        searched = points_of_both(vectors, images, unfinished)
    points, queries, count = searched.points, searched.queries, len(vectors)

    def exact_search(rows: np.ndarray) -> NeighborLists:
        library: Literal["torch", "faiss"] = "torch" if torch.cuda.is_available() else "faiss"
        return exact_neighbors(points, rows, settings.k, groups, library, queries)

    is_small = count <= EXACT_UP_TO and (settings.method == "auto" or images is not None)
    if settings.method == "exact" or is_small:
        return _search_all(exact_search, searched, settings.k, unfinished)[0], {"method": "exact"}
    threads = 1 if deterministic else torch.get_num_threads()
    sample = np.random.default_rng(seed).permutation(count)[: settings.recall_sample]
    search, figures = _graph_search(searched, groups, settings, threads, sample, exact_search, unfinished)
    started = time.monotonic()
    found, new = _search_all(search, searched, settings.k, unfinished)
    figures |= {"searched_rows": new, "search_seconds": round(time.monotonic() - started, 1)}
    return found, figures


def _graph_search(
    searched: Points,
    groups: Sequence[np.ndarray],
    settings: Neighbors,
    threads: int,
    sample: np.ndarray,
    exact_search: Search,
    folder: Path | None,
) -> tuple[Search, dict[str, Any]]:
    """A search by HNSW that finds `neighbors.min_recall` of the neighbors of `sample`, and its figures.

    `auto` gets `exact_search` where HNSW would take longer. The figures are kept in `folder`, so that a resumed search
    has the same efSearch.
    """
    figures_file = folder / "recall.json" if folder else None
    kept: dict[str, Any] | None = read_json(figures_file) if figures_file and figures_file.is_file() else None
    if kept and kept["method"] == "exact":
        return exact_search, kept
    started = time.monotonic()
    graph = GraphSearch(searched.points, groups, settings, threads, searched.queries)
    if kept:
        graph.effort = kept["ef_search"]
        return graph.neighbors, kept
    build_seconds = round(time.monotonic() - started, 1)
    limit = len(searched.points) // (1 if settings.method == "hnsw" else ROWS_A_STEP)
    share = graph.raise_effort(sample, exact_search(sample), settings.min_recall, limit)
    is_found = share >= settings.min_recall
    if not is_found and settings.method == "hnsw":
        raise UserError(
            f"HNSW finds {share:.3f} of the true neighbors however long it searches; raise neighbors.hnsw_m or "
            "neighbors.hnsw_ef_construction, lower neighbors.min_recall, or set neighbors.method to exact"
        )
    figures = {
        "method": "hnsw" if is_found else "exact",
        "library": graph.library,
        "ef_search": graph.effort,
        "recall": share,
        "recall_sample": len(sample),
        "build_seconds": build_seconds,
    }
    if figures_file:
        write_json(figures_file, figures)
    return graph.neighbors if is_found else exact_search, figures


def _search_all(search: Search, searched: Points, k: int, folder: Path | None) -> tuple[NeighborLists, int]:
    """The k neighbors of all rows, with the distances of the table, and how many rows this call searched.

    With `folder`, what an earlier call wrote there is kept; `done.json` counts its rows.
    """
    first, files, count = 0, [], len(searched.points)
    found = no_neighbors(0 if folder else count, k)
    if folder:
        first = read_json(folder / "done.json") if (folder / "done.json").is_file() else 0
        files = [
            open_array(folder / "positions.npy", (count, k), np.int32, first > 0),
            open_array(folder / "distances.npy", (count, k), np.float32, first > 0),
        ]
        found = NeighborLists(*files)
    with ProgressBar(total=count, initial=first, desc="searching neighbors", unit="row") as progress:
        for start in range(first, count, ROWS_AT_A_TIME):
            part = slice(start, min(start + ROWS_AT_A_TIME, count))
            rows = np.arange(part.start, part.stop)
            positions, distances = search(rows)
            found.positions[part], found.distances[part] = positions, searched.distances(rows, distances)
            if folder:
                for file in files:
                    file.flush()
                write_json(folder / "done.json", part.stop)
            progress.update(part.stop - part.start)
    return found, count - first


def no_neighbors(rows: int, k: int) -> NeighborLists:
    """Lists of `rows` rows to be filled in: positions -1 at distance inf."""
    return NeighborLists(np.full((rows, k), -1, dtype=np.int64), np.full((rows, k), np.inf, dtype=np.float32))


def answers_needed(rows: int, k: int, groups: Sequence[np.ndarray]) -> int:
    """Answers to ask for, of which k are allowed neighbors for 99 % of the rows: a row's own groups take some."""
    left_out = sum(np.bincount(group)[group] for group in groups) if groups else np.ones(rows)
    return min(k + int(np.quantile(left_out, 0.99)) + 1, rows)


def _rank(points: np.ndarray, query: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`answers` (positions, -1 is none), nearest first, and their distances from `query`, computed in float64."""
    candidates = np.sort(answers[answers >= 0])
    distances = np.empty(len(candidates), dtype=np.float32)
    for part in slices(len(candidates), COLUMNS_AT_A_TIME):
        differences = (points[candidates[part]] - query).astype(np.float64)
        distances[part] = np.sqrt(np.einsum("ij,ij->i", differences, differences))
    order = np.argsort(distances, kind="stable")  # of equal distances the lower position stays first
    return candidates[order], distances[order]


def _is_allowed(positions: np.ndarray, row: int, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Which of `positions` may be neighbors of `row` (bool)."""
    allowed: np.ndarray = positions != row
    for group in groups:
        allowed &= group[positions] != group[row]
    return allowed


def exact_neighbors(
    points: np.ndarray,
    rows: np.ndarray,
    k: int,
    groups: Sequence[np.ndarray],
    library: Literal["torch", "faiss"] = "torch",
    queries: Queries | None = None,
) -> NeighborLists:
    """The k nearest neighbors of `rows` (q,) among all `points` (n, d), by Euclidean distance from their `queries`.

    Matrix products in float32 propose more candidates than needed, and distances in float64 rank them. A row asks
    again, for four times as many, where its candidates do not reach beyond its k-th neighbor: where others are left
    out, or many lie at one distance. torch multiplies on a GPU where there is one, Faiss is faster on a CPU. Both give
    the same positions. `points` may be memory-mapped. Without `queries`, a row's query is its own point.
    """
    found, count, queries = no_neighbors(len(rows), k), len(points), queries or points.__getitem__
    nearest = _NearestByTorch(points) if library == "torch" else _NearestByFaiss(points)
    pending, asked = np.arange(len(rows)), min(answers_needed(count, k, groups) + SPARE_ANSWERS, count)
    while len(pending):
        unsettled = []
        for part in slices(len(pending), max(ANSWERS_AT_A_TIME // asked, 1)):
            lines = pending[part]
            asking = queries(rows[lines])
            answers = nearest(asking, asked) if asked < count else [np.arange(count)] * len(lines)
            for line, row, query, answer in zip(lines, rows[lines], asking, answers, strict=True):
                positions, distances = _rank(points, query, answer)
                allowed = np.flatnonzero(_is_allowed(positions, row, groups))[:k]
                if asked == count or (len(allowed) == k and distances[allowed[-1]] < distances[-1]):
                    found.positions[line, : len(allowed)] = positions[allowed]
                    found.distances[line, : len(allowed)] = distances[allowed]
                else:
                    unsettled.append(line)
        pending, asked = np.array(unsettled, dtype=np.int64), min(4 * asked, count)
    return found


class _NearestByFaiss:
    """The points (n, d) nearest to queries, by Faiss's matrix products in float32."""

    def __init__(self, points: np.ndarray) -> None:
        self.points = points

    def __call__(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Positions (q, count) of the points nearest to `queries` (q, d)."""
        import faiss  # compiled, and needed by step 3 only

        faiss.omp_set_num_threads(torch.get_num_threads())
        positions: np.ndarray = faiss.knn(np.ascontiguousarray(queries), self.points, count)[1]
        return positions


class _NearestByTorch:
    """The points (n, d) nearest to queries, by torch's matrix products in float32."""

    def __init__(self, points: np.ndarray) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.points = torch.from_numpy(np.array(points, dtype=np.float32)).to(device)
        self.squares = self.points.square().sum(dim=1)

    def __call__(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Positions (q, count) of the points nearest to `queries` (q, d)."""
        points = self.points
        asking = torch.from_numpy(np.array(queries)).to(points.device)
        scores = asking.new_empty(len(asking), 0)
        positions = torch.empty(len(asking), 0, dtype=torch.int64, device=points.device)
        for part in slices(len(points), COLUMNS_AT_A_TIME):
            # ‖b‖² − 2ab orders points as their distance from a does.
            of_part = torch.addmm(self.squares[part], asking, points[part].T, alpha=-2)
            numbers = torch.arange(part.start, part.stop, device=points.device).expand_as(of_part)
            scores, positions = torch.cat([scores, of_part], dim=1), torch.cat([positions, numbers], dim=1)
            scores, chosen = scores.topk(min(count, scores.shape[1]), dim=1, largest=False)
            positions = positions.gather(1, chosen)
        return positions.cpu().numpy()


def recall(found: NeighborLists, truth: NeighborLists) -> float:
    """Share of the true neighbors that were found; of several at the farthest true distance any is as true.

    1 where no row has a neighbor. The distances of both are those of the same points, so that equal ones are equal.
    """
    wanted = np.isfinite(truth.distances)
    if not wanted.any():
        return 1.0
    farthest = np.where(wanted, truth.distances, -np.inf).max(axis=1, keepdims=True)
    tied = [(result.distances == farthest).sum(axis=1) for result in (found, truth)]
    hits = (found.distances < farthest).sum(axis=1) + np.minimum(*tied)
    return float(hits.sum() / wanted.sum())


class GraphSearch:
    """Neighbors among `points` (n, d) by an HNSW graph: filtered by groups, and ranked by exact distance."""

    def __init__(
        self,
        points: np.ndarray,
        groups: Sequence[np.ndarray],
        settings: Neighbors,
        threads: int,
        queries: Queries | None = None,
    ) -> None:
        self.points, self.groups, self.k = points, groups, settings.k
        self._queries = queries or points.__getitem__
        self.library = choose_library(settings.library, points)
        self._graph = build_graph(self.library, points, settings.hnsw_m, settings.hnsw_ef_construction, threads)
        self.asked = answers_needed(len(points), settings.k, groups)
        """Answers that the graph gives for a row."""
        self.effort = self.asked
        """efSearch: the candidates that the graph keeps while it searches."""

    def neighbors(self, rows: np.ndarray) -> NeighborLists:
        """Neighbors of `rows` (q,) at the present effort; exact where the graph leaves a row with fewer than k."""
        found, available, short = no_neighbors(len(rows), self.k), min(self.k, len(self.points) - 1), []
        queries = self._queries(rows)
        answers = self._graph.search(queries, self.asked, self.effort)
        for line, (row, query, answer) in enumerate(zip(rows, queries, answers, strict=True)):
            positions, distances = _rank(self.points, query, answer)
            allowed = np.flatnonzero(_is_allowed(positions, row, self.groups))[: self.k]
            found.positions[line, : len(allowed)] = positions[allowed]
            found.distances[line, : len(allowed)] = distances[allowed]
            if len(allowed) < available:
                short.append(line)
        if short:
            completed = exact_neighbors(self.points, rows[short], self.k, self.groups, queries=self._queries)
            found.positions[short], found.distances[short] = completed
        return found

    def raise_effort(self, sample: np.ndarray, truth: NeighborLists, wanted: float, limit: int) -> float:
        """Double efSearch until the share `wanted` of the true neighbors of `sample` is found; returns the share.

        It is smaller where efSearch has reached `limit`.
        """
        while True:
            share = recall(self.neighbors(sample), truth)
            if share >= wanted or self.effort >= limit:
                return share
            self.effort = min(2 * self.effort, limit)
