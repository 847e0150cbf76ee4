"""The objective: from the embeddings of a batch to the named terms of the loss, and their weighted sum (Eq. 8).

It alone knows which loss a run has: the N-pairs losses of the registry, STRUC, the pairwise loss with fine-grained
labels, PVSE's extra terms, and neighborhood batches. To add an N-pairs loss, write its function in losses.py and name
it in `LOSSES` (pipeline/registry.py).
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import losses
from datasets import BatchPlan, NeighborTable, OtherTexts, Prepared, load_neighbors
from pipeline.devices import to_device
from pipeline.registry import LOSSES
from pipeline.schema import Loss, Settings
from pipeline.work import Work
from training.fine_grained import PairwiseLoss, train_relevance
from training.pvse import pvse_terms
from training.runs import Weights, reads_neighbors, soft_share

HINGE_TAN_SQUARED_ALPHA = 0.2
"""From 1/3 on the hinge has no gradient for unrelated unit vectors."""


@dataclass
class ObjectiveBatch:
    """What the objective reads of a batch of B pairs, besides their embeddings."""

    rows: np.ndarray
    """(B,) pair numbers."""
    text_rows: np.ndarray
    """Pair numbers of the texts that y holds."""
    image_ids: Tensor
    """(B,) int64."""
    neighbors: np.ndarray
    """(B,) drawn neighbor pairs, -1 where there is none."""
    positive_ids: Tensor
    """(B,) image_ids of the drawn neighbors, a pair's own where there is none."""
    readable: Tensor | None = None
    """(B,) bool, False where the pair's image was lost; None where none was."""
    neighbor_readable: Tensor | None = None
    """(B,) bool, False where the drawn neighbor's image was lost; None where none was."""


