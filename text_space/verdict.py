"""What steps 1 and 3 say before anything is trained: does the vocabulary know the texts, can the neighbors help?"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from text_space.hnsw import slices

FEW_KNOWN_WORDS = 0.75
"""Share of known words below which step 1 names another doc2vec.min_count."""
MIN_COUNTS = (20, 10, 5, 3, 2, 1)
"""Values of doc2vec.min_count that it chooses from."""
LINES_COUNTED = 100_000
"""Texts that it counts words of."""

SAMPLE = 2000
"""Train pairs whose neighbors are judged, at most."""
POOL = 20_000
"""Images that an image is compared with, at most."""
PERMUTATIONS = 200
"""Draws from which the interval of chance is taken."""
ROWS_AT_A_TIME = 10_000
"""Rows that `category_share` judges at a time."""
NEAR_IMAGES = 0.01
"""Share of the images that counts as near."""

Agrees = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of rows (q,) and their neighbors (q, k), −1 where there is none: which neighbors agree, (q, k); NaN: not known."""


class Agreement(NamedTuple):
    """Share of the neighbors that agree with their row, and the 95 % interval of that share by chance."""

    share: float
    chance: float
    low: float
    high: float

    @property
    def is_above_chance(self) -> bool:
        """Whether the neighbors say more than others drawn at random would."""
        return self.share > self.high

    def __str__(self) -> str:
        return f"by chance {self.chance:.3f} [{self.low:.3f}, {self.high:.3f}]"


def agreement(positions: np.ndarray, agrees: Agrees, seed: int) -> Agreement | None:
    """How many neighbors agree with their row, beside the neighbors of other rows, which are drawn PERMUTATIONS times.

    positions: (n, k), −1 where there is none. On SAMPLE rows at most. None where nothing is known of any neighbor.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(positions))[:SAMPLE])

    def share(of_rows: np.ndarray) -> float:
        answers = agrees(rows, np.asarray(positions[of_rows]))
        return float(np.nanmean(answers)) if np.isfinite(answers).any() else float("nan")

    found = share(rows)
    if not np.isfinite(found):
        return None
    by_chance = [share(rng.choice(len(positions), len(rows))) for _ in range(PERMUTATIONS)]
    low, high = np.nanquantile(by_chance, [0.025, 0.975])
    return Agreement(found, float(np.nanmean(by_chance)), float(low), float(high))


def by_category(categories: np.ndarray) -> Agrees:
    """Neighbors agree where they have the row's category. categories: (n,) numbers, −1 for none."""

    def agrees(rows: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
        own, theirs = categories[rows, None], np.where(neighbors >= 0, categories[neighbors], -1)
        return np.where((own >= 0) & (theirs >= 0), own == theirs, np.nan)

    return agrees


def category_share(positions: np.ndarray, categories: np.ndarray, first: int = 20) -> tuple[float, float]:
    """Share of the `first` neighbors of all rows that agree `by_category`, and what chance gives.

    Chance is the probability that another row drawn at random has the row's category. Both are nan where no two
    neighbors have a category. positions: (n, k). categories: (n,) numbers, −1 for none.
    """
    agrees, hits, known = by_category(categories), 0, 0
    for part in slices(len(positions), ROWS_AT_A_TIME):
        answers = agrees(np.arange(part.start, part.stop), np.asarray(positions[part, :first]))
        hits, known = hits + int(np.nansum(answers)), known + int(np.isfinite(answers).sum())
    if not known:
        return float("nan"), float("nan")
    counts = np.bincount(categories[categories >= 0]).astype(np.float64)
    total = counts.sum()
    return hits / known, float((counts * (counts - 1)).sum() / (total * (total - 1)))


def by_images(features: np.ndarray, images: np.ndarray, seed: int) -> Agrees:
    """Neighbors agree where their image is among the NEAR_IMAGES nearest of the row's image, by cosine.

    features: (n, d) image features. images: (n,) image numbers: a neighbor that has the row's own image is not known.
    What is near is measured against POOL images drawn by seed.
    """
    pool = _unit(features[np.sort(np.random.default_rng(seed).permutation(len(features))[:POOL])])

    @functools.cache
    def threshold(row: int) -> float:
        return float(np.quantile(pool @ _unit(features[row]), 1 - NEAR_IMAGES))

    def agrees(rows: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
        scores = np.einsum("qd,qkd->qk", _unit(features[rows]), _unit(features[neighbors]))
        is_near = scores >= np.array([threshold(int(row)) for row in rows])[:, None]
        return np.where((neighbors >= 0) & (images[rows, None] != images[neighbors]), is_near, np.nan)

    return agrees


def _unit(vectors: np.ndarray) -> np.ndarray:
    """float32 vectors of length 1; zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)


def better_k(k: int, texts: int) -> int | None:
    """A k of a hundredth of the texts, at least 5, where `neighbors.k` is above a twentieth of them; else None."""
    return max(5, round(texts / 100)) if k > texts / 20 else None


def better_min_count(lines: Iterable[str], min_count: int) -> tuple[int, float]:
    """The largest value of doc2vec.min_count up to `min_count` that knows FEW_KNOWN_WORDS of the words, and its share.

    The lowest, 1, where none does. lines: texts as words between blanks. LINES_COUNTED of them are read.
    """
    counts = collections.Counter(word for line in itertools.islice(lines, LINES_COUNTED) for word in line.split())
    values = [min_count, *(value for value in MIN_COUNTS if value < min_count)]
    shares = [sum(count for count in counts.values() if count >= value) / max(counts.total(), 1) for value in values]
    return next((pair for pair in zip(values, shares, strict=True) if pair[1] >= FEW_KNOWN_WORDS), (values[-1], 1.0))
