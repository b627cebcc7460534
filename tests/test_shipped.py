"""The models that ship are listed, and solve what the list says of them."""

import json

import pytest

from ckl_jax import models
from ckl_jax.checkpoint import shipped
from ckl_jax.checkpoint.store import load_model
from ckl_jax.evaluate import judge_cell, moved


def test_every_model_that_ships_has_a_line_with_its_accuracy(capsys):
    assert sorted(models.ACCURACY) == shipped.names()
    models.main(models.ModelsCommand())
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(models.ACCURACY)
    assert lines[0].split() == ["tiny", "addition", "5", "413,376", "1000", "x", "1", "94.9", "40.6", "83.6", "0.0"]
    assert lines[4].split() == ["N7", "addition", "7", "437,952", "300", "x", "3", "99.4", "90.2", "97.9", "62.3"]
    assert lines[6].split()[-4:] == ["87.3", "-", "-", "-"]


def test_the_ladders_models_take_at_most_12_megabytes():
    files = [path for path in shipped.PRETRAINED.glob("N*/**/*") if path.is_file()]
    assert 8e6 < sum(path.stat().st_size for path in files) < 12e6


@pytest.mark.parametrize("name", models.ACCURACY)
def test_a_model_says_how_it_was_made(name):
    made_by = json.loads((shipped.PRETRAINED / name / "model.json").read_text())["made_by"]
    assert made_by["command"] == "python -m ckl_jax.pretrain"
    assert made_by["config"]["seed"] == 0


CELLS = [
    ("tiny", "varying", 5, 0, 0.89, 1.0),
    ("tiny", "varying", 6, 0, 0.2, 0.55),
    ("tiny", "identical", 5, 0, 0.7, 0.95),
    ("tiny", "identical", 6, 0, 0.0, 0.03),
    ("N3", "varying", 3, 0, 0.85, 1.0),
    ("N3", "varying", 4, 0, 0.0, 0.03),
    ("N3", "identical", 3, 0, 0.68, 1.0),
    ("N3", "identical", 4, 0, 0.0, 0.03),
    ("N5", "varying", 5, 180, 0.98, 1.0),
    ("N5", "varying", 6, 0, 0.01, 0.15),
    ("N5", "identical", 5, 0, 0.98, 1.0),
    ("N5", "identical", 5, 180, 0.98, 1.0),
    ("N5", "identical", 6, 0, 0.0, 0.03),
    ("N6", "varying", 6, 0, 0.93, 1.0),
    ("N6", "varying", 7, 180, 0.3, 0.65),
    ("N6", "identical", 6, 0, 0.8, 1.0),
    ("N6", "identical", 7, 0, 0.0, 0.03),
    ("N7", "varying", 7, 0, 0.95, 1.0),
    ("N7", "varying", 8, 180, 0.76, 0.98),
    ("N7", "identical", 7, 0, 0.89, 1.0),
    ("N7", "identical", 8, 0, 0.45, 0.8),
    ("N9", "varying", 9, 59, 0.95, 1.0),
    ("N9", "varying", 10, 59, 0.88, 1.0),
    ("N9", "identical", 9, 59, 0.92, 1.0),
    ("N9", "identical", 10, 59, 0.58, 0.9),
    ("tiny_subtraction", "varying", 5, 0, 0.74, 0.97),
    ("tiny_multiplication", "varying", 5, 0, 0.8, 1.0),
]
"""Model, operands, digits, position of the block, and the bounds of accuracy on 100 problems other than the list's.

Where both kinds of operands have the same position, they share a program."""


def test_every_number_of_the_list_is_measured_again():
    listed = {}
    for name, measured in models.ACCURACY.items():
        digits = load_model(name).max_pretrain_digits
        for operands in ("varying", "identical"):
            listed[name, operands, digits] = getattr(measured, operands)
            listed[name, operands, digits + 1] = getattr(measured, f"{operands}_longer")
    assert {cell[:3] for cell in CELLS} == {cell for cell, share in listed.items() if share is not None}
    for *cell, offset, least, most in CELLS:
        assert 100 * least <= listed[tuple(cell)] <= 100 * most
        assert offset in models.ACCURACY[cell[0]].offsets


@pytest.mark.slow
@pytest.mark.parametrize(("name", "operands", "digits", "offset", "least", "most"), CELLS)
def test_accuracy_is_what_was_published(name, operands, digits, offset, least, most):
    model = moved(load_model(name), offset)
    assert least <= judge_cell(model, operands, digits, 100, seed=1).mean() <= most
