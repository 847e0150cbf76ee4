"""The structure-preserving loss (STRUC) of losses.py against loops over Wang et al.'s triplets."""

import math

import numpy as np
import pytest
import torch
from test_losses import OperationLog, random_mask, unit_vectors
from torch import Tensor

from losses import (
    euclidean_distances,
    group_ranking_loss,
    neighborhood_masks,
    structure_preserving_loss_terms,
    weighted_sum,
)


def distance(a: np.ndarray, c: np.ndarray) -> float:
    return math.sqrt(np.sum((a - c) ** 2) + 1e-4)


def eq5_term(anchors: Tensor, candidates: Tensor, group: Tensor, others: Tensor, margin: float) -> float:
    """One of the four sums of their Eq. 5, a triplet at a time, over the number of anchors."""
    total = 0.0
    for i, a in enumerate(anchors.numpy()):
        for j, c in enumerate(candidates.numpy()):
            for k, other in enumerate(candidates.numpy()):
                if group[i, j] and others[i, k]:
                    total += max(0.0, margin + distance(a, c) - distance(a, other))
    return total / len(anchors)


# --- One term --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "m"), [(5, 5), (4, 9), (6, 2), (1, 3)])
@pytest.mark.parametrize("margin", [0.0, 0.1, 1.0])
def test_group_ranking_is_the_sum_over_triplets(b: int, m: int, margin: float) -> None:
    a, c = unit_vectors(b, 3, seed=1), unit_vectors(m, 3, seed=2)
    group, others = random_mask(b, m, seed=3), random_mask(b, m, seed=4)
    others[0] = True
    group[0, -1] = True
    expected = eq5_term(a, c, group, others, margin)
    assert expected > 0
    assert group_ranking_loss(a, c, group, others, margin=margin).item() == pytest.approx(expected)


def test_group_ranking_by_hand() -> None:
    """On a circle: the anchor at 0°, its group at 60° and 180°, others at 90° and 180°."""
    at = {degrees: [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))] for degrees in (0, 60, 90, 180)}
    candidates = torch.tensor([at[60], at[180], at[90], at[180]], dtype=torch.float64)
    group = torch.tensor([[True, True, False, False]])
    loss = group_ranking_loss(torch.tensor([at[0]], dtype=torch.float64), candidates, group, ~group, margin=0.5)
    # Distances 1, 2 | √2, 2: [0.5 + 1 − √2] + [0.5 + 1 − 2 < 0] + [0.5 + 2 − √2] + [0.5 + 2 − 2].
    assert loss.item() == pytest.approx((1.5 - math.sqrt(2)) + 0 + (2.5 - math.sqrt(2)) + 0.5, abs=1e-3)


def test_distance_is_euclidean_and_not_squared() -> None:
    a, c = unit_vectors(4, 5, seed=1), unit_vectors(6, 5, seed=2)
    torch.testing.assert_close(euclidean_distances(a, c), torch.cdist(a, c), atol=1e-3, rtol=0)
    expected = [[distance(x, y) for y in c.numpy()] for x in a.numpy()]
    torch.testing.assert_close(euclidean_distances(a, c), torch.tensor(expected, dtype=torch.float64))


def test_one_neighbor_an_anchor_is_the_triplet_loss_over_distances() -> None:
    y, neighbors = unit_vectors(5, 3, seed=1), unit_vectors(5, 3, seed=2)
    batch, drawn = ~torch.eye(5, dtype=torch.bool), torch.eye(5, dtype=torch.bool)
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    masks = torch.cat([nothing, drawn], dim=1), torch.cat([batch, nothing], dim=1)
    loss = group_ranking_loss(y, torch.cat([y, neighbors]), *masks, margin=0.2)
    to_positive, to_others = euclidean_distances(y, neighbors).diagonal(), euclidean_distances(y, y)
    expected = (0.2 + to_positive[:, None] - to_others).relu()[batch].sum() / 5
    torch.testing.assert_close(loss, expected)


def test_several_embeddings_are_as_far_apart_as_the_closest_pair() -> None:
    a, c = unit_vectors(4, 2, 3, seed=1), unit_vectors(5, 2, 3, seed=2)
    closest = torch.stack([euclidean_distances(a[:, p], c[:, q]) for p in (0, 1) for q in (0, 1)]).amin(dim=0)
    torch.testing.assert_close(euclidean_distances(a, c), closest)
    group, others = random_mask(4, 5, seed=3), random_mask(4, 5, seed=4)
    single = group_ranking_loss(a[:, 0], c[:, 0], group, others)
    torch.testing.assert_close(group_ranking_loss(a[:, :1], c[:, :1], group, others), single)


def test_gradient() -> None:
    a, c = (unit_vectors(n, 3, seed=n).requires_grad_() for n in (3, 6))
    group, others = random_mask(3, 6, seed=1), random_mask(3, 6, seed=2)
    assert group_ranking_loss(a, c, group, others, margin=0.5).item() > 0
    assert torch.autograd.gradcheck(lambda a, c: group_ranking_loss(a, c, group, others, margin=0.5), [a, c])


