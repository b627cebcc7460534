"""What a checkpoint says it holds, and what it cannot hold: a model.json, foreign weights, a size that is only claimed.

Nothing is unpickled or run: model.json and manifests are JSON, parameters are the arrays of Orbax and TensorStore.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from ckl_jax import tasks
from ckl_jax.config import ModelConfig
from ckl_jax.config.shape import require_vocabulary
from ckl_jax.errors import ConfigError, is_integer, require
from ckl_jax.runtime.paths import in_bucket
from ckl_jax.runtime.reading import read_object
from ckl_jax.tasks.catalog import task_named
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Task

MOST_INFLATED = 1_000
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
SHAPE = ("num_layers", "num_heads", "width", "block_size", "vocab_size")


def model_description(path: pathlib.Path) -> tuple[ModelConfig, int, Task]:
    """The shape, N and the task of a model.json.

    Raises:
      ConfigError: what ``read_object`` refuses; fields that are missing, unknown, or of values that no model has.
    """
    described = read_object(path, "checkpoint")
    model: Any = described.get("model")
    digits: Any = described.get("max_pretrain_digits")
    names = {declared.name for declared in dataclasses.fields(ModelConfig)}
    try:
        require(isinstance(model, dict), "model", model, "an object of sizes")
        unknown, missing = sorted(model.keys() - names), sorted(set(SHAPE) - model.keys())
        require(not unknown, "model", unknown, f"fields of {', '.join(sorted(names))}")
        require(not missing, "model", f"nothing for {', '.join(missing)}", f"all of {', '.join(SHAPE)}")
        config = ModelConfig(**model)
        require_vocabulary(config.vocab_size, "vocab_size")
        require_digits(digits)
        task = task_named(described.get("task", ADDITION.name))
    except ConfigError as error:
        raise ConfigError(f"checkpoint: {path} is no model description ({error})") from error
    return config, digits, task


def require_ours(directory: pathlib.Path) -> None:
    """Raises a ConfigError if it is a model of transformers or nanoGPT: a directory, or a file of weights in one."""
    files = directory.iterdir() if directory.is_dir() and not (directory / "model.json").exists() else [directory]
    is_theirs = any(path.suffix in WEIGHTS and path.is_file() for path in files)
    allowed = (
        f"a checkpoint of ours, which `python -m ckl_jax.convert --source {directory} --out DIRECTORY` makes of it"
    )
    require(not is_theirs, "checkpoint", f"{directory}, weights of transformers or nanoGPT", allowed)


def require_digits(digits: Any) -> None:
    """Raises a ConfigError unless a model can have been pre-trained on that many digits, and be tested on one more."""
    most = tasks.MAX_DIGITS - 1
    require(is_integer(digits) and 1 <= digits <= most, "max_pretrain_digits", digits, f"an integer of 1..{most}")


def require_filled(directory: pathlib.Path, config: ModelConfig) -> None:
    """Raises a ConfigError if the files of the parameters are far too small for the shape that is claimed."""
    if in_bucket(directory):
        return
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    most = MOST_INFLATED * size // 4
    allowed = f"what makes at most {most} weights, for {size} bytes in {directory}"
    require(config.num_weights <= most, "checkpoint", f"{config.num_weights} weights in model.json", allowed)
