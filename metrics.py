"""Metrics of retrieval: embeddings in, plain numbers out.

Embeddings are numpy arrays or torch tensors (on the CPU or a GPU, where the work is then done); row i of `queries` is
paired with row i of `targets`, and rows of equal `groups` belong to the same image. Closeness is Euclidean distance:
q·t − ‖t‖²/2 ranks targets as −‖q − t‖ does, and for L2-normalised embeddings as the inner product. An item may have
several vectors (PVSE): wherever (n, d) is asked for, (n, K, d) does as well, and two items are as close as the closest
of their K × K pairs of vectors. Score matrices are float32, computed block by block.

Ties matter (a collapsed model must not score), and a matrix product may round equal columns differently, so every
distinct vector is scored once: equal vectors have exactly equal scores.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Matrix = np.ndarray | Tensor
Labels = np.ndarray | Tensor | Sequence[int] | Sequence[str]

BLOCK_SCORES = 2**24  # scores in memory at once: 64 MiB
GATHERED = 2**20  # numbers of vectors gathered at once: in the processor's cache, four times as fast as from memory


# --- Ranks of the pairs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairRanks:
    """Where the pairs stand in one direction's rankings, which its k-way Recall@1 and Recall@K are read off."""

    closer: np.ndarray
    """(n,) int64: possible negatives at least as close to the query as its pair."""
    possible: np.ndarray
    """(n,) int64: possible negatives, that is, items of other groups."""
    best: np.ndarray
    """(q,) int64: of every distinct query, its best-ranked own target's rank among all targets, from 1."""
    best_groups: np.ndarray
    """(q,): these queries' groups."""
    best_possible: np.ndarray
    """(q,) int64: these queries' items of other groups."""
    best_own: np.ndarray
    """(q,) int64: these queries' own items."""

    def kway_success_probabilities(self, k: int) -> np.ndarray:
        """As the function of that name. ValueError for k < 2, and where a query has no possible negative."""
        _check_kway(k, self.possible)
        probabilities = np.ones(len(self.closer))
        # C(N − r, k − 1) / C(N, k − 1) = Π_i (N − r − i) / (N − i): one draw after the other passes the r by.
        for drawn in range(min(k - 1, self.possible.max())):
            left = self.possible - drawn
            probabilities *= np.where(left > 0, np.maximum(left - self.closer, 0) / np.maximum(left, 1), 1.0)
        return probabilities

    # What a random ranking is expected to score. An item is as likely to stand in any place as in any other.

    def kway_chance(self, k: int) -> float:
        """Of k-way Recall@1: the mean of 1 / (1 + min(k − 1, N)), N the possible negatives. ValueError as above."""
        _check_kway(k, self.possible)
        return _mean(1 / (1 + np.minimum(k - 1, self.possible)))

    def recall_chance(self, k: int) -> float:
        """Of Recall@K: the mean of 1 − C(n − c, K) / C(n, K), of n items c being the query's own."""
        kinds, of_query = np.unique(np.column_stack([self.best_possible, self.best_own]), axis=0, return_inverse=True)
        recalls = []
        for others, own in kinds.tolist():
            drawn = min(k, others + own)
            ways = math.comb(others + own, drawn)
            recalls.append((ways - math.comb(others, drawn)) / ways)  # of whole numbers: no rounding but the last
        return _mean(np.array(recalls)[of_query.reshape(-1)])

    def median_rank_chance(self) -> float:
        """Of the median rank: the median of the ranks' distribution, P(rank > r) = C(n − c, r) / C(n, r)."""
        kinds, counts = np.unique(np.column_stack([self.best_possible, self.best_own]), axis=0, return_counts=True)
        beyond = np.zeros(kinds[:, 0].max() + 1)  # P(rank > r) at r - 1
        for (others, own), count in zip(kinds.tolist(), counts, strict=True):
            drawn = np.arange(others)
            beyond[:others] += np.cumprod((others - drawn) / (others + own - drawn)) * count / counts.sum()
        # Halfway between the two middle ranks where the half is reached exactly, but for rounding.
        return 1 + float(np.mean([(beyond > 0.5 + 1e-9).sum(), (beyond >= 0.5 - 1e-9).sum()]))


def _mean(values: np.ndarray) -> float:
    """The mean, without rounding where all values are equal."""
    return float(values[0] + (values - values[0]).mean())


