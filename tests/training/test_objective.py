"""The objective: what it makes of the settings, and PVSE's terms where images were lost."""

import math

import pytest
import torch

import losses
from pipeline.schema import Loss
from training.objective import npairs_loss
from training.pvse import diversity_loss, mmd_loss, pvse_terms

A, P, N = torch.nn.functional.normalize(torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)), dim=2)


@pytest.mark.parametrize(("given", "used"), [(None, 0.2), (0.1, 0.1)])
def test_the_hinge_has_its_own_angle(given: float | None, used: float) -> None:
    """Eq. 2 with squared distances, summed as in Eq. 3, of the angle that is set or of the hinge's."""
    total = 0.0
    for i in range(4):
        for j in range(4):
            middle = (A[i] + P[i]) / 2
            bracket = (A[i] - P[i]).square().sum() - 4 * used * (N[j] - middle).square().sum()
            total += max(0.0, bracket.item()) * (i != j)
    loss = npairs_loss(Loss(form="hinge", tan_squared_alpha=given))(A, P, N)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5) and total > 0


def test_the_margin_reaches_the_triplet_loss() -> None:
    for margin in (0.05, 0.7):
        total = 0.0
        for i in range(4):
            for j in range(4):
                bracket = (A[i] - P[i]).square().sum() - (A[i] - N[j]).square().sum() + margin
                total += max(0.0, bracket.item()) * (i != j)
        assert npairs_loss(Loss(base="triplet", margin=margin))(A, P, N).item() == pytest.approx(total / 4)


def test_tiled_negatives_count_a_batch_times() -> None:
    tiled = npairs_loss(Loss(tile_negatives=True))(A, P, N)
    torch.testing.assert_close(tiled, losses.angular_npairs_loss(A, P, N, negatives_weight=4.0))
    assert not math.isclose(tiled.item(), npairs_loss(Loss())(A, P, N).item())


def masks(readable: list[bool], neighbor_readable: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(readable), torch.tensor(neighbor_readable)


def test_a_lost_image_has_no_part_in_the_terms_of_pvse() -> None:
    x, y = torch.nn.functional.normalize(torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(1)), dim=3)
    of_images = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    terms = pvse_terms(x, y, (of_images, y), *masks([True, False, True], [True, True, False]))
    torch.testing.assert_close(terms["l_mmd"], mmd_loss(x[[0, 2]], y[[0, 2]]))
    of_each = [diversity_loss(one[None]) for one in of_images]
    expected = (of_each[0] + of_each[2] + of_each[3] + of_each[4]) / 6 + diversity_loss(y)
    torch.testing.assert_close(terms["l_diversity"], expected)
    (gradient,) = torch.autograd.grad(terms["l_diversity"], of_images)
    assert not gradient[[1, 5]].any() and gradient.isfinite().all() and gradient[0].any()


def test_a_batch_without_any_image_gives_terms_of_0() -> None:
    x = torch.nn.functional.normalize(torch.randn(2, 2, 5), dim=2)
    terms = pvse_terms(x, x, (x, torch.zeros(2, 2, 5)), *masks([False, False], [False, False]))
    assert terms["l_mmd"] == 0 and terms["l_diversity"] == 0
