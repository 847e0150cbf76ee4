"""Precision over recall and over scope, against a ranking sorted by hand and scikit-learn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve as scikit_learns
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metrics import EmbeddedPairs, average_precisions
from reporting.evaluation import write_scalars
from reporting.precision_curves import precision_curves, precision_recall_curve, precision_scope_curve

LEVELS = [level / 10 for level in range(11)]


def gaussian(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


def lattice(n: int, seed: int) -> np.ndarray:
    """Small whole numbers: many equal distances, and exact arithmetic."""
    return np.random.default_rng(seed).integers(-1, 2, size=(n, 3)).astype(np.float32)


every_kind = pytest.mark.parametrize("make", [gaussian, lattice], ids=["no ties", "ties"])


def labelled(make: Callable[[int, int], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """20 queries and 50 targets; no target has the last label, that of some queries."""
    rng = np.random.default_rng(3)
    query_labels, target_labels = rng.integers(5, size=20), rng.integers(4, size=50)
    assert 4 in query_labels
    return make(20, 1), make(50, 2), query_labels, target_labels


def rankings(
    queries: np.ndarray, targets: np.ndarray, query_labels: np.ndarray, target_labels: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each query with a relevant target: distances of all targets, and which are relevant."""
    found = []
    for query, label in zip(queries.astype(float), query_labels, strict=True):
        relevant = target_labels == label
        if relevant.any():
            found.append((((targets - query) ** 2).sum(axis=1), relevant))
    return found


@every_kind
def test_precision_recall_is_scikit_learns_interpolated(make: Callable[[int, int], np.ndarray]) -> None:
    data = labelled(make)
    expected = []
    for distances, relevant in rankings(*data):
        precision, recall, _ = scikit_learns(relevant, -distances)
        # Its last point, of recall 0 and precision 1, is of no target at all.
        expected.append([precision[:-1][recall[:-1] >= level - 1e-9].max() for level in LEVELS])
    np.testing.assert_allclose(precision_recall_curve(*data), np.mean(expected, axis=0))
    fine = [0.0, 0.33, 1.0]
    np.testing.assert_allclose(
        precision_recall_curve(*data, levels=fine)[[0, 2]], precision_recall_curve(*data)[[0, 10]]
    )


@every_kind
def test_precision_scope_counts_the_closest_with_ties_against_the_model(make: Callable[[int, int], np.ndarray]) -> None:
    data = labelled(make)
    scopes = [1, 2, 3, 10, 49, 50]
    expected = []
    for distances, relevant in rankings(*data):
        order = sorted(range(50), key=lambda target: (distances[target], relevant[target]))
        expected.append([relevant[order[:scope]].mean() for scope in scopes])
    np.testing.assert_allclose(precision_scope_curve(*data, scopes), np.mean(expected, axis=0))


def test_a_perfect_and_a_collapsed_space() -> None:
    labels = np.arange(40) % 4
    x = np.eye(4, dtype=np.float32)[labels]
    assert (precision_recall_curve(x, x, labels, labels) == 1).all()
    np.testing.assert_allclose(precision_scope_curve(x, x, labels, labels, [1, 10, 20, 40]), [1, 1, 0.5, 0.25])
    same = np.ones_like(x)
    np.testing.assert_allclose(precision_recall_curve(same, same, labels, labels), 0.25)
    np.testing.assert_allclose(precision_scope_curve(same, same, labels, labels, [1, 30, 31, 40]), [0, 0, 1 / 31, 0.25])


def test_torch_and_numpy_agree_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets, *labels = labelled(gaussian)
    before = precision_recall_curve(queries, targets, *labels), precision_scope_curve(queries, targets, *labels, [5])
    monkeypatch.setattr("ranking.BLOCK_SCORES", 100)
    of_torch = torch.from_numpy(queries), torch.from_numpy(targets)
    np.testing.assert_allclose(precision_recall_curve(*of_torch, *labels), before[0])
    np.testing.assert_allclose(precision_scope_curve(*of_torch, *labels, [5]), before[1])


def test_mistakes() -> None:
    x, one = gaussian(4, 1), [1, 1, 1, 1]
    with pytest.raises(ValueError, match="no query has a relevant target"):
        precision_recall_curve(x, x, one, [2, 2, 2, 2])
    with pytest.raises(ValueError, match="no query has a relevant target"):
        precision_scope_curve(x, x, one, [2, 2, 2, 2], [1])
    with pytest.raises(ValueError, match="levels must be"):
        precision_recall_curve(x, x, one, one, [1.1])
    for scope in (0, 5):
        with pytest.raises(ValueError, match="scopes must be from 1 to 4"):
            precision_scope_curve(x, x, one, one, [scope])


def test_curves_reach_tensorboard_with_recall_and_scope_for_steps(tmp_path: Path) -> None:
    # Pairs 0 and 1 share an image, which is one item; pair 4 has no category.
    labels, groups = np.array([0, 0, 1, 1, -1, 0]), np.array([0, 0, 1, 2, 3, 4])
    x, y = torch.from_numpy(gaussian(6, 1)), torch.from_numpy(gaussian(6, 2))
    x[1] = x[0]
    curves = precision_curves(EmbeddedPairs(x, y, groups, labels))
    texts, images = [0, 1, 2, 3, 5], [0, 2, 3, 5]
    expected = precision_recall_curve(x[images], y[texts], labels[images], labels[texts])
    assert list(curves["precision_recall/image_to_text"].values()) == pytest.approx(expected.tolist())
    expected = precision_scope_curve(y[texts], x[images], labels[texts], labels[images], [1, 2, 3, 4])
    assert curves["precision_scope/text_to_image"] == pytest.approx(dict(zip([1, 2, 3, 4], expected, strict=True)))
    # At the last scope all is retrieved: the share of relevant items.
    share = np.mean([np.mean(labels[images] == label) for label in labels[texts]])
    assert curves["precision_scope/text_to_image"][4] == pytest.approx(share)

    write_scalars(tmp_path, {"map_image_to_text": {"value": 0.5}}, [], curves, "test", epoch=7)
    board = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    board.Reload()
    points = {event.step: event.value for event in board.Scalars("test_precision_recall/image_to_text")}
    assert points == pytest.approx(curves["precision_recall/image_to_text"])
    assert list(points) == list(range(0, 101, 10))
    assert [event.step for event in board.Scalars("test_precision_scope/image_to_text")] == [1, 2, 3, 5]
    assert [event.step for event in board.Scalars("test/map_image_to_text")] == [7]


def test_without_categories_there_are_no_curves() -> None:
    x = torch.from_numpy(gaussian(3, 1))
    assert precision_curves(EmbeddedPairs(x, x, np.arange(3), np.full(3, -1))) == {}


def test_the_mean_of_precisions_at_relevant_targets_is_the_area_that_map_reports() -> None:
    """With one relevant target, precision at every recall level is its average precision."""
    queries, targets = gaussian(8, 1), gaussian(8, 2)
    labels = np.arange(8)
    curve = precision_recall_curve(queries, targets, labels, labels)
    np.testing.assert_allclose(curve, average_precisions(queries, targets, labels, labels).mean())
