"""Curves of precision over recall and over scope, of retrieval by category."""

from collections.abc import Sequence

import numpy as np
import torch

from metrics import EmbeddedPairs, relevant_places
from ranking import Labels, Matrix

SCOPES = [digit * 10**power for power in range(8) for digit in (1, 2, 3, 5, 7)]

TENTHS = tuple(tenth / 10 for tenth in range(11))

Curves = dict[str, dict[int, float]]
"""By TensorBoard tag, precision by recall in per cent or by scope."""


def precision_curves(pairs: EmbeddedPairs) -> Curves:
    """Both curves in both directions; none without categories. A scope is a number of closest targets."""
    curves: Curves = {}
    for way, of_way in pairs.by_category.items():
        recalls = range(0, 101, 10)
        precisions = precision_recall_curve(*of_way[:4], levels=[recall / 100 for recall in recalls])
        curves[f"precision_recall/{way}"] = dict(zip(recalls, precisions.tolist(), strict=True))
        count = len(of_way.targets)
        scopes = sorted({scope for scope in SCOPES if scope < count} | {count})
        precisions = precision_scope_curve(*of_way[:4], scopes=scopes)
        curves[f"precision_scope/{way}"] = dict(zip(scopes, precisions.tolist(), strict=True))
    return curves


def precision_recall_curve(
    queries: Matrix,
    targets: Matrix,
    query_labels: Labels,
    target_labels: Labels,
    levels: Sequence[float] = TENTHS,
) -> np.ndarray:
    """Interpolated precision at each recall level, (levels,) float64, the mean over the queries.

    At a level it is the highest precision with that recall or more. Arguments, errors and ties as for
    `mean_average_precision`; ValueError also for a level outside [0, 1].
    """
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"recall levels must be from 0 to 1, got {list(levels)}")
    total, count = np.zeros(len(levels)), 0
    for _, at_least_as_close, relevant_among_them in relevant_places(queries, targets, query_labels, target_labels):
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

    Of targets at the same distance the relevant ones come last. Arguments and errors as for `mean_average_precision`;
    ValueError also for a scope below 1 or above the number of targets.
    """
    if not all(1 <= scope <= len(targets) for scope in scopes):
        raise ValueError(f"scopes must be from 1 to {len(targets)}, the number of targets, got {list(scopes)}")
    total, count = np.zeros(len(scopes)), 0
    for _, at_least_as_close, relevant_among_them in relevant_places(queries, targets, query_labels, target_labels):
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
