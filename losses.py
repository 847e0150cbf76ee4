"""Losses over batches of embeddings: tensors in, scalars out.

The base losses are N-pairs losses (Thomas & Kovashka, ECCV 2020, Eq. 3): every anchor is compared with its positive and
with all negatives of the minibatch at once, in O(B²) time and memory and without waiting for the device. Each exists on
embeddings and, underneath, on similarities (inner products of L2-normalised vectors), for models with several
embeddings an instance. `retrieval_loss_terms` composes the terms of Eq. 8 from either.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# (anchors, positives, negatives, negative_mask) -> scalar; what `retrieval_loss_terms` takes.
NPairsLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# --- N-pairs losses on embeddings ------------------------------------------------------------------------------------


def angular_npairs_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    negative_mask: Tensor | None = None,
    *,
    tan_squared_alpha: float = 1.0,
    form: str = "logsumexp",
    negatives_weight: float = 1.0,
) -> Tensor:
    """Angular N-pairs loss (Eq. 2 and 3; Wang et al., ICCV 2017) of L2-normalised embeddings, a scalar.

    With t = tan²α and w = negatives_weight:

    - form "logsumexp": mean_i log(1 + w Σ_j exp(4t (a_i + p_i)·n_j − 2(1 + t) a_i·p_i)), Wang et al.'s, which leaves
      out the constant 2 − 6t of the bracket. The code published with the paper tiles anchors, so that its w is B.
    - form "hinge": mean_i Σ_j [2 − 6t − 2(1 + t) a_i·p_i + 4t (a_i + p_i)·n_j]₊, the paper's Eq. 2 for unit vectors,
      summed as in Eq. 3. Unrelated vectors make its bracket positive only for t < 1/3.

    anchors, positives: (B, D), assumed L2-normalised. negatives: (M, D), likewise. negative_mask: (B, M) bool, True
    where the negative counts; None means M = B and all but the diagonal. An anchor without negatives contributes 0 to
    the mean over all B anchors. Computed in float32 (float64 for float64), whatever the autocast.

    Raises ValueError for shapes that do not fit, an unknown form, t or w that is not positive, and w ≠ 1 with "hinge".
    """
    return angular_npairs_from_similarities(
        *similarities(anchors, positives, negatives),
        negative_mask,
        tan_squared_alpha=tan_squared_alpha,
        form=form,
        negatives_weight=negatives_weight,
    )


def triplet_npairs_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    negative_mask: Tensor | None = None,
    *,
    margin: float = 0.2,
) -> Tensor:
    """Triplet N-pairs loss (Eq. 1 summed as in Eq. 3), mean_i Σ_j [‖a_i − p_i‖² − ‖a_i − n_j‖² + margin]₊, a scalar.

    Shapes, normalisation, mask, precision and errors as for `angular_npairs_loss`.
    """
    anchor_positive, anchor_negative, _ = similarities(anchors, positives, negatives)
    return triplet_npairs_from_similarities(anchor_positive, anchor_negative, negative_mask, margin=margin)


def similarities(anchors: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products a_i·p_i (B,), a_i·n_j (B, M) and p_i·n_j (B, M) of (B, D), (B, D) and (M, D), in full precision.

    Raises ValueError where the shapes do not fit.
    """
    if anchors.ndim != 2 or anchors.shape != positives.shape:
        raise ValueError(
            f"anchors and positives must both be (B, D), got {tuple(anchors.shape)} and {tuple(positives.shape)}"
        )
    if negatives.ndim != 2 or negatives.shape[1] != anchors.shape[1]:
        raise ValueError(f"negatives must be (M, {anchors.shape[1]}), got {tuple(negatives.shape)}")
    # Autocast would round every product to bfloat16; at these sizes it saves nothing.
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, positives, negatives = map(_full_precision, (anchors, positives, negatives))
        return (anchors * positives).sum(dim=1), anchors @ negatives.T, positives @ negatives.T


# --- N-pairs losses on similarities ----------------------------------------------------------------------------------


