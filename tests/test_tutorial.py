"""The tutorial as a script and as a notebook."""

import importlib.util
import os
import re
import subprocess
import sys

import jupytext
import pytest
from matplotlib import image
from names import ROOT, missing

TUTORIAL = ROOT / "experiments" / "tutorial.py"
PICTURES = ["certainty", "kl", "round", "scratchpad", "weights"]


@pytest.fixture(scope="module")
def notebook():
    return jupytext.read(TUTORIAL)


def cells(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_it_is_a_notebook_whose_cells_compile(notebook):
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert len(cells(notebook, "markdown")) > 10
    for source in cells(notebook, "code"):
        compile(source, str(TUTORIAL), "exec")
    assert sum(len(source.splitlines()) for source in cells(notebook, "code")) > 100


def test_its_sections_are_numbered(notebook):
    headings = re.findall(r"^## (\d+)\.", "\n".join(cells(notebook, "markdown")), re.MULTILINE)
    assert headings == [str(number) for number in range(1, 8)]


def test_its_text_names_what_exists(notebook):
    text = "\n".join(cells(notebook, "markdown"))
    assert "ckl_jax.losses.prioritized_kl" in text
    assert missing(text) == []
    commands, files = re.findall(r"python -m (\w+\.\w+)", text), re.findall(r"`(\w+/\w+\.py)`", text)
    assert len(commands) + len(files) > 4
    assert [name for name in commands if importlib.util.find_spec(name) is None] == []
    assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.slow
def test_it_runs_as_a_script_and_saves_its_pictures(tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.tutorial"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    out = tmp_path / "runs" / "tutorial"
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.png" for name in PICTURES]
    for name in PICTURES:
        picture = image.imread(out / f"{name}.png")
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.01
    assert "8 Adam steps" in ran.stdout
    before, after = map(float, re.findall(r"^  kl +(\S+) +(\S+)$", ran.stdout, re.MULTILINE)[0])
    assert before == 0
    assert after > 0
