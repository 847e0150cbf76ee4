"""The pairwise loss, fine-grained labels, and what makes texts alike, against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.fine_grained import Relevance, fine_grained_labels, likeness, pairwise_similarity_loss

seeds = st.integers(0, 2**31)
few_examples = settings(max_examples=25, deadline=None)


def batch(seed: int, b: int = 5, m: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Similarities, positives, negatives and labels; a part of the examples is neither positive nor negative."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (b, m), generator=generator)
    kind[0, :2] = torch.tensor([0, 1])
    similarities = torch.rand(b, m, generator=generator, dtype=torch.float64) * 2 - 1
    return similarities, kind == 0, kind == 1, torch.rand(b, m, generator=generator, dtype=torch.float64) + 0.5


def loop(
    similarities: Tensor, positive: Tensor, negative: Tensor, labels: Tensor | None, margin: float, weight: float
) -> float:
    """The formula, an example at a time."""
    means, total = [], 0.0
    for kind in (positive, negative):
        scores, label = [], []
        for i in range(similarities.shape[0]):
            for j in range(similarities.shape[1]):
                if kind[i, j]:
                    scores.append(similarities[i, j].item())
                    label.append(1.0 if labels is None else labels[i, j].item())
        means.append(sum(x * s for x, s in zip(label, scores, strict=True)) / sum(label))
        total += sum(x * (s - means[-1]) ** 2 for x, s in zip(label, scores, strict=True)) / sum(label)
    return total + weight * max(0.0, margin - (means[0] - means[1]))


# The loss


@given(seeds, st.floats(0.1, 2), st.floats(0.1, 5))
@few_examples
def test_the_loss_is_a_loop_over_its_examples(seed: int, margin: float, weight: float) -> None:
    similarities, positive, negative, labels = batch(seed)
    for given_labels in (labels, None):
        loss = pairwise_similarity_loss(
            similarities, positive, negative, given_labels, margin=margin, mean_weight=weight
        )
        assert loss.item() == pytest.approx(loop(similarities, positive, negative, given_labels, margin, weight))


@given(seeds, st.floats(0.01, 100))
@few_examples
def test_equal_labels_give_the_loss_of_2018(seed: int, label: float) -> None:
    similarities, positive, negative, _ = batch(seed)
    positives, negatives = similarities[positive].numpy(), similarities[negative].numpy()
    expected = positives.var() + negatives.var() + 1.5 * max(0, 0.7 - (positives.mean() - negatives.mean()))
    for labels in (None, torch.full_like(similarities, label)):
        loss = pairwise_similarity_loss(similarities, positive, negative, labels, margin=0.7, mean_weight=1.5)
        assert loss.item() == pytest.approx(expected)


def test_an_example_of_label_two_counts_as_two_examples() -> None:
    similarities, positive, negative, _ = batch(1)
    labels = torch.ones_like(similarities)
    labels[2] = 2
    twice = [torch.cat([x, x[2:3]]) for x in (similarities, positive, negative)]
    torch.testing.assert_close(
        pairwise_similarity_loss(similarities, positive, negative, labels), pairwise_similarity_loss(*twice)
    )


def test_a_harder_label_raises_an_examples_share_of_the_gradient() -> None:
    """With the variances left out the gradient is that of the means: label over the sum of labels."""
    similarities, positive, negative, labels = batch(2)
    similarities.requires_grad_()

    def gradient(labels: Tensor) -> Tensor:
        # From a weight so large that variances do not matter.
        loss = pairwise_similarity_loss(similarities, positive, negative, labels, margin=9, mean_weight=1e9)
        return torch.autograd.grad(loss, similarities)[0] / 1e9

    found = gradient(labels)
    torch.testing.assert_close(found[positive], -labels[positive] / labels[positive].sum(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[negative], labels[negative] / labels[negative].sum(), rtol=1e-6, atol=1e-8)
    assert not found[~positive & ~negative].any()
    harder = labels.clone()
    harder[0, 0] *= 2  # a positive
    assert gradient(harder)[0, 0] < found[0, 0] < 0


@pytest.mark.parametrize("margin", [0.2, 3.0], ids=["margin kept", "margin violated"])
def test_gradients(margin: float) -> None:
    similarities, positive, negative, labels = batch(3)
    similarities[positive] += 1
    labels.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: pairwise_similarity_loss(s, positive, negative, labels.detach(), margin=margin),
        similarities.requires_grad_(),
    )
    pairwise_similarity_loss(similarities, positive, negative, labels).backward()
    assert labels.grad is None, "labels say how much an example counts and are not learned"


@pytest.mark.parametrize("missing", ["positive", "negative", "both"])
def test_a_side_without_examples_has_no_loss_and_no_nan(missing: str) -> None:
    similarities, positive, negative, labels = batch(4)
    similarities.requires_grad_()
    none = torch.zeros_like(positive)
    positive = none if missing in ("positive", "both") else positive
    negative = none if missing in ("negative", "both") else negative
    loss = pairwise_similarity_loss(similarities, positive, negative, labels)
    loss.backward()
    assert similarities.grad.isfinite().all()
    if missing == "both":
        assert loss.item() == 0 and not similarities.grad.any()
    else:
        kind = positive if missing == "negative" else negative
        weights = labels[kind] / labels[kind].sum()
        variance = (weights * (similarities[kind] - (weights * similarities[kind]).sum()) ** 2).sum()
        torch.testing.assert_close(loss, variance)


def test_a_perfect_space_has_no_loss() -> None:
    _, positive, negative, labels = batch(5)
    assert pairwise_similarity_loss(positive.double(), positive, negative, labels, margin=0.9) == pytest.approx(0)


def test_bfloat16_similarities_are_computed_in_float32() -> None:
    similarities, positive, negative, labels = batch(6)
    half = similarities.bfloat16()
    loss = pairwise_similarity_loss(half, positive, negative, labels)
    assert loss.dtype == torch.float32
    assert loss == pairwise_similarity_loss(half.float(), positive, negative, labels)


def test_shapes_that_do_not_fit() -> None:
    similarities, positive, negative, labels = batch(7)
    for arguments in (
        (similarities, positive[:2], negative, labels),
        (similarities, positive, negative.float(), labels),
        (similarities, positive, negative, labels[:2]),
    ):
        with pytest.raises(ValueError, match="must be"):
            pairwise_similarity_loss(*arguments)
    with pytest.raises(ValueError, match="own must be bool"):
        fine_grained_labels(similarities, positive, negative, positive.float())


# Labels


@given(seeds, st.floats(0, 10))
@few_examples
def test_labels_are_monotone_in_hardness(seed: int, strength: float) -> None:
    """An unlike positive has a higher label than a like one, an alike negative than an unlike one."""
    likeness, positive, negative, _ = batch(seed, 8, 8)
    likeness = (likeness + 1) / 2
    labels = fine_grained_labels(likeness, positive, negative, strength=strength)
    order = likeness[positive].argsort()
    assert (labels[positive][order].diff() <= 0).all()
    order = likeness[negative].argsort()
    assert (labels[negative][order].diff() >= 0).all()
    assert (labels[~positive & ~negative] == 1).all()
    assert (labels >= 1).all() and (labels <= 1 + strength).all()


def test_labels_are_one_and_strength_times_hardness() -> None:
    likeness = torch.tensor([[0.9, 0.2, 0.7], [0.4, 0.5, 0.1]])
    positive = torch.tensor([[True, True, False], [False, True, False]])
    negative = torch.tensor([[False, False, True], [True, False, False]])
    labels = fine_grained_labels(likeness, positive, negative, strength=2.0)
    torch.testing.assert_close(labels, torch.tensor([[1.2, 2.6, 2.4], [1.8, 2.0, 1.0]]))
    assert (fine_grained_labels(likeness, positive, negative, strength=0.0) == 1).all()


def test_a_text_compared_with_itself_says_nothing() -> None:
    likeness = torch.tensor([[1.0, 0.2], [0.6, 1.0]])
    positive, own = torch.ones(2, 2, dtype=torch.bool), torch.eye(2, dtype=torch.bool)
    negative = ~positive
    labels = fine_grained_labels(likeness, positive, negative, own)
    torch.testing.assert_close(labels, torch.tensor([[1.6, 1.8], [1.4, 1.6]]))
    other = fine_grained_labels(likeness.fill_diagonal_(0.0), positive, negative, own)
    torch.testing.assert_close(other, labels)
    assert (fine_grained_labels(likeness, own, ~own & negative, own) == 1).all(), "nothing else is positive"


# What makes texts alike


def relevance_by_category() -> Relevance:
    return Relevance(np.array([0, 0, 1, 2, 3, 4]), np.array([0, 0, 0, 1, -1, 1]))


def test_alike_by_category() -> None:
    relevance = relevance_by_category()
    rows = np.arange(6)
    alike, unlike = relevance.alike(rows, rows)
    for i in rows:
        for j in rows:
            one, other = relevance.categories[i], relevance.categories[j]
            same_image = relevance.image_ids[i] == relevance.image_ids[j]
            assert alike[i, j] == (not same_image and one == other and one >= 0)
            assert unlike[i, j] == (not same_image and one != other and min(one, other) >= 0)
    assert np.array_equal(relevance.own(rows, rows), np.equal.outer(relevance.image_ids, relevance.image_ids))


@given(seeds)
@few_examples
def test_alike_by_neighbors_either_way(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(20, 8, replace=False))
    neighbors = np.where(rng.random((8, 3)) < 0.8, rng.choice(rows, (8, 3)), -1)
    relevance = Relevance(rng.integers(0, 15, 20), np.full(20, -1), rows, neighbors)
    lists = {row: set(table) - {-1} for row, table in zip(rows.tolist(), neighbors.tolist(), strict=True)}
    a, b = rng.choice(20, 7), rng.choice(20, 9)  # some without a list, some twice
    alike, unlike = relevance.alike(a, b)
    for i, one in enumerate(a.tolist()):
        for j, other in enumerate(b.tolist()):
            same_image = relevance.image_ids[one] == relevance.image_ids[other]
            near = other in lists.get(one, ()) or one in lists.get(other, ())
            assert alike[i, j] == (near and not same_image)
            assert unlike[i, j] == (not near and not same_image)


def test_likeness_is_a_weighted_inner_product_and_symmetric() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    comparison = torch.randn(5, generator=generator)
    expected = torch.tensor([[(comparison[:4] * x * y).sum() + comparison[4] for y in b] for x in a])
    torch.testing.assert_close(likeness(a, b, comparison), expected)
    torch.testing.assert_close(likeness(b, a, comparison), expected.T)
