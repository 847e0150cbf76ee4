"""Which examples of a minibatch are positive and negative, and how hard each is: the system of Xu et al. (ICCS 2019).

From their abstract:

- Not all positives are equally positive, and not all negatives equally negative.
- A siamese network compares an example's text with the text that belongs to its image.
- Labels that follow from this weigh a pairwise loss.

From Yu et al. 2018 (arXiv 1802.00985), on which they build: the loss, on mean and variance of the similarities of
matching and non-matching pairs. A pair matches where its text and image have the same category.

Ours:

- All examples of a minibatch of pairs at once, B images by B texts.
- In a dataset without categories a text matches an image whose text is its Doc2Vec neighbor.
- The form of the labels.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from datasets import Prepared, are_listed, read_neighbors
from losses import check_bool, full_precision, multiple_instance_similarities
from pipeline.devices import to_device
from pipeline.errors import UserError
from pipeline.files import read_array
from pipeline.pairs import read_pairs
from pipeline.schema import Loss
from pipeline.steps import FIND_NEIGHBORS, SIAMESE_LABELS, Step
from pipeline.work import Work


def by_neighbors(work: Path, relevance: str, space: str) -> bool:
    """Whether Doc2Vec neighbors, and not categories, make two texts in WORK alike.

    relevance: `siamese.relevance`. space: `neighbors.space`. Raises UserError where categories are asked for and there
    are none, and where the neighbors are not Doc2Vec's.
    """
    if relevance != "neighbors":
        categories = read_pairs(work, ["category"])["category"]
        there = pc.any(pc.not_equal(pc.fill_null(categories, ""), "")).as_py()
        if there:
            return False
        if relevance == "category":
            raise UserError(f"{work} has no categories; set siamese.relevance to neighbors")
    if space != "doc2vec":
        raise UserError("siamese.relevance by neighbors means Doc2Vec's; set neighbors.space to doc2vec")
    return True


def siamese_step(work: Path, relevance: str, space: str) -> Step:
    """The step that trains the siamese network. It reads the neighbor table only where neighbors make texts alike."""
    if not by_neighbors(work, relevance, space):
        return SIAMESE_LABELS
    return dataclasses.replace(SIAMESE_LABELS, inputs=(*SIAMESE_LABELS.inputs, *FIND_NEIGHBORS.outputs))


@dataclass
class Relevance:
    """What makes two texts alike: the same category or, with a table of neighbors, that one is the other's neighbor."""

    image_ids: np.ndarray
    """(N,) int64, equal where pairs share an image."""
    categories: np.ndarray
    """(N,) int64, -1 where a pair has none."""
    rows: np.ndarray | None = None
    """(R,) pair numbers, ascending, whose neighbors are known; None where categories decide."""
    neighbors: np.ndarray | None = None
    """(R, k) their neighbors' pair numbers, -1 where there are fewer."""

    def own(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(A, B) bool, True where the pairs `a` (A,) and `b` (B,) share an image."""
        return self.image_ids[a][:, None] == self.image_ids[b]

    def alike(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which texts of the pairs `a` (A,) and `b` (B,) are alike, and which are not, (A, B) bool both.

        Texts of one image are neither. Without neighbors, nor are texts that have no category.
        """
        others = ~self.own(a, b)
        if self.neighbors is None:
            known = (self.categories[a] >= 0)[:, None] & (self.categories[b] >= 0)
            same = self.categories[a][:, None] == self.categories[b]
            return others & known & same, others & known & ~same
        near = self._in_list_of(a, b) | self._in_list_of(b, a).T
        return others & near, others & ~near

    def _in_list_of(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(A, B) bool, True where the pair of `b` is in the list of the pair of `a`. An unknown list is empty."""
        assert self.rows is not None and self.neighbors is not None
        place = np.minimum(np.searchsorted(self.rows, a), len(self.rows) - 1)
        lists = np.where((self.rows[place] == a)[:, None], self.neighbors[place], -1)
        return are_listed(b, lists)


def train_relevance(work: Path, relevance: str, space: str, data: Prepared) -> Relevance:
    """What makes the train texts alike. Raises UserError as `by_neighbors` and `read_neighbors`."""
    if not by_neighbors(work, relevance, space):
        return Relevance(data.image_ids, data.categories)
    rows = data.rows["train"]
    return Relevance(data.image_ids, data.categories, rows, read_neighbors(Work(work).neighbors(space), rows))


def likeness(a: Tensor, b: Tensor, comparison: Tensor) -> Tensor:
    """Logits of how alike two sets of texts are, (A, B): Σ_d w_d a_d b_d + bias.

    a: (A, D), b: (B, D), the siamese network's unit vectors; comparison: (D + 1,), its weights w and its bias.
    """
    return (a * comparison[:-1]) @ b.T + comparison[-1]


class PairwiseLoss:
    """The pairwise similarity loss over all examples of a minibatch, with the labels that `loss.labels` asks for.

    Attributes:
        with_neighbors: whether each pair's drawn Doc2Vec neighbor has to be among the texts. A minibatch has many pairs
            of one category, but hardly any neighbors.
    """

    def __init__(self, settings: Loss, relevance: Relevance, work: Work, device: torch.device) -> None:
        self.settings, self.relevance, self.device = settings, relevance, device
        self.with_neighbors = relevance.neighbors is not None
        self.vectors: np.ndarray | None = None
        self.comparison: Tensor | None = None
        if settings.labels == "siamese":
            self.vectors = read_array(work.siamese_vectors)
            self.comparison = torch.from_numpy(np.array(read_array(work.siamese_comparison))).to(device)

    def __call__(
        self,
        images: Tensor,
        texts: Tensor,
        image_rows: np.ndarray,
        text_rows: np.ndarray,
        readable: Tensor | None = None,
    ) -> Tensor:
        """The loss of the examples (image of pair i, text of pair j), a scalar. An image with its own text is one.

        images: (B, D) and texts: (M, D) unit vectors, of the pairs `image_rows` (B,) and `text_rows` (M,); or (B, K, D)
        and (M, K, D) of PVSE, as similar as their closest embeddings. readable: (B,) bool, False where the image was
        lost and has no example.
        """
        of_image = self.relevance.own(image_rows, text_rows)
        alike, unlike = self.relevance.alike(image_rows, text_rows)
        own, positive, negative = (to_device(mask, self.device) for mask in (of_image, of_image | alike, unlike))
        if readable is not None:
            own, positive, negative = (mask & readable[:, None] for mask in (own, positive, negative))
        if images.ndim == 2:
            images, texts = images[:, None], texts[:, None]
        return pairwise_similarity_loss(
            multiple_instance_similarities(images, texts),
            positive,
            negative,
            self.labels(image_rows, text_rows, positive, negative, own),
            margin=self.settings.mean_margin,
            mean_weight=self.settings.mean_weight,
        )

    def labels(
        self, image_rows: np.ndarray, text_rows: np.ndarray, positive: Tensor, negative: Tensor, own: Tensor
    ) -> Tensor | None:
        """(B, M) labels of all examples, None where all are equal. Of an image its own text is compared."""
        if self.vectors is None or self.comparison is None:
            return None
        of_images, of_texts = (to_device(self.vectors[rows], self.device) for rows in (image_rows, text_rows))
        alike = likeness(of_images, of_texts, self.comparison).sigmoid()
        return fine_grained_labels(alike, positive, negative, own, strength=self.settings.label_strength)


def pairwise_similarity_loss(
    similarities: Tensor,
    positive: Tensor,
    negative: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float = 0.4,
    mean_weight: float = 1.0,
) -> Tensor:
    """(σ²₊ + σ²₋) + λ [m − (μ₊ − μ₋)]₊ of the examples of a minibatch, a scalar (Yu et al. 2018, arXiv 1802.00985).

    μ₊, σ²₊ are mean and variance (of the population) of the similarities of the positive examples, μ₋, σ²₋ those of the
    negative ones, m = margin and λ = mean_weight. With labels ℓ (Xu et al. 2019) an example counts ℓ times as much:
    μ = Σ ℓ s / Σ ℓ and σ² = Σ ℓ (s − μ)² / Σ ℓ over each side. That labels enter the loss and raise the influence of
    hard examples is from their abstract; that they are weights of both moments is ours. Equal labels change nothing.

    similarities: (B, M). positive, negative: (B, M) bool, disjoint; what is in neither does not count. labels: (B, M),
    above 0, without a gradient; None for equal ones. A side without examples has no variance, and the margin counts
    only where both have some. Precision as for `angular_npairs_loss`. Raises ValueError for shapes that do not fit.
    """
    similarities = full_precision(similarities)
    labels = torch.ones_like(similarities) if labels is None else labels.detach().to(similarities)
    if labels.shape != similarities.shape:
        raise ValueError(f"labels must be {tuple(similarities.shape)}, got {tuple(labels.shape)}")
    variances, means, there = [], [], []
    for name, examples in (("positive", positive), ("negative", negative)):
        check_bool(name, examples, similarities.shape)
        weights = labels * examples
        total = weights.sum()
        weights = weights / total.clamp(min=torch.finfo(total.dtype).tiny)
        means.append((weights * similarities).sum())
        variances.append((weights * (similarities - means[-1]).square()).sum())
        there.append(total > 0)
    apart = (margin - (means[0] - means[1])).relu() * (there[0] & there[1])
    return variances[0] + variances[1] + mean_weight * apart


def fine_grained_labels(
    likeness: Tensor, positive: Tensor, negative: Tensor, own: Tensor | None = None, *, strength: float = 1.0
) -> Tensor:
    """Labels 1 + strength · hardness of the examples of a minibatch, (B, M), 1 for what is no example.

    Xu et al. (ICCS 2019): a positive whose texts look unlike is hard, and a negative whose texts look alike. With the
    likeness s in (0, 1) of the example's text and its image's own text, hardness is 1 − s for a positive and s for a
    negative. That is from their abstract; the linear form is ours.

    likeness: (B, M). positive, negative: (B, M) bool, disjoint. own: (B, M) bool, the positives that are a text with
    its own image: that a text is like itself says nothing, so they get the mean hardness of the other positives, or 0
    where there are none. Raises ValueError for shapes that do not fit.
    """
    own = torch.zeros_like(positive) if own is None else own
    for name, examples in (("positive", positive), ("negative", negative), ("own", own)):
        check_bool(name, examples, likeness.shape)
    unlike = 1 - likeness
    others = positive & ~own
    mean = (unlike * others).sum() / others.sum().clamp(min=1)
    hardness = torch.where(positive, torch.where(own, mean, unlike), likeness * negative)
    return 1 + strength * hardness
