"""Points among which step 3 searches: Euclid's nearest of a row's query are the row's neighbors.

By Euclidean distance or cosine the query of a row is its own point. Neighbors in two spaces at once, `neighbors.space
both`, are ranked by z_text + z_image. z_text of the rows i and j is the cosine of their text vectors, less the mean of
the cosines of i and all other rows, over their standard deviation; z_image is that of their images. With unit vectors
t and v the sum is (t_i / s, v_i / r) · (t_j, v_j) less a number of i, where s and r are the deviations of i. All points
(t, v) have the length √2. So the highest sum is the least Euclidean distance from i's weighted vector, exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.files import open_array
from text_space.hnsw import slices

ROWS_AT_A_TIME = 10_000
"""Rows that are computed at a time."""
LEAST_DEVIATION = 1e-6
"""Deviation of a row's cosines below which they are all the same but for float32's rounding: the row's z is 0."""


@dataclass(frozen=True)
class Points:
    """n points of d dimensions, the queries of the rows, and what stands for distance in a neighbor table."""

    points: np.ndarray
    """(n, d) float32, perhaps memory-mapped."""
    queries: Callable[[np.ndarray], np.ndarray]
    """From rows (q,) to their queries (q, d) float32."""
    distances: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """From rows (q,) and Euclidean distances (q, k) from their queries, inf for none, to the table's (q, k)."""


def points_of(vectors: np.ndarray, distance: str, folder: Path | None) -> Points:
    """Points of `vectors` (n, d) by `neighbors.distance`; in `folder`, memory-mapped, where they are computed."""
    if distance == "euclidean":
        points = np.ascontiguousarray(vectors, dtype=np.float32)
        return Points(points, points.__getitem__, lambda rows, distances: distances)
    points = _empty(vectors.shape, folder)
    for part in slices(len(vectors), ROWS_AT_A_TIME):
        points[part] = on_sphere(vectors[part])
    # 1 - cos of the angle between unit vectors
    return Points(points, points.__getitem__, lambda rows, distances: np.square(distances) / 2)


def points_of_both(texts: np.ndarray, images: np.ndarray, folder: Path | None) -> Points:
    """Points whose nearest have the highest z_text + z_image; the table's distance is minus that sum.

    texts: (n, d) and images: (n, e), vectors of the same rows. A row whose cosines are all the same, such as that of a
    zero vector, has z = 0 in that space. Means and deviations are exact: they follow from the mean and the covariance
    of the unit vectors.
    """
    count, width = len(texts), texts.shape[1]
    points = _empty((count, width + images.shape[1] + 1), folder)
    for part in slices(count, ROWS_AT_A_TIME):
        text, image = on_sphere(texts[part]), on_sphere(images[part])
        # Zero vectors stay zero. The last dimension gives their points the length of the others.
        missing = 2.0 - text.any(axis=1) - image.any(axis=1)
        points[part] = np.hstack([text, image, np.sqrt(missing)[:, None]])
    of_text, of_image = slice(0, width), slice(width, -1)
    moments = [cosine_moments(points[:, of_space]) for of_space in (of_text, of_image)]
    means, deviations = np.stack(moments, axis=2)
    constant = deviations < LEAST_DEVIATION
    weights = np.where(constant, 0, 1 / np.where(constant, 1, deviations))
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    # Queries get the length of the points: one that weighs both spaces alike is its own point.
    scaled = np.sqrt(2) * weights / np.where(lengths == 0, 1, lengths)

    def queries(rows: np.ndarray) -> np.ndarray:
        weighted = np.zeros((len(rows), points.shape[1]), dtype=np.float32)
        weighted[:, of_text] = points[rows, of_text] * scaled[rows, :1]
        weighted[:, of_image] = points[rows, of_image] * scaled[rows, 1:]
        return weighted

    def distances(rows: np.ndarray, euclidean: np.ndarray) -> np.ndarray:
        there = np.isfinite(euclidean)
        squares = 2 + np.square(scaled[rows]).sum(axis=1, keepdims=True)
        products = (squares - np.square(np.where(there, euclidean, 0), dtype=np.float64)) / 2
        sums = products * lengths[rows] / np.sqrt(2) - (weights * means)[rows].sum(axis=1, keepdims=True)
        return np.where(there, -sums, np.inf)

    return Points(points, queries, distances)


def cosine_moments(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n,) of each row's cosines with all other rows. unit: (n, d), of length 1 or 0.

    With m the mean of the rows and a_ij = u_i · (u_j − m): Σ_j a_ij = 0 and Σ_j a_ij² = u_iᵀ C u_i, where C = Σ_j
    (u_j − m)(u_j − m)ᵀ. The row itself is taken out of both sums. O(n d²), in float64.
    """
    count, others = len(unit), max(len(unit) - 1, 1)
    parts = list(slices(count, ROWS_AT_A_TIME))
    mean = sum(unit[part].sum(axis=0, dtype=np.float64) for part in parts) / count
    scatter = np.zeros((unit.shape[1], unit.shape[1]))
    for part in parts:
        centered = unit[part] - mean
        scatter += centered.T @ centered
    means, deviations = np.empty(count), np.empty(count)
    for part in parts:
        rows = unit[part].astype(np.float64)
        own = np.einsum("ij,ij->i", rows, rows - mean)
        squares = np.einsum("ij,ij->i", rows @ scatter, rows) - np.square(own)
        means[part] = rows @ mean - own / others
        deviations[part] = np.sqrt(np.maximum(squares / others - np.square(own / others), 0))
    return means, deviations


def on_sphere(vectors: np.ndarray) -> np.ndarray:
    """`vectors` (n, d) at unit length, float32: there Euclid's nearest are the cosine's. Zero stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)


def _empty(shape: tuple[int, int], folder: Path | None) -> np.ndarray:
    """A float32 array to be filled in, memory-mapped in `folder` where there is one."""
    return np.empty(shape, dtype=np.float32) if folder is None else open_array(folder / "points.npy", shape, np.float32)
