"""The one error of what a user asks for or hands in, and the checks that raise it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import numbers
from typing import Any

import numpy as np

MOST_CHARACTERS = 300
_FLOAT32 = np.finfo(np.float32)
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "bool": (bool, "True or False"),
}


class ConfigError(ValueError):
    """What a user asked for cannot work; the message is one line that names the field and what is allowed."""


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises a ConfigError that names the field, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name}: got {_shown(value)}, allowed is {allowed}")


def _shown(value: Any) -> str:
    """One line of bounded length, whatever it is: a whole array, or an integer that Python refuses to print."""
    try:
        text = " ".join(repr(value).split("\n"))
    except ValueError:
        return f"{type(value).__name__} without a text"
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "..."


def extra(module: str, field: str, name: str) -> Any:
    """An optional package. Raises a ConfigError, under the name of the option ``field``, where it is not installed.

    Args:
      name: the extra of this project that has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{field}: needs {module}, allowed with the extra {name} installed only ({error})") from error


def is_integer(value: Any) -> bool:
    """Whether it is an integer, Python's or NumPy's; True and False are none here."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def require_types(config: Any) -> None:
    """Raises a ConfigError where a dataclass's field of numbers or switches holds something else.

    Python itself would take 2.5 layers, or "no" for a switch that is on.
    """
    for declared in dataclasses.fields(config):
        # A string in modules with postponed annotations.
        written = declared.type if isinstance(declared.type, str) else inspect.formatannotation(declared.type)
        name, _, none = written.partition(" | ")
        value = getattr(config, declared.name)
        if name in _KINDS and not (none and value is None):
            kind, allowed = _KINDS[name]
            fits = isinstance(value, kind) and isinstance(value, bool) == (name == "bool")
            require(fits, declared.name, value, allowed + (", or None" if none else ""))


def require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises a ConfigError where the field is none of the words."""
    require(getattr(config, name) in choices, name, getattr(config, name), " | ".join(choices))


def require_number(config: Any, names: str, low: float, *, exclusive: bool = False, high: float = math.inf) -> None:
    """Raises a ConfigError where one of the fields, named with spaces between, is no number within the bounds."""
    bound = f"{'above' if exclusive else 'at least'} {low:g}" + (f", at most {high:g}" if high < math.inf else "")
    for name in names.split():
        value = getattr(config, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number and (low < value if exclusive else low <= value) and value <= high, name, value, bound)
        require(_in_32_bits(value), name, value, f"{bound}, and what 32 bits can hold")


def _in_32_bits(value: float) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**31
    return math.isfinite(value) and (value == 0 or float(_FLOAT32.tiny) <= abs(value) <= float(_FLOAT32.max))
