"""The models that ship solve what experiments/README.md says of them."""

import pytest

from ckl_jax.checkpoint.store import load_model
from ckl_jax.evaluate import judge_cell, moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "operands", "digits", "offset", "least", "most"),
    [
        ("tiny", "identical", 5, 0, 0.7, 0.95),  # 82.9% of 1,000
        ("tiny", "varying", 6, 0, 0.2, 0.55),  # 36.6% of 1,000
        ("N5", "identical", 5, 0, 0.98, 1.0),  # 99.9% of 300, at three offsets
        ("N5", "identical", 5, 180, 0.98, 1.0),
        ("N5", "varying", 6, 0, 0.0, 0.03),  # 0% of 300
    ],
)
def test_accuracy_is_what_was_published(name, operands, digits, offset, least, most):
    model = moved(load_model(name), offset)
    assert least <= judge_cell(model, operands, digits, 100, seed=1).mean() <= most
