"""Distances of pairs in the joint space, and neighbors in Doc2Vec space, as TensorBoard and the report show them."""

import numpy as np
import torch

BLOCK = 256
"""Texts whose distances to all others are in memory at once."""


def doc2vec_neighbors(vectors: np.ndarray, groups: np.ndarray, anchors: np.ndarray, k: int) -> np.ndarray:
    """Pairs (anchor, neighbor) of positions, (P, 2) int64: each anchor with its `k` nearest texts (Eq. 5).

    A text of the anchor's own image is no neighbor, so that an anchor may have fewer.

    Args:
        vectors: (N, d) Doc2Vec vectors of the texts. Distance is Euclidean.
        groups: (N,) image numbers.
        anchors: (A,) positions.
        k: neighbors of an anchor; of fewer texts, all.
    """
    reference = torch.from_numpy(np.array(vectors))
    found = []
    for part in np.array_split(anchors, -(-len(anchors) // BLOCK)):
        distances = torch.cdist(reference[part], reference)
        distances[torch.from_numpy(groups[part][:, None] == groups)] = torch.inf
        nearest = distances.topk(min(k, len(vectors)), largest=False)
        row, place = torch.nonzero(nearest.values.isfinite(), as_tuple=True)
        found.append(np.column_stack([part[row.numpy()], nearest.indices[row, place].numpy()]))
    return np.concatenate(found)


def pair_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances (n,), from 0 to 2, of unit vectors (n, D); with (n, K, D) of each closest pair of vectors."""
    x, y = (vectors if vectors.ndim == 3 else vectors[:, None] for vectors in (x, y))
    found = []
    for start in range(0, len(x), 4096):
        rows = slice(start, start + 4096)
        differences = x[rows, :, None].astype(np.float64) - y[rows, None]
        found.append(np.sqrt((differences**2).sum(axis=-1)).min(axis=(1, 2)))
    return np.concatenate(found) if found else np.zeros(0)
