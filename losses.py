"""Losses over batches of embeddings: tensors in, scalars out.

The base losses are N-pairs losses (Thomas & Kovashka, ECCV 2020, Eq. 3): every anchor is compared with its positive and
with all negatives of the minibatch at once, in O(B²) time and memory and without waiting for the device. They work on
inner products of L2-normalised vectors. `retrieval_loss_terms` composes the terms of Eq. 8 from one of them.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

NPairsLoss = Callable[..., Tensor]
"""(anchors, positives, negatives, negative_mask) -> scalar. Those with several positives take `targets` by name."""


def angular_npairs_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    negative_mask: Tensor | None = None,
    *,
    tan_squared_alpha: float = 1.0,
    form: str = "logsumexp",
    negatives_weight: float = 1.0,
    targets: Tensor | None = None,
) -> Tensor:
    """Angular N-pairs loss (Eq. 2 and 3; Wang et al., ICCV 2017) of L2-normalised embeddings, a scalar.

    With t = tan²α and w = negatives_weight:

    - form "logsumexp": mean_i log(1 + w Σ_j exp(4t (a_i + p_i)·n_j − 2(1 + t) a_i·p_i)), Wang et al.'s, which leaves
      out the constant 2 − 6t of the bracket. The code published with the paper tiles anchors, so that its w is B.
    - form "hinge": mean_i Σ_j [2 − 6t − 2(1 + t) a_i·p_i + 4t (a_i + p_i)·n_j]₊, the paper's Eq. 2 for unit vectors,
      summed as in Eq. 3. Unrelated vectors make its bracket positive only for t < 1/3.

    anchors, positives: (B, D), assumed L2-normalised. negatives: (M, D), likewise. Where an instance has several
    embeddings (PVSE), all three are (…, K, D). negative_mask: (B, M) bool, True where the negative counts; None means
    M = B and all but the diagonal. targets: (B, B), see `soft_targets`; None means that p_i is a_i's only positive. An
    anchor without negatives contributes 0 to the mean over all B anchors. Computed in float32 (float64 for float64),
    whatever the autocast.

    Raises ValueError for shapes that do not fit, an unknown form, t or w that is not positive, and w ≠ 1 or targets
    with "hinge".
    """
    t, w = tan_squared_alpha, negatives_weight
    _check(form in ("logsumexp", "hinge"), f"form must be 'logsumexp' or 'hinge', got {form!r}")
    _check(t > 0 and w > 0, f"tan_squared_alpha and negatives_weight must be above 0, got {t}, {w}")
    _check(
        form == "logsumexp" or (w == 1 and targets is None),
        "negatives_weight and targets are settings of the logsumexp form",
    )
    if targets is not None:
        scales = (4 * t, 4 * t, 2 * (1 + t))
        return _several_positives(anchors, positives, negatives, negative_mask, targets, scales, w)
    ap, an, pn = triplet_similarities(anchors, positives, negatives)
    mask = _mask_of(negative_mask, an)
    brackets = 2 - 6 * t - 2 * (1 + t) * ap[:, None] + 4 * t * (an + pn)
    if form == "hinge":
        return brackets.masked_fill(~mask, 0).relu().sum(dim=1).mean()
    return _log_of_one_plus_sum(brackets - (2 - 6 * t) + math.log(w), mask).mean()


def infonce_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    negative_mask: Tensor | None = None,
    *,
    temperature: float = 0.1,
    targets: Tensor | None = None,
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018), the loss of CLIP one way, a scalar.

    mean_i −log(exp(a_i·p_i / τ) / (exp(a_i·p_i / τ) + Σ_j exp(a_i·n_j / τ))), which is
    mean_i log(1 + Σ_j exp(a_i·(n_j − p_i) / τ)), with τ = temperature, a constant.

    Shapes, normalisation, mask, targets, precision and errors as for `angular_npairs_loss`.
    """
    _check(temperature > 0, f"temperature must be above 0, got {temperature}")
    if targets is not None:
        scales = (1 / temperature, 0.0, 1 / temperature)
        return _several_positives(anchors, positives, negatives, negative_mask, targets, scales, 1.0)
    ap, an, _ = triplet_similarities(anchors, positives, negatives)
    return _log_of_one_plus_sum((an - ap[:, None]) / temperature, _mask_of(negative_mask, an)).mean()


