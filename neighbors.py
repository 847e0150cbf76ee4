"""Nearest neighbors of every row of a matrix: exact, or approximate (HNSW, Malkov and Yashunin 2016), recall measured.

Rows are positions 0 … n - 1. A row is no neighbor of itself, nor of a row it shares a group with: `groups` are arrays
(n,) of numbers, equal where two rows belong together (one image, one text). Results are `Found`: nearest first, of two
at the same distance the lower position first, positions -1 and distances inf where a row has fewer than k neighbors.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hnsw
from artifacts import open_array, read_json, write_json, written_whole
from config import Neighbors, UserError

Distance = Literal["euclidean", "cosine"]

EXACT_UP_TO = 50_000
"""Rows up to which `neighbors.method: auto` searches exactly.

Measured on two cores with k 200 and Doc2Vec vectors of paragraphs, 200 dimensions; seconds of exact search against
HNSW's, with raising its recall to 0.95: 5,000 rows 2.0 against 7.4, 20,000 rows 11.7 against 18.4, 50,000 rows 45.1
against 47.9. Exact search grows with the square of the rows.
"""

ROWS_A_STEP = 150
"""Rows for each step of `efSearch` from which HNSW takes longer than exact search, which `auto` then turns to.

Measured on the same cores, 200 dimensions: HNSW among 886,903 rows takes one thread 5.1 ms a query at efSearch 812 and
17 ms at 3,248; exact search among 50,000 takes two 0.9 ms a row, which grows with the rows.
"""

_BLOCK = 256  # rows that exact search compares with all others at a time
_COLUMNS = 65_536  # points that exact search holds at a time
_CHUNK = 10_000  # rows that HNSW is asked about at a time


class Found(NamedTuple):
    """Neighbors of q rows: positions (q, k) int64 (int32 on disk) and distances (q, k) float32."""

    positions: np.ndarray
    distances: np.ndarray


def find_neighbors(
    vectors: np.ndarray,
    groups: Sequence[np.ndarray],
    settings: Neighbors,
    seed: int,
    deterministic: bool,
    unfinished: Path | None = None,
) -> tuple[Found, dict[str, Any]]:
    """Neighbors of every row of `vectors` (n, d) by `neighbors.method`, and figures on how they were found.

    With the folder `unfinished`, what is found lies in it, memory-mapped, and so does the index; a search that was
    stopped goes on from there. Raises UserError where HNSW cannot reach `neighbors.min_recall`.
    """
    method = settings.method
    if method == "auto":
        method = "exact" if len(vectors) <= EXACT_UP_TO else "hnsw"
    rows = np.arange(len(vectors))
    cosine = settings.distance == "cosine"
    with contextlib.ExitStack() as stack:
        folder = unfinished or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if method == "exact":
            points = on_sphere(vectors) if cosine else np.ascontiguousarray(vectors, dtype=np.float32)
            found, figures = exact_neighbors(points, rows, settings.k, groups), {"method": "exact"}
        else:
            threads = 1 if deterministic else torch.get_num_threads()
            started = time.monotonic()
            index = HNSW(vectors, groups, settings, threads, folder)
            build_seconds = round(time.monotonic() - started, 1)
            figures_file = folder / "recall.json"
            if figures_file.is_file():
                figures = read_json(figures_file)
                index.effort = figures["ef_search"]
            else:
                sample = np.random.default_rng(seed).permutation(len(vectors))[: settings.recall_sample]
                truth = exact_neighbors(index.points, sample, settings.k, groups)
                limit = len(vectors) if settings.method == "hnsw" else len(vectors) // ROWS_A_STEP
                share = index.raise_effort(sample, truth, settings.min_recall, limit)
                figures = {"method": "hnsw", "ef_search": index.effort, "recall": share, "recall_sample": len(sample)}
                figures["build_seconds"] = build_seconds
                write_json(figures_file, figures)
            if figures["recall"] < settings.min_recall:
                if settings.method == "hnsw":
                    raise UserError(
                        f"HNSW finds {figures['recall']:.3f} of the true neighbors however long it searches; raise "
                        "neighbors.hnsw_m or neighbors.hnsw_ef_construction, lower neighbors.min_recall, or set "
                        "neighbors.method to exact"
                    )
                figures["method"], index.exact = "exact", True
            started, left = time.monotonic(), len(rows) - index.done(unfinished)
            found = index.neighbors(rows, unfinished)
            figures |= {"searched_rows": left, "search_seconds": round(time.monotonic() - started, 1)}
    if cosine:
        for part in _parts(len(vectors)):
            found.distances[part] = found.distances[part] ** 2 / 2  # 1 - cos of the angle between unit vectors
    return found, figures


def _parts(rows: int, size: int = _CHUNK) -> Iterator[slice]:
    """`rows` rows, so many at a time."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def on_sphere(vectors: np.ndarray) -> np.ndarray:
    """`vectors` (n, d) at unit length, float32: there Euclid's nearest are the cosine's. Zero stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)


def _nearest(points: np.ndarray, row: int, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of `candidates` (ascending positions) and their distances, to float32's last digit."""
    differences = (points[candidates] - points[row]).astype(np.float64)
    distances = np.sqrt(np.einsum("ij,ij->i", differences, differences)).astype(np.float32)
    order = np.argsort(distances, kind="stable")[:k]
    return candidates[order], distances[order]


