"""The pre-trained models that ship with the package, each by the name of its directory."""

from __future__ import annotations

import os
import pathlib

from ckl_jax.errors import require
from ckl_jax.runtime.paths import AnyPath
from ckl_jax.tasks.catalog import task_named
from ckl_jax.tasks.columns import ADDITION

PRETRAINED = pathlib.Path(__file__).parents[1] / "pretrained"
SHIPPED_TINY = PRETRAINED / "tiny"


def names() -> list[str]:
    """The models that ship, in the order of the alphabet."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model.json"))


def shipped(task: str = "addition", scale: str = "tiny") -> pathlib.Path:
    """The model of a task that ships and that fine-tuning starts from, or where it would: of larger scales none does.

    That is the tiny one, and for addition at the scale ``ladder`` the one of N = 5: the least certain of the ladder at
    critical tokens. Raises ConfigError for an unknown task.
    """
    addition = task_named(task) is ADDITION
    name = ("N5" if addition else "tiny") if scale == "ladder" else scale
    return PRETRAINED / (name if addition else f"{name}_{task}")


def located(checkpoint: AnyPath) -> AnyPath:
    """The directory of a model that ships, for its name; any other path, and one that is there, for itself.

    Raises:
      ConfigError: the name's, where a directory of that name is here without being a model: a run that was told to
        write there, say.
    """
    name = os.fspath(checkpoint)
    here = pathlib.Path(name)
    if name not in names():
        return checkpoint
    if not here.exists():
        return PRETRAINED / name
    allowed = f"{PRETRAINED / name} for the model that ships, as {here.resolve()} is here and no model"
    require((here / "model.json").exists(), "checkpoint", name, allowed)
    return checkpoint
