"""Intervals of figures, against scipy and by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from reporting.figures import bootstrap_interval, difference_interval, paired_t_interval


def gaussian(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def test_bootstrap_is_the_normal_interval_of_many_values() -> None:
    values = gaussian(500, 1).astype(np.float64) * 3 + 7
    low, high = bootstrap_interval(values, resamples=4000)
    half_width = 1.96 * values.std() / math.sqrt(500)
    assert low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)
    narrow_low, narrow_high = bootstrap_interval(values, resamples=4000, confidence=0.5)
    assert (narrow_high - narrow_low) / (high - low) == pytest.approx(0.6745 / 1.96, rel=0.1)


def test_bootstrap_draws_whole_groups() -> None:
    values = gaussian(60, 1)
    copies, groups = np.repeat(values, 5), np.repeat(np.arange(60), 5)
    assert bootstrap_interval(copies, groups) == pytest.approx(bootstrap_interval(values))
    (low, high), (naive_low, naive_high) = bootstrap_interval(copies, groups), bootstrap_interval(copies)
    assert high - low > 1.8 * (naive_high - naive_low)


def test_bootstrap_weighs_groups_by_their_size() -> None:
    # Of two groups a resample holds both (mean 0.1) half of the time, else one of them twice (0 or 1).
    values, groups = [0.0] * 9 + [1.0], ["many"] * 9 + ["one"]
    assert bootstrap_interval(values, groups, confidence=0.02) == pytest.approx((0.1, 0.1))
    assert bootstrap_interval(values, groups, confidence=0.9) == (0, 1)


def test_bootstrap_is_its_seeds() -> None:
    values = torch.arange(20.0)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values.numpy(), seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval([2.5, 2.5, 2.5]) == (2.5, 2.5)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_paired_t_interval_is_scipys(n: int) -> None:
    ours, baseline = np.random.default_rng(n).normal([[0.6], [0.5]], 0.1, size=(2, n))
    expected = scipy.stats.ttest_rel(ours, baseline).confidence_interval(0.9)
    assert paired_t_interval(ours - baseline, 0.9) == pytest.approx((np.mean(ours - baseline), *expected))
    assert all(type(value) is float for value in paired_t_interval(ours - baseline))


def test_paired_t_interval_of_equal_differences() -> None:
    assert paired_t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_interval_mistakes() -> None:
    for values in ([], [1.0, np.nan], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="values must be"):
            bootstrap_interval(values)
    with pytest.raises(ValueError, match="groups"):
        bootstrap_interval([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval([1.0, 2.0], resamples=0)
    for differences in ([], [1.0], [1.0, np.inf], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="differences must be"):
            paired_t_interval(differences)
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match="confidence"):
            bootstrap_interval([1.0, 2.0], confidence=confidence)
        with pytest.raises(ValueError, match="confidence"):
            paired_t_interval([1.0, 2.0], confidence)


def resampled_by_a_loop(values: np.ndarray, groups: np.ndarray, median: bool) -> list[float]:
    """Each of the 1,000 resamples of whole groups, its values written out."""
    rng, names, found = np.random.default_rng(0), np.unique(groups), []
    for _ in range(1000):
        drawn = np.concatenate([values[groups == names[place]] for place in rng.integers(len(names), size=len(names))])
        found.append(float(np.floor(np.median(drawn)) if median else drawn.mean()))
    return found


@pytest.mark.parametrize("median", [False, True])
def test_bootstrap_of_a_difference_is_a_loop_over_images(median: bool) -> None:
    rng = np.random.default_rng(5)
    groups, fewer = np.repeat(np.arange(8), 3), np.repeat(np.arange(8), 2)  # one run tells two captions apart more
    ours, theirs = rng.integers(1, 20, 24).astype(float), rng.integers(1, 20, 16).astype(float)
    both = [resampled_by_a_loop(*of_run, median) for of_run in ((ours, groups), (theirs, fewer))]
    expected = np.quantile(np.subtract(*both), [0.025, 0.975])
    assert difference_interval((ours, groups), (theirs, fewer), median=median) == pytest.approx(tuple(expected))
    alone = np.quantile(both[0], [0.025, 0.975])
    assert bootstrap_interval(ours, groups, median=median) == pytest.approx(tuple(alone))
