"""What the API pages are made of: names in docstrings lead somewhere. (``.ci/run`` builds the pages.)"""

import ast
import builtins
import re

import pytest
from names import ROOT, exists, missing_in_docstring

SOURCES = sorted((ROOT / "ckl_jax").rglob("*.py"))


def docstrings(source):
    """All string literals that are statements: docstrings, those of fields included."""
    statements = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    return [
        node.value.value
        for node in statements
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_names_in_docstrings_lead_somewhere(path):
    assert missing_in_docstring("\n".join(docstrings(path.read_text()))) == []


def spoiled(text):
    """What Markdown makes of a docstring that was not meant: an open code span, or tags that a browser swallows."""
    parts = text.replace("``", "`").split("`")
    return ["`"] * (len(parts) % 2 == 0) + re.findall(r"</?\w+>", "".join(parts[::2]))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_docstrings_render_as_they_read(path):
    assert [found for text in docstrings(path.read_text()) for found in spoiled(text)] == []


def test_what_would_render_badly_is_found():
    assert spoiled("``a`` and `<out>/b`, a < b and c > d") == []
    assert spoiled("``a and b") == ["`"]
    assert spoiled("in <out>/tensorboard") == ["<out>"]


def unknown_to_pdoc(source):
    """Names in the types of named tuples that pdoc does not find: where annotations are strings, it knows what is built
    in and what has its module's name before it."""
    tree = ast.parse(source)
    if not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body):
        return set()
    tuples = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name[0] != "_" and "NamedTuple" in map(ast.unparse, node.bases)
    ]
    types = [line.annotation for node in tuples for line in node.body if isinstance(line, ast.AnnAssign)]
    parts = [part for annotation in types for part in ast.walk(annotation)]
    dotted = {part.value.id for part in parts if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)}
    return {part.id for part in parts if isinstance(part, ast.Name)} - dotted - set(dir(builtins))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_types_of_named_tuples_are_known_to_the_api_pages(path):
    assert unknown_to_pdoc(path.read_text()) == set()


def test_a_type_that_pdoc_does_not_know_is_found():
    text = "from typing import NamedTuple\nclass A(NamedTuple):\n    x: Program\n    y: jax.Array | float\n"
    assert unknown_to_pdoc(text) == set()
    assert unknown_to_pdoc("from __future__ import annotations\n" + text) == {"Program"}


def test_a_name_that_leads_nowhere_is_found():
    assert missing_in_docstring("`ckl_jax.losses.entropy`, ``losses.entropy`` and `config.json`") == []
    assert missing_in_docstring("see ckl_jax.losses.entropic") == ["ckl_jax.losses.entropic"]
    assert missing_in_docstring("``losses.entropic``") == ["ckl_jax.losses.entropic"]
    assert missing_in_docstring("ckl_jax.no_module") == ["ckl_jax.no_module"]
    assert exists("ckl_jax.config.FinetuneConfig.kl_target")
    assert not exists("ckl_jax.config.FinetuneConfig.kl_targets")


def test_the_first_page_names_every_module_at_the_door():
    import ckl_jax

    door = {path.stem for path in (ROOT / "ckl_jax").iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"}
    named = set(re.findall(r"`(?:ckl_jax\.)?(\w+)", ckl_jax.__doc__))
    assert door - named == {"pretrained"}
