"""Cases of one kind, of which the quick tests need one."""

import pytest


def first(values):
    """The first case for every run of the tests, the others for the slow ones."""
    quick, *others = values
    return [quick, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]