def angular_npairs_from_similarities(
    anchor_positive: Tensor,
    anchor_negative: Tensor,
    positive_negative: Tensor,
    negative_mask: Tensor | None = None,
    *,
    tan_squared_alpha: float = 1.0,
    form: str = "logsumexp",
    negatives_weight: float = 1.0,
) -> Tensor:
    """`angular_npairs_loss` from a·p (B,), a·n (B, M) and p·n (B, M); everything else as there."""
    if form not in ("logsumexp", "hinge"):
        raise ValueError(f"form must be 'logsumexp' or 'hinge', got {form!r}")
    if not negatives_weight > 0:
        raise ValueError(f"negatives_weight must be positive, got {negatives_weight}")
    brackets = angular_brackets(
        anchor_positive, anchor_negative, positive_negative, tan_squared_alpha=tan_squared_alpha
    )
    mask = _checked_mask(negative_mask, brackets)
    if form == "hinge":
        if negatives_weight != 1:
            raise ValueError(f"negatives_weight is a setting of the logsumexp form, got {negatives_weight} with hinge")
        return brackets.masked_fill(~mask, 0).relu().sum(dim=1).mean()
    # Out goes the constant of Eq. 2, in comes the weight of the negatives.
    exponents = brackets - (2 - 6 * tan_squared_alpha) + math.log(negatives_weight)
    # The column of zeros is the 1 of log(1 + …). It also keeps a row of nothing but −inf from having a NaN gradient.
    one = exponents.new_zeros(len(exponents), 1)
    return torch.cat([one, exponents.masked_fill(~mask, -math.inf)], dim=1).logsumexp(dim=1).mean()


def triplet_npairs_from_similarities(
    anchor_positive: Tensor, anchor_negative: Tensor, negative_mask: Tensor | None = None, *, margin: float = 0.2
) -> Tensor:
    """`triplet_npairs_loss` from a·p (B,) and a·n (B, M); everything else as there."""
    brackets = triplet_brackets(anchor_positive, anchor_negative, margin=margin)
    mask = _checked_mask(negative_mask, brackets)
    return brackets.masked_fill(~mask, 0).relu().sum(dim=1).mean()


def angular_brackets(
    anchor_positive: Tensor, anchor_negative: Tensor, positive_negative: Tensor, *, tan_squared_alpha: float
) -> Tensor:
    """What stands in the bracket of Eq. 2 for unit vectors, 2 − 6t − 2(1 + t) a·p + 4t (a + p)·n: (B, M).

    anchor_positive: (B,). anchor_negative, positive_negative: (B, M). Raises ValueError for other shapes and t ≤ 0.
    """
    t = tan_squared_alpha
    if not t > 0:
        raise ValueError(f"tan_squared_alpha must be positive, got {t}")
    _check_similarities(anchor_positive, anchor_negative)
    if positive_negative.shape != anchor_negative.shape:
        raise ValueError(f"p·n is {tuple(positive_negative.shape)}, a·n is {tuple(anchor_negative.shape)}")
    # bfloat16 keeps 8 bits: similarities near 1 would be off by up to 0.004 before 4t multiplies the error and exp
    # follows.
    anchor_positive, anchor_negative, positive_negative = map(
        _full_precision, (anchor_positive, anchor_negative, positive_negative)
    )
    return 2 - 6 * t - 2 * (1 + t) * anchor_positive[:, None] + 4 * t * (anchor_negative + positive_negative)


def triplet_brackets(anchor_positive: Tensor, anchor_negative: Tensor, *, margin: float) -> Tensor:
    """What stands in the bracket of Eq. 1 for unit vectors, 2 a·n − 2 a·p + margin: (B, M).

    anchor_positive: (B,). anchor_negative: (B, M). Raises ValueError for other shapes.
    """
    _check_similarities(anchor_positive, anchor_negative)
    anchor_positive, anchor_negative = map(_full_precision, (anchor_positive, anchor_negative))
    return 2 * anchor_negative - 2 * anchor_positive[:, None] + margin


def active_triplets(brackets: Tensor, negative_mask: Tensor | None = None) -> Tensor:
    """Share of the unmasked triplets whose bracket is positive, that is, which have a gradient under a hinge: a scalar.

    brackets: (B, M), from `angular_brackets` or `triplet_brackets`. negative_mask as for `angular_npairs_loss`. Where
    every triplet is masked, none is active: 0. Raises ValueError where the shapes do not fit.
    """
    mask = _checked_mask(negative_mask, brackets)
    return ((brackets > 0) & mask).sum() / mask.sum().clamp(min=1)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_similarities(anchor_positive: Tensor, anchor_negative: Tensor) -> None:
    if anchor_positive.ndim != 1 or anchor_negative.ndim != 2 or len(anchor_positive) != len(anchor_negative):
        raise ValueError(
            "a·p and a·n must be (B,) and (B, M), "
            f"got {tuple(anchor_positive.shape)} and {tuple(anchor_negative.shape)}"
        )
    if len(anchor_positive) == 0:
        raise ValueError("a batch needs at least one anchor")


