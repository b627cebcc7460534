"""Paths of runs: pathlib's on this machine, etils.epath's in a bucket (gs://), with the same methods as far as used.

What epath lacks in a bucket is here: ``resolve``, ``rglob`` and appending. Checkpoints go there through Orbax itself.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import cast

import fsspec
from etils import epath

from ckl_jax.config import ConfigError, require
from ckl_jax.strays import is_unread


def parse(text: str) -> pathlib.Path:
    """A path as an option gives it; for ``gs://bucket/directory`` an epath.Path, which pathlib's type stands for here.

    Raises:
      ConfigError: nothing, or a newline or another character that is not printed; a path that the system refuses to
        look at (too long, a loop of links); another scheme than gs, no bucket, or gcsfs or google-cloud-storage is not
        installed.
    """
    require(text != "" and text.isprintable(), "path", text, "one or more printable characters")
    scheme, separator, rest = text.partition("://")
    if not separator:
        _require_reachable(pathlib.Path(text))
        return pathlib.Path(text)
    if scheme != "gs" or not rest.strip("/"):
        raise ConfigError(f"path: got {text}, allowed are local paths and gs://bucket/directory")
    try:
        fsspec.get_filesystem_class("gcs")
        importlib.import_module("google.cloud.storage")  # Orbax looks at the bucket by it.
    except ImportError as error:
        raise ConfigError(
            f"path: got {text}, allowed with gcsfs and google-cloud-storage only: install the extra tpu ({error})"
        ) from error
    return cast(pathlib.Path, epath.Path(text))


def _require_reachable(path: pathlib.Path) -> None:
    try:
        path.stat()
    except OSError as error:
        is_new = isinstance(error, (FileNotFoundError, NotADirectoryError))
        require(is_new, "path", str(path), f"a path that the system can look at ({error.strerror})")


def require_directory(path: pathlib.Path, field: str) -> None:
    """Raises a ConfigError, under the name of the option ``field``, where no directory is nor can be made."""
    if in_bucket(path):
        return
    nearest = next(place for place in (path, *resolved(path).parents) if place.exists())
    fits = nearest.is_dir() and (nearest == path or os.access(nearest, os.W_OK | os.X_OK))
    require(fits, field, str(path), f"a directory, or a place for a new one, which {nearest} is not")


def in_bucket(path: pathlib.Path) -> bool:
    """Whether the path is one of a bucket."""
    return "://" in os.fspath(path)


def resolved(path: pathlib.Path) -> pathlib.Path:
    """The absolute path; epath would put this machine's directory before a bucket's."""
    return path if in_bucket(path) else path.resolve()


def files_below(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files under a directory, at any depth, but those that nothing reads."""
    for path in directory.iterdir():
        if is_unread(path.name):
            continue
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def append(path: pathlib.Path, text: str) -> None:
    """Adds text to the end of a file. An object in a bucket cannot grow: it is written anew, which happens whole."""
    with writing(path):
        if in_bucket(path):
            path.write_text((path.read_text() if path.exists() else "") + text)
        else:
            with path.open("a") as file:
                file.write(text)


def replace(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Every failure to write inside, a full disk say, is an OSError that names a file.

    Python's own names none once a file is open, and TensorStore's is a ValueError, which Orbax logs once per thread.
    """
    log = logging.getLogger("absl")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), os.fspath(path)) from error
    finally:
        log.disabled = disabled
