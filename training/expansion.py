"""Neighbor expansion: embeddings move towards the other modality of their nearest train pairs (`evaluation.expand`).

With weight w, k neighbors, unit vectors f and norm(v) = v / ‖v‖:

    x̂ = norm(f(x) + w · norm(mean_j f(y_j)))    j: the k train pairs whose images are nearest to the image x
    ŷ = norm(f(y) + w · norm(mean_j f(x_j)))    j: the k train pairs whose texts are nearest to the text y

Images are near each other by the cosine of the backbone's pretrained features, texts by that of their vectors in Omega.
Of equally near pairs the lower pair number is the nearer. Only train pairs are neighbors. Of a train pair's own
neighbors, pairs of its image_id and texts of the same words are left out, as in step 3. Without a neighbor, as where a
vector is zero, an embedding stays as it is.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import Prepared
from images.loading import ImageSource, demand_readable
from models import TwoStream
from pipeline.devices import autocast
from pipeline.files import read_array
from pipeline.schema import Settings
from pipeline.work import Work
from text_space.table import same_words
from training.embedding import embed_pairs, embed_texts, encode_images
from training.image_sources import image_source, pretrained_features

SPARE = 16
"""Candidates beyond k that a matrix product in float32 proposes. float64 ranks them."""
QUERIES_AT_A_TIME, PAIRS_AT_A_TIME = 4096, 4096
"""Rows and columns of such a product: 64 MiB."""


def embed_split(model: TwoStream, data: Prepared, settings: Settings, device: torch.device) -> tuple[Tensor, Tensor]:
    """`embed_pairs` of the pairs of `evaluation.split`, expanded where `evaluation.expand` says so.

    Raises UserError where an image of theirs cannot be read, and as `Expander`.
    """
    rows, images = data.rows[settings.evaluation.split], image_source(settings, data, device, for_one_pass=True)
    size, precision = settings.evaluation.batch_size, settings.training.precision
    x, y = embed_pairs(model, data, images, rows, size, precision, device)
    needed = set(data.images.of_pair[rows].tolist())
    demand_readable({number: why for number, why in images.unreadable.items() if number in needed}, len(needed))
    if settings.evaluation.expand:
        expander = Expander(model, data, images, settings, device)
        numbers, first, image_of_row = np.unique(data.images.of_pair[rows], return_index=True, return_inverse=True)
        x, y = expander.images(x[first], numbers)[image_of_row], expander.texts(y, rows)
    return x, y


class Expander:
    """The T train pairs whose text has a known word and whose image can be read, and what they add to embeddings.

    Their embeddings are computed when they are first needed. A place is a number below T.

    Raises UserError where the backbone's features are needed and missing, and where an image can no longer be read.
    """

    def __init__(
        self, model: TwoStream, data: Prepared, images: ImageSource, settings: Settings, device: torch.device
    ) -> None:
        self.model, self.data, self.source = model, data, images
        self.weight, self.k = settings.evaluation.expand, settings.evaluation.expand_neighbors
        self.batches = (settings.evaluation.batch_size, settings.training.precision, device)
        self.features, unreadable = pretrained_features(settings, data.images, device)
        self.omega = read_array(Work(settings.work_folder).vectors)
        train = data.rows["train"]
        self.rows = train[~np.isin(data.images.of_pair[train], list(unreadable))]
        """(T,) their pair numbers, ascending."""
        self.words = np.full(len(data.image_ids), -1)
        """(N,) equal where two of them have the same words; -1 for all other pairs."""
        self.words[self.rows] = same_words(data.tokens, data.offsets, self.rows)
        dimensions = settings.model.dimensions
        self.of_images = _WhenNeeded(self._embed_images, len(self.rows), dimensions)
        self.of_texts = _WhenNeeded(self._embed_texts, len(self.rows), dimensions)

    def images(self, x: Tensor, numbers: np.ndarray) -> Tensor:
        """x̂ (R, D) of the embeddings x (R, D) of the dataset's images `numbers` (R,)."""
        pairs = np.argsort(self.data.images.of_pair, kind="stable")
        first, last = (np.searchsorted(self.data.images.of_pair[pairs], numbers, side) for side in ("left", "right"))
        own = np.full((len(numbers), int((last - first).max(initial=1))), -1)
        for line, (start, end) in enumerate(zip(first, last, strict=True)):
            own[line, : end - start] = pairs[start:end]
        return self.new_images(x, self._features(numbers), own)

    def texts(self, y: Tensor, rows: np.ndarray) -> Tensor:
        """ŷ (R, D) of the embeddings y (R, D) of the texts of the pairs `rows` (R,)."""
        return self.new_texts(y, self.omega[rows], rows[:, None])

    def new_images(self, x: Tensor, features: np.ndarray, own: np.ndarray | None = None) -> Tensor:
        """x̂ (R, D) of images with the backbone's features (R, F).

        own: (R, P) the pairs that a query is part of, -1 for none; None: it is no image of the dataset.
        """

        def of_places(places: np.ndarray) -> np.ndarray:
            return self._features(self.data.images.of_pair[self.rows[places]])

        return self._expanded(x, self._nearest(features, of_places, own), self.of_texts)

    def new_texts(self, y: Tensor, vectors: np.ndarray, own: np.ndarray | None = None) -> Tensor:
        """ŷ (R, D) of texts with vectors (R, d) in Omega. own: as for images."""
        return self._expanded(
            y, self._nearest(vectors, lambda places: self.omega[self.rows[places]], own), self.of_images
        )

    def _features(self, numbers: np.ndarray) -> np.ndarray:
        return self.features[numbers, np.zeros(len(numbers), dtype=np.int64)]

    def _nearest(
        self, queries: np.ndarray, of_places: Callable[[np.ndarray], np.ndarray], own: np.ndarray | None
    ) -> np.ndarray:
        left_out = []
        if own is not None:
            for labels in (self.data.image_ids, self.words):
                of_query, of_train = np.where(own < 0, -1, labels[own]), labels[self.rows]
                of_query = np.where(np.isin(of_query, of_train), of_query, -1)  # of pairs outside train nothing is left
                left_out.append((of_query[:, (of_query >= 0).any(axis=0)], of_train))
        return nearest_places(queries, of_places, len(self.rows), self.k, left_out, self.batches[-1])

    def _expanded(self, own: Tensor, places: np.ndarray, of_train: "_WhenNeeded") -> Tensor:
        total = np.zeros(own.shape, dtype=np.float32)
        for rank in range(self.k):
            total += of_train[places[:, rank]]
        return expanded(own, torch.from_numpy(total).to(own.device), self.weight)

    def _embed_images(self, places: np.ndarray) -> np.ndarray:
        numbers, image_of_place = np.unique(self.data.images.of_pair[self.rows[places]], return_inverse=True)
        size, precision, device = self.batches
        if len(numbers) <= size:  # of one query: processes that decode images would take seconds to start
            with torch.no_grad(), autocast(precision, device):
                x = self.model.eval().images(self.source.load(numbers, np.zeros(len(numbers), dtype=bool)))
        else:
            x = encode_images(self.model.eval().images, self.source, numbers, *self.batches)
        lost = {number: self.source.unreadable[number] for number in numbers if number in self.source.unreadable}
        demand_readable(lost, len(numbers))
        return x.cpu().numpy()[image_of_place]

    def _embed_texts(self, places: np.ndarray) -> np.ndarray:
        return embed_texts(self.model.texts, self.data.read, self.rows[places], *self.batches).cpu().numpy()


