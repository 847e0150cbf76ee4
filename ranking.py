"""Rankings with exact ties: scores of a gallery, ranks of pairs, the nearest items of a query.

Closeness is Euclidean distance. q·t − ‖t‖²/2 ranks targets as −‖q − t‖ does; for L2-normalised embeddings it ranks as
the inner product. An item may have several vectors (PVSE): wherever (n, d) is asked for, (n, K, d) is accepted, and
two items are as close as the closest of their K × K pairs of vectors.

A tie never helps: another item as close as a query's own counts as closer. A collapsed model, which embeds everything
alike, therefore scores nothing. A matrix product may round equal columns differently, so a gallery scores every
distinct vector once, and equal vectors have exactly equal scores.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Matrix = np.ndarray | Tensor
Labels = np.ndarray | Tensor | Sequence[int] | Sequence[str]

BLOCK_SCORES = 2**24
"""Scores in memory at once: 64 MiB of float32."""


# --- Ranks of pairs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairRanks:
    """Where the pairs stand in the rankings of one direction. k-way Recall@1 and Recall@K are read off it.

    A negative of a query is an item of another group. n pairs, q distinct queries.
    """

    closer: np.ndarray
    """(n,) int64: negatives at least as close to the query as its pair."""
    possible: np.ndarray
    """(n,) int64: negatives of the query."""
    best: np.ndarray
    """(q,) int64: rank, from 1, of each distinct query's best-ranked own item."""
    best_groups: np.ndarray
    """(q,): groups of the distinct queries."""
    best_possible: np.ndarray
    """(q,) int64: their negatives."""
    best_own: np.ndarray
    """(q,) int64: their own items."""

    def kway_success_probabilities(self, k: int) -> np.ndarray:
        """Per pair, the probability that it is closer than k − 1 negatives drawn without replacement: (n,) float64.

        With r of N negatives at least as close as the pair it is C(N − r, k − 1) / C(N, k − 1); all N are drawn where
        N < k − 1. Raises ValueError for k < 2 and for a query without a negative.
        """
        _check_kway(k, self.possible)
        probabilities = np.ones(len(self.closer))
        # C(N − r, k − 1) / C(N, k − 1) = Π_i (N − r − i) / (N − i): each draw misses the r closer ones.
        for drawn in range(min(k - 1, self.possible.max())):
            left = self.possible - drawn
            probabilities *= np.where(left > 0, np.maximum(left - self.closer, 0) / np.maximum(left, 1), 1.0)
        return probabilities

    @property
    def gallery(self) -> int:
        """The largest k of k-way retrieval: a query's pair and all negatives, of the query that has most."""
        return int(self.possible.max()) + 1

    # What a random ranking is expected to score. Every item is equally likely at every place.

    def kway_chance(self, k: int) -> float:
        """k-way Recall@1 of a random ranking: the mean of 1 / (1 + min(k − 1, N)). Errors as above."""
        _check_kway(k, self.possible)
        return mean(1 / (1 + np.minimum(k - 1, self.possible)))

    def recall_chance(self, k: int) -> float:
        """Recall@K of a random ranking: the mean of 1 − C(n − c, K) / C(n, K), of n items c being the query's own."""
        kinds, of_query = np.unique(np.column_stack([self.best_possible, self.best_own]), axis=0, return_inverse=True)
        recalls = []
        for others, own in kinds.tolist():
            drawn = min(k, others + own)
            ways = math.comb(others + own, drawn)
            recalls.append((ways - math.comb(others, drawn)) / ways)  # integers: only the quotient is rounded
        return mean(np.array(recalls)[of_query.reshape(-1)])

    def median_rank_chance(self) -> float:
        """Median rank of a random ranking, from P(rank > r) = C(n − c, r) / C(n, r)."""
        kinds, counts = np.unique(np.column_stack([self.best_possible, self.best_own]), axis=0, return_counts=True)
        beyond = np.zeros(kinds[:, 0].max() + 1)  # P(rank > r) at r - 1
        for (others, own), count in zip(kinds.tolist(), counts, strict=True):
            drawn = np.arange(others)
            beyond[:others] += np.cumprod((others - drawn) / (others + own - drawn)) * count / counts.sum()
        # Where P is exactly one half, up to rounding, the median lies between two ranks.
        return 1 + float(np.mean([(beyond > 0.5 + 1e-9).sum(), (beyond >= 0.5 - 1e-9).sum()]))


def _check_kway(k: int, possible: np.ndarray) -> None:
    if k < 2:
        raise ValueError(f"k must be at least 2, got {k}")
    if possible.min() == 0:
        raise ValueError(f"query {int(possible.argmin())} has no possible negative: all targets are of its group")


def mean(values: np.ndarray) -> float:
    """The mean of (n,) values, exact where all are equal."""
    return float(values[0] + (values - values[0]).mean())


