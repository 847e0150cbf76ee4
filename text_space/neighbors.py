"""Nearest neighbors of every row of a matrix: exact, or approximate (HNSW, Malkov and Yashunin 2016), recall measured.

Rows are positions 0 … n - 1. A row is no neighbor of itself, nor of a row it shares a group with: `groups` are arrays
(n,) of numbers, equal where two rows belong together (one image, one text). Results are `Found`: nearest first, of two
at the same distance the lower position first, positions -1 and distances inf where a row has fewer than k neighbors.
"""

import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import open_array, read_json, write_json, written_whole
from pipeline.settings import Neighbors

Distance = Literal["euclidean", "cosine"]

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

_SPARE = 16  # answers of exact search more than are needed, for the rounding of its matrix products
_ANSWERS = 1_000_000  # answers that exact search holds at a time
_COLUMNS = 65_536  # points that a row is compared with at a time
_CHUNK = 10_000  # rows that HNSW is asked about, or that are added to it, at a time
SAVE_EVERY = 600.0
"""Seconds of building HNSW after which what is built is saved; at 3.3 million texts that writes 3 GB."""


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

    With the folder `unfinished`, HNSW and what it finds lie in it, memory-mapped, and a search that was stopped goes on
    from there; exact search begins anew. Raises UserError where HNSW cannot reach `neighbors.min_recall`.
    """
    method = settings.method
    if method == "auto":
        method = "exact" if len(vectors) <= EXACT_UP_TO else "hnsw"
    rows = np.arange(len(vectors))
    with contextlib.ExitStack() as stack:
        folder = unfinished or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if method == "exact":
            cosine = settings.distance == "cosine"
            points = on_sphere(vectors) if cosine else np.ascontiguousarray(vectors, dtype=np.float32)
            found, figures = (
                _distances(exact_neighbors(points, rows, settings.k, groups), settings),
                {"method": "exact"},
            )
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
                truth = index.true_neighbors(sample)
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
    return found, figures


def _distances(found: Found, settings: Neighbors) -> Found:
    """`found`, its Euclidean distances turned, in place, into those of `neighbors.distance`."""
    if settings.distance == "cosine":
        np.square(found.distances, out=found.distances)
        found.distances[:] /= 2  # 1 - cos of the angle between unit vectors
    return found


def _parts(rows: int, size: int = _CHUNK) -> Iterator[slice]:
    """`rows` rows, so many at a time."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def on_sphere(vectors: np.ndarray) -> np.ndarray:
    """`vectors` (n, d) at unit length, float32: there Euclid's nearest are the cosine's. Zero stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)


def _nearest(points: np.ndarray, row: int, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of `candidates` (ascending positions) and their distances, to float32's last digit."""
    distances = np.empty(len(candidates), dtype=np.float32)
    for part in _parts(len(candidates), _COLUMNS):
        differences = (points[candidates[part]] - points[row]).astype(np.float64)
        distances[part] = np.sqrt(np.einsum("ij,ij->i", differences, differences))
    order = np.argsort(distances, kind="stable")[:k]
    return candidates[order], distances[order]


