"""Files of tensors by name: safetensors, and PyTorch's, of which the weights alone are read."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckl_jax import foreign
from ckl_jax.config import require
from ckl_jax.errors import extra

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "ckpt.pt")
FLOATS = ("F16", "F32", "F64")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and how to read it (float32)."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def weights(source: pathlib.Path) -> pathlib.Path:
    """The file of weights in a directory; raises ConfigError if it has none."""
    present = [source / name for name in WEIGHTS if (source / name).is_file()]
    require(bool(present), "source", str(source), f"a directory with one of {', '.join(WEIGHTS)}")
    return present[0]


def stored(path: pathlib.Path, skip: re.Pattern[str]) -> dict[str, Stored]:
    """Tensors of a file by name.

    Args:
      skip: names of tensors that nobody reads, which may have any type.

    Raises:
      ConfigError: the file is damaged, holds something else, or numbers that are no floats.
    """
    with foreign.damaged(path, "source"):
        return _safetensors(path, skip) if path.suffix == ".safetensors" else _pytorch(path)


def _safetensors(path: pathlib.Path, skip: re.Pattern[str]) -> dict[str, Stored]:
    file = extra("safetensors", "source", "convert").safe_open(path, framework="np")

    def stored(name: str) -> Stored:
        entry = file.get_slice(name)
        kind = entry.get_dtype()
        require(kind in FLOATS or skip.search(name) is not None, name, kind, " | ".join(FLOATS))
        return Stored(tuple(entry.get_shape()), lambda: file.get_tensor(name).astype(np.float32))

    return {name: stored(name) for name in file.keys()}  # noqa: SIM118 - it is no dict.


def _pytorch(path: pathlib.Path) -> dict[str, Stored]:
    torch = extra("torch", "source", "convert")
    found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("model", found) if isinstance(found, dict) else found
    named = isinstance(found, Mapping) and all(torch.is_tensor(x) for x in found.values())
    require(named, "source", f"{path} with a {type(found).__name__}", "tensors by name")

    def stored(tensor: Any) -> Stored:
        return Stored(tuple(tensor.shape), lambda: tensor.detach().float().numpy())

    return {str(name): stored(tensor) for name, tensor in found.items()}