class _WhenNeeded:
    """Embeddings of the train pairs in one modality, by place. Place -1, no neighbor, has zeros."""

    def __init__(self, embed: Callable[[np.ndarray], np.ndarray], count: int, dimensions: int) -> None:
        self.embed = embed
        self.vectors = np.zeros((count + 1, dimensions), dtype=np.float32)
        self.is_known = np.arange(count + 1) == count

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        missing = np.unique(places[~self.is_known[places]])
        if len(missing):
            self.vectors[missing] = self.embed(missing)
            self.is_known[missing] = True
        return self.vectors[places]


def expanded(own: Tensor, total: Tensor, weight: float) -> Tensor:
    """norm(own + weight · norm(total)), (R, D); `own` where `total`, the sum of the neighbors, is zero."""
    moved = F.normalize(own + weight * F.normalize(total, dim=1), dim=1)
    return torch.where((total != 0).any(dim=1, keepdim=True), moved, own)


def nearest_places(
    queries: np.ndarray,
    of_places: Callable[[np.ndarray], np.ndarray],
    count: int,
    k: int,
    left_out: Sequence[tuple[np.ndarray, np.ndarray]],
    device: torch.device,
) -> np.ndarray:
    """Places (Q, k), int64, of the vectors nearest by cosine to `queries` (Q, d), the nearest first.

    They end in -1 where there are fewer. A query that is zero or not finite has none. Equal vectors stand in the order
    of their places, unless more than SPARE are equal to the k-th.

    of_places: from places (P,) to their vectors (P, d).
    count: how many vectors there are.
    left_out: labels of queries (Q, L) and of vectors (count,). A query has no neighbor of a label of its own; -1 is no
        label.
    """
    found = np.full((len(queries), k), -1, dtype=np.int64)
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        part = slice(start, start + QUERIES_AT_A_TIME)
        of_part = [
            (torch.from_numpy(mine[part]).to(device), torch.from_numpy(theirs).to(device)) for mine, theirs in left_out
        ]
        points = np.nan_to_num(queries[part].astype(np.float32), posinf=0, neginf=0)
        candidates = _candidates(points, of_places, count, k + SPARE, of_part, device)
        for line in np.flatnonzero(points.any(axis=1)):
            places = np.sort(candidates[line][candidates[line] >= 0])
            vectors = of_places(places).astype(np.float64)
            lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
            # einsum sums every row alike; a matrix product rounds equal rows differently by their place.
            cosines = np.einsum("nd,d->n", vectors, points[line].astype(np.float64)) / np.maximum(lengths, 1e-300)
            nearest = places[np.argsort(-cosines, kind="stable")][:k]
            found[start + line, : len(nearest)] = nearest
    return found


