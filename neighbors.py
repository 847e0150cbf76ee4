"""Nearest neighbors of every row of a matrix: exact, or approximate (HNSW, Malkov and Yashunin 2016), recall measured.

Rows are positions 0 … n - 1. A row is no neighbor of itself, nor of a row it shares a group with: `groups` are arrays
(n,) of numbers, equal where two rows belong together (one image, one text). Results are `Found`: nearest first, of two
at the same distance the lower position first, positions -1 and distances inf where a row has fewer than k neighbors.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from config import Neighbors, UserError

Distance = Literal["euclidean", "cosine"]

EXACT_UP_TO = 50_000
"""Rows up to which `neighbors.method: auto` searches exactly.

Measured on two cores with k 200 and Doc2Vec vectors of paragraphs, 200 dimensions; seconds of exact search against
HNSW's, with raising its recall to 0.95: 5,000 rows 2.0 against 7.4, 20,000 rows 11.7 against 18.4, 50,000 rows 45.1
against 47.9. Exact search grows with the square of the rows.
"""

_BLOCK = 256  # rows that exact search compares with all others at a time
_CHUNK = 10_000  # rows that HNSW is asked about at a time


class Found(NamedTuple):
    """Neighbors of q rows: positions (q, k) int64 and distances (q, k) float32."""

    positions: np.ndarray
    distances: np.ndarray


def find_neighbors(
    vectors: np.ndarray, groups: Sequence[np.ndarray], settings: Neighbors, seed: int, deterministic: bool
) -> tuple[Found, dict[str, Any]]:
    """Neighbors of every row of `vectors` (n, d) by `neighbors.method`, and figures on how they were found.

    Raises UserError where HNSW cannot reach `neighbors.min_recall`.
    """
    points = on_sphere(vectors) if settings.distance == "cosine" else np.ascontiguousarray(vectors, dtype=np.float32)
    rows = np.arange(len(points))
    method = settings.method
    if method == "auto":
        method = "exact" if len(points) <= EXACT_UP_TO else "hnsw"
    if method == "exact":
        found, figures = exact_neighbors(points, rows, settings.k, groups), {"method": "exact"}
    else:
        index = HNSW(points, groups, settings, threads=1 if deterministic else torch.get_num_threads())
        sample = np.random.default_rng(seed).permutation(len(points))[: settings.recall_sample]
        truth = exact_neighbors(points, sample, settings.k, groups)
        share = index.raise_effort(sample, truth, settings.min_recall)
        found = index.neighbors(rows)
        figures = {"method": "hnsw", "ef_search": index.effort, "recall": share, "recall_sample": len(sample)}
    if settings.distance == "cosine":
        found = Found(found.positions, found.distances**2 / 2)  # 1 - cos of the angle between unit vectors
    return found, figures


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
    """
    found = _nobody(len(rows), k)
    # The error grows with the norms: measured from the mean they are smallest.
    centred = torch.from_numpy(points - points.mean(axis=0, dtype=np.float64).astype(np.float32))
    norms = centred.square().sum(dim=1)
    error = 4 * centred.shape[1] ** 0.5 * torch.finfo(torch.float32).eps * float(norms.max())
    members = [torch.from_numpy(group) for group in groups]
    with tqdm(total=len(rows), desc="exact search", unit="row", disable=None) as progress:
        for start in range(0, len(rows), _BLOCK):
            block = torch.from_numpy(rows[start : start + _BLOCK])
            estimates = torch.addmm(norms, centred[block], centred.T, alpha=-2).add_(norms[block, None])
            estimates[torch.arange(len(block)), block] = torch.inf
            for group in members:
                estimates.masked_fill_(group[block, None] == group, torch.inf)
            farthest = estimates.topk(min(k, len(points)), dim=1, largest=False, sorted=False).values.amax(dim=1)
            bounds = (farthest + 2 * error).clamp(max=torch.finfo(torch.float32).max)  # who is left out is at infinity
            within = (estimates <= bounds[:, None]).numpy()
            for line, row in enumerate(block.tolist(), start):
                nearest = _nearest(points, row, np.flatnonzero(within[line - start]), k)
                found.positions[line, : len(nearest[0])], found.distances[line, : len(nearest[1])] = nearest
            progress.update(len(block))
    return found


