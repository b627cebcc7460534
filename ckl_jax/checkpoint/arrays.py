"""What Orbax says of stored arrays, compared with what is wanted before they are read: it casts to what is wanted."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from ckl_jax.errors import ConfigError, require


def metadata(reader: ocp.StandardCheckpointer, path: pathlib.Path) -> Any:
    """The tree of a stored checkpoint, with shapes and types in its leaves.

    Raises:
      ConfigError: it has none.
    """
    found = reader.metadata(path).item_metadata
    require(found is not None, "checkpoint", str(path), "the arrays of Orbax as save wrote them, with their metadata")
    return found.tree


def flat(tree: Any) -> dict[str, Any]:
    """The leaves by their names."""
    return {".".join(map(str, key)): leaf for key, leaf in ocp.tree.to_flat_dict(tree).items()}


def shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key): (tuple(leaf.shape), str(leaf.dtype)) for key, leaf in leaves}


def require_same(directory: pathlib.Path, stored: dict[str, Any], wanted: dict[str, Any], of: str) -> None:
    """Raises a ConfigError that names the first array whose stored shape or type is not the one that ``of`` wants."""
    for name in sorted(stored.keys() | wanted.keys()):
        found, expected = stored.get(name), wanted.get(name)
        if found != expected:
            raise ConfigError(f"checkpoint: {directory} has {found} for {name}, allowed is {expected} ({of})")