def test_empty_groups_and_no_others_contribute_nothing_but_count() -> None:
    a, c = batch = [unit_vectors(n, 3, seed=n).requires_grad_() for n in (4, 6)]
    group, others = random_mask(4, 6, seed=1), random_mask(4, 6, seed=2)
    group[1], others[2] = False, False
    loss = group_ranking_loss(a, c, group, others, margin=1.0)
    rest = group_ranking_loss(a[[0, 3]], c, group[[0, 3]], others[[0, 3]], margin=1.0)
    torch.testing.assert_close(loss, rest / 2)
    loss.backward()
    assert (a.grad[[1, 2]] == 0).all() and a.grad[[0, 3]].abs().sum() > 0
    nothing = torch.zeros_like(group)
    for masks in ((nothing, others), (group, nothing), (nothing, nothing)):
        for x in batch:
            x.grad = None
        loss = group_ranking_loss(a, c, *masks)
        loss.backward()
        assert loss == 0 and all((x.grad == 0).all() for x in batch)


def test_equal_vectors_have_a_finite_gradient() -> None:
    x = unit_vectors(3, 4, seed=1, dtype=torch.float32).requires_grad_()
    drawn = torch.eye(3, dtype=torch.bool)
    group_ranking_loss(x, x.clone(), drawn, ~drawn, margin=2.0).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_autocast_and_precision() -> None:
    a, c = (unit_vectors(n, 32, seed=n, dtype=torch.float32) for n in (8, 16))
    masks = random_mask(8, 16, seed=1), random_mask(8, 16, seed=2)
    loss = group_ranking_loss(a, c, *masks)
    with torch.autocast("cpu", torch.bfloat16):
        assert group_ranking_loss(a, c, *masks) == loss
    assert loss.dtype == torch.float32
    assert group_ranking_loss(a.double(), c.double(), *masks).dtype == torch.float64
    torch.testing.assert_close(group_ranking_loss(a.double(), c.double(), *masks).float(), loss)


# --- Neighborhoods ---------------------------------------------------------------------------------------------------

IDS = torch.tensor([10, 11, 10, 12, 13])
NEIGHBOR_IDS = torch.tensor([12, 20, 21, 13, 20])


def test_estimated_neighborhoods() -> None:
    members, others = neighborhood_masks(IDS, NEIGHBOR_IDS)
    assert members.dtype == others.dtype == torch.bool and members.shape == others.shape == (5, 10)
    candidates = [*IDS.tolist(), *NEIGHBOR_IDS.tolist()]
    for i, (own, neighbor) in enumerate(zip(IDS.tolist(), NEIGHBOR_IDS.tolist(), strict=True)):
        assert members[i].tolist() == [candidate == neighbor for candidate in candidates]
        assert others[i].tolist() == [candidate not in (own, neighbor) for candidate in candidates]
    # The drawn one, one that sits in the batch, one that another anchor has drawn too.
    assert members.sum(dim=1).tolist() == [2, 2, 1, 2, 2]


def test_ground_truth_neighborhoods() -> None:
    """Another caption of the same image is drawn: N holds the captions of the image, drawn or not, but the anchor."""
    members, others = neighborhood_masks(IDS, IDS)
    candidates = [*IDS.tolist(), *IDS.tolist()]
    for i, own in enumerate(IDS.tolist()):
        assert members[i].tolist() == [c == own and j != i for j, c in enumerate(candidates)]
        assert others[i].tolist() == [c != own for c in candidates]


def test_stand_ins_are_no_candidates() -> None:
    has_neighbor = torch.tensor([True, False, True, True, False])
    members, others = neighborhood_masks(IDS, torch.where(has_neighbor, NEIGHBOR_IDS, IDS), has_neighbor)
    assert not members[~has_neighbor].any()
    assert not members[:, 5:][:, ~has_neighbor].any() and not others[:, 5:][:, ~has_neighbor].any()
    everyone = neighborhood_masks(IDS, NEIGHBOR_IDS)
    kept = torch.cat([torch.ones(5, dtype=torch.bool), has_neighbor])
    for mask, with_all in zip((members, others), everyone, strict=True):
        assert torch.equal(mask[has_neighbor][:, kept], with_all[has_neighbor][:, kept])


def test_more_members_are_named() -> None:
    named = torch.zeros(5, 10, dtype=torch.bool)
    named[0, 1] = named[0, 0] = named[3, 6] = True
    members, others = neighborhood_masks(IDS, NEIGHBOR_IDS, None, named)
    plain_members, plain_others = neighborhood_masks(IDS, NEIGHBOR_IDS)
    named[0, 0] = False  # nobody is a neighbor of its own
    assert torch.equal(members, plain_members | named) and torch.equal(others, plain_others & ~named)
    assert plain_others[0, 1] and plain_others[3, 6]


# --- The four terms --------------------------------------------------------------------------------------------------


