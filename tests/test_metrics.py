"""metrics.py and ranking.py against plain loops, enumeration, sampling and scikit-learn."""

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

import ranking
from metrics import (
    all_preserved_shares,
    average_precision_chances,
    average_precisions,
    kway_recall_at_1,
    mean_average_precision,
    neighbor_candidates,
    neighborhood_preservation,
    preservation_chance,
    recall_at_k,
)
from ranking import cosine_similarities, nearest, rank_of_own, rank_pairs
from reporting.figures import bootstrap_interval

seeds = st.integers(0, 2**31)
few_examples = settings(max_examples=25, deadline=None)


def gaussian(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def lattice(n: int, d: int, seed: int) -> np.ndarray:
    """Small whole numbers: many equal vectors and equal distances, and exact arithmetic."""
    return np.random.default_rng(seed).integers(-1, 2, size=(n, d)).astype(np.float32)


def noisy_pairs(n: int, d: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    queries = gaussian(n, d, seed)
    return queries, queries + noise * gaussian(n, d, seed + 1)


def captions(images: int, seed: int, noise: float = 0.8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As COCO: an image's row once per caption, 1 to 5 captions an image, rows in random order."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(images), rng.integers(1, 6, size=images)))
    image = gaussian(images, 6, seed)[groups]
    return image, image + noise * gaussian(len(groups), 6, seed + 1), groups + 100


DATA = {
    "general vectors": (*noisy_pairs(30, 4, 1), None),
    "ties": (lattice(40, 3, 1), lattice(40, 3, 2), None),
    "one embedding for all": (np.full((9, 2), 0.3), np.full((9, 2), 0.3), None),
    "image to captions": captions(12, 3),
    "caption to images": (lambda x, y, g: (y, x, g))(*captions(12, 4)),
    "captions with ties": (lattice(40, 3, 5), lattice(40, 3, 6), np.arange(40) % 9),
    "named groups": (*noisy_pairs(8, 3, 2), np.array(list("aabcdeef"))),
}
every_data = pytest.mark.parametrize(("queries", "targets", "groups"), DATA.values(), ids=DATA.keys())


def items_of(targets: np.ndarray, groups: np.ndarray | None) -> list[tuple[object, np.ndarray]]:
    """Distinct (group, vector)."""
    names = range(len(targets)) if groups is None else groups.tolist()
    return [(name, np.array(v)) for name, v in {(g, tuple(map(float, t))) for g, t in zip(names, targets, strict=True)}]


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum((x.astype(np.float64) - y) ** 2))


def lost_to_negatives(queries: np.ndarray, targets: np.ndarray, groups: np.ndarray | None) -> list[list[bool]]:
    """Per query, whether each possible negative is at least as close as the pair."""
    names = list(range(len(targets))) if groups is None else groups.tolist()
    items = items_of(targets, groups)
    return [
        [distance(queries[i], v) <= distance(queries[i], targets[i]) for name, v in items if name != names[i]]
        for i in range(len(queries))
    ]


# --- k-way Recall@1 --------------------------------------------------------------------------------------------------


@every_data
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_kway_is_hypergeometric(queries: np.ndarray, targets: np.ndarray, groups: np.ndarray | None, k: int) -> None:
    expected = []
    for lost in lost_to_negatives(queries, targets, groups):
        drawn = min(k - 1, len(lost))
        expected.append(math.comb(len(lost) - sum(lost), drawn) / math.comb(len(lost), drawn))
    probabilities = rank_pairs(queries, targets, groups).kway_success_probabilities(k)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    recall = kway_recall_at_1(queries, targets, k, groups)
    assert type(recall) is float and recall == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7, 50])
def test_kway_is_the_share_of_all_draws(k: int) -> None:
    """Enumerated: every set of k − 1 negatives, and all of them where there are fewer."""
    queries, targets = noisy_pairs(6, 2, 5)
    shares = []
    for lost in lost_to_negatives(queries, targets, None):
        draws = list(itertools.combinations(lost, min(k - 1, 5)))
        shares.append(np.mean([not any(draw) for draw in draws]))
    assert 0 < np.mean(shares) < 1
    np.testing.assert_allclose(rank_pairs(queries, targets).kway_success_probabilities(k), shares)


def sampled_kway_recall_at_1(lost: list[list[bool]], k: int, repeats: int) -> float:
    """As the paper samples it: k − 1 negatives drawn for each query, again and again. An oracle of the exact one."""
    rng = np.random.default_rng(1)
    hits = [not rng.permutation(of_query)[: k - 1].any() for of_query in map(np.array, lost) for _ in range(repeats)]
    return float(np.mean(hits))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["general vectors", "ties", "image to captions", "caption to images", "named groups"])
