"""Data flows one way: a module imports only from rooms before its own."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "ckl_jax"
ROOMS = (
    *("errors", "fields", "runtime", "checks", "overflow", "resuming"),
    *("certainty", "token_weights", "advantages", "advantage_shaping", "losses", "ratio_losses", "truncation"),
    *("tasks", "config", "presets", "attention", "model", "rollout", "checkpoint", "datasets"),
    *("next_character", "rl", "runs", "analysis"),
    *("evaluate", "pretrain", "finetune", "convert", "models", "check_xla", "preflight"),
)
"""Packages and modules at the door, in the order of the imports."""


def room_of(module: str) -> str:
    return module.split(".")[1]


def imported(path: pathlib.Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    rooms = set()
    for node in nodes:
        if node.module == "ckl_jax":
            rooms |= {alias.name for alias in node.names}
        elif node.module and node.module.startswith("ckl_jax."):
            rooms.add(room_of(node.module))
    return rooms


def test_every_room_has_its_place():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_earlier_rooms(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ROOMS
    assert imported(path) <= set(allowed)


@pytest.mark.parametrize("wing", [room for room in ROOMS if (PACKAGE / room / "__init__.py").exists()])
def test_a_wing_says_what_lives_there(wing):
    docstring = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))
    assert docstring
    assert len(docstring.splitlines()) <= 5
