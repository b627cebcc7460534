"""Paths of runs: pathlib's on this machine, etils.epath's in a bucket (gs://), with the same methods as far as used.

What epath lacks in a bucket is here: ``resolve``, ``rglob`` and appending. Checkpoints go there through Orbax itself.
Buckets need the extra ``tpu``. They were tested against an emulator of Google Cloud Storage, no real one was used.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import pathlib
import posixpath
import re
import urllib.parse
from collections.abc import Iterator
from typing import TypeAlias, cast

import fsspec
from etils import epath

from ckl_jax.errors import ConfigError, require
from ckl_jax.runtime.strays import is_unread

MEANS_MORE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/|(gs|s3):|~", re.IGNORECASE)
VARIABLE = re.compile(r"\$[A-Za-z_{(]")
AnyPath: TypeAlias = str | os.PathLike[str]
REPLACED = "a path without variables: no shell has replaced them"
PATTERNS = "[]\\*?"  # The last two mean more in a bucket alone.
SCHEMES = "allowed are local paths and gs://bucket/directory"


def parse(text: AnyPath, field: str = "path") -> pathlib.Path:
    """A path as people write it, of the option ``field``.

    ``~`` and ``~user`` are home directories, ``file:///directory`` is a local one, and variables are the shell's. For
    ``gs://bucket/directory`` it is an epath.Path, which pathlib's type stands for here.

    Raises:
      ConfigError: nothing, or a newline or another character that is not printed; a path that the system refuses to
        look at (too long, a loop of links); another scheme, or half of one (``gs:/bucket``); no bucket, or gcsfs or
        google-cloud-storage is not installed; no such user's home; a variable that no shell has replaced.
    """
    text = os.fspath(text)
    require(text != "" and text.isprintable(), field, text, "one or more printable characters")
    found = MEANS_MORE.match(text)
    scheme = (found[1] or found[2] or "").lower() if found else ""
    if scheme == "gs":
        return _bucket(text, field)
    if scheme == "file":
        text = _of_url(text, field)
    elif scheme:
        raise ConfigError(f"{field}: got {text}, {SCHEMES}")
    path = _local(text, field)
    _require_reachable(path, field)
    require(VARIABLE.search(text) is None or path.exists(), field, text, REPLACED)
    return path


def _local(text: str, field: str) -> pathlib.Path:
    path = pathlib.Path(text)
    lone = len(path.parts) == 1 and text != str(path) and not text.startswith("~")
    if lone or (text.startswith("./") and MEANS_MORE.match(str(path))):
        return pathlib.Path.cwd() / path  # Without the dot it may mean something else when it is read again: a model.
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{field}: got {text}, allowed is ~ only where that user has a home directory") from error


def _of_url(text: str, field: str) -> str:
    url = urllib.parse.urlsplit(text)
    local = url.netloc in ("", "localhost") and url.path.startswith("/") and not (url.query or url.fragment)
    require(local, field, text, "file:///directory, absolute and on this machine")
    path = urllib.parse.unquote(url.path)
    require(path.isprintable(), field, text, "one or more printable characters")
    return path


def _bucket(text: str, field: str) -> pathlib.Path:
    found = re.fullmatch(r"(?i:gs)://([a-z0-9][a-z0-9._-]+[a-z0-9])((?:/.*)?)", text)
    key = posixpath.normpath("/" + found[2]).strip("/") if found else ""
    if found is None or ".." in found[2].split("/"):
        raise ConfigError(f"{field}: got {text}, {SCHEMES}")
    require(VARIABLE.search(text) is None, field, text, REPLACED)
    try:
        fsspec.get_filesystem_class("gcs")
        importlib.import_module("google.cloud.storage")  # Orbax looks at the bucket by it.
    except ImportError as error:
        raise ConfigError(
            f"{field}: got {text}, allowed with gcsfs and google-cloud-storage only: install the extra tpu ({error})"
        ) from error
    return cast(pathlib.Path, epath.Path(f"gs://{found[1]}/{key}".rstrip("/")))


def cache_home() -> pathlib.Path:
    """Where the user's caches are, by the XDG base directory specification.

    Raises:
      FileNotFoundError: the user has no home directory.
    """
    named = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        given = named.expanduser()
        return given if given.is_absolute() else pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "this user has no home directory", "~") from error


def _require_reachable(path: pathlib.Path, field: str) -> None:
    try:
        path.stat()
    except OSError as error:
        is_new = isinstance(error, (FileNotFoundError, NotADirectoryError))
        require(is_new, field, str(path), f"a path that the system can look at ({error.strerror})")


def require_directory(path: AnyPath, field: str, *, may_be_read_only: bool = False) -> None:
    """Raises a ConfigError, under the name of the option ``field``, where no directory is nor can be made.

    Args:
      may_be_read_only: one that is there may be one that cannot be written.
    """
    place = resolved(path, field)
    found = sorted(set(os.fspath(place)) & set(PATTERNS if in_bucket(place) else PATTERNS[:3]))
    allowed = (
        f"a path without {' '.join(found)}: Orbax takes its own paths for patterns, and would write what cannot be read"
    )
    require(not found or may_be_read_only, field, os.fspath(place), allowed)
    if in_bucket(place):
        return
    nearest = next(found for found in (place, *place.parents) if found.exists())
    writable = (may_be_read_only and nearest == place) or os.access(nearest, os.W_OK | os.X_OK)
    why = ": it cannot be written" if nearest.is_dir() else ""
    allowed = f"a directory, or a place for a new one, which {nearest} is not{why}"
    require(nearest.is_dir() and writable, field, os.fspath(path), allowed)


def in_bucket(path: AnyPath) -> bool:
    """Whether the path is one of a bucket."""
    return "://" in os.fspath(path)


def resolved(path: AnyPath, field: str = "path") -> pathlib.Path:
    """``parse``, and absolute; a bucket's path is, and epath would put this machine's directory before it.

    Raises:
      ConfigError: as ``parse``; a relative path in a directory that is gone.
    """
    path = parse(path, field)
    try:
        return path if in_bucket(path) else path.resolve()
    except FileNotFoundError as error:
        raise ConfigError(f"{field}: got {path}, allowed is an absolute path: this directory is gone") from error


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
            path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + text, encoding="utf-8")
        else:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
            synced(path)


def replace(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        synced(temporary)
        temporary.replace(path)
        synced(path.parent)


def synced(path: pathlib.Path) -> None:
    """Waits until a file, or which files a directory has, would survive a power cut; a bucket's do."""
    if in_bucket(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Of a file system that cannot.
            raise
    finally:
        os.close(descriptor)


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
