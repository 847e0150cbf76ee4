"""Metrics of retrieval: embeddings in, plain numbers out; and the registry of what is reported.

Embeddings are numpy arrays or torch tensors; tensors on a GPU are ranked there. Row i of `queries` is paired with row i
of `targets`, and rows of equal `groups` belong to the same image. Closeness and ties are those of ranking.py.

To add a metric, write a function from the evaluation's settings to `Metric`s and name it in METRICS. evaluate.py,
TensorBoard, the tables and the report read that registry.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.schema import Evaluation
from ranking import Gallery, Labels, Matrix, PairRanks, as_array, as_vectors, blocks, group_codes, mean, rank_pairs

# --- Recall ----------------------------------------------------------------------------------------------------------


def kway_recall_at_1(queries: Matrix, targets: Matrix, k: int, groups: Labels | None = None) -> float:
    """k-way Recall@1 (Thomas & Kovashka, ECCV 2020, Sec. 4.3): its expectation over the draw of the k − 1 negatives.

    The mean of `PairRanks.kway_success_probabilities`. Arguments and errors as for `rank_pairs`; ValueError also for
    k < 2 and for a query without a negative. For several k, or Recall@K as well, call `rank_pairs` once.
    """
    return float(rank_pairs(queries, targets, groups).kway_success_probabilities(k).mean())


def recall_at_k(queries: Matrix, targets: Matrix, ks: Sequence[int], groups: Labels | None = None) -> dict[str, float]:
    """Recall@K as a share and the median rank over the full gallery, {"R@1": …, "R@5": …, "R@10": …, "median_rank": …}.

    As VSE++ (Faghri et al., BMVC 2018) evaluates, with its median rank that is rounded down. Arguments and errors as
    for `rank_pairs`; ValueError also for a K below 1.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every K must be at least 1, got {list(ks)}")
    ranks = rank_pairs(queries, targets, groups).best
    return {f"R@{k}": float((ranks <= k).mean()) for k in ks} | {"median_rank": float(np.floor(np.median(ranks)))}


# --- Neighborhood preservation ---------------------------------------------------------------------------------------


def neighborhood_preservation(
    embeddings: Matrix, reference: Matrix, k: int = 200, groups: Labels | None = None
) -> float:
    """Mean share of the k nearest neighbors in `reference` that are also among the k nearest in `embeddings`.

    The paper's Sec. 4.3, Table 3: |Ψ_M ∩ Ψ_Ω| / |Ψ_Ω|. Arguments and errors as for `all_preserved_shares`.
    """
    return float(all_preserved_shares([embeddings], reference, [k], groups)[0, 0].mean())


def all_preserved_shares(
    spaces: Sequence[Matrix], reference: Matrix, ks: Sequence[int], groups: Labels | None = None
) -> np.ndarray:
    """Share of each item's k nearest in `reference` that are kept in each space: (spaces, ks, n) float64.

    Items of the item's own group are not its neighbors: all captions of an image have that image, at distance 0. Where
    several items tie at the k-th place, the share is its expectation over breaking the tie at random.

    spaces: (n, d) each. reference: (n, d'), one vector an item. Rows are aligned. groups: (n,); None: all differ.
    A k above the number of items outside the largest group is taken as that number. Raises ValueError for other shapes,
    values that are not finite, k < 1 and fewer than two groups.
    """
    if np.ndim(reference) != 2:
        raise ValueError(f"reference must be (n, d), got {np.ndim(reference)} dimensions")
    vectors = [as_vectors(reference, "reference"), *(as_vectors(space, "embeddings") for space in spaces)]
    n = len(vectors[0])
    for space in vectors[1:]:
        if len(space) != n:
            raise ValueError(f"embeddings and reference must have as many rows, got {len(space)} and {n}")
    groups = group_codes(groups, n)
    candidates = int(neighbor_candidates(groups).min())
    for k in ks:
        _check_neighbors(candidates, k)
    ks = [min(k, candidates) for k in ks]
    group = torch.from_numpy(groups).to(vectors[0].device)
    galleries = [Gallery(space) for space in vectors]
    shares = np.empty((len(spaces), len(ks), n))
    for rows in blocks(n, max(map(Gallery.width, galleries, vectors))):
        scores, nearest = _nearest(galleries[0], vectors[0], group, rows, max(ks))
        for i, (gallery, space) in enumerate(zip(galleries[1:], vectors[1:], strict=True)):
            own_scores, own_nearest = _nearest(gallery, space, group, rows, max(ks))
            for j, k in enumerate(ks):
                kept = own_scores.gather(1, nearest.indices[:, :k]) >= own_nearest.values[:, k - 1 : k]
                share = kept.double().mean(dim=1)
                # Items tie at the k-th place where the next one is as near.
                tied = [values[:, k] == values[:, k - 1] for values in (nearest.values, own_nearest.values)]
                for row in (tied[0] | tied[1]).nonzero()[:, 0]:
                    belongs = _neighbor_probabilities(scores[row], nearest.values[row], k)
                    own_belongs = _neighbor_probabilities(own_scores[row], own_nearest.values[row], k)
                    share[row] = (belongs * own_belongs).sum() / k
                shares[i, j, rows] = share.cpu().numpy()
    return shares


