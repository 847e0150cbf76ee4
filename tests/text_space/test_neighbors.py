"""Neighbors against plain loops and scikit-learn, and HNSW's recall against one counted by hand."""

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from pipeline.errors import UserError
from pipeline.schema import Neighbors
from text_space import hnsw, neighbors
from text_space.hnsw import build_graph, choose_library
from text_space.neighbors import (
    GraphSearch,
    NeighborLists,
    exact_neighbors,
    find_neighbors,
    recall,
)
from text_space.points import on_sphere


def by_loop(points: np.ndarray, k: int, groups: Sequence[np.ndarray] = ()) -> NeighborLists:
    """Exact neighbors of all rows, the slow way."""
    positions = np.full((len(points), k), -1)
    distances = np.full((len(points), k), np.inf, dtype=np.float32)
    for i, a in enumerate(points):
        ranked = sorted(
            (np.float32(np.sqrt(((a.astype(np.float64) - b) ** 2).sum())), j)
            for j, b in enumerate(points)
            if i != j and all(group[i] != group[j] for group in groups)
        )
        for rank, (distance, j) in enumerate(ranked[:k]):
            positions[i, rank], distances[i, rank] = j, distance
    return NeighborLists(positions, distances)


def exact(points: np.ndarray, k: int, groups: Sequence[np.ndarray] = ()) -> NeighborLists:
    return exact_neighbors(points, np.arange(len(points)), k, groups)


def cloud(rows: int = 300, dimensions: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dimensions)).astype(np.float32)


def same(found: NeighborLists, wanted: NeighborLists) -> None:
    np.testing.assert_array_equal(found.positions, wanted.positions)
    np.testing.assert_allclose(found.distances, wanted.distances, rtol=1e-6)


# Exact search


@settings(deadline=None)
@given(
    # A coarse grid: many points coincide, many distances are equal.
    arrays(np.int8, st.tuples(st.integers(1, 30), st.just(2)), elements=st.integers(-2, 2)),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 30),
)
def test_exact_search_is_the_plain_loop(grid: np.ndarray, k: int, images: int, texts: int) -> None:
    points = grid.astype(np.float32)
    groups = (np.arange(len(points)) % images, np.arange(len(points)) % texts)
    same(exact(points, k, groups), by_loop(points, k, groups))
    same(exact(points, k), by_loop(points, k))


