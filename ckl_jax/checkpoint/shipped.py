"""The pre-trained models that ship with the package, each by the name of its directory."""

from __future__ import annotations

import os
import pathlib

from ckl_jax.runtime.paths import AnyPath
from ckl_jax.tasks.catalog import task_named
from ckl_jax.tasks.columns import ADDITION

PRETRAINED = pathlib.Path(__file__).parents[1] / "pretrained"
SHIPPED_TINY = PRETRAINED / "tiny"


def names() -> list[str]:
    """The models that ship, in the order of the alphabet."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model.json"))


def shipped(task: str = "addition") -> pathlib.Path:
    """Where the tiny model of a task ships, or would. Raises ConfigError for an unknown task."""
    return SHIPPED_TINY if task_named(task) is ADDITION else PRETRAINED / f"tiny_{task}"


def located(checkpoint: AnyPath) -> AnyPath:
    """The directory of a model that ships, for its name; any other path, and one that is there, for itself."""
    name = os.fspath(checkpoint)
    return PRETRAINED / name if name in names() and not pathlib.Path(name).exists() else checkpoint