@pytest.mark.parametrize("k", [2, 5, 60])
def test_sampled_kway_comes_to_the_exact_one(name: str, k: int) -> None:
    queries, targets, groups = DATA[name]
    exact = kway_recall_at_1(queries, targets, k, groups)
    sampled = sampled_kway_recall_at_1(lost_to_negatives(queries, targets, groups), k, repeats=400)
    assert sampled == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("n", [7, 130, 400])
@pytest.mark.parametrize("d", [1, 5, 67])
def test_equal_vectors_tie_wherever_they_stand(n: int, d: int) -> None:
    """Matrix products may round the same column differently by its place: every pair's double must still be a tie."""
    targets = gaussian(n, d, 1)
    queries = gaussian(2 * n, d, 2)
    doubled = np.random.default_rng(3).permutation(np.concatenate([targets, targets]))
    assert kway_recall_at_1(queries, doubled, 2 * n) == 0
    ranks = rank_pairs(queries, doubled).best
    assert ranks.min() >= 2


def test_a_collapsed_model_scores_nothing() -> None:
    x = np.tile(gaussian(1, 16, 1), (50, 1))
    assert kway_recall_at_1(x, x, 5) == 0
    assert recall_at_k(x, x, [1, 49, 50]) == {"R@1": 0, "R@49": 0, "R@50": 1, "median_rank": 50}


def test_captions_of_one_image_are_no_negatives() -> None:
    rows = np.repeat([[0.0, 0.0], [10.0, 0.0]], 5, axis=0)
    texts = rows + gaussian(10, 2, 1)
    groups = np.repeat([0, 1], 5)
    assert kway_recall_at_1(rows, texts, 6, groups) == 1
    assert kway_recall_at_1(rows, texts, 6) < 1


def test_an_image_of_five_captions_is_one_candidate() -> None:
    texts = np.zeros((7, 2))
    images = np.array([[2.0, 0.0], [9.0, 0.0], *[[1.0, 0.0]] * 4, [1.0, -0.0]])
    # Of the first text's two possible negatives one is closer than its pair.
    assert rank_pairs(texts, images, [0, 1, 2, 2, 2, 2, 2]).kway_success_probabilities(2)[0] == 1 / 2
    assert rank_pairs(texts, images).kway_success_probabilities(2)[0] == 1 / 6


@few_examples
@given(seed=seeds, n=st.integers(2, 12))
def test_kway_falls_with_k(seed: int, n: int) -> None:
    queries, targets = noisy_pairs(n, 2, seed)
    recalls = [kway_recall_at_1(queries, targets, k) for k in range(2, n + 3)]
    assert all(earlier >= later - 1e-12 for earlier, later in itertools.pairwise(recalls))
    ranks = rank_pairs(queries, targets).best
    assert recalls[0] == pytest.approx(np.mean((n - ranks) / (n - 1)))
    # Against the whole gallery it is Recall@1, that is, whether the nearest neighbor is the pair.
    nearest = ((queries[:, None].astype(np.float64) - targets) ** 2).sum(axis=2).argmin(axis=1)
    assert recalls[n - 2] == recalls[-1] == pytest.approx(np.mean(nearest == np.arange(n)))
    assert recalls[-1] == pytest.approx(recall_at_k(queries, targets, [1])["R@1"])


@few_examples
@given(seed=seeds)
def test_row_order_never_matters(seed: int) -> None:
    queries, targets, groups = captions(6, seed)
    order = np.random.default_rng(seed).permutation(len(groups))
    permuted = queries[order], targets[order]
    assert kway_recall_at_1(*permuted, 3, groups[order]) == pytest.approx(kway_recall_at_1(queries, targets, 3, groups))
    assert recall_at_k(*permuted, [1, 2], groups[order]) == pytest.approx(recall_at_k(queries, targets, [1, 2], groups))
    assert neighborhood_preservation(*permuted, 3) == pytest.approx(neighborhood_preservation(queries, targets, 3))


# --- Recall@K over the full gallery ----------------------------------------------------------------------------------


@every_data
def test_ranks(queries: np.ndarray, targets: np.ndarray, groups: np.ndarray | None) -> None:
    names = np.arange(len(queries)) if groups is None else groups
    items = items_of(targets, groups)
    expected = []
    for name, query in items_of(queries, groups):
        best = min(distance(query.astype(np.float32), v) for g, v in items if g == name)
        expected.append((name, 1 + sum(distance(query.astype(np.float32), v) <= best for g, v in items if g != name)))
    found = rank_pairs(queries, targets, groups)
    ranks, query_groups = found.best, found.best_groups
    assert query_groups.dtype == names.dtype
    assert sorted(zip(query_groups.tolist(), ranks.tolist(), strict=True)) == sorted(expected)
    recalls = recall_at_k(queries, targets, (1, 5, 10), groups)
    assert list(recalls) == ["R@1", "R@5", "R@10", "median_rank"]
    assert all(type(value) is float for value in recalls.values())
    for k in (1, 5, 10):
        assert recalls[f"R@{k}"] == pytest.approx(np.mean([rank <= k for _, rank in expected]))
    assert recalls["median_rank"] == np.median([rank for _, rank in expected]) // 1