def _checked_mask(negative_mask: Tensor | None, brackets: Tensor) -> Tensor:
    if negative_mask is None:
        if brackets.shape[0] != brackets.shape[1]:
            raise ValueError(f"without a negative_mask M must be B, got (B, M) = {tuple(brackets.shape)}")
        return ~torch.eye(len(brackets), dtype=torch.bool, device=brackets.device)
    if negative_mask.dtype != torch.bool or negative_mask.shape != brackets.shape:
        got = f"{negative_mask.dtype} {tuple(negative_mask.shape)}"
        raise ValueError(f"negative_mask must be bool {tuple(brackets.shape)}, got {got}")
    return negative_mask


# --- The paper's loss ------------------------------------------------------------------------------------------------


def negative_mask(anchor_ids: Tensor, negative_ids: Tensor, positive_ids: Tensor | None = None) -> Tensor:
    """(B, M) bool, True where the negative shares neither the anchor's nor the positive's image_id.

    anchor_ids: (B,), negative_ids: (M,), positive_ids: (B,), or None where the positive is of the anchor's own image. A
    neighbor drawn as the positive may itself sit in the batch, among the negatives. Raises ValueError for other shapes.
    """
    if anchor_ids.ndim != 1 or negative_ids.ndim != 1:
        raise ValueError(f"ids must be (B,) and (M,), got {tuple(anchor_ids.shape)} and {tuple(negative_ids.shape)}")
    mask = anchor_ids[:, None] != negative_ids
    if positive_ids is None:
        return mask
    if positive_ids.shape != anchor_ids.shape:
        raise ValueError(f"positive_ids must be {tuple(anchor_ids.shape)}, got {tuple(positive_ids.shape)}")
    return mask & (positive_ids[:, None] != negative_ids)


def retrieval_loss_terms(
    base_loss: NPairsLoss,
    images: Tensor,
    texts: Tensor,
    ids: Tensor,
    neighbor_images: Tensor | None = None,
    neighbor_texts: Tensor | None = None,
    neighbor_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of Eq. 8 over one batch of pairs (x_i, y_i) and, where given, their drawn neighbors (x_i', y_i').

    l_i2t  (Eq. 3): anchor x_i, positive y_i, negatives y_j.
    l_sym  (Eq. 4): anchor y_i, positive x_i, negatives x_j.
    l_img  (Eq. 7): anchor x_i, positive x_i', negatives x_j; only where neighbor_images is given.
    l_text (Eq. 6): anchor y_i, positive y_i', negatives y_j; only where neighbor_texts is given.

    base_loss: called as base_loss(anchors, positives, negatives, negative_mask), for example
    `functools.partial(angular_npairs_loss, tan_squared_alpha=1.0)`. images, texts, neighbor_images, neighbor_texts:
    (B, D), or whatever base_loss takes. ids, neighbor_ids: (B,), the image_ids of the pairs and of their neighbors.

    Raises ValueError where neighbors come without their ids, and what base_loss and `negative_mask` raise.
    """
    mask = negative_mask(ids, ids)
    terms = {"l_i2t": base_loss(images, texts, texts, mask), "l_sym": base_loss(texts, images, images, mask)}
    if neighbor_images is None and neighbor_texts is None:
        return terms
    if neighbor_ids is None:
        raise ValueError("neighbors need neighbor_ids, to be masked where they sit in the batch")
    mask = negative_mask(ids, ids, neighbor_ids)
    if neighbor_images is not None:
        terms["l_img"] = base_loss(images, neighbor_images, images, mask)
    if neighbor_texts is not None:
        terms["l_text"] = base_loss(texts, neighbor_texts, texts, mask)
    return terms


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · term, a scalar: Eq. 8 with weights {"l_i2t": 1, "l_sym": SYM, "l_img": IMG, "l_text": TEXT}.

    A term of weight 0 need not be there, and one without a weight is left out. Raises ValueError where a weighted term
    is missing or no weight differs from 0.
    """
    weights = {name: weight for name, weight in weights.items() if weight != 0}
    if not weights or not weights.keys() <= terms.keys():
        raise ValueError(f"cannot weigh the terms {sorted(terms)} with {weights}")
    return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
