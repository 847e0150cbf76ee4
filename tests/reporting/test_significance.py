"""What a difference is worth: the hierarchical bootstrap, Holm's correction, the room above chance."""

import numpy as np
import pytest
import scipy.stats

from reporting.significance import Scored, above_chance, holm, paired_t_test, seeds_and_images


def runs(seed: int, images: list[int]) -> list[Scored]:
    """A run for each number of images, with one to three queries an image."""
    rng = np.random.default_rng(seed)
    found = []
    for count in images:
        groups = np.repeat(rng.permutation(100)[:count], rng.integers(1, 4, count))
        found.append((rng.integers(1, 9, len(groups)).astype(float), groups))
    return found


def rescored(of_seeds: list[Scored], seed: int) -> list[Scored]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, 9, len(groups)).astype(float), groups) for _, groups in of_seeds]


def by_a_loop(of_seeds: list[Scored], same_images: bool, median: bool, resamples: int) -> list[float]:
    """The same draws, their values written out."""
    rng, found = np.random.default_rng(0), []
    for _ in range(resamples):
        of_draws, images = [], None
        for place in rng.integers(len(of_seeds), size=len(of_seeds)):
            values, groups = of_seeds[place]
            names = sorted(set(groups.tolist()))
            if images is None or not same_images:
                images = [names[number] for number in rng.integers(len(names), size=len(names))]
            drawn = [value for image in images for value, group in zip(values, groups, strict=True) if group == image]
            of_draws.append(np.floor(np.median(drawn)) if median else np.mean(drawn))
        found.append(float(np.mean(of_draws)))
    return found


@pytest.mark.parametrize("median", [False, True])
@pytest.mark.parametrize("same_images", [False, True])
def test_seeds_and_images_are_drawn_as_a_loop_draws_them(same_images: bool, median: bool) -> None:
    ours = runs(1, [7, 7, 7, 7] if same_images else [6, 7, 8, 9])
    if same_images:
        ours = rescored([ours[0]] * 4, 2)
    methods = {"ours": ours, "theirs": rescored(ours, 3)}
    found = seeds_and_images(methods, same_images=same_images, median=median, resamples=40)
    for name, of_seeds in methods.items():
        assert found[name] == pytest.approx(by_a_loop(of_seeds, same_images, median, 40))


@pytest.mark.parametrize("same_images", [False, True])
def test_the_spread_is_that_of_seeds_and_of_images(same_images: bool) -> None:
    # A seed moves all of its images by N(0, 0.5), an image moves by N(0, 2). Images of all seeds are the same, or not.
    seeds, images = 40, 60
    rng = np.random.default_rng(4)
    of_image = 2 * rng.normal(size=(1 if same_images else seeds, images))
    scores = 0.5 * rng.normal(size=(seeds, 1)) + of_image
    groups = np.arange(images)
    methods = {"ours": [(row, groups) for row in scores], "theirs": [(np.zeros(images), groups)] * seeds}
    found = seeds_and_images(methods, same_images=same_images, resamples=500)
    variance = 0.5**2 / seeds + 2**2 / (images if same_images else images * seeds)
    assert np.std(found["ours"] - found["theirs"]) == pytest.approx(np.sqrt(variance), rel=0.15)


def test_methods_that_differ_alike_everywhere_differ_by_that() -> None:
    ours = runs(5, [6, 7, 8])
    found = seeds_and_images(
        {"ours": ours, "theirs": [(values - 0.25, groups) for values, groups in ours]}, same_images=False, resamples=50
    )
    assert found["ours"] - found["theirs"] == pytest.approx(np.full(50, 0.25))


@pytest.mark.parametrize("n", [2, 5, 10])
def test_the_paired_t_test_is_scipys(n: int) -> None:
    ours, theirs = np.random.default_rng(n).normal([[0.6], [0.5]], 0.1, size=(2, n))
    assert paired_t_test(ours - theirs) == pytest.approx(scipy.stats.ttest_rel(ours, theirs).pvalue)


def test_equal_differences_have_no_chance_in_them() -> None:
    assert paired_t_test([0.5, 0.5, 0.5]) == 0
    assert paired_t_test([0.0, 0.0, 0.0]) == 1


def test_holms_correction_by_hand() -> None:
    # Sorted 0.005 0.01 0.03 0.04 times 4 3 2 1 is 0.02 0.03 0.06 0.04; the last may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    for seed in range(30):
        p_values = np.random.default_rng(seed).uniform(0, 0.05, size=8)
        rejected = set()
        for step, place in enumerate(np.argsort(p_values)):  # stops at the first that is not below its own level
            if p_values[place] >= 0.05 / (8 - step):
                break
            rejected.add(int(place))
        assert {place for place, p in enumerate(holm(p_values.tolist())) if p < 0.05} == rejected


def test_the_share_of_the_room_above_chance() -> None:
    assert above_chance(0.6, 0.2) == pytest.approx(0.5)
    assert above_chance(0.2, 0.2) == 0
    assert above_chance(1.0, 0.05) == 1
    assert above_chance(3.0, 100.0) is None  # a median rank