def rank_pairs(queries: Matrix, targets: Matrix, groups: Labels | None = None) -> PairRanks:
    """Rank all targets for every query. Every metric of ranks is read off the result.

    Target rows of one group with the same vector are one item: an image of five captions is one candidate. Query rows
    of one group with the same vector are one query of `best`.

    queries, targets: (n, d), row i paired with row i. groups: (n,), equal ones are of the same image; None: all differ.
    Raises ValueError for other shapes and for values that are not finite.
    """
    labels = np.arange(len(queries)) if groups is None else as_array(groups)
    queries, targets = as_vectors(queries, "queries"), as_vectors(targets, "targets")
    if queries.shape != targets.shape:
        raise ValueError(
            "queries and targets must be pairs, both (n, d) or both (n, K, d), got (n, K, d) = "
            f"{tuple(queries.shape)} and {tuple(targets.shape)}"
        )
    codes = group_codes(groups, len(queries))
    gallery = Gallery(targets, codes)
    closer, closer_than_best = gallery.closer_negatives(queries, codes)
    _, query = _distinct(queries.flatten(1))
    _, row = np.unique(codes * (int(query.max()) + 1) + query, return_index=True)
    possible = gallery.possible_negatives(codes)
    own = len(gallery.item_group) - possible[row]
    return PairRanks(closer, possible, 1 + closer_than_best[row], labels[row], possible[row], own)


# --- One query -------------------------------------------------------------------------------------------------------