def rank_pairs(queries: Matrix, targets: Matrix, groups: Labels | None = None) -> PairRanks:
    """Rank all targets for all queries, once for every metric that is read off the ranks.

    Target rows of one group that hold the same vector are one item, so that an image of five captions is one candidate;
    query rows likewise are one query of `best`. Ties are pessimistic: an item of another group at the same distance is
    closer.

    queries, targets: (n, d). groups: (n,), None for all different. Raises ValueError for other shapes and values that
    are not finite.
    """
    labels = np.arange(len(queries)) if groups is None else _array(groups)
    queries, gallery, groups = _retrieval(queries, targets, groups)
    closer, closer_than_best = gallery.closer_negatives(queries, groups)
    _, query = _distinct(queries.flatten(1))
    _, row = np.unique(groups * (int(query.max()) + 1) + query, return_index=True)
    possible = gallery.possible_negatives(groups)
    own = len(gallery.item_group) - possible[row]
    return PairRanks(closer, possible, 1 + closer_than_best[row], labels[row], possible[row], own)


# --- k-way Recall@1 --------------------------------------------------------------------------------------------------


def kway_recall_at_1(queries: Matrix, targets: Matrix, k: int, groups: Labels | None = None) -> float:
    """k-way Recall@1 (Thomas & Kovashka, ECCV 2020, Sec. 4.3), its expectation over the draw of the k − 1 negatives.

    The mean of `kway_success_probabilities`, with the same arguments and errors.
    """
    return float(kway_success_probabilities(queries, targets, k, groups).mean())


def kway_success_probabilities(queries: Matrix, targets: Matrix, k: int, groups: Labels | None = None) -> np.ndarray:
    """Per query, the probability that its pair is closer than k − 1 negatives drawn without replacement: (n,) float64.

    With r of N possible negatives at least as close as the pair (a tie is a miss): C(N − r, k − 1) / C(N, k − 1). The
    possible negatives are the items of the other groups. Where N < k − 1, all N are drawn.

    Items, arguments and errors as for `rank_pairs`; ValueError also for k < 2, and where a query has no possible
    negative. For several k, or Recall@K as well, `rank_pairs` ranks but once.
    """
    return rank_pairs(queries, targets, groups).kway_success_probabilities(k)


def sampled_kway_recall_at_1(
    queries: Matrix, targets: Matrix, k: int, groups: Labels | None = None, *, repeats: int, seed: int
) -> float:
    """k-way Recall@1 as the paper samples it, averaged over `repeats` draws: a check of `kway_recall_at_1`.

    Arguments and errors as there; ValueError also for repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    queries, gallery, groups = _retrieval(queries, targets, groups)
    possible = gallery.possible_negatives(groups)
    _check_kway(k, possible)
    start, stop = gallery.own_items(groups)
    rng = np.random.default_rng(seed)
    hits = 0
    at_once = GATHERED if queries.device.type == "cpu" else BLOCK_SCORES
    for _ in range(repeats):
        drawn = _draw_without_replacement(rng, possible, k - 1)
        item = drawn + np.where(drawn >= start[:, None], (stop - start)[:, None], 0)  # a query's own items are skipped
        column = np.column_stack([gallery.column, gallery.item_column[item]])
        for rows in _blocks(len(queries), k * gallery.vectors_of_column.shape[1] * queries[0].numel(), at_once):
            candidates = gallery.vectors[gallery.vectors_of_column[column[rows]]]
            differences = candidates[:, :, :, None] - queries[rows, None, None]
            distances = differences.square().sum(dim=4).amin(dim=(2, 3)).cpu().numpy()
            lost = (distances[:, 1:] <= distances[:, :1]) & (drawn[rows] >= 0)
            hits += int((~lost.any(axis=1)).sum())
    return hits / (repeats * len(queries))


def _check_kway(k: int, possible: np.ndarray) -> None:
    if k < 2:
        raise ValueError(f"k must be at least 2, got {k}")
    if possible.min() == 0:
        raise ValueError(f"query {int(possible.argmin())} has no possible negative: all targets are of its group")


def _draw_without_replacement(rng: np.random.Generator, population: np.ndarray, size: int) -> np.ndarray:
    """(n, size) different numbers below population[i] a row, in Floyd's way; −1 once the population is used up."""
    draws = np.minimum(population, size)
    drawn = np.full((len(population), size), -1)
    for step in range(size):
        newest = population - draws + step
        number = rng.integers(newest + 1)
        repeated = (drawn[:, :step] == number[:, None]).any(axis=1)
        drawn[:, step] = np.where(step < draws, np.where(repeated, newest, number), -1)
    return drawn


