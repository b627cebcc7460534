"""What a field of a dataclass may hold, said at the field alone: ``rounds: PositiveInt = 14``, ``Literal["k1", "k2"]``.

``require_fields`` holds a dataclass to it; the command line's help shows it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np

from ckl_jax.errors import require, require_word

_FLOAT32 = np.finfo(np.float32)
_KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "an integer"),
    float: ((int, float), "a number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
    pathlib.Path: ((str, os.PathLike), "a path"),
}


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The numbers of an ``Annotated[int, AtLeast(1)]``: from ``low`` on, up to ``high``."""

    low: float
    high: float = math.inf
    word = "at least"

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def __str__(self) -> str:
        return f"{self.word} {self.low:g}" + (f", at most {self.high:g}" if self.high < math.inf else "")


class Above(AtLeast):
    """Likewise, without ``low`` itself."""

    word = "above"

    def __contains__(self, number: float) -> bool:
        return number != self.low and super().__contains__(number)


PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Share = Annotated[float, AtLeast(0, 1)]
PositiveShare = Annotated[float, Above(0, 1)]


class Chapter:
    """A dataclass that is one group in the help of those that inherit it, under its name and docstring."""


@functools.cache
def kinds(config_type: Any) -> Mapping[str, Any]:
    """The type of every field of a dataclass, with its annotations."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def bound(kind: Any) -> AtLeast | None:
    """What bounds the numbers of such a field; None if nothing does."""
    if get_origin(kind) in (Union, types.UnionType):
        return bound(get_args(kind)[0])
    return next((mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, AtLeast)), None)


def require_fields(config: Any) -> None:
    """Raises a ConfigError where a field of a dataclass holds what its type does not allow, or 32 bits cannot hold.

    Python itself would take 2.5 layers, or "no" for a switch that is on.
    """
    config_type: Any = type(config)
    for name, kind in kinds(config_type).items():
        _require(name, getattr(config, name), kind)


def _require(name: str, value: Any, kind: Any, limits: AtLeast | None = None, none: str = "") -> None:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is not None:
            _require(name, value, arguments[0], none=", or None")
    elif origin is Annotated:
        _require(name, value, arguments[0], bound(kind), none)
    elif origin is Literal:
        require_word(value, name, arguments, beside=none)
    elif origin is tuple:
        require(isinstance(value, tuple), name, value, "a tuple" + none)
        for item in value:
            _require(name, item, arguments[0])
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        require(isinstance(value, kind), name, value, f"a {kind.__name__}{none}")
    elif kind in _KINDS:
        types_, allowed = _KINDS[kind]
        fits = isinstance(value, types_) and isinstance(value, bool) == (kind is bool)
        require(fits, name, value, allowed + none)
        if kind in (int, float):
            require(limits is None or value in limits, name, value, f"{limits}{none}")
            allowed = f"{limits}, and what" if limits else "what"
            require(_in_32_bits(value), name, value, f"{allowed} 32 bits can hold{none}")


def _in_32_bits(value: float) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**31
    return math.isfinite(value) and (value == 0 or float(_FLOAT32.tiny) <= abs(value) <= float(_FLOAT32.max))
