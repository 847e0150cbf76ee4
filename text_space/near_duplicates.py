"""Texts that nearly repeat another one, found with MinHash signatures and locality-sensitive hashing.

Broder, "On the resemblance and containment of documents" (1997); banding as in Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", ch. 3. Candidates from the bands are verified by the share of equal signature values,
which estimates the Jaccard similarity of two texts' 3-grams with a standard error of at most 0.044.

The signatures are datasketch's. The bands are not its MinHashLSH, although both propose the same candidates: that
takes 7.2 KB a text (measured with 100,000 texts, threshold 0.8), 24 GB for 3.3 million. A signature takes 256 bytes.
"""

import functools
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasketch import MinHash

from pipeline.files import open_array, read_json, write_json
from pipeline.processes import cores, in_order
from pipeline.progress import ProgressBar

TEXTS_AT_A_TIME = 5_000
"""Texts that a process signs at a time."""
PERMUTATIONS = 128
"""Values of a signature."""
WITHOUT_SPACES = ("zh", "ja", "th", "lo", "km", "my")
"""Languages written without spaces between words."""

_MULTIPLIERS = np.random.default_rng(0).integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def shingles(text: str, language: str = "en") -> set[str]:
    """The 3-grams of a text's words, in lower case; of its characters in languages without spaces.

    A text of one or two words is one shingle. A text without a word has none.
    """
    words = re.findall(r"\w+", text.lower())
    if language in WITHOUT_SPACES:
        characters = "".join(words)
        return {characters[i : i + 3] for i in range(max(1, len(characters) - 2))} if characters else set()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set()


def signatures(
    texts: Iterable[str], count: int, language: str = "en", unfinished: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """MinHash signatures of `count` texts, uint16 (count, PERMUTATIONS), and which texts have a word, bool (count,).

    Only the low 16 bits of each value are kept: two different values agree in them once in 65,536 times. With the
    folder `unfinished` both results lie in it, memory-mapped, and a stopped call resumes there.
    """
    done, files = 0, []
    values, has_words = np.zeros((0 if unfinished else count, PERMUTATIONS), np.uint16), np.zeros(count, bool)
    if unfinished:
        done_file = unfinished / "signatures.json"
        done = read_json(done_file) if done_file.is_file() else 0
        files = [
            open_array(unfinished / "signatures.npy", (count, PERMUTATIONS), np.uint16, done > 0),
            open_array(unfinished / "has_words.npy", (count,), bool, done > 0),
        ]
        values, has_words = files
    texts = itertools.islice(texts, done, None)
    parts = iter(lambda: list(itertools.islice(texts, TEXTS_AT_A_TIME)), [])
    bar = ProgressBar(total=count, initial=done, desc="near-duplicate texts: signatures", unit="text")
    sign = functools.partial(_sign, language=language)
    processes = cores() if count > 2 * TEXTS_AT_A_TIME else 0  # for few texts, starting processes takes longer
    with bar:
        for of_part in in_order(sign, parts, processes):
            end = done + len(of_part[0])
            values[done:end], has_words[done:end] = of_part
            done = end
            if unfinished:
                for file in files:
                    file.flush()
                write_json(done_file, done)
            bar.update(len(of_part[0]))
    return values, has_words


def _sign(texts: list[str], language: str) -> tuple[np.ndarray, np.ndarray]:
    # The scheme fixes the signatures. Another default of a newer library would find other duplicates.
    minhash = MinHash(PERMUTATIONS, scheme="affine32")
    values, has_words = np.zeros((len(texts), PERMUTATIONS), np.uint16), np.zeros(len(texts), bool)
    for row, text in enumerate(texts):
        if of_text := shingles(text, language):
            minhash.clear()
            minhash.update_batch([shingle.encode() for shingle in of_text])
            values[row] = minhash.hashvalues.astype(np.uint16)
            has_words[row] = True
    return values, has_words


def rows_per_band(threshold: float) -> int:
    """The most rows a band at which two texts of similarity `threshold` share a band with probability 0.99."""
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
    unfinished: Path | None = None,
) -> dict[int, int]:
    """The texts to leave out, each with the kept text that it nearly repeats; both are positions in `texts`.

    - Of two near-duplicates the earlier stays.
    - `protected` texts (bool) stay, and earlier texts that repeat them go.
    - Texts of one image (equal numbers in `images`, one a text) are no duplicates of each other.
    - A text without a word repeats nothing.

    `unfinished` is as for `signatures`.
    """
    values, has_words = signatures(texts, len(images), language, unfinished)
    rows, starts, row_of, bucket_of = _meetings(values, has_words, rows_per_band(threshold))
    repeats: dict[int, int] = {}
    # The kept texts of each bucket are a linked list of meetings: the bucket's last one, and before each the previous.
    last = np.full(int(bucket_of.max(initial=-1)) + 1, -1, np.int64)
    previous = np.full(len(bucket_of), -1, np.int64)
    order = np.argsort(~protected[rows], kind="stable")
    for number in ProgressBar(order.tolist(), desc="near-duplicate texts: comparing", unit="text"):
        row, meetings = int(rows[number]), range(starts[number], starts[number + 1])
        if not protected[row]:
            others = set()
            for meeting in meetings:
                other = last[bucket_of[meeting]]
                while other >= 0:
                    others.add(row_of[other])
                    other = previous[other]
            near = np.array(sorted(others), np.int64)
            near = near[images[near] != images[row]]
            near = near[(values[near] == values[row]).mean(axis=1) >= threshold]
            if len(near):
                repeats[row] = int(near[0])
                continue
        for meeting in meetings:
            bucket = bucket_of[meeting]
            previous[meeting], last[bucket] = last[bucket], meeting
    return repeats


def _meetings(
    values: np.ndarray, has_words: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The buckets in which texts meet others.

    `values` (texts, PERMUTATIONS) are cut into bands of `rows` values. Texts that agree in a band share a bucket.
    Buckets with a single text, nearly all, are never built, so that millions of texts fit into memory.
    Returns the T texts that meet another, ascending; where the meetings of each begin (T + 1,); and for each meeting
    its text and its bucket's number.
    """
    candidates = np.flatnonzero(has_words)
    members, numbers, buckets = [], [], 0
    bands = range(0, PERMUTATIONS - rows + 1, rows)
    for start in ProgressBar(bands, desc="near-duplicate texts: bands", unit="band"):
        keys = np.zeros(len(candidates), np.uint64)
        for column in range(start, start + rows):
            keys += values[candidates, column] * _MULTIPLIERS[column]  # wraps around, as a hash may
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        lengths = np.diff(starts, append=len(order))
        shared = np.repeat(lengths > 1, lengths)
        members.append(candidates[order[shared]].astype(np.int32))
        numbers.append(buckets + np.repeat(np.arange((lengths > 1).sum(), dtype=np.int32), lengths[lengths > 1]))
        buckets += int((lengths > 1).sum())
    row_of, bucket_of = np.concatenate(members), np.concatenate(numbers)
    order = np.argsort(row_of, kind="stable")
    row_of, bucket_of = row_of[order], bucket_of[order]
    texts, counts = np.unique(row_of, return_counts=True)
    return texts, np.concatenate([[0], np.cumsum(counts)]), row_of, bucket_of