# --- Recall@K over the full gallery ----------------------------------------------------------------------------------


def recall_at_k(queries: Matrix, targets: Matrix, ks: Sequence[int], groups: Labels | None = None) -> dict[str, float]:
    """Recall@K as a share and the median rank over the full gallery, {"R@1": …, "R@5": …, "R@10": …, "median_rank": …}.

    As VSE++ (Faghri et al., BMVC 2018) evaluates, down to the median rank that is rounded down. Arguments and errors as
    for `rank_pairs`; ValueError also for a K below 1.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every K must be at least 1, got {list(ks)}")
    ranks = rank_pairs(queries, targets, groups).best
    recalls = {f"R@{k}": float((ranks <= k).mean()) for k in ks}
    return {**recalls, "median_rank": float(np.floor(np.median(ranks)))}


# --- Neighborhood preservation ---------------------------------------------------------------------------------------


def neighborhood_preservation(
    embeddings: Matrix, reference: Matrix, k: int = 200, groups: Labels | None = None
) -> float:
    """Mean share of the k nearest neighbors in `reference` that are also among the k nearest in `embeddings`.

    The paper's Sec. 4.3, Table 3. The mean of `preserved_shares`, with the same arguments and errors.
    """
    return float(preserved_shares(embeddings, reference, k, groups).mean())


def preserved_shares(embeddings: Matrix, reference: Matrix, k: int = 200, groups: Labels | None = None) -> np.ndarray:
    """Per item, |Ψ_M ∩ Ψ_Ω| / |Ψ_Ω|: the share of its k nearest in `reference` kept in `embeddings`. (n,) float64.

    An item is no neighbor of its own, nor are those of its group, in neither space: all captions of an image have that
    image, at distance 0. Where several are tied at the k-th place (many texts may be the same boilerplate), the share
    is its expectation over breaking these ties at random.

    embeddings: (n, d), reference: (n, d') with one vector an item, rows aligned. groups: (n,), None for all different.
    A k above the number of items outside the largest group (n − 1 where all are different) is taken as that number.
    Raises ValueError for other shapes, values that are not finite, k < 1 and fewer than two groups. For several k or
    several spaces, `all_preserved_shares` looks up the neighbors but once.
    """
    return all_preserved_shares([embeddings], reference, [k], groups)[0, 0]


def all_preserved_shares(
    spaces: Sequence[Matrix], reference: Matrix, ks: Sequence[int], groups: Labels | None = None
) -> np.ndarray:
    """`preserved_shares` of every space (images, texts, …) for every k, with the same errors: (spaces, ks, n)."""
    if np.ndim(reference) != 2:
        raise ValueError(f"reference must be (n, d), got {np.ndim(reference)} dimensions")
    vectors = [_vectors(reference, "reference"), *(_vectors(space, "embeddings") for space in spaces)]
    n = len(vectors[0])
    for space in vectors[1:]:
        if len(space) != n:
            raise ValueError(f"embeddings and reference must have as many rows, got {len(space)} and {n}")
    groups = _group_codes(groups, n)
    candidates = int(neighbor_candidates(groups).min())
    for k in ks:
        _check_neighbors(candidates, k)
    ks = [min(k, candidates) for k in ks]
    group = torch.from_numpy(groups).to(vectors[0].device)
    galleries = [_Gallery(space) for space in vectors]
    shares = np.empty((len(spaces), len(ks), n))
    widest = max(gallery.width(space) for gallery, space in zip(galleries, vectors, strict=True))
    for rows in _blocks(n, widest):
        scores, nearest = _nearest(galleries[0], vectors[0], group, rows, max(ks))
        for i, (gallery, space) in enumerate(zip(galleries[1:], vectors[1:], strict=True)):
            own_scores, own_nearest = _nearest(gallery, space, group, rows, max(ks))
            for j, k in enumerate(ks):
                kept = own_scores.gather(1, nearest.indices[:, :k]) >= own_nearest.values[:, k - 1 : k]
                share = kept.double().mean(dim=1)
                # Only where the next one is as near as the k-th do several share the places that are left.
                tied = [values[:, k] == values[:, k - 1] for values in (nearest.values, own_nearest.values)]
                for row in (tied[0] | tied[1]).nonzero()[:, 0]:
                    belongs = _neighbor_probabilities(scores[row], nearest.values[row], k)
                    own_belongs = _neighbor_probabilities(own_scores[row], own_nearest.values[row], k)
                    share[row] = (belongs * own_belongs).sum() / k
                shares[i, j, rows] = share.cpu().numpy()
    return shares


def preservation_chance(n: int, k: int = 200, groups: Labels | None = None) -> float:
    """What `neighborhood_preservation` expects of unrelated spaces over n items, with the same errors.

    The mean of k over the number of items of other groups, k / (n − 1) where all groups are different.
    """
    candidates = neighbor_candidates(_group_codes(groups, n))
    fewest = int(candidates.min())
    _check_neighbors(fewest, k)
    return _mean(min(k, fewest) / candidates)


def neighbor_candidates(groups: Labels) -> np.ndarray:
    """How many items of other groups than its own every item has, (n,) int64. groups: (n,)."""
    codes = _group_codes(groups, len(groups))
    return len(codes) - np.bincount(codes)[codes]


def _check_neighbors(candidates: int, k: int) -> None:
    if candidates < 1 or k < 1:
        raise ValueError(
            f"neighbors need at least two items of different groups and k of at least 1, got {candidates} to choose "
            f"from and k = {k}"
        )


def _nearest(
    gallery: "_Gallery", vectors: Tensor, groups: Tensor, rows: slice, k: int
) -> tuple[Tensor, torch.return_types.topk]:
    """Scores of all n items for the rows' items, (rows, n), and the k + 1 highest, nearest first.

    Items of a row's own group, the row itself first of all, have a score of −inf.
    """
    scores = gallery.row_scores(vectors[rows])
    scores.masked_fill_(groups[rows, None] == groups, -math.inf)
    return scores, scores.topk(k + 1, dim=1)


def _neighbor_probabilities(scores: Tensor, highest: Tensor, k: int) -> Tensor:
    """Probability of each of n items to be among the k nearest, (n,): 0 or 1, but for those tied at the k-th place."""
    belongs = (scores > highest[k - 1]).double()
    tied = scores == highest[k - 1]
    belongs[tied] = (highest[:k] == highest[k - 1]).sum() / tied.sum().double()
    return belongs


# --- Mean average precision ------------------------------------------------------------------------------------------


def mean_average_precision(queries: Matrix, targets: Matrix, query_labels: Labels, target_labels: Labels) -> float:
    """mAP over the whole ranking, a target being relevant where its label is the query's.

    The mean of `average_precisions` over the queries that have a relevant target, with the same arguments and errors;
    ValueError also where no query has one.
    """
    precisions = average_precisions(queries, targets, query_labels, target_labels)
    if np.isnan(precisions).all():
        raise ValueError("no query has a relevant target")
    return float(np.nanmean(precisions))


def average_precisions(queries: Matrix, targets: Matrix, query_labels: Labels, target_labels: Labels) -> np.ndarray:
    """Per query, average precision over all targets, NaN where none is relevant: (n,) float64.

    The mean, over the relevant targets, of the precision among all targets at least as close: a tie counts at its end,
    as in scikit-learn's average_precision_score.

    queries: (n, d), targets: (m, d), query_labels: (n,), target_labels: (m,), integers or strings. Raises ValueError
    for other shapes and values that are not finite.
    """
    precisions = np.full(len(queries), np.nan)
    for rows, at_least_as_close, relevant_among_them in _relevant_places(queries, targets, query_labels, target_labels):
        precisions[rows] = (relevant_among_them.double() / at_least_as_close).mean(dim=1).cpu().numpy()
    return precisions


def precision_recall_curve(
    queries: Matrix,
    targets: Matrix,
    query_labels: Labels,
    target_labels: Labels,
    levels: Sequence[float] = tuple(level / 10 for level in range(11)),
) -> np.ndarray:
    """Interpolated precision at each recall level, (levels,) float64, the mean over the queries.

    At a level it is the highest precision with that recall or more, a relevant target being one with the query's label.
    Arguments, errors and ties as for `mean_average_precision`; ValueError also for a level outside [0, 1].
    """
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"recall levels must be from 0 to 1, got {list(levels)}")
    total, count = np.zeros(len(levels)), 0
    for _, at_least_as_close, relevant_among_them in _relevant_places(queries, targets, query_labels, target_labels):
        relevant = relevant_among_them.shape[1]
        # Columns go from the farthest relevant target, with all of the recall, to the closest.
        highest = (relevant_among_them.double() / at_least_as_close).cummax(dim=1).values
        for place, level in enumerate(levels):
            last = (relevant_among_them >= level * relevant - 1e-9).sum(dim=1, keepdim=True) - 1
            total[place] += highest.gather(1, last).sum().item()
        count += len(at_least_as_close)
    return _mean_of_queries(total, count)


def precision_scope_curve(
    queries: Matrix, targets: Matrix, query_labels: Labels, target_labels: Labels, scopes: Sequence[int]
) -> np.ndarray:
    """Share of the `scope` closest targets that have the query's label, (scopes,) float64, the mean over the queries.

    Among targets at the same distance the relevant ones come last. Arguments and errors as for
    `mean_average_precision`; ValueError also for a scope below 1 or above the number of targets.
    """
    if not all(1 <= scope <= len(targets) for scope in scopes):
        raise ValueError(f"scopes must be from 1 to {len(targets)}, the number of targets, got {list(scopes)}")
    total, count = np.zeros(len(scopes)), 0
    for _, at_least_as_close, relevant_among_them in _relevant_places(queries, targets, query_labels, target_labels):
        relevant = relevant_among_them.shape[1]
        order = torch.arange(relevant, 0, -1, device=at_least_as_close.device)  # among the relevant ones, ties included
        ranks = at_least_as_close - relevant_among_them + order
        for place, scope in enumerate(scopes):
            total[place] += (ranks <= scope).sum().item() / scope
        count += len(ranks)
    return _mean_of_queries(total, count)


def _mean_of_queries(total: np.ndarray, count: int) -> np.ndarray:
    if not count:
        raise ValueError("no query has a relevant target")
    return total / count


def _relevant_places(
    queries: Matrix, targets: Matrix, query_labels: Labels, target_labels: Labels
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Where the relevant targets of the queries stand, block by block: numbers of some queries of one label (B,), and,
    for each of the R targets of that label, from the farthest to the closest, how many targets are at least as close
    and how many of these are relevant, both (B, R). Queries without a relevant target do not appear.

    Raises ValueError for shapes that do not fit and values that are not finite.
    """
    queries, targets = _vectors(queries, "queries"), _vectors(targets, "targets")
    query_labels, target_labels = _array(query_labels), _array(target_labels)
    if queries.shape[2] != targets.shape[2]:
        raise ValueError(f"queries have {queries.shape[2]} dimensions, targets {targets.shape[2]}")
    if query_labels.shape != (len(queries),) or target_labels.shape != (len(targets),):
        expected = f"({len(queries)},) and ({len(targets)},)"
        raise ValueError(f"labels must be {expected}, got {query_labels.shape} and {target_labels.shape}")
    gallery = _Gallery(targets)
    for label in np.intersect1d(query_labels, target_labels):
        of_label = np.flatnonzero(query_labels == label)
        relevant = torch.from_numpy(np.flatnonzero(target_labels == label)).to(targets.device)
        for rows in _blocks(len(of_label), gallery.width(queries)):
            scores = gallery.row_scores(queries[of_label[rows]])
            relevant_scores = _sorted(scores[:, relevant])
            at_least_as_close = len(targets) - torch.searchsorted(_sorted(scores), relevant_scores)
            relevant_among_them = len(relevant) - torch.searchsorted(relevant_scores, relevant_scores)
            yield of_label[rows], at_least_as_close, relevant_among_them


def average_precision_chances(query_labels: Labels, target_labels: Labels) -> np.ndarray:
    """Per query, the average precision that a random ranking is expected to have, NaN where none is relevant: (n,).

    Of m targets R are relevant. One of these at place r has (r − 1)(R − 1) / (m − 1) others before it in the mean, and
    is at any place with probability 1/m: p + (1 − p) H / m, with p = (R − 1) / (m − 1) and H = 1 + 1/2 + … + 1/m.

    query_labels: (n,), target_labels: (m,), integers or strings. Raises ValueError where there is no target.
    """
    query_labels, target_labels = _array(query_labels), _array(target_labels)
    m = len(target_labels)
    if m == 0:
        raise ValueError("target_labels must not be empty")
    labels, counts = np.unique(target_labels, return_counts=True)
    place = np.minimum(np.searchsorted(labels, query_labels), len(labels) - 1)
    relevant = np.where(labels[place] == query_labels, counts[place], np.nan)
    others = (relevant - 1) / max(m - 1, 1)
    return others + (1 - others) * (1 / np.arange(1, m + 1)).sum() / m


def _sorted(scores: Tensor) -> Tensor:
    """Rows in ascending order."""
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=1))  # carries no indices: twice as fast as torch's


