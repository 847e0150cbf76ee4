"""MinHash against exact Jaccard similarity."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text_space.near_duplicates import PERMUTATIONS, near_duplicates, rows_per_band, shingles, signatures


def jaccard(first: str, second: str, language: str = "en") -> float:
    a, b = shingles(first, language), shingles(second, language)
    return len(a & b) / len(a | b)


def found(texts: list[str], threshold: float = 0.8, language: str = "en") -> dict[int, int]:
    """Near-duplicates where every text has an image of its own and none is protected."""
    return near_duplicates(texts, np.arange(len(texts)), np.zeros(len(texts), bool), threshold, language)


def variants(seed: int) -> list[str]:
    """Texts of 40 words and copies of them with 1 to 20 words replaced."""
    chance = random.Random(seed)
    texts = []
    for _ in range(15):
        words = [f"w{chance.randrange(2000)}" for _ in range(40)]
        texts.append(" ".join(words))
        for changes in (1, 2, 4, 8, 20):
            copy = list(words)
            for place in chance.sample(range(40), changes):
                copy[place] = f"x{chance.randrange(2000)}"
            texts.append(" ".join(copy))
    chance.shuffle(texts)
    return texts


def test_shingles() -> None:
    assert shingles("The cat, the CAT sat.") == {"the cat the", "cat the cat", "the cat sat"}
    assert shingles("Two words") == {"two words"}
    assert shingles("...") == set()
    assert shingles("桥梁建设者 们", "zh") == {"桥梁建", "梁建设", "建设者", "设者们"}
    assert shingles("桥", "zh") == {"桥"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_signatures_estimate_jaccard(language: str) -> None:
    texts = variants(0)
    values, has_words = signatures(texts, len(texts), language)
    assert has_words.all()
    errors = [
        (values[a] == values[b]).mean() - jaccard(texts[a], texts[b], language)
        for a, b in itertools.combinations(range(len(texts)), 2)
    ]
    spread = 0.5 / PERMUTATIONS**0.5  # the standard error at a similarity of 1/2, where it is largest
    assert np.abs(errors).max() < 5 * spread
    assert abs(np.mean(errors)) < 0.01


def test_signatures_stay_the_same() -> None:
    """The same rows are dropped whatever version of the library is installed."""
    values, _ = signatures(["the cat sat on the mat"], 1)
    assert values[0, :4].tolist() == [29912, 60772, 29549, 4743]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    rows = rows_per_band(threshold)
    assert 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.99
    longer = rows + 1
    assert longer > PERMUTATIONS or 1 - (1 - threshold**longer) ** (PERMUTATIONS // longer) < 0.99


@pytest.mark.parametrize("threshold", [0.4, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_against_exact_jaccard(threshold: float, seed: int) -> None:
    texts = variants(seed)
    repeats = found(texts, threshold)
    assert repeats
    for row, kept in repeats.items():
        assert kept < row
        assert kept not in repeats
        assert jaccard(texts[row], texts[kept]) > threshold - 0.15
    kept = [row for row in range(len(texts)) if row not in repeats]
    for a, b in itertools.combinations(kept, 2):
        assert jaccard(texts[a], texts[b]) < threshold + 0.15


def test_identical_texts_are_found_at_any_threshold() -> None:
    assert found(["A cat sat.", "a dog", "a CAT sat", "a dog"], threshold=1.0) == {2: 0, 3: 1}


def test_texts_without_words_repeat_nothing() -> None:
    assert found(["...", "!!!", "...", "cat", "cat"]) == {4: 3}
    assert found(["..."]) == {}
    assert found([]) == {}


def test_captions_of_one_image_are_no_duplicates_of_each_other() -> None:
    texts = ["a cat sat on the mat"] * 4
    assert near_duplicates(texts, np.array([7, 7, 8, 7]), np.zeros(4, bool), 0.8) == {2: 0}


def test_protected_texts_stay_and_what_repeats_them_goes() -> None:
    texts = ["a cat sat", "a cat sat", "a dog ran", "a cat sat", "a dog ran"]
    protected = np.array([False, True, False, True, False])
    assert near_duplicates(texts, np.arange(5), protected, 0.8) == {0: 1, 4: 2}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.sampled_from("abc"), max_size=6), st.integers(0, 3), st.booleans()), max_size=30),
    st.sampled_from([0.3, 0.8, 1.0]),
)
def test_what_is_dropped_repeats_what_is_kept(rows: list[tuple[list[str], int, bool]], threshold: float) -> None:
    texts = [" ".join(words) for words, _, _ in rows]
    images = np.array([image for _, image, _ in rows], int)
    protected = np.array([kept for _, _, kept in rows], bool)
    repeats = near_duplicates(texts, images, protected, threshold)
    for row, kept in repeats.items():
        assert not protected[row]
        assert protected[kept] or kept < row
        assert kept not in repeats
        assert images[row] != images[kept]
    for a, b in itertools.combinations([row for row in range(len(rows)) if row not in repeats], 2):
        if shingles(texts[a]) and images[a] != images[b] and not (protected[a] and protected[b]):
            assert shingles(texts[a]) != shingles(texts[b])