def test_recall_at_k_is_vse_plus_plus_i2t_and_t2i() -> None:
    """evaluation.py of VSE++: five captions an image, in order; the gallery of images is every fifth row."""
    image = np.repeat(gaussian(12, 5, 1), 5, axis=0)
    text = image + 1.5 * gaussian(60, 5, 2)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    groups = np.arange(60) // 5
    i2t, t2i = [], []
    for index in range(12):
        order = np.argsort(text @ image[5 * index])[::-1]
        i2t.append(min(np.where(order == i)[0][0] for i in range(5 * index, 5 * index + 5)))
        for i in range(5 * index, 5 * index + 5):
            t2i.append(np.where(np.argsort(image[::5] @ text[i])[::-1] == index)[0][0])
    for ours, theirs in (
        (recall_at_k(image, text, [1, 5], groups), np.array(i2t)),
        (recall_at_k(text, image, [1, 5], groups), np.array(t2i)),
    ):
        expected = {f"R@{k}": np.mean(theirs < k) for k in (1, 5)}
        assert ours == pytest.approx({**expected, "median_rank": np.floor(np.median(theirs)) + 1})
        assert 0 < ours["R@1"] < ours["R@5"]


@every_data
def test_every_rank_metric_can_be_read_off_one_ranking(
    queries: np.ndarray, targets: np.ndarray, groups: np.ndarray | None
) -> None:
    ranks = rank_pairs(queries, targets, groups)
    for k in (2, 5):
        assert ranks.kway_success_probabilities(k).mean() == kway_recall_at_1(queries, targets, k, groups)
    assert len(ranks.closer) == len(ranks.possible) == len(queries) >= len(ranks.best)
    with pytest.raises(ValueError, match="at least 2"):
        ranks.kway_success_probabilities(1)


# --- One query -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 5, 67])
@pytest.mark.parametrize("several", [1, 2])
def test_equal_vectors_are_equally_similar_wherever_they_stand(d: int, several: int) -> None:
    vectors = np.repeat(gaussian(several, d, 1)[None], 130, axis=0)
    assert len(set(cosine_similarities(vectors, gaussian(several, d, 2)).tolist())) == 1


@few_examples
@given(seed=seeds, several=st.integers(1, 2))
def test_a_tie_never_helps_the_rank_of_a_querys_own(seed: int, several: int) -> None:
    vectors, query = lattice(20 * several, 2, seed).reshape(20, several, 2), lattice(several, 2, seed + 1)
    own = np.random.default_rng(seed).random(20) < 0.2
    own[seed % 20] = True
    scores = [max(float(a @ b) for a in item for b in query) for item in vectors]
    best = max(score for score, is_own in zip(scores, own, strict=True) if is_own)
    rank = rank_of_own(vectors, query, own)
    assert rank == 1 + sum(score >= best for score, is_own in zip(scores, own, strict=True) if not is_own)
    # It is the place at which the list shows the first of them.
    places = [place for place, _ in nearest(vectors, query, 20, own=own)]
    assert own[places].argmax() == rank - 1
    assert places == sorted(range(20), key=lambda place: (-scores[place], own[place], place))


def test_a_collapsed_gallery_ranks_the_own_item_last() -> None:
    vectors = np.tile(gaussian(1, 67, 1), (50, 1))
    own = np.arange(50) == 7
    assert rank_of_own(vectors, vectors[7], own) == 50
    assert 7 not in [place for place, _ in nearest(vectors, vectors[7], 49, own=own)]


# --- What chance gives -----------------------------------------------------------------------------------------------


