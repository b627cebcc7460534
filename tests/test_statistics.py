"""Intervals: the side that they are on, and how they are shown; p-values and their correction."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ckl_jax.analysis.statistics import (
    Interval,
    bootstrap_ratio,
    holm,
    mean_interval,
    paired_p,
    percent,
    share_interval,
)
from ckl_jax.errors import ConfigError

NAN = float("nan")


@pytest.mark.parametrize(
    ("low", "high", "than", "side"),
    [
        (0.01, 0.2, 0.0, "above"),
        (0.0, 0.2, 0.0, "undecided"),
        (-0.1, 0.1, 0.0, "undecided"),
        (-0.1, 0.0, 0.0, "undecided"),
        (-0.2, -0.01, 0.0, "below"),
        (NAN, NAN, 0.0, "undecided"),
        (0.1, 0.1, 0.0, "undecided"),
        (0.1, 0.1, (0.5, 0.4, 0.6), "undecided"),
        (0.4, 0.6, (0.1, 0.1, 0.1), "above"),
        (0.6, 0.8, 0.5, "above"),
        (0.2, 0.4, 0.5, "below"),
        (0.6, 0.8, Interval(0.4, 0.3, 0.5), "above"),
        (0.6, 0.8, [0.7, 0.6, 0.8], "undecided"),
        (0.6, 0.8, (0.5, 0.4, 0.6), "undecided"),
        (0.6, 0.8, (1.0, 0.9, 1.1), "below"),
        (0.6, 0.8, (NAN, NAN, NAN), "undecided"),
    ],
)
def test_a_side_is_that_of_the_whole_interval(low, high, than, side):
    assert Interval(0.0, low, high).side(than) == side


@pytest.mark.parametrize("values", [(0.1, 0.1, 0.1), (0.9 - 0.8, 0.4 - 0.3, 0.6 - 0.5), (-0.7,) * 7])
def test_values_that_are_the_same_but_for_rounding_decide_nothing(values):
    interval = mean_interval(np.array(values))
    assert interval.low == interval.high == interval.mean
    assert interval.side() == "undecided"


@pytest.mark.parametrize("problems", [100, 1000])
def test_shares_of_float32_that_are_the_same_decide_nothing(problems):
    shares = np.arange(problems, dtype=np.float32) / problems
    for step in (0, 1, 5):
        differences = shares[step:].astype(np.float64) - shares[: problems - step]
        for pair in itertools.pairwise(differences[:60]):
            assert mean_interval(np.array(pair)).side() == "undecided"
            assert not paired_p(np.array(pair)) < 1
    one_problem_apart = mean_interval(np.array([0.5, 0.5 + 1 / problems]))
    assert one_problem_apart.low < one_problem_apart.mean < one_problem_apart.high


def test_an_interval_is_shown_as_far_as_there_are_numbers():
    interval = Interval(0.5281, 0.4279, 0.6272)
    assert percent(interval) == percent([*interval]) == "52.8 [42.8, 62.7]"
    assert percent((-0.00001, -0.02, 0.03), "+") == "+0.0 [-2.0, +3.0]"
    assert interval.text(".3g") == "0.528 [0.428, 0.627]"
    assert percent((0.5, NAN, NAN)) == "50.0"
    assert percent((NAN, 0.0, 1.0)) == "none"


@pytest.mark.parametrize(("successes", "count"), [(0, 1), (1, 1), (0, 7), (3, 7), (7, 7), (997, 1000), (1, 10**6)])
def test_the_interval_of_a_share_is_wilsons(successes, count):
    expected = stats.binomtest(successes, count).proportion_ci(method="wilson")
    np.testing.assert_allclose(share_interval(successes, count), (successes / count, *expected), atol=1e-14)


def test_an_interval_is_cut_where_nothing_can_be():
    assert mean_interval(np.full(4, 1 + 1e-7)).within(0, 1) == (1.0, 1.0, 1.0)
    assert mean_interval(np.array([0.2, 0.9])).within(0, 1) == (0.55, 0.0, 1.0)
    assert mean_interval(np.array([-0.2, 0.9])).within(-1, 1) == (0.35, -1.0, 1.0)
    few, one = mean_interval(np.array([0.5, 0.5, 0.6])), mean_interval(np.array([0.5]))
    assert few.within(0, 1) == few
    np.testing.assert_equal(one.within(0, 1), one)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_of_a_mean_is_students(count):
    values = np.random.default_rng(count).normal(size=count)
    expected = stats.t.interval(0.9, count - 1, values.mean(), stats.sem(values))
    np.testing.assert_allclose(mean_interval(values, 0.9)[1:], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # One degree of freedom: p = 1 - 2 atan(t) / pi; here t = 2.
        ((1, 3), 0.2951672),
        ((-3, -1), 0.2951672),
        # Two: p = 1 - t / sqrt(2 + t^2); here t = 2 sqrt(3).
        ((1, 2, 3), 0.0741799),
        ((-1, 1), 1),
        ((0.5, 0.5, 0.5), NAN),
        ((0.1, 0.1, 0.1), NAN),
        ((0.9 - 0.8, 0.4 - 0.3, 0.6 - 0.5), NAN),
        ((0.3 - 0.2 - 0.1, 0.0, 0.7 - 0.6 - 0.1), 1),
        ((0, 0, 0), 1),
        ((0.5,), NAN),
        ((), NAN),
    ],
)
def test_a_paired_p_is_that_of_students_test_by_hand(differences, p):
    assert paired_p(np.array(differences)) == pytest.approx(p, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_paired_p_is_scipys(count):
    differences = np.random.default_rng(count).normal(0.5, size=count)
    assert paired_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-10)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # Times 4, 3, 2 and 1 from the smallest on, and none below a smaller one's.
        ((0.01, 0.04, 0.03, 0.005), (0.03, 0.06, 0.06, 0.02)),
        ((0.03,), (0.03,)),
        ((0.02, 0.02), (0.04, 0.04)),
        ((0.4, 0.7, 0.6), (1, 1, 1)),
        ((NAN, 0.01, NAN), (NAN, 0.03, NAN)),
        ((), ()),
    ],
)
def test_p_values_are_corrected_by_holms_method(p_values, corrected):
    assert holm(p_values) == pytest.approx(list(corrected), nan_ok=True)


def test_a_ratio_of_sums_and_its_bootstrap():
    parts, wholes = np.array([1.0, 0.0, 3.0]), np.array([2.0, 2.0, 4.0])
    ratio = bootstrap_ratio(parts, wholes)
    assert ratio.mean == pytest.approx(0.5)
    assert (ratio.low, ratio.high) == pytest.approx((0.0, 0.75))
    assert bootstrap_ratio(0.3 * wholes, wholes) == pytest.approx((0.3, 0.3, 0.3))


def test_a_whole_of_nothing_adds_nothing_to_a_ratio():
    ratio = bootstrap_ratio(np.array([0.0, 1.0, 1.0]), np.array([0.0, 2.0, 2.0]))  # Some samples have the first alone.
    assert ratio == pytest.approx((0.5, 0.5, 0.5))


REFUSED = [([], []), ([1.0], [1.0, 2.0]), ([0.0, 0.0], [0.0, 0.0]), ([1.0, 1.0], [-1.0, 2.0]), ([float("nan")], [1.0])]


@pytest.mark.parametrize(("parts", "wholes"), REFUSED)
def test_a_ratio_of_nothing_is_refused(parts, wholes):
    with pytest.raises(ConfigError, match=r"^parts"):
        bootstrap_ratio(np.array(parts), np.array(wholes))