def recall(found: Found, truth: Found) -> float:
    """Share of the true neighbors that were found; one at the distance of the farthest true one counts as true."""
    hits = np.isfinite(found.distances) & (found.distances <= truth.distances[:, -1:])
    return float(hits.sum() / max(np.isfinite(truth.distances).sum(), 1))


class HNSW:
    """An index of nmslib's over `points` (n, d) by Euclidean distance; built by one thread it is always the same."""

    def __init__(self, points: np.ndarray, groups: Sequence[np.ndarray], settings: Neighbors, threads: int) -> None:
        import nmslib  # compiled, and needed by large datasets only

        self.points, self.groups, self.k = points, groups, settings.k
        # Who is left out takes room among the answers. Rows of large groups are completed by exact search.
        left_out = sum(np.bincount(group)[group] for group in groups) if groups else np.ones(len(points))
        self.asked = min(settings.k + int(np.quantile(left_out, 0.99)) + 1, len(points))
        self.effort = self.asked
        self._index = nmslib.init(method="hnsw", space="l2")
        self._index.addDataPointBatch(points)
        building = {"M": settings.hnsw_m, "efConstruction": settings.hnsw_ef_construction, "indexThreadQty": threads}
        # nmslib draws a point's level from a state of the thread's own, which a fresh thread has fresh.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._index.createIndex, {**building, "post": 0}, print_progress=False).result()

    def neighbors(self, rows: np.ndarray) -> Found:
        """Neighbors of `rows` (q,) at the present effort."""
        self._index.setQueryTimeParams({"efSearch": self.effort})
        found = _nobody(len(rows), self.k)
        available = min(self.k, len(self.points) - 1)
        short = []
        with tqdm(total=len(rows), desc="HNSW search", unit="row", disable=None) as progress:
            for start in range(0, len(rows), _CHUNK):
                chunk = rows[start : start + _CHUNK]
                answers = self._index.knnQueryBatch(self.points[chunk], k=self.asked)
                for line, (row, (answer, _)) in enumerate(zip(chunk, answers, strict=True), start):
                    allowed = np.sort(answer[answer != row])
                    for group in self.groups:
                        allowed = allowed[group[allowed] != group[row]]
                    nearest = _nearest(self.points, row, allowed, self.k)
                    found.positions[line, : len(nearest[0])], found.distances[line, : len(nearest[1])] = nearest
                    if len(allowed) < available:
                        short.append(line)
                progress.update(len(chunk))
        if short:
            completed = exact_neighbors(self.points, rows[short], self.k, self.groups)
            found.positions[short], found.distances[short] = completed
        return found

    def raise_effort(self, sample: np.ndarray, truth: Found, wanted: float) -> float:
        """Double efSearch until the share `wanted` of the true neighbors of `sample` is found; returns the share.

        Raises UserError where it is not, though efSearch spans all points.
        """
        while True:
            share = recall(self.neighbors(sample), truth)
            if share >= wanted:
                return share
            if self.effort >= len(self.points):
                raise UserError(
                    f"HNSW finds {share:.3f} of the true neighbors however long it searches; raise neighbors.hnsw_m or "
                    "neighbors.hnsw_ef_construction, lower neighbors.min_recall, or set neighbors.method to exact"
                )
            self.effort = min(2 * self.effort, len(self.points))


def category_share(positions: np.ndarray, categories: np.ndarray, first: int = 20) -> tuple[float, float]:
    """Share of the `first` neighbors in `positions` (n, k) that have their row's category, and what chance gives.

    `categories` (n,) are numbers, -1 for none; rows and neighbors without one do not count. Chance is the probability
    that another row drawn at random has the row's category. Both are nan where no two neighbors have one.
    """
    neighbors = positions[:, :first]
    known = (neighbors >= 0) & (categories[neighbors] >= 0) & (categories >= 0)[:, None]
    same = known & (categories[neighbors] == categories[:, None])
    counts = np.bincount(categories[categories >= 0]).astype(np.float64)
    total = counts.sum()
    if not known.any():
        return float("nan"), float("nan")
    return float(same.sum() / known.sum()), float((counts * (counts - 1)).sum() / (total * (total - 1)))