def _log_of_one_plus_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """log(1 + Σ_j exp(exponents_ij)) over the entries (B, M) of the mask: (B,)."""
    # The column of zeros is the 1 of log(1 + …). It also keeps a row of nothing but −inf from having a NaN gradient.
    one = exponents.new_zeros(len(exponents), 1)
    return torch.cat([one, exponents.masked_fill(~mask, -math.inf)], dim=1).logsumexp(dim=1)


def soft_targets(neighbors: Tensor, share: float) -> Tensor:
    """T = (1 − λ) I + λ W / ΣW by row, (B, B) float32: how much each pair of a batch is a positive of each other. Ours.

    neighbors: W, (B, B) bool, with False on the diagonal. share: λ, from 0 to 1. A row of I where a pair has no
    neighbor in the batch.
    """
    check_bool("neighbors", neighbors, torch.Size([len(neighbors)] * 2))
    counts = neighbors.sum(dim=1, keepdim=True)
    of_neighbors = share * (counts > 0)
    own = torch.eye(len(neighbors), device=neighbors.device)
    return (1 - of_neighbors) * own + of_neighbors * neighbors / counts.clamp(min=1)


def _several_positives(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    negative_mask: Tensor | None,
    targets: Tensor,
    scales: tuple[float, float, float],
    negatives_weight: float,
) -> Tensor:
    """mean_i Σ_p T_ip log(1 + w Σ_n M_in exp(u a_i·n + v p·n − s a_i·p)) with scales (u, v, s), a scalar. Ours.

    The sum over n is the product of two matrices of exponentials, so that it takes O(B²) memory. Each matrix is divided
    by its rows' maxima, and float64 holds products that float32 would round to 0.
    """
    _, an, pn = triplet_similarities(anchors, positives, negatives)
    mask = _mask_of(negative_mask, an)
    _check(targets.shape == (len(an), len(pn)), f"targets must be {(len(an), len(pn))}, got {tuple(targets.shape)}")
    u, v, s = scales
    with torch.autocast(an.device.type, enabled=False):
        ap = similarities(anchors, positives).double()
        of_anchors, of_positives = (u * an.double()).masked_fill(~mask, -math.inf), v * pn.double()
        largest = [x.detach().amax(dim=1, keepdim=True).clamp(min=-1e3) for x in (of_anchors, of_positives)]
        sums = (of_anchors - largest[0]).exp() @ (of_positives - largest[1]).exp().T
        tiny = torch.finfo(sums.dtype).tiny
        exponents = sums.clamp(min=tiny).log() + largest[0] + largest[1].T - s * ap + math.log(negatives_weight)
        losses = exponents.logaddexp(exponents.new_zeros(())).masked_fill(~mask.any(dim=1, keepdim=True), 0)
        return (targets * losses).sum(dim=1).mean().to(an.dtype)


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
    ap, an, _ = triplet_similarities(anchors, positives, negatives)
    mask = _mask_of(negative_mask, an)
    brackets = 2 * an - 2 * ap[:, None] + margin
    return brackets.masked_fill(~mask, 0).relu().sum(dim=1).mean()


