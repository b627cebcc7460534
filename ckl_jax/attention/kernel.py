"""What the kernels of a TPU and of a GPU share: their settings, products, and dropout.

Dropout draws from a counter: a hash of the row's seed, the head's, query and key says what is kept, the same in both
passes, and in ``keeps`` outside of the kernels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Settings(NamedTuple):
    """What a kernel is compiled for; ``interpret`` computes that of ``device`` in Python's steps, on any."""

    num_heads: int
    rate: float
    precision: Any
    device: str = "tpu"
    interpret: bool = False


def product(a: jax.Array, b: jax.Array, contracted: tuple[int, int], settings: Settings) -> jax.Array:
    """Of two matrices over these axes, in float32; bfloat16 has but one precision."""
    axes = ((contracted[:1], contracted[1:]), ((), ()))
    precision = settings.precision if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def dropped(weights: jax.Array, seed: jax.Array, rows: jax.Array, columns: jax.Array, rate: float) -> jax.Array:
    """The weights that dropout keeps, scaled to the same mean; arguments as of ``keeps``."""
    return weights if rate == 0 else jnp.where(keeps(seed, rows, columns, rate), weights / (1 - rate), 0.0)


def keeps(seed: jax.Array, rows: jax.Array, columns: jax.Array, rate: float) -> jax.Array:
    """Which weights dropout keeps: True with probability 1 - rate, independent for all practical purposes.

    Args:
      seed: int32 of a row of the batch and a head.
      rows, columns: int32 positions of queries and keys, of shapes that broadcast.
    """
    bits = _hash(_hash(rows ^ seed) + columns)
    return jax.lax.shift_right_logical(bits, 1) < jnp.int32((1 - rate) * 2**31 - 1)


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the input moves half of the output's (lowbias32, C. Wellons)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ jax.lax.shift_right_logical(x, shift)) * jnp.int32(factor)
    return x ^ jax.lax.shift_right_logical(x, 16)
