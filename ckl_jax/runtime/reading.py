"""Reading what someone else may have made: JSON as data alone, plain files alone, and one line of what is wrong."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ckl_jax.errors import ConfigError, require
from ckl_jax.runtime.paths import in_bucket
from ckl_jax.runtime.strays import is_unread

MOST_JSON_BYTES = 2**24
MOST_SAID = 200
AS_MADE = "what the command that made it wrote"


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