def triplet_similarities(anchors: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products a_i·p_i (B,), a_i·n_j (B, M) and p_i·n_j (B, M) of (B, D), (B, D) and (M, D), in float32.

    Of (B, K, D), (B, K, D) and (M, K, D), PVSE's, each is that of the closest of the K × K pairs. `training.precision:
    tf32` rounds the products on a GPU. Raises ValueError for shapes that do not fit, and for no anchor.
    """
    _check(
        anchors.ndim in (2, 3) and anchors.shape == positives.shape,
        f"anchors and positives must both be (B, D) or (B, K, D), got {tuple(anchors.shape)}, {tuple(positives.shape)}",
    )
    _check(
        negatives.ndim == anchors.ndim and negatives.shape[-1] == anchors.shape[-1],
        f"negatives must be (M, {'K, ' * (anchors.ndim - 2)}{anchors.shape[-1]}), got {tuple(negatives.shape)}",
    )
    _check(len(anchors) > 0, "a batch needs at least one anchor")
    # bfloat16 keeps 8 bits: similarities near 1 would be off by up to 0.004 before 4t multiplies the error.
    with torch.autocast(anchors.device.type, enabled=False):
        a, p, n = map(full_precision, (anchors, positives, negatives))
        if a.ndim == 2:
            return (a * p).sum(dim=1), similarities(a, n), similarities(p, n)
        return (a @ p.transpose(1, 2)).amax(dim=(1, 2)), similarities(a, n), similarities(p, n)


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (B, M), in float32, of (B, D) and (M, D); of PVSE's (B, K, D) and (M, K, D) the greatest ones."""
    if a.ndim == 3:
        return multiple_instance_similarities(a, b)
    return full_precision(a) @ full_precision(b).T


def full_precision(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _mask_of(negative_mask: Tensor | None, similarities: Tensor) -> Tensor:
    """The mask of the negatives, by default all but the diagonal of (B, B)."""
    if negative_mask is None:
        b, m = similarities.shape
        _check(b == m, f"without a negative_mask M must be B, got (B, M) = {(b, m)}")
        return ~torch.eye(b, dtype=torch.bool, device=similarities.device)
    check_bool("negative_mask", negative_mask, similarities.shape)
    return negative_mask


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_bool(name: str, mask: Tensor, shape: torch.Size) -> None:
    """Raise ValueError where a mask is of another type or shape."""
    expected = mask.dtype == torch.bool and mask.shape == shape
    _check(expected, f"{name} must be bool {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}")


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
    has_neighbor: Tensor | None = None,
    known_neighbors: Tensor | None = None,
    readable: Tensor | None = None,
    neighbor_readable: Tensor | None = None,
    targets: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of Eq. 8 over one batch of pairs (x_i, y_i) and, where given, their drawn neighbors (x_i', y_i').

    l_i2t  (Eq. 3): anchor x_i, positive y_i, negatives y_j.
    l_sym  (Eq. 4): anchor y_i, positive x_i, negatives x_j.
    l_img  (Eq. 7): anchor x_i, positive x_i', negatives x_j; only where neighbor_images is given.
    l_text (Eq. 6): anchor y_i, positive y_i', negatives y_j; only where neighbor_texts is given.

    base_loss: called as base_loss(anchors, positives, negatives, negative_mask), for example
    `functools.partial(angular_npairs_loss, tan_squared_alpha=1.0)`. images, texts, neighbor_images, neighbor_texts:
    (B, D), or whatever base_loss takes. ids, neighbor_ids: (B,), the image_ids of the pairs and of their neighbors.
    has_neighbor: (B,) bool, False where a pair has no neighbor and what stands in its place does not count; None means
    that all have one. known_neighbors: (B, B) bool, True where pair j is no negative of pair i in any term; None for no
    such pairs. That is ours, for batches that hold the neighbors: l_i2t would push apart what l_img pulls together.
    readable, neighbor_readable: (B,) bool, False where the image of the pair, or of its neighbor, was lost; None for
    none. A lost pair is no anchor and no negative: it contributes 0 to means over B. targets: (B, B), `soft_targets` of
    l_i2t and l_sym; None where a pair is its only positive.

    Raises ValueError where neighbors come without their ids, for a mask of another type or shape, and what base_loss
    and `negative_mask` raise.
    """
    others = negative_mask(ids, ids)
    if known_neighbors is not None:
        check_bool("known_neighbors", known_neighbors, others.shape)
        others = others & ~known_neighbors
    if readable is not None:
        check_bool("readable", readable, ids.shape)
        others = others & readable[:, None] & readable
    options = {} if targets is None else {"targets": targets}
    terms = {
        "l_i2t": base_loss(images, texts, texts, others, **options),
        "l_sym": base_loss(texts, images, images, others, **options),
    }
    if neighbor_images is None and neighbor_texts is None:
        return terms
    if neighbor_ids is None:
        raise ValueError("neighbors need neighbor_ids, to be masked where they sit in the batch")
    mask = others & negative_mask(ids, ids, neighbor_ids)
    if has_neighbor is not None:
        mask = mask & has_neighbor[:, None]
    if neighbor_images is not None:
        of_images = mask if neighbor_readable is None else mask & neighbor_readable[:, None]
        terms["l_img"] = base_loss(images, neighbor_images, images, of_images)
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


# --- STRUC, the structure-preserving loss ----------------------------------------------------------------------------


def structure_preserving_loss_terms(
    images: Tensor,
    texts: Tensor,
    ids: Tensor,
    neighbor_images: Tensor | None = None,
    neighbor_texts: Tensor | None = None,
    neighbor_ids: Tensor | None = None,
    has_neighbor: Tensor | None = None,
    *,
    margin: float = 0.1,
    neighborhoods: Tensor | None = None,
    readable: Tensor | None = None,
    neighbor_readable: Tensor | None = None,
) -> dict[str, Tensor]:
    """The four terms of Wang, Li and Lazebnik's loss (CVPR 2016, Eq. 5), STRUC in the paper's Table 2.

    l_i2t : anchor x_i, positives every text of its image, negatives all other texts of the batch; λ = 1.
    l_sym : anchor y_i, positive its image, negatives all other images of the batch; their λ1.
    l_img : anchor x_i, positives N(x_i), negatives all other images; their λ2; only where neighbor_images is given.
    l_text: anchor y_i, positives N(y_i), negatives all other texts; their λ3; only where neighbor_texts is given.

    Each is `group_ranking_loss`, so that the weights 1, λ1, λ2, λ3 give their Eq. 5 divided by B. Table 2's columns are
    λ2 = 0 (Text) and λ3 = 0 (Img). The default margin, the weights of our Table 2 (λ1 = 1, the other 0.1), and taking
    all negatives are ours: the paper gives no values, and Wang et al. take only the most violating negatives.

    images, texts, neighbor_images, neighbor_texts: (B, D), the pairs (x_i, y_i) and drawn neighbors (x_i', y_i'). ids,
    neighbor_ids: (B,), their image_ids. has_neighbor: (B,) bool, False where there is none and a stand-in fills the
    row: it is no candidate of any anchor and N is empty; None for all True. The neighborhoods:

    - Ground truth (GT): y_i' is another caption of y_i's own image, hence neighbor_ids = ids, and N(y_i) holds all
      captions of that image, drawn or of the batch. An image has no ground-truth neighbors but itself.
    - Estimated (NN): (x_i', y_i') is drawn from y_i's nearest neighbors in Ω, and N(i) holds whatever has its image_id.
      Other captions of the anchor's own image are then neither neighbor nor negative, as in `negative_mask`.
    - neighborhoods: (B, 2B) bool names more members, True where the batch's pair j (column j) or the drawn pair j
      (column B + j) is in y_i's list of neighbors; None for the drawn ones only.

    readable, neighbor_readable: (B,) bool, False where the image of the pair, or of its neighbor, was lost; None for
    none. A lost pair is neither anchor nor candidate.

    Raises ValueError where neighbors come without their ids, and for shapes that do not fit.
    """
    there = torch.ones_like(ids, dtype=torch.bool) if readable is None else readable
    same, known = ~negative_mask(ids, ids), there[:, None] & there
    terms = {
        "l_i2t": group_ranking_loss(images, texts, same & known, ~same & known, margin=margin),
        "l_sym": group_ranking_loss(texts, images, same & known, ~same & known, margin=margin),
    }
    if neighbor_images is None and neighbor_texts is None:
        return terms
    if neighbor_ids is None:
        raise ValueError("neighbors need neighbor_ids, to be masked where they sit in the batch")
    members, others = neighborhood_masks(ids, neighbor_ids, has_neighbor, neighborhoods)
    drawn_there = torch.ones_like(there) if neighbor_readable is None else neighbor_readable
    known = there[:, None] & torch.cat([there, drawn_there])
    members, others = members & known, others & known
    for name, anchors, neighbors in (("l_img", images, neighbor_images), ("l_text", texts, neighbor_texts)):
        if neighbors is not None:
            candidates = torch.cat([anchors, neighbors])
            terms[name] = group_ranking_loss(anchors, candidates, members, others, margin=margin)
    return terms


def neighborhood_masks(
    ids: Tensor, neighbor_ids: Tensor, has_neighbor: Tensor | None = None, neighborhoods: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Who is in N(i) and who is outside of it, (B, 2B) bool both, over the batch's pairs and then the drawn ones.

    Arguments as for `structure_preserving_loss_terms`, the same ValueErrors. Neither are: the anchor itself, what
    shares its image_id without being its neighbor, and stand-ins.
    """
    if neighbor_ids.shape != ids.shape:
        raise ValueError(f"neighbor_ids must be {tuple(ids.shape)}, got {tuple(neighbor_ids.shape)}")
    every = torch.ones_like(ids, dtype=torch.bool)
    has_neighbor = every if has_neighbor is None else has_neighbor
    check_bool("has_neighbor", has_neighbor, ids.shape)
    candidate_ids = torch.cat([ids, neighbor_ids])
    members = (neighbor_ids[:, None] == candidate_ids) & has_neighbor[:, None]
    others = negative_mask(ids, candidate_ids, neighbor_ids)
    if neighborhoods is not None:
        check_bool("neighborhoods", neighborhoods, members.shape)
        members, others = members | neighborhoods, others & ~neighborhoods
    real = torch.cat([every, has_neighbor])
    itself = torch.eye(len(ids), len(real), dtype=torch.bool, device=ids.device)
    return members & real & ~itself, others & real


def group_ranking_loss(
    anchors: Tensor, candidates: Tensor, group_mask: Tensor, other_mask: Tensor, *, margin: float = 0.1
) -> Tensor:
    """mean_i Σ_{j in group i} Σ_{k in others of i} [margin + d(a_i, c_j) − d(a_i, c_k)]₊, a scalar.

    Each term of Wang et al.'s Eq. 5 over its number of anchors. d is the Euclidean distance of L2-normalised
    embeddings, not squared; the paper's triplet (Eq. 1) squares it.

    anchors: (B, D). candidates: (M, D). Or (B, K, D) and (M, K, D), d then being that of the closest pair. group_mask,
    other_mask: (B, M) bool. An anchor without a group, or without others, contributes 0. Sorting makes it O(BM log M)
    in time and O(BM) in memory, where all its triplets are O(BM²). Precision as for `triplet_npairs_loss`. Raises
    ValueError for shapes that do not fit.
    """
    distances = euclidean_distances(anchors, candidates)
    check_bool("group_mask", group_mask, distances.shape)
    check_bool("other_mask", other_mask, distances.shape)
    if len(distances) == 0:
        raise ValueError("a batch needs at least one anchor")
    # With the others from near to far, those that violate the margin of c_j are the first v_j, and their hinges sum to
    # v_j · (margin + d_j) − (the sum of the first v_j distances).
    far = distances.masked_fill(~other_mask, math.inf).sort(dim=1).values
    limits = margin + distances
    violations = torch.searchsorted(far.detach(), limits.detach())
    sums = torch.nn.functional.pad(far.masked_fill(far == math.inf, 0).cumsum(dim=1), (1, 0))
    hinges = violations * limits - sums.gather(1, violations)
    return hinges.masked_fill(~group_mask, 0).sum(dim=1).mean()


def euclidean_distances(anchors: Tensor, candidates: Tensor) -> Tensor:
    """‖a_i − c_j‖ of L2-normalised (B, D) and (M, D), or that of the closest pair of (B, K, D) and (M, K, D): (B, M).

    The square root of 2 − 2 a·c + 10⁻⁴, as Wang et al.'s published code has it: without the small term equal vectors
    have no gradient. Raises ValueError where the shapes do not fit.
    """
    if anchors.ndim == candidates.ndim == 2:
        anchors, candidates = anchors[:, None], candidates[:, None]
    return (2 - 2 * multiple_instance_similarities(anchors, candidates)).clamp(min=0).add(1e-4).sqrt()


# --- PVSE: several embeddings an instance ----------------------------------------------------------------------------


def multiple_instance_similarities(a: Tensor, b: Tensor) -> Tensor:
    """Greatest cosine among the K × K pairs of embeddings of two instances (Song & Soleymani, CVPR 2019): (B, M).

    a: (B, K, D), b: (M, K', D), assumed L2-normalised. Raises ValueError where the shapes do not fit.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[2] != b.shape[2]:
        raise ValueError(f"embeddings must be (B, K, D) and (M, K, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    with torch.autocast(a.device.type, enabled=False):
        products = full_precision(a).flatten(0, 1) @ full_precision(b).flatten(0, 1).T
        return products.unflatten(1, b.shape[:2]).unflatten(0, a.shape[:2]).amax(dim=(1, 3))