def _candidates(
    points: np.ndarray,
    of_places: Callable[[np.ndarray], np.ndarray],
    count: int,
    wanted: int,
    left_out: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
) -> np.ndarray:
    """Places (Q, at most `wanted`) of the vectors nearest to `points` (Q, d) by cosine in float32; -1 is none."""
    units = F.normalize(torch.from_numpy(points).to(device), dim=1)
    scores, places = units.new_empty(len(units), 0), torch.empty(len(units), 0, dtype=torch.int64, device=device)
    for start in range(0, count, PAIRS_AT_A_TIME):
        end = min(start + PAIRS_AT_A_TIME, count)
        vectors = torch.from_numpy(np.array(of_places(np.arange(start, end)), dtype=np.float32)).to(device)
        of_block = units @ F.normalize(vectors, dim=1).T
        for mine, theirs in left_out:
            for column in mine.T:
                of_block.masked_fill_(column[:, None] == theirs[start:end], -torch.inf)
        scores = torch.cat([scores, of_block], dim=1)
        places = torch.cat([places, torch.arange(start, end, device=device).expand_as(of_block)], dim=1)
        scores, chosen = scores.topk(min(wanted, scores.shape[1]), dim=1)
        places = places.gather(1, chosen)
    return places.masked_fill(scores == -torch.inf, -1).cpu().numpy()