def unrelated(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random embeddings of images, those of one group equal, and of their texts."""
    return gaussian(int(groups.max()) + 1, 8, seed)[groups], gaussian(len(groups), 8, seed + 10_000)


GROUPS = {
    "one text an image": np.arange(40),
    "five texts an image": np.repeat(np.arange(12), 5),
    "one to nine texts an image": np.repeat(np.arange(15), [1, 9, 2, 5, 1, 1, 3, 7, 1, 5, 5, 2, 4, 1, 1]),
}
every_grouping = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())


@pytest.mark.slow
@every_grouping
@pytest.mark.parametrize("way", ["image to text", "text to image"])
def test_rank_metrics_of_unrelated_embeddings_are_chance(groups: np.ndarray, way: str) -> None:
    kway, recalls, ranks = (3, 20, 100), (1, 5, 10, 200), []
    scores = []
    for seed in range(400):
        x, y = unrelated(groups, seed)
        found = rank_pairs(x, y, groups) if way == "image to text" else rank_pairs(y, x, groups)
        scores.append(
            [found.kway_success_probabilities(k).mean() for k in kway] + [(found.best <= k).mean() for k in recalls]
        )
        ranks.append(found.best)
    chance = [found.kway_chance(k) for k in kway] + [found.recall_chance(k) for k in recalls]
    errors = np.std(scores, axis=0) / np.sqrt(len(scores))
    assert (np.abs(np.mean(scores, axis=0) - chance) <= 4 * errors + 1e-9).all()
    ranks = np.concatenate(ranks)
    median = found.median_rank_chance()
    assert (ranks < median).mean() <= 0.5 + 0.02
    assert (ranks > median).mean() <= 0.5 + 0.02


def test_rank_metrics_by_chance_by_hand() -> None:
    x, y = unrelated(np.arange(7), 1)
    ranks = rank_pairs(x, y)
    assert [ranks.kway_chance(k) for k in (2, 5, 7, 100)] == [1 / 2, 1 / 5, 1 / 7, 1 / 7]
    assert [ranks.recall_chance(k) for k in (1, 5, 7, 100)] == [1 / 7, 5 / 7, 1, 1]
    assert ranks.median_rank_chance() == 4
    assert rank_pairs(x[1:], y[1:]).median_rank_chance() == 3.5
    groups = np.array([0, 0, 1])  # two texts of image 0, one of image 1
    x, y = unrelated(groups, 1)
    to_text, to_image = rank_pairs(x, y, groups), rank_pairs(y, x, groups)
    # Image 0 has one text of another image against it, image 1 two: its texts are counted, not the images.
    assert to_text.kway_chance(2) == pytest.approx(1 / 2)
    assert to_text.kway_chance(3) == pytest.approx(np.mean([1 / 2, 1 / 2, 1 / 3]))
    assert to_text.recall_chance(1) == pytest.approx(np.mean([2 / 3, 1 / 3]))
    assert to_text.recall_chance(2) == pytest.approx(np.mean([1, 2 / 3]))
    assert to_text.median_rank_chance() == 1.5  # rank 1 with probability 1/2
    assert to_image.recall_chance(1) == 1 / 2
    assert to_image.kway_chance(20) == 1 / 2
    assert to_image.median_rank_chance() == 1.5
    with pytest.raises(ValueError, match="at least 2"):
        to_text.kway_chance(1)


@pytest.mark.parametrize("n", [2, 3, 7, 100, 497])
def test_chance_with_different_images_is_k_over_n_to_the_last_digit(n: int) -> None:
    ranks = rank_pairs(*unrelated(np.arange(n), 1))
    for k in (2, 3, 5, 20):
        assert ranks.recall_chance(k) == min(k / n, 1)
        assert k > n or ranks.kway_chance(k) == 1 / k
    assert ranks.median_rank_chance() == (n + 1) / 2


def test_average_precision_by_chance() -> None:
    # One of two targets is at place 1 or 2. Two of three are at 1 and 2, 1 and 3, or 2 and 3.
    assert average_precision_chances([0], [0, 1]) == pytest.approx((1 + 1 / 2) / 2)
    assert average_precision_chances(["a"], ["a", "a"]) == pytest.approx(1)
    assert average_precision_chances([1], [1, 2, 1]) == pytest.approx(
        np.mean([1, (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2])
    )
    assert average_precision_chances([3], [3]) == 1
    assert np.isnan(average_precision_chances([4, 5], [3, 6])).all()
    with pytest.raises(ValueError, match="empty"):
        average_precision_chances([4], [])
    labels = np.arange(497) % 10  # their share is 0.1
    assert average_precision_chances(labels, labels).mean() == pytest.approx(0.1105, abs=1e-4)


@pytest.mark.parametrize("counts", [(1, 1, 1), (30, 5, 1), (12, 12, 12)])
def test_average_precision_of_unrelated_embeddings_is_chance(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    scores = [
        average_precisions(gaussian(3, 8, seed), gaussian(len(labels), 8, seed + 10_000), [0, 1, 2], labels)
        for seed in range(600)
    ]
    chance = average_precision_chances([0, 1, 2], labels)
    errors = np.std(scores, axis=0) / np.sqrt(len(scores))
    assert (np.abs(np.mean(scores, axis=0) - chance) <= 4 * errors + 1e-9).all()


# --- Neighborhood preservation ---------------------------------------------------------------------------------------


def preserved_shares(
    embeddings: np.ndarray, reference: np.ndarray, k: int, groups: np.ndarray | None = None
) -> np.ndarray:
    return all_preserved_shares([embeddings], reference, [k], groups)[0, 0]


def neighbors_of(vectors: np.ndarray, i: int, k: int) -> set[int]:
    others = [j for j in range(len(vectors)) if j != i]
    return set(sorted(others, key=lambda j: distance(vectors[i], vectors[j]))[:k])


@pytest.mark.parametrize("k", [1, 3, 10, 23, 24, 200])
def test_preserved_shares(k: int) -> None:
    embeddings, reference = gaussian(25, 3, 1), gaussian(25, 4, 2)
    both = [(neighbors_of(embeddings, i, k), neighbors_of(reference, i, k)) for i in range(25)]
    expected = [len(found & near) / len(near) for found, near in both]
    shares = preserved_shares(embeddings, reference, k)
    np.testing.assert_allclose(shares, expected)
    assert neighborhood_preservation(embeddings, reference, k) == pytest.approx(np.mean(expected))
    assert type(neighborhood_preservation(embeddings, reference, k)) is float


def test_preservation_breaks_ties_at_random() -> None:
    """The mean over copies that are moved apart by less than any distance is the share with ties."""
    embeddings, reference = lattice(14, 2, 1), lattice(14, 2, 2)
    rng = np.random.default_rng(3)
    moved = [
        preserved_shares(*(x + 1e-3 * rng.uniform(-1, 1, size=x.shape) for x in (embeddings, reference)), 4)
        for _ in range(1500)
    ]
    np.testing.assert_allclose(preserved_shares(embeddings, reference, 4), np.mean(moved, axis=0), atol=0.04)


@pytest.mark.parametrize("k", [1, 5, 11, 200])
def test_preservation_by_a_collapsed_space_is_chance(k: int) -> None:
    collapsed = np.tile(gaussian(1, 7, 1), (12, 1))
    np.testing.assert_allclose(preserved_shares(collapsed, gaussian(12, 3, 2), k), preservation_chance(12, k))
    np.testing.assert_allclose(preserved_shares(collapsed, collapsed, k), preservation_chance(12, k), rtol=1e-6)


@pytest.mark.parametrize("make", [gaussian, lattice], ids=["no ties", "ties"])
def test_all_preserved_shares_are_those_of_each_space_and_k(make: Callable[[int, int, int], np.ndarray]) -> None:
    images, texts, reference = make(30, 3, 1), make(30, 4, 2), make(30, 3, 3)
    shares = all_preserved_shares([images, texts], reference, [4, 11, 1, 100])
    assert shares.shape == (2, 4, 30)
    for i, space in enumerate((images, texts)):
        for j, k in enumerate((4, 11, 1, 100)):
            np.testing.assert_allclose(shares[i, j], preserved_shares(space, reference, k), rtol=1e-12)
    assert (shares[:, 3] == 1).all()


def test_preservation_of_unrelated_spaces_is_chance() -> None:
    measured = neighborhood_preservation(gaussian(400, 20, 1), gaussian(400, 20, 2), 40)
    assert measured == pytest.approx(preservation_chance(400, 40), abs=0.01)
    assert preservation_chance(400, 40) == 40 / 399
    assert preservation_chance(100) == 1


def test_items_of_the_own_group_are_no_neighbors() -> None:
    groups = np.array([0, 0, 1, 1, 1, 2])
    places = np.array([[0.0], [0.1], [1], [1.1], [1.2], [5]])
    assert neighbor_candidates(groups).tolist() == [4, 4, 3, 3, 3, 5]
    # The nearest of other groups: of items 0 and 1 item 2, of 2 to 4 item 1, of 5 item 4. Without groups 1, 0, 3 ...
    other = np.array([[0.0], [0.1], [1], [1.1], [-0.5], [5]])  # item 4 stands apart: nearest to 0, and 3 to item 5
    assert preserved_shares(other, places, 1, groups).tolist() == [0, 0, 1, 1, 0, 0]
    assert preserved_shares(places, places, 3, groups).tolist() == [1] * 6
    assert preserved_shares(places, other, 100, groups).tolist() == preserved_shares(places, other, 3, groups).tolist()
    assert preservation_chance(6, 3, groups) == pytest.approx(np.mean([3 / 4, 3 / 4, 1, 1, 1, 3 / 5]))
    assert preservation_chance(6, 100, groups) == preservation_chance(6, 3, groups)
    with pytest.raises(ValueError, match="different groups"):
        preserved_shares(places, places, 1, np.zeros(6))
    with pytest.raises(ValueError, match="groups must be"):
        preserved_shares(places, places, 1, groups[1:])


@pytest.mark.parametrize("make", [gaussian, lattice], ids=["no ties", "ties"])
def test_groups_that_are_all_different_change_nothing(make: Callable[[int, int, int], np.ndarray]) -> None:
    space, reference = make(40, 3, 1), make(40, 3, 2)
    groups = np.random.default_rng(0).permutation(40)
    for k in (1, 5, 39):
        assert np.array_equal(preserved_shares(space, reference, k), preserved_shares(space, reference, k, groups))
        assert preservation_chance(40, k) == preservation_chance(40, k, groups) == k / 39


def test_an_image_encoder_without_any_knowledge_preserves_as_chance_does() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    n = len(groups)
    # Captions of an image are near each other in the reference, and all have the image's own random embedding.
    measured = []
    for seed in range(20):
        reference = gaussian(60, 8, seed)[groups] + 0.1 * gaussian(n, 8, seed + 100)
        measured.append(neighborhood_preservation(gaussian(60, 8, seed + 200)[groups], reference, 4, groups))
    assert np.mean(measured) == pytest.approx(preservation_chance(n, 4, groups), abs=0.006)
    assert np.mean(measured) < 0.05
    assert neighborhood_preservation(gaussian(60, 8, 1)[groups], reference, 4) > 0.2


def test_preservation_by_the_same_neighbors_is_whole() -> None:
    x = gaussian(60, 5, 1)
    assert neighborhood_preservation(x, x, 10) == 1
    assert neighborhood_preservation(x * 3 + 5, x, 10) == pytest.approx(1, abs=0.01)


# --- Mean average precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gaussian, lattice], ids=["no ties", "ties"])
def test_average_precision_is_scikit_learns(make: Callable[[int, int, int], np.ndarray]) -> None:
    queries, targets = make(20, 3, 1), make(50, 3, 2)
    rng = np.random.default_rng(3)
    query_labels, target_labels = rng.integers(5, size=20), rng.integers(4, size=50)
    assert 4 in query_labels
    expected = np.full(20, np.nan)
    for i in range(20):
        if query_labels[i] in target_labels:
            scores = [-distance(queries[i], t) for t in targets]
            expected[i] = average_precision_score(target_labels == query_labels[i], scores)
    np.testing.assert_allclose(average_precisions(queries, targets, query_labels, target_labels), expected)
    mean = mean_average_precision(queries, targets, query_labels, target_labels)
    assert type(mean) is float and mean == pytest.approx(np.nanmean(expected))
    names = np.array(["cat", "dog", "a longer name", "鳥", "none"])
    assert mean_average_precision(queries, targets, names[query_labels].tolist(), names[target_labels].tolist()) == mean


def test_average_precision_of_perfect_and_reversed_rankings() -> None:
    targets = np.arange(6.0)[:, None]
    assert mean_average_precision([[0.0]], targets, ["a"], ["a", "a", "b", "b", "b", "b"]) == 1
    assert mean_average_precision([[0.0]], targets, ["a"], ["b", "b", "b", "b", "a", "a"]) == pytest.approx(
        (1 / 5 + 2 / 6) / 2
    )


def test_average_precision_of_a_collapsed_space_is_the_share_of_relevant_targets() -> None:
    x = np.tile(gaussian(1, 33, 1), (40, 1))
    labels = np.arange(40) % 4
    np.testing.assert_allclose(average_precisions(x, x, labels, labels), 0.25)


# --- Several vectors an item -----------------------------------------------------------------------------------------

SETS = {
    "general vectors": lambda seed: gaussian(20 * 3, 4, seed).reshape(20, 3, 4),
    "ties": lambda seed: lattice(20 * 3, 3, seed).reshape(20, 3, 3),
}
every_set = pytest.mark.parametrize("make", SETS.values(), ids=SETS.keys())


def closest_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Of two items, (K, d) both: that of their closest pair of vectors."""
    return min(distance(u, v) for u in x for v in y)


def all_metrics_of_sets(queries: object, targets: object, groups: object, labels: object) -> list[float]:
    reference = gaussian(len(queries), 3, 9)
    return [
        kway_recall_at_1(queries, targets, 4, groups),
        *recall_at_k(queries, targets, [1, 3], groups).values(),
        neighborhood_preservation(queries, reference, 5),
        mean_average_precision(queries, targets, labels, labels),
    ]


@every_set
@pytest.mark.parametrize("groups", [None, np.arange(20) % 8], ids=["no groups", "groups"])
def test_items_of_several_vectors_are_ranked_by_their_closest_pair(
    make: Callable[[int], np.ndarray], groups: np.ndarray | None
) -> None:
    queries, targets = make(1), make(2) + make(1) // 2
    targets[3], targets[5] = targets[4], targets[13, ::-1]  # 5 and 13 are one item: of one group, in another order
    names = range(20) if groups is None else groups.tolist()
    items = {(g, tuple(sorted(map(tuple, t.tolist())))) for g, t in zip(names, targets, strict=True)}
    probabilities, best = [], {}
    for query, target, name in zip(queries, targets, names, strict=True):
        lost = [closest_distance(query, np.array(v)) <= closest_distance(query, target) for g, v in items if g != name]
        probabilities.append(math.comb(len(lost) - sum(lost), 3) / math.comb(len(lost), 3))
        closest = min(closest_distance(query, np.array(v)) for g, v in items if g == name)
        ahead = sum(closest_distance(query, np.array(v)) <= closest for g, v in items if g != name)
        best[name, tuple(map(tuple, query.tolist()))] = 1 + ahead
    ranks = rank_pairs(queries, targets, groups)
    np.testing.assert_allclose(ranks.kway_success_probabilities(4), probabilities, rtol=1e-12)
    assert sorted(ranks.best.tolist()) == sorted(best.values())


@every_set
@pytest.mark.parametrize("k", [1, 4])
def test_preserved_shares_of_items_of_several_vectors(make: Callable[[int], np.ndarray], k: int) -> None:
    items, reference = make(1), gaussian(20, 4, 2)
    expected = []
    for i in range(20):
        others = [j for j in range(20) if j != i]
        distances = {j: closest_distance(items[i], items[j]) for j in others}
        kth = sorted(distances.values())[k - 1]
        nearer, tied = ([j for j in others if compare(distances[j], kth)] for compare in (np.less, np.equal))
        kept = neighbors_of(reference, i, k)
        expected.append((len(kept & set(nearer)) + len(kept & set(tied)) * (k - len(nearer)) / len(tied)) / k)
    np.testing.assert_allclose(preserved_shares(items, reference, k), expected)


@every_set
def test_average_precision_of_items_of_several_vectors(make: Callable[[int], np.ndarray]) -> None:
    queries, targets = make(1), make(2)[:, :2]  # K need not be the same
    labels = np.arange(20) % 3
    expected = [
        average_precision_score(labels == label, [-closest_distance(query, target) for target in targets])
        for query, label in zip(queries, labels, strict=True)
    ]
    np.testing.assert_allclose(average_precisions(queries, targets, labels, labels), expected)


@pytest.mark.parametrize("name", ["image to captions", "captions with ties", "caption to images"])
def test_one_vector_an_item_changes_nothing(name: str) -> None:
    queries, targets, groups = DATA[name]
    single = all_metrics_of_sets(queries[:, None], targets[:, None], groups, groups % 3)
    assert single == all_metrics_of_sets(queries, targets, groups, groups % 3)
    twice = all_metrics_of_sets(*(np.repeat(x[:, None], 2, axis=1) for x in (queries, targets)), groups, groups % 3)
    assert single == pytest.approx(twice)


@pytest.mark.parametrize("n", [7, 130, 400])
def test_a_vector_that_all_items_share_is_a_tie_wherever_it_stands(n: int) -> None:
    """One of PVSE's heads may collapse: where it is the closest, all items are at the same distance."""
    shared = np.tile(gaussian(1, 67, 1), (n, 1))
    items = np.stack([shared, gaussian(n, 67, 2), gaussian(n, 67, 3)], axis=1)
    order = np.random.default_rng(1).permuted(np.tile(np.arange(3), (n, 1)), axis=1)
    items = np.take_along_axis(items, order[:, :, None], axis=1)
    queries = np.stack([shared + 0.01 * gaussian(n, 67, 4), shared + 0.02 * gaussian(n, 67, 5)], axis=1)
    queries = np.concatenate([queries, gaussian(n, 67, 6)[:, None] * 9], axis=1)
    assert kway_recall_at_1(queries, items, 2) == 0
    assert recall_at_k(queries, items, [n - 1, n]) == {f"R@{n - 1}": 0, f"R@{n}": 1, "median_rank": n}
    k = n // 3
    np.testing.assert_allclose(preserved_shares(items, gaussian(n, 5, 7), k), preservation_chance(n, k))


def test_order_of_an_items_vectors_never_matters() -> None:
    queries, targets, labels = SETS["general vectors"](1), SETS["general vectors"](2), np.arange(20) % 3
    turned = all_metrics_of_sets(queries[:, ::-1], np.roll(targets, 1, axis=1), None, labels)
    assert turned == pytest.approx(all_metrics_of_sets(queries, targets, None, labels))


@every_set
@pytest.mark.parametrize("size", [1, 50, 333])
def test_blocks_never_matter_to_items_of_several_vectors(
    make: Callable[[int], np.ndarray], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make(1), make(2), np.arange(20) % 8, np.arange(20) % 3
    expected = all_metrics_of_sets(*arguments)
    monkeypatch.setattr(ranking, "BLOCK_SCORES", size)
    assert all_metrics_of_sets(*arguments) == pytest.approx(expected, rel=1e-12)


def test_blocks_are_as_large_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix product has K × K numbers a pair of items."""
    largest = 0
    addmm = torch.addmm

    def measured(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        product = addmm(*arguments)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch, "addmm", measured)
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 5000)
    items, labels = gaussian(100 * 3, 4, 1).reshape(100, 3, 4), np.arange(100) % 3
    for run in (
        lambda: rank_pairs(items, items + 1),
        lambda: preserved_shares(items, items[:, 0], 5),
        lambda: average_precisions(items, items + 1, labels, labels),
    ):
        largest = 0
        run()
        assert 1000 < largest <= 5000


# --- Inputs and blocks -----------------------------------------------------------------------------------------------


def all_metrics(queries: object, targets: object, groups: object, labels: object) -> list[float]:
    return [
        kway_recall_at_1(queries, targets, 4, groups),
        *recall_at_k(queries, targets, [1, 3], groups).values(),
        neighborhood_preservation(queries, targets, 5),
        mean_average_precision(queries, targets, labels, labels),
        *bootstrap_interval(rank_pairs(queries, targets, groups).best, resamples=50),
    ]


@pytest.mark.parametrize("name", ["image to captions", "captions with ties"])
def test_torch_and_numpy_and_double_agree(name: str) -> None:
    queries, targets, groups = DATA[name]
    labels = groups % 3
    expected = all_metrics(queries, targets, groups, labels)
    assert all(type(value) is float for value in expected)
    as_torch = [torch.from_numpy(x) for x in (queries, targets, groups, labels)]
    assert all_metrics(as_torch[0].requires_grad_(), *as_torch[1:]) == expected
    assert all_metrics(queries.astype(np.float64), as_torch[1].double(), groups.tolist(), labels.tolist()) == expected


@pytest.mark.parametrize("name", ["image to captions", "captions with ties", "caption to images"])
@pytest.mark.parametrize("size", [1, 100, 333])
def test_blocks_never_matter(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets, groups = DATA[name]
    expected = all_metrics(queries, targets, groups, groups % 3)
    monkeypatch.setattr(ranking, "BLOCK_SCORES", size)
    assert all_metrics(queries, targets, groups, groups % 3) == pytest.approx(expected, rel=1e-12)


def test_memory_mapped_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", gaussian(9, 4, 1))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert neighborhood_preservation(mapped, mapped, 3) == 1


def test_inputs_are_left_alone() -> None:
    queries, targets = torch.from_numpy(gaussian(9, 4, 1)), torch.from_numpy(gaussian(9, 4, 2))
    before = queries.clone(), targets.clone()
    all_metrics(queries, targets, torch.arange(9), torch.arange(9) % 2)
    assert torch.equal(queries, before[0]) and torch.equal(targets, before[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    """NaN compares as neither closer nor further: a diverged model must not look perfect."""
    good = gaussian(4, 3, 1)
    broken = good.copy()
    broken[2, 1] = bad
    for x, y in ((good, broken), (broken, good)):
        for metric in (
            lambda x, y: kway_recall_at_1(x, y, 2),
            lambda x, y: recall_at_k(x, y, [1]),
            neighborhood_preservation,
            lambda x, y: mean_average_precision(x, y, range(4), range(4)),
        ):
            with pytest.raises(ValueError, match="finite"):
                metric(x, y)


def test_retrieval_mistakes() -> None:
    x = gaussian(4, 3, 1)
    for y in (x[:3], x[:, :2], x[0], x[:, None].repeat(2, axis=1)):
        with pytest.raises(ValueError, match="must be"):
            kway_recall_at_1(x, y, 2)
        with pytest.raises(ValueError, match="must be"):
            recall_at_k(x, y, [1])
    with pytest.raises(ValueError, match="at least 2"):
        kway_recall_at_1(x, x, 1, None)
    with pytest.raises(ValueError, match="no possible negative"):
        kway_recall_at_1(x, x, 2, [5, 5, 5, 5])
    with pytest.raises(ValueError, match="groups"):
        kway_recall_at_1(x, x, 2, [1, 2, 3])
    with pytest.raises(ValueError, match="no possible negative"):
        kway_recall_at_1(x[:1], x[:1], 2)
    with pytest.raises(ValueError, match="at least 1"):
        recall_at_k(x, x, [1, 0])


def test_preservation_mistakes() -> None:
    x = gaussian(4, 3, 1)
    for arguments in ((x[:1], x[:1], 1), (x, x, 0)):
        with pytest.raises(ValueError, match="at least"):
            neighborhood_preservation(*arguments)
    with pytest.raises(ValueError, match="at least"):
        preservation_chance(1, 1)
    with pytest.raises(ValueError, match="as many rows"):
        neighborhood_preservation(x, x[:3], 1)
    for reference in (x[:, None], torch.from_numpy(x)[:, None], x[0]):
        with pytest.raises(ValueError, match="reference must be"):
            neighborhood_preservation(x, reference, 1)


def test_average_precision_mistakes() -> None:
    x = gaussian(4, 3, 1)
    with pytest.raises(ValueError, match="no query has a relevant target"):
        mean_average_precision(x, x, [1, 1, 1, 1], [2, 2, 2, 2])
    assert np.isnan(average_precisions(x, x, [1, 1, 1, 1], [2, 2, 2, 2])).all()
    with pytest.raises(ValueError, match="labels must be"):
        mean_average_precision(x, x, [1, 1, 1], [1, 1, 1, 1])
    with pytest.raises(ValueError, match="dimensions"):
        mean_average_precision(x, x[:, :2], [1, 1, 1, 1], [1, 1, 1, 1])
