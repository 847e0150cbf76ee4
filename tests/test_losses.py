"""losses.py against plain loops over the paper's equations, pytorch-metric-learning and numerical gradients."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import AngularLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import (
    angular_npairs_loss,
    negative_mask,
    retrieval_loss_terms,
    triplet_npairs_loss,
    weighted_sum,
)

LOGSUMEXP = functools.partial(angular_npairs_loss, tan_squared_alpha=1.0)
HINGE = functools.partial(angular_npairs_loss, tan_squared_alpha=0.2, form="hinge")
BASE_LOSSES = {"logsumexp": LOGSUMEXP, "hinge": HINGE, "triplet": triplet_npairs_loss}
every_base_loss = pytest.mark.parametrize("base_loss", BASE_LOSSES.values(), ids=BASE_LOSSES.keys())


def unit_vectors(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1).to(dtype)


def random_mask(b: int, m: int, seed: int) -> Tensor:
    return torch.rand(b, m, generator=torch.Generator().manual_seed(seed)) < 0.6


# --- The equations, one triplet at a time ----------------------------------------------------------------------------


def angular_eq2(a: np.ndarray, p: np.ndarray, n: np.ndarray, t: float) -> float:
    return np.sum((a - p) ** 2) - 4 * t * np.sum((n - (a + p) / 2) ** 2)


def triplet_eq1(a: np.ndarray, p: np.ndarray, n: np.ndarray, margin: float) -> float:
    return np.sum((a - p) ** 2) - np.sum((a - n) ** 2) + margin


def wang_exponent(a: np.ndarray, p: np.ndarray, n: np.ndarray, t: float) -> float:
    return 4 * t * (a + p) @ n - 2 * (1 + t) * a @ p


def npairs_loop(
    per_anchor: Callable[[list[float]], float],
    per_triplet: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
) -> float:
    """Eq. 3: per anchor over its negatives, then the mean over the anchors."""
    total = 0.0
    for i, (a, p) in enumerate(zip(anchors.numpy(), positives.numpy(), strict=True)):
        kept = [n for j, n in enumerate(negatives.numpy()) if (j != i if mask is None else mask[i, j])]
        total += per_anchor([per_triplet(a, p, n) for n in kept])
    return total / len(anchors)


def hinge_sum(brackets: list[float]) -> float:
    return sum(max(0.0, bracket) for bracket in brackets)


def loop_of(base_loss: functools.partial, *batch: Tensor | None) -> float:
    if base_loss is triplet_npairs_loss:
        return npairs_loop(hinge_sum, lambda a, p, n: triplet_eq1(a, p, n, 0.2), *batch)
    if base_loss is HINGE:
        return npairs_loop(hinge_sum, lambda a, p, n: angular_eq2(a, p, n, 0.2), *batch)
    return npairs_loop(lambda e: math.log1p(sum(map(math.exp, e))), lambda a, p, n: wang_exponent(a, p, n, 1.0), *batch)


BATCHES = {
    "the other pairs": (5, 5, None),
    "some of the other pairs": (5, 5, random_mask(5, 5, seed=1)),
    "more negatives": (4, 7, random_mask(4, 7, seed=2)),
    "fewer negatives": (6, 2, random_mask(6, 2, seed=3)),
}
every_batch = pytest.mark.parametrize(("b", "m", "mask"), BATCHES.values(), ids=BATCHES.keys())


@every_batch
@pytest.mark.parametrize("t", [0.05, 0.2, 1.0])
def test_hinge_form_is_eq_2_and_3(b: int, m: int, mask: Tensor | None, t: float) -> None:
    a, p, n = unit_vectors(b, 3, seed=4), unit_vectors(b, 3, seed=5), unit_vectors(m, 3, seed=6)
    expected = npairs_loop(hinge_sum, lambda a, p, n: angular_eq2(a, p, n, t), a, p, n, mask)
    assert expected > 0
    assert angular_npairs_loss(a, p, n, mask, tan_squared_alpha=t, form="hinge").item() == pytest.approx(expected)


@every_batch
@pytest.mark.parametrize(("t", "w"), [(1.0, 1.0), (0.3, 1.0), (1.0, 32.0), (0.5, 0.1)])
def test_logsumexp_form_is_log_of_one_plus_sum_of_exp(b: int, m: int, mask: Tensor | None, t: float, w: float) -> None:
    a, p, n = unit_vectors(b, 3, seed=4), unit_vectors(b, 3, seed=5), unit_vectors(m, 3, seed=6)
    expected = npairs_loop(
        lambda exponents: math.log(1 + w * sum(math.exp(e) for e in exponents)),
        lambda a, p, n: wang_exponent(a, p, n, t),
        *(a, p, n, mask),
    )
    loss = angular_npairs_loss(a, p, n, mask, tan_squared_alpha=t, negatives_weight=w)
    assert loss.item() == pytest.approx(expected)


def test_logsumexp_exponent_is_the_bracket_of_eq_2_without_its_constant() -> None:
    a, p, n = (unit_vectors(1, 5, seed=seed).numpy()[0] for seed in (1, 2, 3))
    for t in (0.2, 1.0):
        assert wang_exponent(a, p, n, t) == pytest.approx(angular_eq2(a, p, n, t) - (2 - 6 * t))


@every_batch
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_triplet_is_eq_1_and_3(b: int, m: int, mask: Tensor | None, margin: float) -> None:
    a, p, n = unit_vectors(b, 3, seed=4), unit_vectors(b, 3, seed=5), unit_vectors(m, 3, seed=6)
    expected = npairs_loop(hinge_sum, lambda a, p, n: triplet_eq1(a, p, n, margin), a, p, n, mask)
    assert expected > 0
    assert triplet_npairs_loss(a, p, n, mask, margin=margin).item() == pytest.approx(expected)


def test_defaults() -> None:
    a, p, n = (unit_vectors(4, 6, seed=seed) for seed in (1, 2, 3))
    assert angular_npairs_loss(a, p, n) == angular_npairs_loss(
        a, p, n, ~torch.eye(4, dtype=torch.bool), tan_squared_alpha=1.0, form="logsumexp", negatives_weight=1.0
    )
    assert triplet_npairs_loss(a, p, n) == triplet_npairs_loss(a, p, n, ~torch.eye(4, dtype=torch.bool), margin=0.2)


def test_weight_of_negatives_is_what_tiling_anchors_does() -> None:
    """The published code repeats the batch B times on the side of the negatives."""
    a, p, n = (unit_vectors(4, 6, seed=seed) for seed in (1, 2, 3))
    mask = ~torch.eye(4, dtype=torch.bool)
    tiled = angular_npairs_loss(a, p, n.repeat(4, 1), mask.repeat(1, 4))
    torch.testing.assert_close(angular_npairs_loss(a, p, n, negatives_weight=4), tiled)


# --- pytorch-metric-learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [20.0, 40.0, 45.0])
def test_logsumexp_form_is_pytorch_metric_learnings_angular_loss(degrees: float) -> None:
    images, texts = unit_vectors(6, 8, seed=1), unit_vectors(6, 8, seed=2)
    labels = torch.arange(6)
    # A clone, because labels that are ref_labels tell it to leave out the pairs themselves.
    theirs = AngularLoss(alpha=degrees)(images, labels, ref_emb=texts, ref_labels=labels.clone())
    t = math.tan(math.radians(degrees)) ** 2
    torch.testing.assert_close(angular_npairs_loss(images, texts, texts, tan_squared_alpha=t), theirs)


def test_masking_by_ids_is_pytorch_metric_learnings_masking_by_labels() -> None:
    images, texts = unit_vectors(6, 8, seed=1), unit_vectors(6, 8, seed=2)
    ids, own = torch.tensor([7, 7, 3, 4, 3, 9]), torch.arange(6)
    theirs = AngularLoss(alpha=45)(images, ids, (own, own, own, own), ref_emb=texts, ref_labels=ids)
    torch.testing.assert_close(angular_npairs_loss(images, texts, texts, negative_mask(ids, ids)), theirs)


# --- Gradients -------------------------------------------------------------------------------------------------------


@every_base_loss
@pytest.mark.parametrize("mask", [None, random_mask(4, 4, seed=7)], ids=["no mask", "mask"])
def test_gradient(base_loss: losses.NPairsLoss, mask: Tensor | None) -> None:
    batch = [unit_vectors(4, 3, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    assert base_loss(*batch, mask).item() > 0
    assert torch.autograd.gradcheck(lambda a, p, n: base_loss(a, p, n, mask), batch)


@every_base_loss
def test_one_pair_has_no_loss_and_no_gradient(base_loss: losses.NPairsLoss) -> None:
    batch = [unit_vectors(1, 4, seed=seed, dtype=torch.float32).requires_grad_() for seed in (1, 2, 3)]
    loss = base_loss(*batch)
    loss.backward()
    assert loss.item() == 0
    assert all((x.grad == 0).all() for x in batch)


@every_base_loss
def test_anchor_without_negatives_contributes_nothing_but_counts(base_loss: losses.NPairsLoss) -> None:
    a, p, n = batch = [unit_vectors(3, 4, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    loss = base_loss(a, p, n, mask)
    torch.testing.assert_close(loss, base_loss(a[[0, 2]], p[[0, 2]], n, mask[[0, 2]]) * 2 / 3)
    loss.backward()
    assert all(x.grad.isfinite().all() for x in batch)
    assert (a.grad[1] == 0).all() and (p.grad[1] == 0).all()


@every_base_loss
def test_no_negatives_at_all(base_loss: losses.NPairsLoss) -> None:
    a, p = unit_vectors(3, 4, seed=1), unit_vectors(3, 4, seed=2)
    assert base_loss(a, p, a[:0], torch.ones(3, 0, dtype=torch.bool)).item() == 0


# --- Precision, memory, waiting --------------------------------------------------------------------------------------


@every_base_loss
def test_autocast_changes_nothing(base_loss: losses.NPairsLoss) -> None:
    batch = [unit_vectors(8, 32, seed=seed, dtype=torch.float32) for seed in (1, 2, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = base_loss(*batch)
    assert under_autocast.dtype == torch.float32
    assert under_autocast == base_loss(*batch)


@every_base_loss
def test_bfloat16_embeddings_are_computed_in_float32(base_loss: losses.NPairsLoss) -> None:
    batch = [unit_vectors(8, 32, seed=seed, dtype=torch.float32) for seed in (1, 2, 3)]
    half = [x.bfloat16() for x in batch]
    assert base_loss(*half) == base_loss(*(x.float() for x in half))
    torch.testing.assert_close(base_loss(*half), base_loss(*batch), rtol=0.02, atol=0)


@every_base_loss
def test_float64_stays_float64(base_loss: losses.NPairsLoss) -> None:
    assert base_loss(*(unit_vectors(3, 4, seed=seed) for seed in (1, 2, 3))).dtype == torch.float64


@pytest.mark.parametrize("w", [1.0, 64.0])
def test_huge_exponents_do_not_overflow(w: float) -> None:
    t = 400.0
    x = unit_vectors(3, 4, seed=1, dtype=torch.float32).requires_grad_()
    # Positives opposite, negatives at the anchor: exponents of thousands.
    loss = angular_npairs_loss(x, -x, x + x.roll(1, 0), tan_squared_alpha=t, negatives_weight=w)
    a, n = x.detach().double().numpy(), (x + x.roll(1, 0)).detach().double().numpy()
    rows = [[math.log(w) + wang_exponent(a[i], -a[i], n[j], t) for j in range(3) if j != i] for i in range(3)]
    assert min(map(max, rows)) > 100
    assert loss.item() == pytest.approx(np.mean([np.logaddexp.reduce([0.0, *row]) for row in rows]), rel=1e-4)
    loss.backward()
    assert x.grad.isfinite().all()


class OperationLog(TorchDispatchMode):
    """Names of the operations, and the size of the largest tensor they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_log_sees_waiting() -> None:
    with OperationLog() as log:
        assert torch.ones(4)[torch.ones(4) > 0].sum().item() == 4
    assert {"index", "_local_scalar_dense"} <= log.names


