"""What a difference is worth: chance of seeds and test images, many comparisons, the room above chance."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from reporting.figures import statistic_of_draws

Scored = tuple[np.ndarray, np.ndarray]
"""Scores of the queries of one run (q,), and their image numbers (q,)."""


def seeds_and_images(
    methods: Mapping[str, Sequence[Scored]],
    *,
    same_images: bool,
    median: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Hierarchical bootstrap of a metric's mean over seeds, (resamples,) of every method.

    A resample draws as many seeds as there are, with replacement, and for each drawn seed as many test images as it
    has, with replacement. Where all seeds have the same test images (`same_images`) they are drawn once for all: their
    chance is one and the same in every seed, and means over seeds do not lessen it. All methods take the same draws, so
    that the difference of two is paired. methods: of every method one run a seed, in the same order.
    """
    seeds = len(next(iter(methods.values())))
    images = [np.unique(np.concatenate([runs[number][1] for runs in methods.values()])) for number in range(seeds)]
    statistics = {
        name: [
            statistic_of_draws(values, np.searchsorted(known, own), len(known), median)
            for (values, own), known in zip(runs, images, strict=True)
        ]
        for name, runs in methods.items()
    }
    rng = np.random.default_rng(seed)
    found = {name: np.zeros(resamples) for name in methods}
    for resample in range(resamples):
        drawn = None
        for number in rng.integers(seeds, size=seeds):
            if drawn is None or not same_images:
                drawn = rng.integers(len(images[number]), size=len(images[number]))
            for name, of_seeds in statistics.items():
                found[name][resample] += of_seeds[number](drawn) / seeds
    return found


def paired_t_test(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of paired differences (n,), n > 1, one a seed: of Student's t with n - 1 degrees of freedom."""
    from scipy.stats import t  # late: it takes half a second

    n, mean, deviation = len(differences), float(np.mean(differences)), float(np.std(differences, ddof=1))
    if deviation == 0:
        return 0.0 if mean else 1.0
    return float(2 * t.sf(abs(mean) / deviation * math.sqrt(n), n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the i-th smallest of m p-values times m - i + 1, at most 1, never falling.

    What is below 0.05 is significant with a chance of at most 5 % that any of the m is so in error.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def above_chance(value: float, chance: float) -> float | None:
    """(value - chance) / (1 - chance): 0 is chance, 1 perfect, as in Cohen's kappa. None where chance is no share."""
    return (value - chance) / (1 - chance) if 0 <= chance < 1 else None