# --- One query -------------------------------------------------------------------------------------------------------


def similarities(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosine similarities (n,) of items to a query; of several vectors an item, that of the closest pair.

    vectors: (n, d) or (n, K, d), and query: (d,) or (K, d), numpy, all of length 1.
    """
    scores = vectors.reshape(-1, vectors.shape[-1]) @ np.atleast_2d(query).T
    return scores.reshape(len(vectors), -1).max(axis=1)


def nearest(
    vectors: np.ndarray, query: np.ndarray, top: int, among: np.ndarray | None = None
) -> list[tuple[int, float]]:
    """Places and cosine similarities of the `top` items nearest to a query, the nearest first, equal ones by place.

    vectors and query: as for `similarities`. among: (n,) bool, which items may be found; None for all.
    """
    scores = similarities(vectors, query)
    if among is not None:
        scores = np.where(among, scores, -np.inf)
    top = min(top, len(scores) if among is None else int(among.sum()))
    if top < 1:
        return []
    lowest = np.partition(scores, len(scores) - top)[len(scores) - top]
    found = np.flatnonzero(scores >= lowest)
    found = found[np.argsort(-scores[found], kind="stable")][:top]
    return list(zip(found.tolist(), scores[found].tolist(), strict=True))


# --- Intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: Matrix | Sequence[float],
    groups: Labels | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, (low, high).

    Whole groups are drawn, with all of their values (a cluster bootstrap), because the captions of one image are not
    independent. values: (n,). groups: (n,), None for all different. Raises ValueError for other shapes, no values,
    values that are not finite, resamples < 1 and a confidence outside (0, 1).
    """
    values = _array(values).astype(np.float64)
    groups = _group_codes(groups, len(values))
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must be (n,), n > 0, and finite, got shape {values.shape}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    _check_confidence(confidence)
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_t_interval(differences: Sequence[float] | Matrix, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences (one a seed) with its Student t interval, (mean, low, high).

    differences: (n,). Raises ValueError for other shapes, n < 2, values that are not finite and a confidence outside
    (0, 1).
    """
    differences = _array(differences).astype(np.float64)
    if differences.ndim != 1 or len(differences) < 2 or not np.isfinite(differences).all():
        raise ValueError(f"differences must be (n,), n > 1, and finite, got shape {differences.shape}")
    _check_confidence(confidence)
    n = len(differences)
    mean = float(differences.mean())
    half_width = _t_quantile(confidence, n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half_width, mean + half_width


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")


def _t_quantile(confidence: float, df: int) -> float:
    """t with P(|T| < t) = confidence for Student's T with df degrees of freedom.

    With t = √df tan θ that probability is a finite sum for every whole df (Abramowitz & Stegun 26.7.3 and 26.7.4) and
    grows with θ, so bisection finds it, without scipy.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        term = math.cos(theta) if df % 2 else 1.0
        series = term if df > 1 else 0.0
        for j in range(2 + df % 2, df - 1, 2):
            term *= (j - 1) / j * math.cos(theta) ** 2
            series += term
        probability = math.sin(theta) * series
        if df % 2:
            probability = 2 / math.pi * (theta + probability)
        low, high = (theta, high) if probability < confidence else (low, theta)
    return math.sqrt(df) * math.tan(low)


# --- Galleries and inputs --------------------------------------------------------------------------------------------


class _Gallery:
    """Targets to be scored: every distinct vector once, every distinct set of K vectors once (a column), and the items,
    the distinct (group, column)."""

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
        """(b, columns) of (b, K, d), the higher the closer."""
        vectors = queries.flatten(0, 1)
        scores = torch.addmm(-self.half_squared_norms, vectors, self.vectors.T)
        if queries.shape[1] > 1:  # the vectors of one query compete, so that their own norms matter too
            scores -= vectors.square().sum(dim=1, keepdim=True) / 2
            scores = scores.unflatten(0, queries.shape[:2]).amax(dim=1)
        if self.vectors_of_column.shape[1] > 1:
            scores = _columns(scores, self.vectors_of_column.reshape(-1))
            scores = scores.unflatten(1, self.vectors_of_column.shape).amax(dim=2)
        return scores

    def row_scores(self, queries: Tensor) -> Tensor:
        """(b, target rows)."""
        return _columns(self.scores(queries), self.column)

    def own_items(self, query_groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the items of every query's group start and stop."""
        return np.searchsorted(self.item_group, query_groups), np.searchsorted(self.item_group, query_groups, "right")

    def possible_negatives(self, query_groups: np.ndarray) -> np.ndarray:
        """How many items of other groups there are, per query."""
        start, stop = self.own_items(query_groups)
        return len(self.item_group) - (stop - start)

    def closer_negatives(self, queries: Tensor, query_groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many items of other groups are at least as close as the pair, and as the closest item of the own group.

        queries: (n, K, d), row i paired with row i of the targets. Returns two arrays (n,), int64.
        """
        device = queries.device
        start, stop = self.own_items(query_groups)
        items_of_column = torch.from_numpy(np.bincount(self.item_column)).to(device, torch.float32)
        closer = np.empty((2, len(queries)), dtype=np.int64)
        for rows in _blocks(len(queries), self.width(queries)):
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


def _retrieval(queries: Matrix, targets: Matrix, groups: Labels | None) -> tuple[Tensor, _Gallery, np.ndarray]:
    queries, targets = _vectors(queries, "queries"), _vectors(targets, "targets")
    if queries.shape != targets.shape:
        raise ValueError(
            "queries and targets must be pairs, both (n, d) or both (n, K, d), got (n, K, d) = "
            f"{tuple(queries.shape)} and {tuple(targets.shape)}"
        )
    codes = _group_codes(groups, len(queries))
    return queries, _Gallery(targets, codes), codes


def _vectors(x: Matrix, name: str) -> Tensor:
    """(n, K, d) float32 of (n, K, d) or of (n, d), where K is 1."""
    # A copy, because torch warns of the read-only arrays that memory-mapping gives.
    x = x.detach().float() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float32))
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise ValueError(f"{name} must be (n, d) or (n, K, d), got {tuple(x.shape)}")
    if not x.isfinite().all():  # no negative is closer than a NaN pair: recall would be perfect
        raise ValueError(f"{name} hold values that are not finite")
    return x if x.ndim == 3 else x[:, None]


def _array(x: np.ndarray | Tensor | Sequence) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _group_codes(groups: Labels | None, n: int) -> np.ndarray:
    if groups is None:
        return np.arange(n)
    groups = _array(groups)
    if groups.shape != (n,):
        raise ValueError(f"groups must be ({n},), got {groups.shape}")
    return np.unique(groups, return_inverse=True)[1]


def _distinct(vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First row of every distinct vector, and for every row the number of its vector among them."""
    rows = np.ascontiguousarray((vectors + 0.0).cpu().numpy())  # −0 becomes 0: vectors are equal as bytes are
    as_bytes = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    _, first, number = np.unique(as_bytes, return_index=True, return_inverse=True)
    return first, number


def _items(groups: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group and column of every distinct (group, column), ordered by group."""
    number_of_columns = int(columns.max()) + 1
    return np.divmod(np.unique(groups * number_of_columns + columns), number_of_columns)


def _blocks(n: int, width: int, at_once: int | None = None) -> Iterator[slice]:
    """Slices over n rows of `width` numbers, so many numbers at most, by default BLOCK_SCORES (one row at least)."""
    step = max(1, (at_once or BLOCK_SCORES) // width)
    for start in range(0, n, step):
        yield slice(start, start + step)
