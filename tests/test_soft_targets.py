"""Several positives an anchor (loss.soft_targets) and InfoNCE, against plain loops over their equations."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_losses import unit_vectors
from torch import Tensor

from losses import angular_npairs_loss, infonce_loss, negative_mask, retrieval_loss_terms, soft_targets

B = 6
NEIGHBORS = torch.zeros(B, B, dtype=torch.bool)
for i, j in [(0, 1), (0, 3), (2, 4), (3, 4)]:
    NEIGHBORS[i, j] = NEIGHBORS[j, i] = True  # 5 has none
LOSSES: dict[str, tuple[functools.partial, Callable[..., float]]] = {
    "angular": (
        functools.partial(angular_npairs_loss, tan_squared_alpha=0.7),
        lambda a, p, n: 4 * 0.7 * (a + p) @ n - 2 * 1.7 * a @ p,
    ),
    "infonce": (functools.partial(infonce_loss, temperature=0.2), lambda a, p, n: a @ (n - p) / 0.2),
}
every_loss = pytest.mark.parametrize(("loss", "exponent"), LOSSES.values(), ids=LOSSES.keys())


def loop(
    exponent: Callable[..., float], a: Tensor, p: Tensor, share: float, mask: np.ndarray, near: np.ndarray
) -> float:
    """mean_i Σ_p T_ip log(1 + Σ_n M_in exp(...)), triple by triple; candidates and negatives are the rows of p."""
    anchors, candidates, total = a.numpy(), p.numpy(), 0.0
    for i in range(len(anchors)):
        count = near[i].sum()
        for j in range(len(candidates)):
            own = 1.0 if i == j else 0.0
            target = (1 - share) * own + share * near[i, j] / count if count else own
            terms = [math.exp(exponent(anchors[i], candidates[j], candidates[n])) for n in np.flatnonzero(mask[i])]
            total += target * math.log(1 + sum(terms))
    return total / len(anchors)


@every_loss
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_it_is_the_triple_loop(loss: functools.partial, exponent: Callable[..., float], share: float) -> None:
    a, p = unit_vectors(B, 4, seed=1), unit_vectors(B, 4, seed=2)
    mask = ~NEIGHBORS & ~torch.eye(B, dtype=torch.bool)
    mask[4] = False  # an anchor without negatives adds 0
    value = loss(a, p, p, mask, targets=soft_targets(NEIGHBORS, share))
    expected = loop(exponent, a, p, share, mask.numpy(), NEIGHBORS.numpy())
    assert value.item() == pytest.approx(expected, rel=1e-6) and expected > 0


@every_loss
def test_one_positive_is_the_plain_loss(loss: functools.partial, exponent: Callable[..., float]) -> None:
    a, p = unit_vectors(B, 4, seed=3), unit_vectors(B, 4, seed=4)
    torch.testing.assert_close(loss(a, p, p), loss(a, p, p, targets=torch.eye(B)), check_dtype=False)
    mask = ~torch.eye(B, dtype=torch.bool)
    expected = loop(exponent, a, p, 0.0, mask.numpy(), NEIGHBORS.numpy())
    assert loss(a, p, p).item() == pytest.approx(expected, rel=1e-9)


@every_loss
def test_gradients(loss: functools.partial, exponent: Callable[..., float]) -> None:
    a, p, n = (unit_vectors(B, 3, seed=seed).requires_grad_() for seed in (5, 6, 7))
    targets, mask = soft_targets(NEIGHBORS, 0.5).double(), ~NEIGHBORS & ~torch.eye(B, dtype=torch.bool)
    mask[1] = False
    assert torch.autograd.gradcheck(lambda *x: loss(*x, mask, targets=targets), [a, p, n])


def test_a_steep_angle_stays_finite() -> None:
    """exp(8t) is beyond float32, and the smallest products are far below its smallest number."""
    a, p = unit_vectors(B, 4, seed=8, dtype=torch.float32), unit_vectors(B, 4, seed=9, dtype=torch.float32)
    a.requires_grad_()
    loss = angular_npairs_loss(a, p, p, tan_squared_alpha=20.0, targets=soft_targets(NEIGHBORS, 0.5))
    loss.backward()
    mask = ~torch.eye(B, dtype=torch.bool)
    exponent = lambda a, p, n: 80 * (a + p) @ n - 42 * a @ p  # noqa: E731
    expected = loop(exponent, a.detach().double(), p.double(), 0.5, mask.numpy(), NEIGHBORS.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-5) and a.grad is not None and a.grad.isfinite().all()


def test_rows_sum_to_one_and_pairs_alone_keep_themselves() -> None:
    targets = soft_targets(NEIGHBORS, 0.4)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(B))
    torch.testing.assert_close(targets[0], torch.tensor([0.6, 0.2, 0, 0.2, 0, 0]))
    torch.testing.assert_close(targets[5], torch.eye(B)[5])


def test_both_directions_have_the_neighbors_as_positives_and_never_as_negatives() -> None:
    x, y, ids = unit_vectors(B, 4, seed=10), unit_vectors(B, 4, seed=11), torch.tensor([0, 1, 2, 3, 4, 2])
    terms = retrieval_loss_terms(
        infonce_loss, x, y, ids, known_neighbors=NEIGHBORS, targets=soft_targets(NEIGHBORS, 0.5)
    )
    mask = (negative_mask(ids, ids) & ~NEIGHBORS).numpy()
    exponent = lambda a, p, n: a @ (n - p) / 0.1  # noqa: E731
    for name, (a, p) in {"l_i2t": (x, y), "l_sym": (y, x)}.items():
        expected = loop(exponent, a, p, 0.5, mask, NEIGHBORS.numpy())
        assert terms[name].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: angular_npairs_loss(a, a, a, form="hinge", targets=torch.eye(B)),
        lambda a: infonce_loss(a, a, a, targets=torch.eye(3)),
        lambda a: infonce_loss(a, a, a, temperature=0),
        lambda a: soft_targets(torch.eye(B), 0.5),
    ],
)
def test_mistakes(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="targets|temperature|neighbors"):
        wrong(unit_vectors(B, 4, seed=16))
