"""What steps 1 and 3 say of vocabulary and neighbors, on cases counted by hand and on made-up neighbors."""

import numpy as np
import pytest

from text_space.verdict import agreement, better_k, better_min_count, by_category, by_images, category_share

ROWS = 400
RNG = np.random.default_rng(0)
CATEGORIES = RNG.integers(0, 4, ROWS)
IMAGES = np.arange(ROWS)


def neighbors_of_own(share: float) -> np.ndarray:
    """(ROWS, 6) neighbors: with probability `share` of the row's category, else any."""
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, ROWS, (ROWS, 6))
    own = np.stack([rng.choice(np.flatnonzero(category == CATEGORIES), 6) for category in CATEGORIES])
    return np.where(rng.random((ROWS, 6)) < share, own, drawn)


def test_neighbors_of_the_same_category_are_above_chance_and_random_ones_are_not() -> None:
    good, random = (agreement(neighbors_of_own(share), by_category(CATEGORIES), 0) for share in (0.3, 0))
    assert good and random
    assert good.is_above_chance and not random.is_above_chance
    assert good.share == pytest.approx((CATEGORIES[neighbors_of_own(0.3)] == CATEGORIES[:, None]).mean())
    chance = (np.bincount(CATEGORIES) / ROWS) ** 2
    assert good.low < chance.sum() < good.high and good.chance == pytest.approx(chance.sum(), abs=0.01)


def test_the_interval_of_chance_holds_random_neighbors_19_times_in_20() -> None:
    inside = 0
    for seed in range(100):
        neighbors = np.random.default_rng(seed).integers(0, ROWS, (ROWS, 6))
        found = agreement(neighbors, by_category(CATEGORIES), seed)
        assert found
        inside += found.low <= found.share <= found.high
    assert 88 <= inside <= 99


def test_rows_and_neighbors_without_a_category_do_not_count() -> None:
    positions = np.array([[1, 2, 3], [0, 2, -1], [3, 0, 1], [2, 4, 0], [0, 1, 2]])
    found = agreement(positions, by_category(np.array([0, 0, 1, 1, -1])), 0)
    assert found and found.share == pytest.approx(4 / 10)
    assert agreement(positions, by_category(np.full(5, -1)), 0) is None


def test_images_of_neighbors_are_near_by_a_plain_count() -> None:
    features = np.random.default_rng(2).normal(size=(ROWS, 8)) + 4 * np.eye(4, 8)[CATEGORIES]
    neighbors = neighbors_of_own(1.0)[:, :2]
    found = agreement(neighbors, by_images(features, IMAGES, 0), 0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    near = []
    for row in range(ROWS):
        scores = unit @ unit[row]
        limit = np.quantile(scores, 0.99)
        near += [scores[other] >= limit for other in neighbors[row] if other != row]
    assert found and found.share == pytest.approx(np.mean(near), abs=1e-4)
    assert found.is_above_chance
    random = agreement(neighbors_of_own(0.0)[:, :2], by_images(features, IMAGES, 0), 0)
    assert random and not random.is_above_chance


def test_a_neighbor_with_the_same_image_is_not_known() -> None:
    neighbors = np.arange(ROWS)[:, None]
    assert agreement(neighbors, by_images(np.ones((ROWS, 2)), np.zeros(ROWS), 0), 0) is None


def test_k_is_at_most_a_twentieth_of_the_texts() -> None:
    assert better_k(20, 400) is None and better_k(21, 400) == 5
    assert better_k(200, 2400) == 24


def test_the_min_count_that_knows_three_quarters_of_the_words() -> None:
    lines = ["a a a a", "b b b", "c c d"]  # a 4, b 3, c 2, d 1
    assert better_min_count(lines, 4) == (2, pytest.approx(0.9))
    assert better_min_count(["a b c"], 3) == (1, 1.0)
    assert better_min_count(["a a a b"], 3) == (3, 0.75)


def test_category_share() -> None:
    positions = np.array([[1, 2, 3], [0, 2, -1], [3, 0, 1], [2, 4, 0], [0, 1, 2]])
    categories = np.array([0, 0, 1, 1, -1])
    share, chance = category_share(positions, categories)
    assert share == pytest.approx((1 + 1 + 1 + 1) / (3 + 2 + 3 + 2))
    assert chance == pytest.approx((2 * 1 + 2 * 1) / (4 * 3))
    assert category_share(positions, categories, first=1)[0] == 1
    assert np.isnan(category_share(positions, np.full(5, -1))).all()