@pytest.fixture(params=["faiss", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both libraries that multiply matrices, in small parts."""
    monkeypatch.setattr(neighbors, "COLUMNS_AT_A_TIME", 70)
    monkeypatch.setattr(neighbors, "ANSWERS_AT_A_TIME", 90)
    return str(request.param)


def test_both_libraries_are_the_plain_loop(library: str) -> None:
    points, group = cloud(400), np.arange(400) // 3
    points[:4], group[:4] = points[0], 0
    rows, wanted = np.arange(400), by_loop(points, 5, (group,))
    same(exact_neighbors(points, rows, 5, (group,), library), wanted)
    some = np.array([390, 3, 41])
    same(exact_neighbors(points, some, 5, (group,), library), NeighborLists(*(part[some] for part in wanted)))
    same(exact_neighbors(points, some[:0], 5, (group,), library), NeighborLists(*(part[:0] for part in wanted)))


def test_many_at_one_distance_and_large_groups(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that leave out a lower position at the same distance, or that are all left out, do not suffice."""
    monkeypatch.setattr(neighbors, "SPARE_ANSWERS", 0)
    points = np.random.default_rng(0).integers(-2, 3, (250, 2)).astype(np.float32)
    groups = (np.minimum(np.arange(250), 3), np.arange(250) % 120)
    same(exact_neighbors(points, np.arange(250), 6, groups, library), by_loop(points, 6, groups))
    same(exact_neighbors(points, np.arange(250), 6, (), library), by_loop(points, 6))


@pytest.mark.parametrize("dimensions", [1, 3, 50, 400])
def test_what_the_products_round_is_ranked_by_differences(library: str, dimensions: int) -> None:
    """Of points near each other and away from the origin, the products in float32 confuse the order."""
    points = (on_sphere(cloud(3, dimensions, 1)).repeat(40, axis=0) * 7 + 1e-2 * cloud(120, dimensions, 2)).astype("f4")
    same(exact_neighbors(points, np.arange(120), 6, (), library), by_loop(points, 6))


def test_scikit_learn_agrees() -> None:
    points = cloud()
    for distance in ("euclidean", "cosine"):
        oracle = NearestNeighbors(n_neighbors=21, metric=distance, algorithm="brute").fit(points.astype(np.float64))
        distances, positions = oracle.kneighbors(points.astype(np.float64))
        found, how = find_neighbors(points, (), Neighbors(k=20, method="exact", distance=distance), 0, True)
        assert how == {"method": "exact"}
        np.testing.assert_array_equal(found.positions, positions[:, 1:])
        np.testing.assert_allclose(found.distances, distances[:, 1:], rtol=1e-5)


def test_fewer_neighbors_than_k() -> None:
    points = np.array([[0], [1], [3]], dtype=np.float32)
    found = exact(points, 4)
    assert found.positions.tolist() == [[1, 2, -1, -1], [0, 2, -1, -1], [1, 0, -1, -1]]
    assert found.distances.tolist() == [[1, 3, *2 * [np.inf]], [1, 2, *2 * [np.inf]], [2, 3, *2 * [np.inf]]]
    assert (exact(points, 2, (np.zeros(3, dtype=np.int64),)).positions == -1).all()


def test_on_sphere() -> None:
    unit = on_sphere(np.array([[3, 4], [0, 0], [1e-30, 0]], dtype=np.float32))
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)


# HNSW


def test_recall_counts_ties_and_missing_neighbors() -> None:
    infinity = np.inf
    truth = NeighborLists(np.array([[1, 2], [5, -1]]), np.array([[1, 2], [1, infinity]], dtype=np.float32))
    found = NeighborLists(np.array([[1, 3], [5, -1]]), np.array([[1, 2], [1, infinity]], dtype=np.float32))
    assert recall(found, truth) == 1  # 3 is as far as 2
    worse = NeighborLists(np.array([[1, 4], [-1, -1]]), np.array([[1, 9], 2 * [infinity]], dtype=np.float32))
    assert recall(worse, truth) == pytest.approx(1 / 3)


def test_recall_is_not_made_up_for_by_others_at_the_last_distance() -> None:
    truth = NeighborLists(np.array([[1, 2, 3]]), np.array([[1, 2, 2]], dtype=np.float32))
    missed = NeighborLists(np.array([[2, 3, 4]]), np.array([[2, 2, 2]], dtype=np.float32))
    assert recall(missed, truth) == pytest.approx(2 / 3)
    none = NeighborLists(np.full((1, 3), -1), np.full((1, 3), np.inf, dtype=np.float32))
    assert recall(none, none) == 1
    found, how = find_neighbors(cloud(50), (np.zeros(50, dtype=np.int64),), Neighbors(k=5, method="hnsw"), 0, True)
    assert (found.positions == -1).all() and how["recall"] == 1


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_search_that_was_stopped_after_its_last_row_ends_as_one_that_was_not(tmp_path: Path, distance: str) -> None:
    wanted = Neighbors(k=5, method="hnsw", distance=distance, min_recall=1.0, hnsw_m=32)
    first = [part.copy() for part in find_neighbors(cloud(), (), wanted, 0, True, tmp_path)[0]]
    found, _ = find_neighbors(cloud(), (), wanted, 0, True, tmp_path)
    same(found, NeighborLists(*first))
    same(found, find_neighbors(cloud(), (), Neighbors(k=5, method="exact", distance=distance), 0, True)[0])


def test_hnsw_raises_its_effort_until_its_recall_suffices(tmp_path: Path) -> None:
    # Hardly any links over points without structure: a graph that is hard to search.
    points, groups = cloud(2000, 30), (np.arange(2000) // 2,)
    poor = {"k": 10, "method": "hnsw", "hnsw_m": 4, "hnsw_ef_construction": 10, "recall_sample": 300}
    truth = exact(points, 10, groups)

    def counted_by_hand(found: NeighborLists, seed: int) -> float:
        sample = np.random.default_rng(seed).permutation(2000)[:300]
        hits = [len(set(found.positions[row]) & set(truth.positions[row])) for row in sample]
        return sum(hits) / 3000

    found, easy = find_neighbors(points, groups, Neighbors(min_recall=0.01, **poor), 7, True)
    assert easy["ef_search"] == GraphSearch(points, groups, Neighbors(**poor), 1).asked and easy["recall_sample"] == 300
    assert easy["recall"] == pytest.approx(counted_by_hand(found, 7))
    found, hard = find_neighbors(points, groups, Neighbors(min_recall=0.9, **poor), 7, True)
    assert easy["recall"] < 0.9 <= hard["recall"]
    assert hard["ef_search"] in [easy["ef_search"] * 2**doublings for doublings in range(1, 9)]
    assert hard["recall"] == pytest.approx(counted_by_hand(found, 7))
    assert (found.positions // 2 != np.arange(2000)[:, None] // 2).all()
    assert (np.diff(found.distances, axis=1) >= 0).all()


def test_hnsw_that_cannot_reach_the_recall_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "recall", lambda found, truth: 0.5)
    with pytest.raises(UserError, match=r"finds 0.500 of the true neighbors .* neighbors.method to exact"):
        find_neighbors(cloud(50), (), Neighbors(k=3, method="hnsw"), 0, True)


def test_auto_searches_exactly_where_hnsw_takes_as_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points, groups = cloud(2000, 30), (np.arange(2000) // 2,)
    poor = {
        "k": 10,
        "method": "auto",
        "library": "faiss",
        "hnsw_m": 3,
        "hnsw_ef_construction": 10,
        "recall_sample": 300,
        "min_recall": 0.95,
    }
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 1000)
    monkeypatch.setattr(neighbors, "ROWS_AT_A_TIME", 700)
    monkeypatch.setattr(neighbors, "ROWS_A_STEP", 2000 // 40)  # an efSearch of 40 is as slow
    found, figures = find_neighbors(points, groups, Neighbors(**poor), 0, True, tmp_path)
    same(NeighborLists(*map(np.asarray, found)), exact(points, 10, groups))
    assert figures["method"] == "exact" and figures["recall"] < 0.95 and figures["ef_search"] == 40
    figures = find_neighbors(points, groups, Neighbors(**poor), 0, True, tmp_path)[1]
    assert figures["method"] == "exact" and figures["searched_rows"] == 0
    monkeypatch.setattr(neighbors, "ROWS_A_STEP", 1)
    (tmp_path / "other").mkdir()
    poor["min_recall"] = 0.5
    assert find_neighbors(points, groups, Neighbors(**poor), 0, True, tmp_path / "other")[1]["method"] == "hnsw"


@pytest.mark.parametrize("library", ["nmslib", "faiss"])
def test_one_thread_builds_the_same_graph_again(library: str) -> None:
    points, poor = cloud(2000, 30), Neighbors(k=10, library=library, hnsw_m=3, hnsw_ef_construction=10)
    first, again = (GraphSearch(points, (), poor, 1).neighbors(np.arange(2000)) for _ in range(2))
    same(first, again)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["nmslib", "faiss"])
def test_hnsw_reaches_its_recall_on_20000_random_vectors(library: str) -> None:
    points = cloud(20_000, 200)
    wanted = Neighbors(k=200, method="hnsw", library=library, recall_sample=200)
    found, how = find_neighbors(points, (), wanted, 0, False)
    assert how["library"] == library and how["recall"] >= 0.95
    truth = exact_neighbors(points, np.arange(100, 200), 200, (), "faiss")
    of_rows = NeighborLists(found.positions[100:200], found.distances[100:200])
    assert recall(of_rows, truth) > 0.93


def test_nmslib_gives_way_where_its_copies_take_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    points = cloud(1000, 200)
    assert choose_library("auto", points) == "nmslib"
    monkeypatch.setattr(hnsw, "NMSLIB_MEMORY_SHARE", 1e-9)
    assert choose_library("auto", points) == "faiss"
    assert choose_library("nmslib", points) == "nmslib"


@pytest.mark.parametrize("library", ["nmslib", "faiss"])
def test_short_answers_are_padded(library: str) -> None:
    answers = build_graph(library, cloud(5), 16, 200, 1).search(cloud(5), 8, 50)
    assert answers.shape == (5, 8) and (answers[:, 5:] == -1).all()
    assert (np.sort(answers[:, :5]) == np.arange(5)).all()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_hnsw_with_full_effort_is_exact(distance: str) -> None:
    points, groups = cloud(400), (np.arange(400) // 2,)
    approximate = Neighbors(k=10, method="hnsw", distance=distance, min_recall=1.0, hnsw_m=32)
    same(
        find_neighbors(points, groups, approximate, 0, True)[0],
        find_neighbors(points, groups, Neighbors(k=10, method="exact", distance=distance), 0, True)[0],
    )


def test_hnsw_completes_rows_that_are_left_with_too_few() -> None:
    """A few rows are one text, so many that all that HNSW returns for them is left out."""
    points = cloud(1500)
    points[:12] = points[0]
    texts = np.maximum(np.arange(1500), 11)
    index = GraphSearch(points, (texts,), Neighbors(k=10, hnsw_m=32), 1)
    assert index.asked == 12
    index.effort = 200
    some = np.arange(30)
    same(index.neighbors(some), exact_neighbors(points, some, 10, (texts,)))
    # There are fewer than k at all: found, and filled up.
    few = GraphSearch(points[:13], (texts[:13],), Neighbors(k=10), 1)
    assert (few.neighbors(some[:1]).positions >= 0).sum() == 1


def test_auto_searches_exactly_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 300)
    for rows, method in ((300, "exact"), (301, "hnsw")):
        assert find_neighbors(cloud(rows), (), Neighbors(k=5, method="auto"), 0, True)[1]["method"] == method


@pytest.mark.parametrize("columns", [7, 64, 100])
def test_points_in_parts_have_the_same_neighbors(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    points, groups = cloud(150), (np.arange(150) // 2, np.arange(150) % 40)
    points[20:40] = points[20]
    whole, rows = exact_neighbors(points, np.arange(150), 10, groups), np.array([149, 3, 25, 26])
    monkeypatch.setattr(neighbors, "COLUMNS_AT_A_TIME", columns)
    same(exact_neighbors(points, np.arange(150), 10, groups), whole)
    same(exact_neighbors(points, rows, 200, groups), by_loop_of(points, rows, groups))


def by_loop_of(points: np.ndarray, rows: np.ndarray, groups: tuple[np.ndarray, ...]) -> NeighborLists:
    found = by_loop(points, 200, groups)
    return NeighborLists(found.positions[rows], found.distances[rows])


def test_ctrl_c_ends_the_wait_for_a_graph() -> None:
    """A graph of millions of points is built in one call that lasts for minutes."""

    def build() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        hnsw.in_new_thread(build)
    with pytest.raises(ZeroDivisionError):
        hnsw.in_new_thread(lambda: 1 / 0)
