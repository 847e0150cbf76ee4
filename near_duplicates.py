"""Texts that nearly repeat another one, found with MinHash signatures and locality-sensitive hashing.

Broder, "On the resemblance and containment of documents" (1997); banding as in Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", ch. 3. Candidates from the bands are verified by the share of equal signature values,
which estimates the Jaccard similarity of two texts' 3-grams with a standard error of at most 0.044.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from datasketch import MinHash
from tqdm import tqdm

PERMUTATIONS = 128
WITHOUT_SPACES = ("zh", "ja", "th", "lo", "km", "my")  # languages whose words no spaces part

_MULTIPLIERS = np.random.default_rng(0).integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def shingles(text: str, language: str = "en") -> set[str]:
    """The 3-grams of a text's words (of its characters in languages without spaces), in lower case.

    A text of fewer than three is one shingle of its own, one without any word none.
    """
    words = re.findall(r"\w+", text.lower())
    if language in WITHOUT_SPACES:
        characters = "".join(words)
        return {characters[i : i + 3] for i in range(max(1, len(characters) - 2))} if characters else set()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set()


def signatures(texts: Iterable[str], count: int, language: str = "en") -> tuple[np.ndarray, np.ndarray]:
    """MinHash signatures of `count` texts, uint16 (count, PERMUTATIONS), and which texts have a word, bool (count,).

    Only the low 16 bits of each value are kept: two that differ agree in them once in 65,536 times, and millions of
    signatures fit into memory.
    """
    # The scheme is named because it fixes the signatures: a newer library must not find other duplicates.
    minhash = MinHash(PERMUTATIONS, scheme="affine32")
    values = np.zeros((count, PERMUTATIONS), np.uint16)
    has_words = np.zeros(count, bool)
    bar = tqdm(texts, desc="near-duplicate texts: signatures", total=count, unit="text", disable=None)
    for row, text in enumerate(bar):
        if found := shingles(text, language):
            minhash.clear()
            minhash.update_batch([shingle.encode() for shingle in found])
            values[row] = minhash.hashvalues.astype(np.uint16)
            has_words[row] = True
    return values, has_words


def rows_per_band(threshold: float) -> int:
    """The longest bands in which a pair of similarity `threshold` still meets in one of them with probability 0.99."""
    for rows in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.99:
            return rows
    return 1


def near_duplicates(
    texts: Iterable[str],
    images: np.ndarray,
    protected: np.ndarray,
    threshold: float,
    language: str = "en",
) -> dict[int, int]:
    """Which texts to leave out, each with the text it nearly repeats, which is kept; both are positions in `texts`.

    The earlier of two stays, but `protected` texts (bool) stay whatever comes before them, and what repeats them goes.
    Texts of the same image (equal numbers in `images`, one a text) are no duplicates of each other. A text without a
    word repeats nothing.
    """
    values, has_words = signatures(texts, len(images), language)
    meetings = _meetings(values, has_words, rows_per_band(threshold))
    repeats: dict[int, int] = {}
    kept: defaultdict[int, list[int]] = defaultdict(list)  # by bucket: texts that stay
    order = sorted(meetings, key=lambda row: (not protected[row], row))
    for row in tqdm(order, desc="near-duplicate texts: comparing", unit="text", disable=None):
        buckets = meetings[row]
        if not protected[row]:
            others = np.unique([other for bucket in buckets for other in kept[bucket]]).astype(np.int64)
            others = others[images[others] != images[row]]
            similarity = (values[others] == values[row]).mean(axis=1)
            near = others[similarity >= threshold]
            if len(near):
                repeats[row] = int(near[0])
                continue
        for bucket in buckets:
            kept[bucket].append(row)
    return repeats


def _meetings(values: np.ndarray, has_words: np.ndarray, rows: int) -> dict[int, list[int]]:
    """The buckets in which a text meets others, for every text that meets one.

    `values` (texts, PERMUTATIONS) are cut into bands of `rows` values; texts that agree in a band share a bucket.
    Buckets are numbered; those with a single text, nearly all, are never built, so that millions of texts fit.
    """
    candidates = np.flatnonzero(has_words)
    found: defaultdict[int, list[int]] = defaultdict(list)
    buckets = 0
    for start in range(0, PERMUTATIONS - rows + 1, rows):
        keys = np.zeros(len(candidates), np.uint64)
        for column in range(start, start + rows):
            keys += values[candidates, column] * _MULTIPLIERS[column]  # wraps around, as a hash may
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        lengths = np.diff(starts, append=len(order))
        for begin, length in zip(starts[lengths > 1], lengths[lengths > 1], strict=True):
            for row in candidates[order[begin : begin + length]].tolist():
                found[row].append(buckets)
            buckets += 1
    return found