def _nobody(rows: int, k: int) -> Found:
    return Found(np.full((rows, k), -1, dtype=np.int64), np.full((rows, k), np.inf, dtype=np.float32))


def exact_neighbors(points: np.ndarray, rows: np.ndarray, k: int, groups: Sequence[np.ndarray]) -> Found:
    """The k nearest neighbors of `rows` (q,) among `points` (n, d), by Euclidean distance, from all distances.

    ‖a‖² + ‖b‖² − 2ab, one matrix product, loses the distance of near points to rounding. So it only tells who may be
    among the k nearest, with room for its error; the distances that decide are computed from differences.
    `points` may be memory-mapped: more than _COLUMNS of them are compared part by part, twice.
    """
    found = _nobody(len(rows), k)
    # The error grows with the norms: measured from the mean they are smallest.
    parts = list(_parts(len(points), _COLUMNS))
    mean = sum(points[part].sum(axis=0, dtype=np.float64) for part in parts) / max(len(points), 1)
    mean = mean.astype(np.float32)
    centred = [torch.from_numpy(points[part] - mean) for part in parts[:1]]
    members = [torch.from_numpy(group) for group in groups]

    def estimates(of: Tensor, block: Tensor, part: slice) -> Tensor:
        """Squared distances (b, c), about, of the centred queries `of`, which are rows `block`, to a part of all."""
        some = centred[0] if len(parts) == 1 else torch.from_numpy(points[part] - mean)
        squares = torch.addmm(some.square().sum(dim=1), of, some.T, alpha=-2).add_(of.square().sum(dim=1)[:, None])
        own = (block >= part.start) & (block < part.stop)
        squares[own.nonzero()[:, 0], block[own] - part.start] = torch.inf
        for group in members:
            squares.masked_fill_(group[block, None] == group[part], torch.inf)
        return squares

    largest = max((float(np.square(points[part] - mean).sum(axis=1).max()) for part in parts), default=0.0)
    error = 4 * points.shape[1] ** 0.5 * torch.finfo(torch.float32).eps * largest
    with tqdm(total=len(rows), desc="exact search", unit="row", disable=None) as progress:
        for start in range(0, len(rows), _BLOCK):
            block = torch.from_numpy(rows[start : start + _BLOCK])
            of = torch.from_numpy(points[rows[start : start + _BLOCK]] - mean)
            nearest, squares = torch.empty(len(block), 0), torch.empty(0)
            for part in parts:
                squares = estimates(of, block, part)
                nearest = torch.cat([nearest, squares], dim=1)
                nearest = nearest.topk(min(k, nearest.shape[1]), dim=1, largest=False, sorted=False).values
            bounds = nearest.amax(dim=1) + 2 * error
            bounds = bounds.clamp(max=torch.finfo(torch.float32).max)  # who is left out is at infinity
            candidates: list[list[np.ndarray]] = [[] for _ in block]
            for part in parts:
                squares = squares if len(parts) == 1 else estimates(of, block, part)
                for line, column in zip(*_grouped((squares <= bounds[:, None]).numpy()), strict=True):
                    candidates[line].append(column + part.start)
            for line, row in enumerate(block.tolist()):
                among = np.concatenate(candidates[line]) if candidates[line] else np.empty(0, np.int64)
                ordered = _nearest(points, row, among, k)
                found.positions[start + line, : len(ordered[0])], found.distances[start + line, : len(ordered[1])] = (
                    ordered
                )
            progress.update(len(block))
    return found


