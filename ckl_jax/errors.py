"""The one error of what a user asks for or hands in, and the checks that raise it."""

from __future__ import annotations

import contextlib
import importlib
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

MOST_CHARACTERS = 300


class ConfigError(ValueError):
    """What a user asked for cannot work; the message is one line that names the field and what is allowed."""


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises a ConfigError that names the field, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name}: got {_shown(value)}, allowed is {allowed}")


def require_word(value: Any, name: str, words: Iterable[str], beside: str = "") -> None:
    """Raises a ConfigError that names the field, its value and all words, unless it is one of them.

    Args:
      beside: what else is allowed, to be told after the words; the caller has seen that it is none of that.
    """
    words = tuple(words)
    require(isinstance(value, str) and value in words, name, value, " | ".join(words) + beside)


@contextlib.contextmanager
def naming(option: str, instead_of: str) -> Iterator[None]:
    """Lets a ConfigError that names the field ``instead_of`` name the option that its value came by."""
    try:
        yield
    except ConfigError as error:
        name, colon, rest = str(error).partition(":")
        if name != instead_of:
            raise
        raise ConfigError(f"{option}{colon}{rest}") from error


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