def preservation_chance(n: int, k: int = 200, groups: Labels | None = None) -> float:
    """`neighborhood_preservation` of unrelated spaces over n items: the mean of k over the items of other groups.

    k / (n − 1) where all groups differ. Errors as there.
    """
    candidates = neighbor_candidates(group_codes(groups, n))
    fewest = int(candidates.min())
    _check_neighbors(fewest, k)
    return mean(min(k, fewest) / candidates)


def neighbor_candidates(groups: Labels) -> np.ndarray:
    """Number of items of other groups, per item, (n,) int64. groups: (n,)."""
    codes = group_codes(groups, len(groups))
    return len(codes) - np.bincount(codes)[codes]


def _check_neighbors(candidates: int, k: int) -> None:
    if candidates < 1 or k < 1:
        raise ValueError(
            f"neighbors need at least two items of different groups and k of at least 1, got {candidates} to choose "
            f"from and k = {k}"
        )


def _nearest(
    gallery: "Gallery", vectors: Tensor, groups: Tensor, rows: slice, k: int
) -> tuple[Tensor, torch.return_types.topk]:
    """Scores of all n items for the rows' items, (rows, n), −inf in the own group; and the k + 1 highest."""
    scores = gallery.row_scores(vectors[rows])
    scores.masked_fill_(groups[rows, None] == groups, -math.inf)
    return scores, scores.topk(k + 1, dim=1)


def _neighbor_probabilities(scores: Tensor, highest: Tensor, k: int) -> Tensor:
    """Probability of each of n items to be among the k nearest, (n,): a fraction where items tie at the k-th place."""
    belongs = (scores > highest[k - 1]).double()
    tied = scores == highest[k - 1]
    belongs[tied] = (highest[:k] == highest[k - 1]).sum() / tied.sum().double()
    return belongs


# --- Mean average precision ------------------------------------------------------------------------------------------


def mean_average_precision(queries: Matrix, targets: Matrix, query_labels: Labels, target_labels: Labels) -> float:
    """mAP over the whole ranking. A target is relevant where its label is the query's.

    The mean of `average_precisions` over the queries with a relevant target. Arguments and errors as there; ValueError
    also where no query has one.
    """
    precisions = average_precisions(queries, targets, query_labels, target_labels)
    if np.isnan(precisions).all():
        raise ValueError("no query has a relevant target")
    return float(np.nanmean(precisions))


def average_precisions(queries: Matrix, targets: Matrix, query_labels: Labels, target_labels: Labels) -> np.ndarray:
    """Per query, average precision over all targets, NaN where none is relevant: (n,) float64.

    The mean, over the relevant targets, of the precision among all targets at least as close. A tie counts at its end,
    as in scikit-learn's average_precision_score.

    queries: (n, d), targets: (m, d), query_labels: (n,), target_labels: (m,), integers or strings. Raises ValueError
    for other shapes and values that are not finite.
    """
    precisions = np.full(len(queries), np.nan)
    for rows, at_least_as_close, relevant_among_them in relevant_places(queries, targets, query_labels, target_labels):
        precisions[rows] = (relevant_among_them.double() / at_least_as_close).mean(dim=1).cpu().numpy()
    return precisions