def _grouped(mask: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """The lines of a mask that have a True, and where in each they are."""
    found = [(line, np.flatnonzero(columns)) for line, columns in enumerate(mask)]
    found = [each for each in found if len(each[1])]
    return [line for line, _ in found], [columns for _, columns in found]


def recall(found: Found, truth: Found) -> float:
    """Share of the true neighbors that were found; one at the distance of the farthest true one counts as true."""
    hits = np.isfinite(found.distances) & (found.distances <= truth.distances[:, -1:])
    return float(hits.sum() / max(np.isfinite(truth.distances).sum(), 1))


class HNSW:
    """An index of nmslib's over `vectors` (n, d); built by one thread it is always the same.

    By Euclidean distance, for `neighbors.distance: cosine` of the vectors at unit length. The vectors (`points.npy`)
    and the index (`hnsw.index`) are kept in `folder` and used where they lie there already.
    """

    def __init__(
        self, vectors: np.ndarray, groups: Sequence[np.ndarray], settings: Neighbors, threads: int, folder: Path
    ) -> None:
        import nmslib  # compiled, and needed by large datasets only

        self.groups, self.k = groups, settings.k
        built = folder / "hnsw.index"
        self.points = open_array(folder / "points.npy", vectors.shape, np.float32, keep=built.is_file())
        if not built.is_file():
            for part in _parts(len(vectors)):
                self.points[part] = on_sphere(vectors[part]) if settings.distance == "cosine" else vectors[part]
            self.points.flush()
            print(f"building HNSW among {len(vectors):,} vectors", flush=True)
            with written_whole(built) as beside:
                m, breadth, shown = settings.hnsw_m, settings.hnsw_ef_construction, sys.stderr.isatty()
                hnsw.build(folder / "points.npy", beside, m, breadth, threads, shown)
        # Who is left out takes room among the answers. Rows of large groups are completed by exact search.
        left_out = sum(np.bincount(group)[group] for group in groups) if groups else np.ones(len(vectors))
        self.asked = min(settings.k + int(np.quantile(left_out, 0.99)) + 1, len(vectors))
        self.effort = self.asked
        self._index = nmslib.init(method="hnsw", space="l2")
        self._index.loadIndex(str(built), load_data=False)
        self._threads = threads
        self.exact = False
        """Whether `neighbors` compares with all points after all."""

    def neighbors(self, rows: np.ndarray, unfinished: Path | None = None) -> Found:
        """Neighbors of `rows` (q,) at the present effort.

        With the folder `unfinished` they are written into it as they are found, `done.json` says how many rows are, and
        the rest is found by another call with the same rows.
        """
        self._index.setQueryTimeParams({"efSearch": self.effort})
        first = self.done(unfinished)
        if unfinished:
            found = Found(
                open_array(unfinished / "positions.npy", (len(rows), self.k), np.int32, first > 0),
                open_array(unfinished / "distances.npy", (len(rows), self.k), np.float32, first > 0),
            )
        else:
            found = _nobody(len(rows), self.k)
        with tqdm(total=len(rows), initial=first, desc="HNSW search", unit="row", disable=None) as progress:
            for start in range(first, len(rows), _CHUNK):
                part = slice(start, min(start + _CHUNK, len(rows)))
                found.positions[part], found.distances[part] = self._neighbors_of(rows[part])
                if unfinished:
                    found.positions.flush()
                    found.distances.flush()
                    write_json(unfinished / "done.json", part.stop)
                progress.update(part.stop - part.start)
        return found

    def done(self, unfinished: Path | None) -> int:
        """The rows whose neighbors lie in the folder `unfinished`, from a call that was stopped."""
        return read_json(unfinished / "done.json") if unfinished and (unfinished / "done.json").is_file() else 0

    def _neighbors_of(self, rows: np.ndarray) -> Found:
        if self.exact:
            return exact_neighbors(self.points, rows, self.k, self.groups)
        found = _nobody(len(rows), self.k)
        available = min(self.k, len(self.points) - 1)
        short = []
        answers = self._index.knnQueryBatch(self.points[rows], k=self.asked, num_threads=self._threads)
        for line, (row, (answer, _)) in enumerate(zip(rows, answers, strict=True)):
            allowed = np.sort(answer[answer != row])
            for group in self.groups:
                allowed = allowed[group[allowed] != group[row]]
            nearest = _nearest(self.points, row, allowed, self.k)
            found.positions[line, : len(nearest[0])], found.distances[line, : len(nearest[1])] = nearest
            if len(allowed) < available:
                short.append(line)
        if short:
            completed = exact_neighbors(self.points, rows[short], self.k, self.groups)
            found.positions[short], found.distances[short] = completed
        return found

    def raise_effort(self, sample: np.ndarray, truth: Found, wanted: float, limit: int) -> float:
        """Double efSearch until the share `wanted` of the true neighbors of `sample` is found; returns the share.

        It is smaller where efSearch has reached `limit`.
        """
        while True:
            share = recall(self.neighbors(sample), truth)
            if share >= wanted or self.effort >= limit:
                return share
            self.effort = min(2 * self.effort, limit)


def category_share(positions: np.ndarray, categories: np.ndarray, first: int = 20) -> tuple[float, float]:
    """Share of the `first` neighbors in `positions` (n, k) that have their row's category, and what chance gives.

    `categories` (n,) are numbers, -1 for none; rows and neighbors without one do not count. Chance is the probability
    that another row drawn at random has the row's category. Both are nan where no two neighbors have one.
    """
    hits = total_known = 0
    for part in _parts(len(positions)):
        neighbors, own = np.asarray(positions[part, :first]), categories[part, None]
        known = (neighbors >= 0) & (categories[neighbors] >= 0) & (own >= 0)
        hits += int((known & (categories[neighbors] == own)).sum())
        total_known += int(known.sum())
    counts = np.bincount(categories[categories >= 0]).astype(np.float64)
    total = counts.sum()
    if not total_known:
        return float("nan"), float("nan")
    return hits / total_known, float((counts * (counts - 1)).sum() / (total * (total - 1)))