def cosine_similarities(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosine similarities (n,) of items to a query; of several vectors an item, that of the closest pair.

    Equal vectors have exactly equal similarities. vectors: (n, d) or (n, K, d); query: (d,) or (K, d); unit vectors.
    """
    flat = vectors.reshape(-1, vectors.shape[-1])
    # einsum sums every row alike; a matrix product rounds equal rows differently by their place.
    scores = [np.einsum("nd,d->n", flat, vector).reshape(len(vectors), -1) for vector in np.atleast_2d(query)]
    return np.concatenate(scores, axis=1).max(axis=1)


def nearest(
    vectors: np.ndarray,
    query: np.ndarray,
    top: int,
    among: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> list[tuple[int, float]]:
    """Places and cosine similarities of the `top` items nearest to a query, the nearest first.

    Of equally near items the query's own come last; all others stand in their order.

    vectors, query: as for `cosine_similarities`. among: (n,) bool, items that may be found; None: all.
    own: (n,) bool, items of the query's group; None: none.
    """
    scores = cosine_similarities(vectors, query)
    if among is not None:
        scores = np.where(among, scores, -np.inf)
    top = min(top, len(scores) if among is None else int(among.sum()))
    if top < 1:
        return []
    lowest = np.partition(scores, len(scores) - top)[len(scores) - top]
    found = np.flatnonzero(scores >= lowest)
    is_own = np.zeros(len(found), dtype=bool) if own is None else own[found]
    found = found[np.lexsort((found, is_own, -scores[found]))][:top]
    return list(zip(found.tolist(), scores[found].tolist(), strict=True))


def rank_of_own(vectors: np.ndarray, query: np.ndarray, own: np.ndarray) -> int:
    """Rank, from 1, of the nearest of a query's own items. Every other item at least as near is ranked before it.

    vectors, query: as for `cosine_similarities`. own: (n,) bool, at least one True.
    """
    scores = cosine_similarities(vectors, query)
    return 1 + int((scores[~own] >= scores[own].max()).sum())


def gap_of_own(vectors: np.ndarray, query: np.ndarray, own: np.ndarray) -> float | None:
    """Cosine similarity of the nearest of a query's own items less that of the nearest other; None without another.

    It is above 0 exactly where `rank_of_own` is 1. Arguments: as for `rank_of_own`.
    """
    scores = cosine_similarities(vectors, query)
    return None if own.all() else float(scores[own].max()) - float(scores[~own].max())


# --- Galleries -------------------------------------------------------------------------------------------------------


class Gallery:
    """Targets to be scored.

    Every distinct vector is scored once. A column is a distinct set of K vectors, an item a distinct (group, column).
    """

    def __init__(self, targets: Tensor, groups: np.ndarray | None = None) -> None:
        vectors = targets.flatten(0, 1)
        first, number = _distinct(vectors)
        if len(first) == len(vectors):
            self.vectors, number = vectors, np.arange(len(vectors))  # in their order: nothing to gather later
        else:
            self.vectors = vectors[first]
        sets = np.sort(number.reshape(len(targets), -1), axis=1)
        self.vectors_of_column, self.column = np.unique(sets, axis=0, return_inverse=True)
        self.half_squared_norms = self.vectors.square().sum(dim=1) / 2
        if groups is not None:
            self.item_group, self.item_column = _items(groups, self.column)

    def width(self, queries: Tensor) -> int:
        """Numbers that scoring one of the queries takes."""
        return queries.shape[1] * max(self.vectors_of_column.size, len(self.column))

    def scores(self, queries: Tensor) -> Tensor:
        """Scores (b, columns) of queries (b, K, d), the higher the closer."""
        vectors = queries.flatten(0, 1)
        scores = torch.addmm(-self.half_squared_norms, vectors, self.vectors.T)
        if queries.shape[1] > 1:  # the vectors of one query compete, so their own norms count
            scores -= vectors.square().sum(dim=1, keepdim=True) / 2
            scores = scores.unflatten(0, queries.shape[:2]).amax(dim=1)
        if self.vectors_of_column.shape[1] > 1:
            scores = _columns(scores, self.vectors_of_column.reshape(-1))
            scores = scores.unflatten(1, self.vectors_of_column.shape).amax(dim=2)
        return scores

    def row_scores(self, queries: Tensor) -> Tensor:
        """Scores (b, target rows) of queries (b, K, d)."""
        return _columns(self.scores(queries), self.column)

    def own_items(self, query_groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the items of every query's group start and stop."""
        return np.searchsorted(self.item_group, query_groups), np.searchsorted(self.item_group, query_groups, "right")

    def possible_negatives(self, query_groups: np.ndarray) -> np.ndarray:
        """Number of items of other groups, per query."""
        start, stop = self.own_items(query_groups)
        return len(self.item_group) - (stop - start)

    def closer_negatives(self, queries: Tensor, query_groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of items of other groups at least as close as the pair, and as the closest own item: two (n,) int64.

        queries: (n, K, d), row i paired with row i of the targets.
        """
        device = queries.device
        start, stop = self.own_items(query_groups)
        items_of_column = torch.from_numpy(np.bincount(self.item_column)).to(device, torch.float32)
        closer = np.empty((2, len(queries)), dtype=np.int64)
        for rows in blocks(len(queries), self.width(queries)):
            scores = self.scores(queries[rows])
            own = stop[rows] - start[rows]
            row = torch.from_numpy(np.repeat(np.arange(len(own)), own)).to(device)
            item = np.arange(own.sum()) - np.repeat(own.cumsum() - own - start[rows], own)
            own_scores = scores[row, torch.from_numpy(self.item_column[item]).to(device)]
            best = scores.new_full((len(own),), -math.inf).scatter_reduce(0, row, own_scores, "amax")
            pair = scores.gather(1, torch.from_numpy(self.column[rows, None]).to(device))[:, 0]
            others = [(1, best, scores.clone())] if not torch.equal(pair, best) else []
            for which, threshold, matrix in (*others, (0, pair, scores)):
                # In place: a matrix of this size is faster to overwrite than to allocate.
                at_least_as_close = matrix.ge_(threshold[:, None]) @ items_of_column
                at_least_as_close.index_add_(0, row, (own_scores >= threshold[row]).float(), alpha=-1)
                closer[which, rows] = at_least_as_close.cpu().numpy()
            if not others:
                closer[1, rows] = closer[0, rows]
        return closer[0], closer[1]


def _columns(scores: Tensor, columns: np.ndarray) -> Tensor:
    """scores[:, columns], without a copy where that is all of them in their order."""
    if np.array_equal(columns, np.arange(scores.shape[1])):
        return scores
    return scores[:, torch.from_numpy(columns).to(scores.device)]


def _distinct(vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First row of every distinct vector, and for every row the number of its vector among them."""
    rows = np.ascontiguousarray((vectors + 0.0).cpu().numpy())  # −0 becomes 0: equal vectors have equal bytes
    as_bytes = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    _, first, number = np.unique(as_bytes, return_index=True, return_inverse=True)
    return first, number


def _items(groups: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group and column of every distinct (group, column), ordered by group."""
    number_of_columns = int(columns.max()) + 1
    return np.divmod(np.unique(groups * number_of_columns + columns), number_of_columns)


# --- Inputs ----------------------------------------------------------------------------------------------------------


def as_vectors(x: Matrix, name: str) -> Tensor:
    """(n, K, d) float32 of (n, K, d) or of (n, d), where K is 1. ValueError for other shapes and values not finite."""
    # numpy arrays are copied: torch warns of read-only ones, which memory-mapping gives.
    x = x.detach().float() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float32))
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise ValueError(f"{name} must be (n, d) or (n, K, d), got {tuple(x.shape)}")
    if not x.isfinite().all():  # no negative is closer than a NaN pair: recall would be perfect
        raise ValueError(f"{name} hold values that are not finite")
    return x if x.ndim == 3 else x[:, None]


def as_array(x: np.ndarray | Tensor | Sequence) -> np.ndarray:
    """A numpy array of an array, a tensor or a sequence."""
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def group_codes(groups: Labels | None, n: int) -> np.ndarray:
    """Groups numbered from 0, (n,) int64; all different for None. Raises ValueError for another length."""
    if groups is None:
        return np.arange(n)
    groups = as_array(groups)
    if groups.shape != (n,):
        raise ValueError(f"groups must be ({n},), got {groups.shape}")
    return np.unique(groups, return_inverse=True)[1]


def blocks(n: int, width: int) -> Iterator[slice]:
    """Slices over n rows of `width` numbers, each of BLOCK_SCORES numbers at most, or one row."""
    step = max(1, BLOCK_SCORES // width)
    for start in range(0, n, step):
        yield slice(start, start + step)