def expected_terms(
    x: Tensor, y: Tensor, x_: Tensor, y_: Tensor, neighbor_ids: Tensor, margin: float
) -> dict[str, float]:
    ids = torch.cat([IDS, neighbor_ids]).tolist()
    same = torch.tensor([[a == b for b in ids[:5]] for a in ids[:5]])
    members = torch.tensor([[c == ids[5 + i] and j != i for j, c in enumerate(ids)] for i in range(5)])
    others = torch.tensor([[c not in (ids[i], ids[5 + i]) for c in ids] for i in range(5)])
    return {
        "l_i2t": eq5_term(x, y, same, ~same, margin),
        "l_sym": eq5_term(y, x, same, ~same, margin),
        "l_img": eq5_term(x, torch.cat([x, x_]), members, others, margin),
        "l_text": eq5_term(y, torch.cat([y, y_]), members, others, margin),
    }


@pytest.mark.parametrize("neighbor_ids", [NEIGHBOR_IDS, IDS], ids=["estimated", "ground truth"])
@pytest.mark.parametrize("margin", [0.1, 0.7])
def test_terms_are_eq_5(neighbor_ids: Tensor, margin: float) -> None:
    x, y, x_, y_ = (unit_vectors(5, 3, seed=seed) for seed in (1, 2, 3, 4))
    terms = structure_preserving_loss_terms(x, y, IDS, x_, y_, neighbor_ids, margin=margin)
    expected = expected_terms(x, y, x_, y_, neighbor_ids, margin)
    assert min(expected.values()) > 0
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


def test_default_margin_is_wang_et_als() -> None:
    x, y = unit_vectors(5, 3, seed=1), unit_vectors(5, 3, seed=2)
    terms = structure_preserving_loss_terms(x, y, IDS)
    assert terms == structure_preserving_loss_terms(x, y, IDS, margin=0.1)
    assert terms["l_i2t"] != structure_preserving_loss_terms(x, y, IDS, margin=0.2)["l_i2t"]


def test_terms_need_only_the_neighbors_that_are_given() -> None:
    x, y, drawn = (unit_vectors(5, 3, seed=seed) for seed in (1, 2, 3))
    assert structure_preserving_loss_terms(x, y, IDS).keys() == {"l_i2t", "l_sym"}
    text = structure_preserving_loss_terms(x, y, IDS, None, drawn, NEIGHBOR_IDS)
    image = structure_preserving_loss_terms(x, y, IDS, drawn, None, NEIGHBOR_IDS)
    assert text.keys() == {"l_i2t", "l_sym", "l_text"} and image.keys() == {"l_i2t", "l_sym", "l_img"}


def test_neither_stand_ins_nor_named_neighbors_matter_as_others() -> None:
    x, y, y_, other = (unit_vectors(5, 3, seed=seed) for seed in (1, 2, 3, 4))
    has_neighbor = torch.tensor([True, False, True, True, True])
    stand_ins = [torch.where(has_neighbor[:, None], y_, stand_in) for stand_in in (y, other)]
    losses = [
        structure_preserving_loss_terms(x, y, IDS, None, s, NEIGHBOR_IDS, has_neighbor)["l_text"] for s in stand_ins
    ]
    assert losses[0] == losses[1] > 0
    everybody = torch.ones(5, 10, dtype=torch.bool)
    terms = structure_preserving_loss_terms(x, y, IDS, None, y_, NEIGHBOR_IDS, neighborhoods=everybody)
    assert terms["l_text"] == 0


def test_memory_and_no_waiting_for_the_device() -> None:
    b, d = 48, 8
    x, y, x_, y_ = (unit_vectors(b, d, seed=seed).requires_grad_() for seed in (1, 2, 3, 4))
    ids = torch.arange(b) // 2
    with OperationLog() as log:
        terms = structure_preserving_loss_terms(x, y, ids, x_, y_, ids + 1, ids > 3)
        weighted_sum(terms, dict.fromkeys(terms, 1.0)).backward()
    assert log.largest <= b * (2 * b + 1)
    assert not log.names & {"_local_scalar_dense", "nonzero", "index", "masked_select", "unique", "_unique2"}


# --- Mistakes --------------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit() -> None:
    a, c, mask = torch.ones(4, 3), torch.ones(5, 3), torch.ones(4, 5, dtype=torch.bool)
    for batch in [
        (a, c[:, :2], mask, mask),
        (a[0], c, mask, mask),
        (a, c[:, None], mask, mask),
        (a, c, mask.T, mask),
        (a, c, mask, mask.float()),
        (a[:0], c, mask[:0], mask[:0]),
    ]:
        with pytest.raises(ValueError, match=r"must|needs"):
            group_ranking_loss(*batch)


def test_neighbors_that_do_not_fit() -> None:
    x = unit_vectors(5, 3, seed=1)
    with pytest.raises(ValueError, match="neighbor_ids"):
        structure_preserving_loss_terms(x, x, IDS, x, x)
    with pytest.raises(ValueError, match="neighbor_ids must be"):
        structure_preserving_loss_terms(x, x, IDS, x, x, IDS[:, None])
    for has_neighbor in (torch.ones(5), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="has_neighbor must be"):
            structure_preserving_loss_terms(x, x, IDS, x, x, IDS, has_neighbor)
    with pytest.raises(ValueError, match="neighborhoods must be"):
        structure_preserving_loss_terms(x, x, IDS, x, x, IDS, neighborhoods=torch.ones(5, 5, dtype=torch.bool))