def relevant_places(
    queries: Matrix, targets: Matrix, query_labels: Labels, target_labels: Labels
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Where the relevant targets of the queries stand, block by block of B queries with one label.

    Yields the queries' row numbers (B,) and two counts (B, R) for the R targets of that label, from the farthest to the
    closest: targets at least as close, and relevant ones among them. Queries without a relevant target do not appear.
    Raises ValueError for shapes that do not fit and values that are not finite.
    """
    queries, targets = as_vectors(queries, "queries"), as_vectors(targets, "targets")
    query_labels, target_labels = as_array(query_labels), as_array(target_labels)
    if queries.shape[2] != targets.shape[2]:
        raise ValueError(f"queries have {queries.shape[2]} dimensions, targets {targets.shape[2]}")
    if query_labels.shape != (len(queries),) or target_labels.shape != (len(targets),):
        expected = f"({len(queries)},) and ({len(targets)},)"
        raise ValueError(f"labels must be {expected}, got {query_labels.shape} and {target_labels.shape}")
    gallery = Gallery(targets)
    for label in np.intersect1d(query_labels, target_labels):
        of_label = np.flatnonzero(query_labels == label)
        relevant = torch.from_numpy(np.flatnonzero(target_labels == label)).to(targets.device)
        for rows in blocks(len(of_label), gallery.width(queries)):
            scores = gallery.row_scores(queries[of_label[rows]])
            relevant_scores = _sorted(scores[:, relevant])
            at_least_as_close = len(targets) - torch.searchsorted(_sorted(scores), relevant_scores)
            relevant_among_them = len(relevant) - torch.searchsorted(relevant_scores, relevant_scores)
            yield of_label[rows], at_least_as_close, relevant_among_them


def average_precision_chances(query_labels: Labels, target_labels: Labels) -> np.ndarray:
    """Per query, the expected average precision of a random ranking, NaN where no target is relevant: (n,).

    Of m targets R are relevant. A relevant one at place r is expected to have (r − 1)(R − 1) / (m − 1) relevant ones
    before it, and every place has probability 1/m. So it is p + (1 − p) H / m, with p = (R − 1) / (m − 1) and
    H = 1 + 1/2 + … + 1/m. query_labels: (n,), target_labels: (m,). Raises ValueError without a target.
    """
    query_labels, target_labels = as_array(query_labels), as_array(target_labels)
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
    return torch.from_numpy(np.sort(scores.numpy(), axis=1))  # twice as fast as torch's sort, which returns indices too


# --- Registry --------------------------------------------------------------------------------------------------------

WAYS = ("image_to_text", "text_to_image")


class NotMeasurable(Exception):
    """A metric is not defined on these pairs; the message says why."""


class ByCategory(NamedTuple):
    """Retrieval by category in one direction: q queries, m targets."""

    queries: Tensor
    targets: Tensor
    query_labels: np.ndarray
    target_labels: np.ndarray
    query_groups: np.ndarray


@dataclass
class EmbeddedPairs:
    """R embedded pairs, as metrics read them. What several metrics need is computed once, when first read."""

    images: Tensor
    """(R, D), or (R, K, D)."""
    texts: Tensor
    """(R, D), or (R, K, D)."""
    groups: np.ndarray
    """(R,) image numbers."""
    categories: np.ndarray
    """(R,) category numbers, −1 where a pair has none."""
    reference: np.ndarray | None = None
    """(R, d) Doc2Vec vectors of the texts. Only neighborhood preservation reads them."""
    preservation_k: int = 200
    """Neighbors compared by neighborhood preservation, beside 1 % of the pairs."""

    @functools.cached_property
    def ranks(self) -> dict[str, PairRanks]:
        """Ranks of the pairs, by way."""
        ways = {WAYS[0]: (self.images, self.texts), WAYS[1]: (self.texts, self.images)}
        return {way: rank_pairs(queries, targets, self.groups) for way, (queries, targets) in ways.items()}

    @property
    def one_percent(self) -> int:
        """1 % of the pairs, at least one."""
        return max(round(len(self.groups) / 100), 1)

    @functools.cached_property
    def preserved(self) -> dict[int, dict[str, np.ndarray]]:
        """`preserved_shares` (R,) of `images` and `texts`, by k. Ks that take in all other pairs are left out."""
        assert self.reference is not None
        fewest = neighbor_candidates(self.groups).min()
        ks = [k for k in dict.fromkeys([self.preservation_k, self.one_percent]) if k < fewest]
        if not ks:
            return {}
        images, texts = all_preserved_shares([self.images, self.texts], self.reference, ks, self.groups)
        return {k: {"images": images[place], "texts": texts[place]} for place, k in enumerate(ks)}

    @functools.cached_property
    def by_category(self) -> dict[str, ByCategory]:
        """Retrieval by category, by way; empty without categories. An image of several texts is one item."""
        texts = np.flatnonzero(self.categories >= 0)
        if not len(texts):
            return {}
        images = texts[np.unique(self.groups[texts], return_index=True)[1]]
        x, y, labels = self.images[images], self.texts[texts], self.categories
        return {
            WAYS[0]: ByCategory(x, y, labels[images], labels[texts], self.groups[images]),
            WAYS[1]: ByCategory(y, x, labels[texts], labels[images], self.groups[texts]),
        }


class Scores(NamedTuple):
    """What each query scored. Their mean is the metric's value, or their median where `Metric.is_median`."""

    values: np.ndarray
    """(q,) float64."""
    groups: np.ndarray | None = None
    """(q,) image numbers of the queries; None where every pair is a query, in the pairs' order."""


@dataclass(frozen=True)
class Metric:
    """One reported number."""

    key: str
    """The name without the direction: `5way_recall_at_1`."""
    label: str
    """The same for people: `5-way Recall@1`."""
    direction: str
    """One of WAYS; `images` or `texts` where these are compared with each other."""
    compute: Callable[[EmbeddedPairs], Scores | float]
    """Scores of the queries, or a single number without an interval. May raise NotMeasurable."""
    chance: Callable[[EmbeddedPairs], float]
    """What a random ranking is expected to score."""
    higher_is_better: bool = True
    is_share: bool = True
    """Whether it lies between 0 and 1."""
    is_median: bool = False
    """Whether it is the median of the scores, rounded down as in VSE++."""
    every_epoch: bool = False
    """Whether training computes it on the validation split after every epoch."""
    as_measured: Callable[[EmbeddedPairs], "Metric"] | None = None
    """The metric that these pairs allow, where it may be another; its name says which."""

    @property
    def name(self) -> str:
        """In metrics.json, queries.parquet and TensorBoard: `5way_recall_at_1_image_to_text`."""
        return f"{self.key}_{self.direction}"

    @property
    def title(self) -> str:
        """For people: `5-way Recall@1, image to text`."""
        return f"{self.label}, {self.direction.replace('_', ' ')}"

    def value(self, scores: Scores | float) -> float:
        """The number, of what `compute` gave."""
        if not isinstance(scores, Scores):
            return scores
        return float(np.floor(np.median(scores.values)) if self.is_median else scores.values.mean())


def kway_recalls(evaluation: Evaluation) -> Iterator[Metric]:
    """k-way Recall@1 (Sec. 4.3), for each k of `evaluation.kway`; a k above the gallery is measured as its size."""

    def metric(k: int, way: str) -> Metric:
        return Metric(
            f"{k}way_recall_at_1",
            f"{k}-way Recall@1",
            way,
            lambda pairs: Scores(pairs.ranks[way].kway_success_probabilities(k)),
            lambda pairs: pairs.ranks[way].kway_chance(k),
            every_epoch=True,
            as_measured=lambda pairs: metric(min(k, pairs.ranks[way].gallery), way),
        )

    return (metric(k, way) for k in evaluation.kway for way in WAYS)


def full_gallery_recalls(evaluation: Evaluation) -> Iterator[Metric]:
    """Recall@K for each K of `evaluation.recall_at`, and the median rank, as `recall_at_k`."""

    def recall(k: int, way: str) -> Metric:
        def compute(pairs: EmbeddedPairs) -> Scores:
            if pairs.ranks[way].recall_chance(k) == 1:
                raise NotMeasurable(f"Recall@{k} is left out: the gallery has no more items")
            return Scores((pairs.ranks[way].best <= k).astype(float), pairs.ranks[way].best_groups)

        return Metric(f"recall_at_{k}", f"Recall@{k}", way, compute, lambda pairs: pairs.ranks[way].recall_chance(k))

    def median(way: str) -> Metric:
        def compute(pairs: EmbeddedPairs) -> Scores:
            return Scores(pairs.ranks[way].best.astype(float), pairs.ranks[way].best_groups)

        def chance(pairs: EmbeddedPairs) -> float:
            return pairs.ranks[way].median_rank_chance()

        return Metric("median_rank", "median rank", way, compute, chance, False, is_share=False, is_median=True)

    for way in WAYS:
        yield from (recall(k, way) for k in evaluation.recall_at)
        yield median(way)


def preservations(evaluation: Evaluation) -> Iterator[Metric]:
    """Neighborhood preservation (Sec. 4.3, Table 3) of `evaluation.preservation_k` neighbors, and of 1 %."""

    def metric(key: str, label: str, modality: str, k_of: Callable[[EmbeddedPairs], int]) -> Metric:
        def compute(pairs: EmbeddedPairs) -> Scores:
            k = k_of(pairs)
            if k not in pairs.preserved:
                raise NotMeasurable(
                    f"neighborhood preservation of {k} neighbors is left out: there are {len(pairs.groups)} pairs"
                )
            return Scores(pairs.preserved[k][modality])

        def chance(pairs: EmbeddedPairs) -> float:
            return preservation_chance(len(pairs.groups), k_of(pairs), pairs.groups)

        return Metric(key, label, modality, compute, chance)

    k = evaluation.preservation_k
    for modality in ("images", "texts"):
        yield metric(f"preservation_{k}", f"neighbors kept of nearest {k}", modality, lambda pairs: k)
        yield metric("preservation_1_percent", "neighbors kept of nearest 1 %", modality, lambda p: p.one_percent)


def mean_average_precisions(_: Evaluation) -> Iterator[Metric]:
    """mAP by category, as `mean_average_precision`."""

    def metric(way: str) -> Metric:
        def compute(pairs: EmbeddedPairs) -> Scores:
            if not pairs.by_category:
                raise NotMeasurable("mAP is left out: no pair has a category")
            retrieval = pairs.by_category[way]
            precisions = average_precisions(*retrieval[:4])
            judged = ~np.isnan(precisions)
            return Scores(precisions[judged], retrieval.query_groups[judged])

        def chance(pairs: EmbeddedPairs) -> float:
            retrieval = pairs.by_category[way]
            chances = average_precision_chances(retrieval.query_labels, retrieval.target_labels)
            return float(chances[~np.isnan(chances)].mean())

        return Metric("map", "mAP", way, compute, chance)

    return map(metric, WAYS)


METRICS: dict[str, Callable[[Evaluation], Iterator[Metric]]] = {
    "kway_recall_at_1": kway_recalls,
    "full_gallery_recall": full_gallery_recalls,
    "preservation": preservations,
    "map": mean_average_precisions,
}
"""Every reported metric, in the order of metrics.json: a line gives one metric in each direction and for each k."""


def registered(evaluation: Evaluation, family: str | None = None) -> dict[str, Metric]:
    """The metrics that these settings ask for, by name; with `family` those of one line of METRICS."""
    families = METRICS.values() if family is None else [METRICS[family]]
    return {metric.name: metric for of_family in families for metric in of_family(evaluation)}
