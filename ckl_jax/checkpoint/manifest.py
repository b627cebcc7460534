"""The SHA-256 manifest beside a directory of arrays, because damaged array files load without an error otherwise.

It is written when the directory is complete and verified before it is read; a directory without one counts as
unfinished. Files that nothing reads (``strays``) are in no manifest.
"""

from __future__ import annotations

import hashlib
import pathlib

from ckl_jax.errors import ConfigError
from ckl_jax.runtime import hosts, reading
from ckl_jax.runtime.paths import files_below, in_bucket, synced
from ckl_jax.runtime.strays import is_unread


def beside(directory: pathlib.Path) -> pathlib.Path:
    """Where the manifest of a directory lies."""
    return directory.parent / f"{directory.name}.sha256.json"


def write(directory: pathlib.Path) -> None:
    """Writes the manifest of what a directory holds now, after all of that; process 0 writes, for all."""
    hosts.of_first(lambda: _sync(directory))
    hosts.write_json(beside(directory), digests(directory))


def _sync(directory: pathlib.Path) -> None:
    if not in_bucket(directory):
        for path in (directory.parent, directory, *directory.rglob("*")):
            synced(path)


def digests(directory: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the directory."""
    files = sorted(files_below(directory))
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def verify(directory: pathlib.Path) -> None:
    """Raises a ConfigError that names the files which are missing, changed or new since the manifest was written."""
    listed = reading.read_object(beside(directory), "checkpoint")
    expected = {name: digest for name, digest in listed.items() if not any(map(is_unread, name.split("/")))}
    reading.require_plain(directory, "checkpoint")
    found = digests(directory)
    damaged = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if damaged:
        raise ConfigError(f"checkpoint: {directory} is damaged, these files differ from the manifest: {damaged[:3]}")
