"""Intervals: the side that they are on, and how they are shown."""

import pytest

from ckl_jax.analysis.statistics import Interval, percent

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


def test_an_interval_is_shown_as_far_as_there_are_numbers():
    interval = Interval(0.5281, 0.4279, 0.6272)
    assert percent(interval) == percent([*interval]) == "52.8 [42.8, 62.7]"
    assert percent((-0.00001, -0.02, 0.03), "+") == "+0.0 [-2.0, +3.0]"
    assert interval.text(".3g") == "0.528 [0.428, 0.627]"
    assert percent((0.5, NAN, NAN)) == "50.0"
    assert percent((NAN, 0.0, 1.0)) == "none"
