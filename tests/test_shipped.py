"""The models that ship are listed, and solve what the list says of them."""

import json
import math

import pytest

from ckl_jax import models
from ckl_jax.checkpoint import shipped
from ckl_jax.checkpoint.store import load_model
from ckl_jax.evaluate import judge_cell, moved

PROBLEMS = 100


def test_every_model_that_ships_has_a_line_with_its_accuracy(capsys):
    assert sorted(models.ACCURACY) == shipped.names()
    models.main(models.ModelsCommand())
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(models.ACCURACY)
    assert lines[0].split() == ["tiny", "addition", "5", "413,376", "1000", "x", "1", "96.2", "36.6", "82.9", "0.1"]
    assert lines[2].split() == ["N7", "addition", "7", "437,952", "300", "x", "3", "99.6", "89.1", "96.0", "62.7"]
    assert lines[3].split()[-4:] == ["86.8", "-", "-", "-"]


def test_the_models_take_at_most_12_megabytes():
    files = [path for path in shipped.PRETRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6


@pytest.mark.parametrize("name", models.ACCURACY)
def test_a_model_says_how_it_was_made(name):
    made_by = json.loads((shipped.PRETRAINED / name / "model.json").read_text())["made_by"]
    assert made_by["command"] == "python -m ckl_jax.pretrain"
    assert made_by["config"]["seed"] == 0


CELLS = [
    (name, operands, longer)
    for name, measured in models.ACCURACY.items()
    for operands in ("varying", "identical")
    for longer in (0, 1)
    if getattr(measured, operands + "_longer" * longer) is not None
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "operands", "longer"), CELLS)
def test_accuracy_is_what_the_list_says(name, operands, longer):
    model, measured = load_model(name), models.ACCURACY[name]
    digits, place = model.max_pretrain_digits + longer, moved(model, measured.offsets[-1])
    share = getattr(measured, operands + "_longer" * longer) / 100
    # Other problems, and one place instead of the mean over several, which differ by some percent.
    error = 0.05 + 3.3 * math.sqrt(share * (1 - share) / PROBLEMS)
    assert judge_cell(place, operands, digits, PROBLEMS, seed=1).mean() == pytest.approx(share, abs=error)