@every_base_loss
def test_quadratic_memory_and_no_waiting_for_the_device(base_loss: losses.NPairsLoss) -> None:
    b, d = 48, 8
    images, texts, neighbors = (unit_vectors(b, d, seed=seed).requires_grad_() for seed in (1, 2, 3))
    ids = torch.arange(b) // 2
    with OperationLog() as log:
        terms = retrieval_loss_terms(base_loss, images, texts, ids, neighbors, neighbors, ids + 1)
        weighted_sum(terms, dict.fromkeys(terms, 1.0)).backward()
    assert log.largest <= b * (b + 1)
    # What would copy values to the host, or make shapes of values: .item(), .any() in an if, boolean indexing.
    assert not log.names & {"_local_scalar_dense", "nonzero", "index", "masked_select", "unique", "_unique2"}


# --- Active triplets -------------------------------------------------------------------------------------------------


def active(a: Tensor, p: Tensor, n: Tensor, loss: losses.NPairsLoss) -> Tensor:
    """(B, M) bool: which triplets have a loss of their own."""
    one = torch.ones(1, 1, dtype=torch.bool)
    return torch.tensor([[bool(loss(a[[i]], p[[i]], n[[j]], one) > 0) for j in range(len(n))] for i in range(len(a))])


def test_unrelated_vectors_have_no_active_triplet_at_45_degrees() -> None:
    """E[bracket] = 2 − 6t: the reason why the hinge form defaults to t = 0.2 and the other to t = 1."""
    a, p, n = (unit_vectors(12, 512, seed=seed).requires_grad_() for seed in (1, 2, 3))
    assert not active(a, p, n, functools.partial(HINGE, tan_squared_alpha=1.0)).any()
    assert active(a, p, n, HINGE).all()
    assert active(a, p, n, triplet_npairs_loss).float().mean() > 0.5
    loss = angular_npairs_loss(a, p, n, form="hinge", tan_squared_alpha=1.0)
    loss.backward()
    assert loss == 0 and (a.grad == 0).all()
    assert angular_npairs_loss(a, p, n, form="hinge", tan_squared_alpha=0.2) > 1


