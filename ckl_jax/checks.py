"""What public functions require of their arrays and numbers, before JAX looks at them.

Traced values are taken as they are: their numbers are not known yet.
"""

from __future__ import annotations

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


def require_logits(logits: Any) -> None:
    """Raises a ConfigError unless it is an array of floats [..., V] with V of 2 or more."""
    require_floats(logits, "logits")
    require(logits.ndim >= 1 and logits.shape[-1] >= 2, "logits", logits.shape, "[..., V] with V >= 2")


def require_at_least(value: Any, name: str, low: float, allowed: str) -> None:
    """Raises a ConfigError unless it is a number from ``low`` on, finite in float32; of a traced one, unless it is one
    number.
    """
    if isinstance(value, jax.core.Tracer):
        require(value.ndim == 0, name, f"an array {list(value.shape)}", f"one number, {allowed}")
        return
    number = isinstance(value, (int, float, np.number)) or (
        isinstance(value, (np.ndarray, jax.Array)) and not value.ndim
    )
    number = number and not isinstance(value, bool)
    fits = number and low <= (value if isinstance(value, int) else float(value)) <= float(FLOAT32.max)
    require(fits, name, value, allowed)


def require_temperature(value: Any, note: str = "") -> None:
    """Raises a ConfigError unless it is a finite number above 0, in float32 too."""
    require_at_least(value, "temperature", float(FLOAT32.tiny), f"above 0 and finite{note}")