@dataclass
class Objective:
    """The loss of a run.

    A pair whose image was lost is no anchor and no negative: it contributes 0, and means stay over all B pairs. In the
    pairwise loss its text remains an example for the other images.
    """

    terms: Callable[..., dict[str, Tensor]]
    """`losses.retrieval_loss_terms` of an N-pairs loss, or `losses.structure_preserving_loss_terms`."""
    weights: dict[str, float]
    """Of the terms, by name."""
    neighbors: NeighborTable | OtherTexts | None
    """What positives of L_img and L_text are drawn from; None where no term needs any."""
    within_batch: bool
    """Whether the positives are looked up among the batch's own pairs (neighborhood batches)."""
    soft_share: float
    """`loss.soft_targets`, the share of the positive that a pair's neighbors in the batch take."""
    pairwise: PairwiseLoss | None
    """The pairwise loss in place of i2t and sym (Xu et al. 2019)."""
    lists_neighbors: bool
    """Whether the terms take all neighbors in the batch, and not only the drawn one (STRUC)."""
    val_terms: tuple[str, ...]
    """The terms whose sum is the validation loss."""
    hint: str | None
    """What to change where no triplet is active; None for losses of which every triplet has a gradient."""

    @property
    def with_neighbor_images(self) -> bool:
        """Whether x must hold the drawn neighbors' images after the pairs' own."""
        return bool(self.weights["l_img"]) and not self.within_batch

    @property
    def with_neighbor_texts(self) -> bool:
        """Whether y must hold the drawn neighbors' texts after the pairs' own."""
        wanted = self.weights["l_text"] or (self.pairwise and self.pairwise.with_neighbors)
        return bool(wanted) and not self.within_batch

    def text_rows(self, batch: BatchPlan) -> np.ndarray:
        """Pairs whose texts y must hold: the batch's, then, where wanted, the drawn neighbors."""
        return np.concatenate([batch.rows, batch.positives]) if self.with_neighbor_texts else batch.rows

    def __call__(
        self, x: Tensor, y: Tensor, batch: ObjectiveBatch, residuals: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """The terms by name: `l_i2t`, `l_sym`, and where they are weighted `l_img`, `l_text`, `l_diversity`, `l_mmd`.

        x, y: embeddings (B, D), or (B, K, D) of PVSE, of the batch's images and texts, and then of its drawn neighbors
        (2B in all) where `with_neighbor_images` and `with_neighbor_texts` say so. residuals: PVSE's, of both streams.
        """
        size, device = len(batch.rows), x.device
        positives = np.where(batch.neighbors >= 0, batch.neighbors, batch.rows)
        known: dict[str, Tensor] = {}
        if self.lists_neighbors and isinstance(self.neighbors, NeighborTable):
            members = self.neighbors.is_listed(batch.rows, np.concatenate([batch.rows, positives]))
            known["neighborhoods"] = to_device(members, device)
        x_near, y_near, has_neighbor = x[size:], y[size:], batch.neighbors >= 0
        if self.within_batch and isinstance(self.neighbors, NeighborTable):
            found = batch.neighbors[:, None] == batch.rows
            has_neighbor = found.any(axis=1)
            places = to_device(found.argmax(axis=1), device)
            x_near, y_near = x[places], y[places]
        if (self.within_batch or self.soft_share) and isinstance(self.neighbors, NeighborTable):
            near = self.neighbors.is_listed(batch.rows, batch.rows)  # being a neighbor is not mutual
            known["known_neighbors"] = near_pairs = to_device(near | near.T, device)
            if self.soft_share:
                there = batch.readable
                positives_there = near_pairs if there is None else near_pairs & there[:, None] & there
                known["targets"] = losses.soft_targets(positives_there, self.soft_share)
        terms = self.terms(
            x[:size],
            y[:size],
            batch.image_ids,
            neighbor_images=x_near if self.weights["l_img"] else None,
            neighbor_texts=y_near if self.weights["l_text"] else None,
            neighbor_ids=batch.positive_ids,
            has_neighbor=to_device(has_neighbor, device),
            readable=batch.readable,
            neighbor_readable=batch.neighbor_readable,
            **known,
        )
        if self.pairwise:
            texts = len(batch.text_rows) if self.pairwise.with_neighbors else size
            del terms["l_sym"]
            rows, text_rows = batch.rows, batch.text_rows[:texts]
            terms["l_i2t"] = self.pairwise(x[:size], y[:texts], rows, text_rows, batch.readable)
        if "l_diversity" in self.weights:
            terms |= pvse_terms(x[:size], y[:size], residuals, batch.readable, batch.neighbor_readable)
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms (Eq. 8), a scalar."""
        return losses.weighted_sum(terms, self.weights)

    def validation_loss(self, x: Tensor, y: Tensor, rows: np.ndarray, image_ids: Tensor) -> Tensor:
        """The sum of `val_terms`, i2t + sym by default, whatever the weights, or the pairwise loss: a scalar.

        x, y: (B, D) or (B, K, D), embeddings of the pairs `rows` (B,). image_ids: (B,).
        """
        if self.pairwise:
            return self.pairwise(x, y, rows, rows)
        terms = self.terms(x, y, image_ids)
        return torch.stack([terms[name] for name in self.val_terms]).sum()

    def hint_if_inactive(self, terms: Mapping[str, Tensor], image_ids: np.ndarray) -> str | None:
        """What to change where the batch has negatives and no triplet has a gradient; None elsewhere.

        image_ids: (B,) of the batch's pairs.
        """
        if self.hint is None or len(np.unique(image_ids)) < 2:
            return None
        inactive = all(terms[name].item() == 0 for name, weight in self.weights.items() if weight and name in terms)
        return self.hint if inactive else None


def npairs_loss(settings: Loss) -> losses.NPairsLoss:
    """The N-pairs loss that `loss.base` names; for fine_grained, which has its own for the pairs, the angular one.

    Keyword-only parameters of its function that are named as settings of section `loss` get their values; where a
    setting is null, the function's default stands.
    """
    function = LOSSES.load("angular" if settings.base == "fine_grained" else settings.base)
    names = [name for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY]
    options = {name: value for name in names if (value := getattr(settings, name, None)) is not None}
    if options.get("form") == "hinge":
        options.setdefault("tan_squared_alpha", HINGE_TAN_SQUARED_ALPHA)
    loss: losses.NPairsLoss = functools.partial(function, **options)
    if settings.tile_negatives:
        return lambda anchors, *others, **targets: function(
            anchors, *others, **options, **targets, negatives_weight=float(len(anchors))
        )
    return loss


def build_objective(settings: Settings, weights: Weights, data: Prepared, device: torch.device) -> Objective:
    """The objective of these settings and weights. Reads the neighbor table or the labels where a term needs them.

    Raises UserError where these are missing or of other pairs.
    """
    base = settings.loss.base
    if base == "struc":
        margin = {} if settings.loss.margin is None else {"margin": settings.loss.margin}
        terms: Callable[..., dict[str, Tensor]] = functools.partial(LOSSES.load(base), **margin)
    else:
        terms = functools.partial(losses.retrieval_loss_terms, npairs_loss(settings.loss))
    of_terms = weights.of_terms()
    pvse = settings.model.pvse
    if pvse.embeddings > 1:
        of_terms |= {"l_diversity": pvse.diversity_weight, "l_mmd": pvse.mmd_weight}
    work = settings.work_folder
    pairwise: PairwiseLoss | None = None
    if base == "fine_grained":
        relevance = train_relevance(work, settings.siamese.relevance, settings.neighbors.space, data)
        pairwise = LOSSES.load(base)(settings.loss, relevance, Work(work), device)
    neighbors: NeighborTable | OtherTexts | None = None
    if weights.img or weights.text or soft_share(settings) or (pairwise and pairwise.with_neighbors):
        if reads_neighbors(settings, weights):
            neighbors = load_neighbors(work, settings.neighbors, data)
        else:
            neighbors = OtherTexts(data)
    hints = {"triplet": "raise loss.margin", "struc": "raise loss.margin"}
    if settings.loss.form == "hinge":
        hints["angular"] = "lower loss.tan_squared_alpha"
    return Objective(
        terms=terms,
        weights=of_terms,
        neighbors=neighbors,
        within_batch=neighbors is not None and settings.training.batches == "neighborhoods",
        soft_share=soft_share(settings),
        pairwise=pairwise,
        lists_neighbors=base == "struc" and settings.neighbors.draw == "neighbors",
        val_terms=("l_i2t",) if settings.training.val_loss == "i2t" else ("l_i2t", "l_sym"),
        hint=hints.get(base),
    )
