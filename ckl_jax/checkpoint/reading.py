"""Reading what someone else may have made: JSON as data alone, plain files alone, and no size that is only claimed.

Nothing is unpickled or run: model.json and manifests are JSON, parameters are the arrays of Orbax and TensorStore.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ckl_jax import tasks
from ckl_jax.config import ModelConfig
from ckl_jax.config.shape import require_vocabulary
from ckl_jax.errors import ConfigError, is_integer, require
from ckl_jax.runtime.paths import in_bucket
from ckl_jax.runtime.strays import is_unread
from ckl_jax.tasks.catalog import task_named
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Task

MOST_JSON_BYTES = 2**24
MOST_INFLATED = 1_000
MOST_SAID = 200
AS_MADE = "what the command that made it wrote"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
SHAPE = ("num_layers", "num_heads", "width", "block_size", "vocab_size")


def read_object(path: pathlib.Path, field: str) -> dict[str, Any]:
    """The object of a small JSON file.

    Raises:
      ConfigError, under the name of the option ``field``: no plain file, too large, no JSON object, a key twice, or a
        number that JSON does not have (NaN).
    """
    allowed = f"a file with a JSON object, of at most {MOST_JSON_BYTES} bytes"
    require(path.is_file(), field, str(path), allowed)
    if not in_bucket(path):
        size = path.stat().st_size
        require(size <= MOST_JSON_BYTES, field, f"{path} of {size} bytes", allowed)
    with damaged(path, field):
        found = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_number
        )
    require(isinstance(found, dict), field, f"{path} with a {type(found).__name__}", allowed)
    return found


@contextmanager
def damaged(path: pathlib.Path, field: str, allowed: str = AS_MADE) -> Iterator[None]:
    """Turns what a reader says about a file or directory that it cannot read into a ConfigError of one line.

    What Orbax and TFDS log about it is not shown: it would stand above that line.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # Of any kind: it depends on the content, and readers that are not ours raise it.
        raise _damage(path, field, error, allowed) from error
    finally:
        logger.setLevel(level)


@contextmanager
def only_read(path: pathlib.Path, field: str, applies: bool) -> Iterator[None]:
    """Turns what goes wrong over the content of a file into a ConfigError, if ``applies``: if it was not made here."""
    try:
        yield
    except (ConfigError, OSError):
        raise
    except Exception as error:  # Of any kind: it depends on the content.
        if applies:
            raise _damage(path, field, error) from error
        raise


def _damage(path: pathlib.Path, field: str, error: Exception, allowed: str = AS_MADE) -> ConfigError:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:MOST_SAID]
    return ConfigError(f"{field}: {path} is damaged ({said}); allowed is {allowed}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


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


def require_plain(directory: pathlib.Path, field: str) -> None:
    """Raises a ConfigError if the directory is, or holds at any depth, a link, a device or a pipe to read."""
    if in_bucket(directory):
        return
    found = [directory]
    for root, directories, files in os.walk(directory):
        directories[:], files = ([name for name in names if not is_unread(name)] for names in (directories, files))
        found += [pathlib.Path(root, name) for name in (*directories, *files)]
    for path in found:
        mode = path.lstat().st_mode
        plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        require(plain, field, str(path), "a plain file or directory: links are not followed")


def require_filled(directory: pathlib.Path, config: ModelConfig) -> None:
    """Raises a ConfigError if the files of the parameters are far too small for the shape that is claimed."""
    if in_bucket(directory):
        return
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    most = MOST_INFLATED * size // 4
    allowed = f"what makes at most {most} weights, for {size} bytes in {directory}"
    require(config.num_weights <= most, "checkpoint", f"{config.num_weights} weights in model.json", allowed)
