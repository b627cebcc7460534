"""What public functions require of their arrays and numbers, before JAX looks at them.

Traced values are taken as they are: their numbers are not known yet.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.errors import require

FLOAT32 = jnp.finfo(jnp.float32)
MOST_SEED = 2**31 - 1


def require_floats(array: Any, name: str) -> None:
    """Raises a ConfigError unless it is an array of NumPy or JAX of floats."""
    _require_kind(array, name, jnp.floating, "an array of floats")


def require_integers(array: Any, name: str) -> None:
    """Raises a ConfigError unless it is an array of NumPy or JAX of integers."""
    _require_kind(array, name, jnp.integer, "an array of integers")


def require_array(array: Any, name: str) -> None:
    """Raises a ConfigError unless it is an array of NumPy or JAX."""
    require(isinstance(array, (np.ndarray, np.generic, jax.Array)), name, type(array).__name__, "an array")


def require_shape_of(array: Any, name: str, like: Any, of: str) -> None:
    """Raises a ConfigError unless both are arrays of one shape: the argument ``name``, and ``like``, the one ``of``."""
    require_array(like, of)
    require_array(array, name)
    require(array.shape == like.shape, name, array.shape, f"the shape of {of}, {like.shape}")


def as_mask(mask: Any, shape: tuple[int, ...], name: str = "mask", of: str = "the shape of the values") -> Any:
    """The mask as booleans, from an array of booleans or of zeros and ones of any type.

    Raises a ConfigError for another shape or another number. The numbers of a traced mask are not known: there every
    one but 0 is True.
    """
    require_array(mask, name)
    require(mask.shape == shape, name, mask.shape, f"{of}, {shape}")
    if mask.dtype != bool and not isinstance(mask, jax.core.Tracer):
        others = np.setdiff1d(np.asarray(mask).astype(np.float64), (0, 1))
        require(len(others) == 0, name, float(others[0]) if len(others) else None, "booleans, or 0 and 1 alone")
    return mask.astype(bool)


def _require_kind(array: Any, name: str, kind: Any, allowed: str) -> None:
    require_array(array, name)
    require(jnp.issubdtype(array.dtype, kind), name, str(array.dtype), allowed)


def require_some(array: Any, name: str) -> None:
    """Raises a ConfigError for an array without numbers: there is no mean or least of none."""
    require(array.size > 0, name, array.shape, "at least one episode and one token")


def require_logits(logits: Any) -> None:
    """Raises a ConfigError unless it is an array of floats [..., V] with V of 2 or more."""
    require_floats(logits, "logits")
    require(logits.ndim >= 1 and logits.shape[-1] >= 2, "logits", logits.shape, "[..., V] with V >= 2")


def require_at_least(value: Any, name: str, low: float, allowed: str, high: float = float(FLOAT32.max)) -> None:
    """Raises a ConfigError unless it is a number from ``low`` to ``high``, by default what is finite in float32; of a
    traced one, unless it is one number.
    """
    if isinstance(value, jax.core.Tracer):
        require(value.ndim == 0, name, f"an array {list(value.shape)}", f"one number, {allowed}")
        return
    number = isinstance(value, (int, float, np.number)) or (
        isinstance(value, (np.ndarray, jax.Array)) and not value.ndim
    )
    number = number and not isinstance(value, bool)
    fits = number and low <= (value if isinstance(value, int) else float(value)) <= high
    require(fits, name, value, allowed)


def require_above_0(value: Any, name: str) -> None:
    """Raises a ConfigError unless it is a number above 0, in float32 too; it may be infinite."""
    require_at_least(value, name, float(FLOAT32.tiny), "above 0", math.inf)


def require_share(value: Any, name: str) -> None:
    """Raises a ConfigError unless it is a number from 0 to 1."""
    require_at_least(value, name, 0, "0 to 1", 1)


def require_positive_share(value: Any, name: str) -> None:
    """Raises a ConfigError unless it is a number above 0, in float32 too, and at most 1."""
    require_at_least(value, name, float(FLOAT32.tiny), "above 0, at most 1", 1)


def number(value: Any) -> Any:
    """A number that leaves float32 arrays what they are: float64 numbers of NumPy, or of JAX with jax_enable_x64, would
    make float64 of them. Python's own do not.
    """
    return value.astype(jnp.float32) if isinstance(value, jax.Array) else float(value)


def require_temperature(value: Any, note: str = "") -> None:
    """Raises a ConfigError unless it is a finite number above 0, in float32 too."""
    require_at_least(value, "temperature", float(FLOAT32.tiny), f"above 0 and finite{note}")