def _allowed(answer: np.ndarray, row: int, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Those of the positions `answer` that may be neighbors of `row`, ascending; -1 is none."""
    allowed = np.sort(answer[(answer >= 0) & (answer != row)])
    for group in groups:
        allowed = allowed[group[allowed] != group[row]]
    return allowed


def _asked(rows: int, k: int, groups: Sequence[np.ndarray]) -> int:
    """How many answers leave k neighbors to all but one in a hundred of `rows` rows: who is left out takes room."""
    left_out = sum(np.bincount(group)[group] for group in groups) if groups else np.ones(rows)
    return min(k + int(np.quantile(left_out, 0.99)) + 1, rows)


def _nobody(rows: int, k: int) -> Found:
    return Found(np.full((rows, k), -1, dtype=np.int64), np.full((rows, k), np.inf, dtype=np.float32))


def exact_neighbors(points: np.ndarray, rows: np.ndarray, k: int, groups: Sequence[np.ndarray]) -> Found:
    """The k nearest neighbors of `rows` (q,) among `points` (n, d), by Euclidean distance, from all distances.

    ‖a‖² + ‖b‖² − 2ab, one matrix product, loses the distance of near points to rounding. So it only tells who may be
    among the k nearest; the distances that decide are computed from differences. A row is done when its k-th neighbor
    is nearer than any point that was not looked at can be, the rounding counted in; until then more are looked at.
    The rounding is at most (d + 3)·u·(‖a‖ + ‖b‖)², with u = 2⁻²⁴, and only points with ‖b‖ ≤ ‖a‖ + r can be nearer
    than r. The matrix products are the GPU's where there is one. `points` may be memory-mapped.
    """
    found = _nobody(len(rows), k)
    if not len(rows):
        return found
    count = len(points)
    lengths = np.concatenate([np.sqrt(np.square(points[part], dtype=np.float64).sum(axis=1)) for part in _parts(count)])
    longest, unit = float(lengths.max()), (points.shape[1] + 3) * float(np.finfo(np.float32).eps) / 2

    def error(row: int, radius: float) -> float:
        """The most by which a squared distance from `row` to a point within `radius` of it is off."""
        return unit * (lengths[row] + min(lengths[row] + radius, longest)) ** 2

    nearest_by_product = _NearestByProduct(points, "cuda" if torch.cuda.is_available() else None)
    with tqdm(total=len(rows), desc="exact search", unit="row", disable=None) as progress:
        open_lines, asked = np.arange(len(rows)), min(_asked(count, k, groups) + _SPARE, count)
        while len(open_lines):
            unproven = []
            for part in _parts(len(open_lines), max(_ANSWERS // asked, 1)):
                lines = open_lines[part]
                if asked < count:
                    squares, answers = nearest_by_product(rows[lines], asked)
                else:
                    answers = [np.arange(count)] * len(lines)
                for number, (line, row, answer) in enumerate(zip(lines, rows[lines], answers, strict=True)):
                    positions, distances = _nearest(points, row, _allowed(answer, row, groups), k)
                    proven = asked == count or (
                        len(positions) == k
                        and float(distances[-1]) ** 2 < float(squares[number, -1]) - error(row, float(distances[-1]))
                    )
                    if proven:
                        found.positions[line, : len(positions)] = positions
                        found.distances[line, : len(positions)] = distances
                        progress.update()
                    else:
                        unproven.append(line)
            open_lines, asked = np.array(unproven, dtype=np.int64), min(4 * asked, count)
    return found


class _NearestByProduct:
    """Which points (n, d) are nearest to some of them by matrix products in float32, and their squared distances."""

    def __init__(self, points: np.ndarray, device: str | None) -> None:
        self.points = points
        self.on_device = torch.from_numpy(np.array(points)).to(device) if device else None

    def __call__(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances, ascending, and positions, (q, k) both, for `rows` (q,), which are among them."""
        if self.on_device is None:
            import faiss  # compiled, and not needed where a trained model is used

            faiss.omp_set_num_threads(torch.get_num_threads())
            return faiss.knn(np.ascontiguousarray(self.points[rows]), self.points, k)
        points = self.on_device
        of = points[torch.from_numpy(rows).to(points.device)]
        best = of.new_empty(len(of), 0), torch.empty(len(of), 0, dtype=torch.int64, device=of.device)
        for part in _parts(len(points), _COLUMNS):
            squares = torch.addmm(points[part].square().sum(dim=1), of, points[part].T, alpha=-2)
            squares += of.square().sum(dim=1)[:, None]
            positions = torch.arange(part.start, part.stop, device=of.device).expand_as(squares)
            squares, positions = torch.cat([best[0], squares], dim=1), torch.cat([best[1], positions], dim=1)
            nearest = squares.topk(min(k, squares.shape[1]), dim=1, largest=False)
            best = nearest.values, positions.gather(1, nearest.indices)
        return best[0].cpu().numpy(), best[1].cpu().numpy()


def recall(found: Found, truth: Found) -> float:
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


def _reason(error: RuntimeError) -> str:
    """What Faiss has to say, without where in its code."""
    return " ".join(str(error).split()).rpartition("failed: ")[2]


class HNSW:
    """An index of Faiss's over `vectors` (n, d); built by one thread it is always the same.

    By Euclidean distance, for `neighbors.distance: cosine` of the vectors at unit length. The vectors (`points.npy`)
    and the index (`hnsw.index`) are kept in `folder`, memory-mapped. What lies there already is not made again, and a
    part of an index is gone on with.
    """

    def __init__(
        self, vectors: np.ndarray, groups: Sequence[np.ndarray], settings: Neighbors, threads: int, folder: Path
    ) -> None:
        import faiss  # compiled, and not needed where a trained model is used

        self.groups, self.settings = groups, settings
        self._faiss, self._threads, self._path = faiss, threads, folder / "hnsw.index"
        begun = self._path.is_file()
        self.points = open_array(folder / "points.npy", vectors.shape, np.float32, keep=begun)
        if not begun:
            for part in _parts(len(vectors)):
                self.points[part] = on_sphere(vectors[part]) if settings.distance == "cosine" else vectors[part]
            self.points.flush()
        self._build()
        self._index = self._read(faiss.IO_FLAG_MMAP_IFC)
        self.asked = self.effort = _asked(len(vectors), settings.k, groups)
        self.exact = False
        """Whether `neighbors` compares with all points after all."""

    def _read(self, flags: int) -> Any:
        try:
            return self._faiss.read_index(str(self._path), flags)
        except RuntimeError as error:
            raise UserError(f"cannot read {self._path}: {_reason(error)}; remove it") from None

    def _save(self, index: Any) -> None:
        with written_whole(self._path) as beside:
            try:
                self._faiss.write_index(index, str(beside))
            except RuntimeError as error:
                raise UserError(f"cannot write {self._path}: {_reason(error)}") from None

    def _build(self) -> None:
        """Build what is not built yet of the index, and save it every SAVE_EVERY seconds."""
        index = (
            self._read(0)
            if self._path.is_file()
            else self._faiss.IndexHNSWFlat(self.points.shape[1], self.settings.hnsw_m)
        )
        if index.ntotal == len(self.points):
            return
        index.hnsw.efConstruction = self.settings.hnsw_ef_construction
        self._faiss.omp_set_num_threads(self._threads)
        # The levels of Malkov and Yashunin's Algorithm 1, line 4, drawn here: Faiss would draw those of an index that
        # is gone on with anew.
        draws = 1 - np.random.default_rng(0).random(len(self.points))
        highest = index.hnsw.assign_probas.size() - 1
        levels = 1 + np.minimum(-np.log(draws) / np.log(self.settings.hnsw_m), highest).astype(np.int32)
        saved, progress = time.monotonic(), functools.partial(tqdm, desc="building HNSW", unit="vector", disable=None)
        with progress(total=len(self.points), initial=index.ntotal) as bar:
            for start in range(index.ntotal, len(self.points), _CHUNK):
                some = np.ascontiguousarray(self.points[start : start + _CHUNK])
                self._faiss.copy_array_to_vector(levels[: start + len(some)], index.hnsw.levels)
                index.add(some)
                bar.update(len(some))
                if time.monotonic() - saved >= SAVE_EVERY:
                    self._save(index)
                    saved = time.monotonic()
        self._save(index)

    def neighbors(self, rows: np.ndarray, unfinished: Path | None = None) -> Found:
        """Neighbors of `rows` (q,) at the present effort.

        With the folder `unfinished` they are written into it as they are found, `done.json` says how many rows are, and
        the rest is found by another call with the same rows.
        """
        first = self.done(unfinished)
        if unfinished:
            found = Found(
                open_array(unfinished / "positions.npy", (len(rows), self.settings.k), np.int32, first > 0),
                open_array(unfinished / "distances.npy", (len(rows), self.settings.k), np.float32, first > 0),
            )
        else:
            found = _nobody(len(rows), self.settings.k)
        with tqdm(total=len(rows), initial=first, desc="HNSW search", unit="row", disable=None) as progress:
            for start in range(first, len(rows), _CHUNK):
                part = slice(start, min(start + _CHUNK, len(rows)))
                of_part = _distances(self._neighbors_of(rows[part]), self.settings)
                found.positions[part], found.distances[part] = of_part
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
            return exact_neighbors(self.points, rows, self.settings.k, self.groups)
        found = _nobody(len(rows), self.settings.k)
        available = min(self.settings.k, len(self.points) - 1)
        short = []
        self._faiss.omp_set_num_threads(self._threads)
        parameters = self._faiss.SearchParametersHNSW(efSearch=self.effort)
        _, answers = self._index.search(np.ascontiguousarray(self.points[rows]), self.asked, params=parameters)
        for line, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            allowed = _allowed(answer, row, self.groups)
            nearest = _nearest(self.points, row, allowed, self.settings.k)
            found.positions[line, : len(nearest[0])], found.distances[line, : len(nearest[1])] = nearest
            if len(allowed) < available:
                short.append(line)
        if short:
            completed = exact_neighbors(self.points, rows[short], self.settings.k, self.groups)
            found.positions[short], found.distances[short] = completed
        return found

    def true_neighbors(self, rows: np.ndarray) -> Found:
        """What `neighbors` would give at a recall of 1: from the distances to all points."""
        return _distances(exact_neighbors(self.points, rows, self.settings.k, self.groups), self.settings)

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