@pytest.mark.parametrize(("t", "are_active"), [(0.32, True), (0.34, False)])
def test_orthogonal_vectors_are_active_below_a_third(t: float, are_active: bool) -> None:
    eye = torch.eye(9)
    triplets = active(eye[:3], eye[3:6], eye[6:], functools.partial(HINGE, tan_squared_alpha=t))
    assert (triplets == are_active).all()


# --- Properties ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)
few_examples = settings(max_examples=25, deadline=None)


@every_base_loss
@few_examples
@given(seed=seeds, b=st.integers(1, 6), m=st.integers(1, 6))
def test_order_never_matters(base_loss: losses.NPairsLoss, seed: int, b: int, m: int) -> None:
    a, p, n = unit_vectors(b, 4, seed=seed), unit_vectors(b, 4, seed=seed + 1), unit_vectors(m, 4, seed=seed + 2)
    mask = random_mask(b, m, seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(b, generator=generator), torch.randperm(m, generator=generator)
    permuted = base_loss(a[rows], p[rows], n[columns], mask[rows][:, columns])
    torch.testing.assert_close(permuted, base_loss(a, p, n, mask))


@every_base_loss
@few_examples
@given(seed=seeds, b=st.integers(1, 6), m=st.integers(1, 6))
def test_masked_negatives_never_matter(base_loss: losses.NPairsLoss, seed: int, b: int, m: int) -> None:
    a, p, n = (unit_vectors(size, 4, seed=seed + number) for number, size in enumerate((b, b, m)))
    mask = random_mask(b, m, seed)
    mask[:, seed % m] = False
    other = n.clone()
    other[seed % m] = -other[seed % m] * 50
    assert base_loss(a, p, n, mask) == base_loss(a, p, other, mask)


@every_base_loss
@few_examples
@given(seed=seeds, b=st.integers(2, 6))
def test_rotations_never_matter(base_loss: losses.NPairsLoss, seed: int, b: int) -> None:
    batch = [unit_vectors(b, 4, seed=seed + i) for i in range(3)]
    rotation = torch.linalg.qr(unit_vectors(4, 4, seed=seed + 3)).Q
    torch.testing.assert_close(base_loss(*(x @ rotation for x in batch)), base_loss(*batch))


# --- Eq. 4 to 8 ------------------------------------------------------------------------------------------------------


def test_negative_mask() -> None:
    anchors, negatives, positives = [1, 1, 2, 3], [1, 2, 3, 4, 1], [1, 4, 3, 9]
    mask = negative_mask(torch.tensor(anchors), torch.tensor(negatives), torch.tensor(positives))
    expected = [[n not in (a, p) for n in negatives] for a, p in zip(anchors, positives, strict=True)]
    assert mask.dtype == torch.bool and mask.tolist() == expected
    own = negative_mask(torch.tensor(anchors), torch.tensor(negatives))
    assert own.tolist() == [[n != a for n in negatives] for a in anchors]


def test_negative_mask_of_different_images_is_all_but_the_diagonal() -> None:
    assert torch.equal(negative_mask(torch.arange(5), torch.arange(5)), ~torch.eye(5, dtype=torch.bool))


@every_base_loss
def test_terms_are_eq_3_4_6_and_7(base_loss: losses.NPairsLoss) -> None:
    x, y, x_, y_ = (unit_vectors(5, 3, seed=seed) for seed in (1, 2, 3, 4))
    ids, neighbor_ids = torch.tensor([10, 11, 10, 12, 13]), torch.tensor([12, 20, 21, 13, 10])
    terms = retrieval_loss_terms(base_loss, x, y, ids, x_, y_, neighbor_ids)
    cross = torch.tensor([[ids[i] != ids[j] for j in range(5)] for i in range(5)])
    within = torch.tensor([[ids[j] not in (ids[i], neighbor_ids[i]) for j in range(5)] for i in range(5)])
    assert not torch.equal(cross, within)
    expected = {
        "l_i2t": loop_of(base_loss, x, y, y, cross),
        "l_sym": loop_of(base_loss, y, x, x, cross),
        "l_img": loop_of(base_loss, x, x_, x, within),
        "l_text": loop_of(base_loss, y, y_, y, within),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


@every_base_loss
def test_known_neighbors_are_no_negatives_in_any_term(base_loss: losses.NPairsLoss) -> None:
    """Neighborhood batches: the positives are pairs of the batch, one has none, and neighbors are masked."""
    x, y = unit_vectors(6, 3, seed=1), unit_vectors(6, 3, seed=2)
    ids, known = torch.tensor([10, 11, 12, 10, 13, 14]), torch.zeros(6, 6, dtype=torch.bool)
    for i, j in ((0, 1), (2, 3), (4, 2)):
        known[i, j] = known[j, i] = True
    places, has = torch.tensor([1, 0, 3, 2, 2, 0]), torch.tensor([True, True, True, True, True, False])
    terms = retrieval_loss_terms(base_loss, x, y, ids, x[places], y[places], ids[places], has, known)
    others, within = (torch.zeros(6, 6, dtype=torch.bool) for _ in range(2))
    for i in range(6):
        for j in range(6):
            others[i, j] = ids[i] != ids[j] and not known[i, j]
            within[i, j] = others[i, j] and ids[j] != ids[places[i]] and has[i]
    expected = {
        "l_i2t": loop_of(base_loss, x, y, y, others),
        "l_sym": loop_of(base_loss, y, x, x, others),
        "l_img": loop_of(base_loss, x, x[places], x, within),
        "l_text": loop_of(base_loss, y, y[places], y, within),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)
    without = retrieval_loss_terms(base_loss, x, y, ids, x[places], y[places], ids[places], has)
    assert all(terms[name] < without[name] for name in terms)
    with pytest.raises(ValueError, match="known_neighbors must be bool"):
        retrieval_loss_terms(base_loss, x, y, ids, known_neighbors=known.float())


@every_base_loss
def test_symmetric_term_exchanges_images_and_texts(base_loss: losses.NPairsLoss) -> None:
    x, y = unit_vectors(5, 3, seed=1), unit_vectors(5, 3, seed=2)
    terms, exchanged = (retrieval_loss_terms(base_loss, *batch, torch.arange(5)) for batch in ((x, y), (y, x)))
    assert terms["l_i2t"] == exchanged["l_sym"] and terms["l_sym"] == exchanged["l_i2t"]
    assert terms["l_i2t"] != terms["l_sym"]


def test_terms_need_only_the_neighbors_that_are_given() -> None:
    x, y, neighbors, ids = *(unit_vectors(4, 3, seed=seed) for seed in (1, 2, 3)), torch.arange(4)
    assert retrieval_loss_terms(LOGSUMEXP, x, y, ids).keys() == {"l_i2t", "l_sym"}
    assert retrieval_loss_terms(LOGSUMEXP, x, y, ids, neighbors, None, ids + 9).keys() == {"l_i2t", "l_sym", "l_img"}
    assert retrieval_loss_terms(LOGSUMEXP, x, y, ids, None, neighbors, ids + 9).keys() == {"l_i2t", "l_sym", "l_text"}


def test_weighted_sum_is_eq_8() -> None:
    terms = {"l_i2t": torch.tensor(1.0), "l_sym": torch.tensor(10.0), "l_text": torch.tensor(100.0)}
    weights = {"l_i2t": 1, "l_sym": 1, "l_img": 0.3, "l_text": 0.2}
    torch.testing.assert_close(weighted_sum({**terms, "l_img": torch.tensor(1000.0)}, weights), torch.tensor(331.0))
    torch.testing.assert_close(weighted_sum(terms, {**weights, "l_img": 0}), torch.tensor(31.0))
    torch.testing.assert_close(weighted_sum(terms, {"l_i2t": 1, "l_sym": 1}), torch.tensor(11.0))
    with pytest.raises(ValueError, match="l_img"):
        weighted_sum(terms, weights)
    with pytest.raises(ValueError, match="cannot weigh"):
        weighted_sum(terms, {"l_i2t": 0})


# --- Mistakes --------------------------------------------------------------------------------------------------------

FOUR, FIVE = torch.ones(4, 3), torch.ones(5, 3)


@every_base_loss
@pytest.mark.parametrize(
    "batch",
    [
        (FOUR, FIVE, FIVE),
        (FOUR[0], FOUR[0], FOUR),
        (FOUR, FOUR, FOUR[:, :2]),
        (FOUR, FOUR, FOUR[0]),
        (FOUR, FOUR, FIVE),
        (FOUR[:0], FOUR[:0], FOUR[:0]),
        (FOUR, FOUR, FIVE, torch.ones(5, 4, dtype=torch.bool)),
        (FOUR, FOUR, FIVE, torch.ones(5, dtype=torch.bool)),
        (FOUR, FOUR, FIVE, torch.ones(4, 5)),
    ],
)
def test_shapes_that_do_not_fit(base_loss: losses.NPairsLoss, batch: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        base_loss(*batch)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"form": "hing"}, "hing"),
        ({"tan_squared_alpha": 0.0}, "tan_squared_alpha"),
        ({"tan_squared_alpha": -1.0}, "tan_squared_alpha"),
        ({"tan_squared_alpha": math.nan}, "tan_squared_alpha"),
        ({"negatives_weight": 0.0}, "negatives_weight"),
        ({"form": "hinge", "negatives_weight": 4.0}, "negatives_weight"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, str | float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        angular_npairs_loss(FOUR, FOUR, FOUR, **setting)


def test_ids_that_do_not_fit() -> None:
    ids = torch.arange(4)
    for arguments in [(ids[None], ids), (ids, ids[None]), (ids, ids, ids[:3])]:
        with pytest.raises(ValueError, match="ids must be"):
            negative_mask(*arguments)
    with pytest.raises(ValueError, match="neighbor_ids"):
        retrieval_loss_terms(LOGSUMEXP, FOUR, FOUR, ids, FOUR, FOUR)


def test_a_pair_without_a_neighbor_contributes_nothing_to_the_neighbor_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, stand_in = (
        torch.nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=1).requires_grad_() for _ in range(3)
    )
    ids, neighbor_ids = torch.arange(4), torch.arange(10, 14)
    has = torch.tensor([True, True, False, True])
    terms = retrieval_loss_terms(LOGSUMEXP, x, y, ids, stand_in, stand_in, neighbor_ids, has)
    mask = negative_mask(ids, ids, neighbor_ids)
    for name, own in (("l_img", x), ("l_text", y)):
        each = [LOGSUMEXP(own[i : i + 1], stand_in[i : i + 1], own, mask[i : i + 1]) for i in (0, 1, 3)]
        torch.testing.assert_close(terms[name], torch.stack(each).sum() / 4)
    (terms["l_img"] + terms["l_text"]).backward()
    assert not stand_in.grad[2].any()


@every_base_loss
def test_a_lost_pair_is_no_anchor_and_no_negative(base_loss: losses.NPairsLoss) -> None:
    """As a loop over the triplets of Eq. 3, 4, 6 and 7 that are left, each term a mean over all B pairs."""
    x, y, x_, y_ = (unit_vectors(6, 4, seed=seed) for seed in (1, 2, 3, 4))
    ids, drawn = torch.arange(6), torch.arange(6) + 10
    readable, neighbor_readable = torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    readable[2], neighbor_readable[4] = False, False
    terms = retrieval_loss_terms(
        base_loss, x, y, ids, x_, y_, drawn, readable=readable, neighbor_readable=neighbor_readable
    )
    others = ~torch.eye(6, dtype=torch.bool)
    others[2], others[:, 2] = False, False
    of_images = others.clone()
    of_images[4] = False
    expected = {
        "l_i2t": loop_of(base_loss, x, y, y, others),
        "l_sym": loop_of(base_loss, y, x, x, others),
        "l_img": loop_of(base_loss, x, x_, x, of_images),
        "l_text": loop_of(base_loss, y, y_, y, others),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)
    none = torch.ones(6, dtype=torch.bool)
    all_there = retrieval_loss_terms(base_loss, x, y, ids, x_, y_, drawn, readable=none, neighbor_readable=none)
    for name, term in retrieval_loss_terms(base_loss, x, y, ids, x_, y_, drawn).items():
        assert term == all_there[name]
