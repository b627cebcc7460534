"""Exponentials and products whose values overflow as they truly do and whose derivatives stay finite.

All is of float32. A derivative is exact up to ``LARGEST``, which stands for every larger one, and 0 where it is no
number (the ratio of two probabilities of 0). So the value says that a loss has overflown or is no number, and a weight
of 0 takes a token out of value and gradient, whatever stands there and however the loss is scaled: plain exponentials
and products would make NaN of 0 times infinity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LARGEST = 2.0**100
"""Times the scale of a loss it is finite still; its square in a norm is not, which tells that it stands for another."""


@jax.custom_jvp
def exp(x: jax.Array) -> jax.Array:
    """e^x."""
    return jnp.exp(x)


@jax.custom_jvp
def k3(log_ratio: jax.Array) -> jax.Array:
    """exp(-d) - 1 + d of d = ``log_ratio``, accurate near 0."""
    ratio_less_1 = jnp.expm1(-log_ratio)
    near_0 = log_ratio**2 * (1 / 2 - log_ratio * (1 / 6 - log_ratio / 24))
    elsewhere = jnp.where(jnp.isposinf(ratio_less_1), ratio_less_1, ratio_less_1 + log_ratio)
    return jnp.where(jnp.abs(log_ratio) < 1e-2, near_0, elsewhere)


@jax.custom_jvp
def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x * y, and 0 where either is 0, even if the other is infinite or NaN."""
    return jnp.where((x == 0) | (y == 0), 0.0, x * y)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, -LARGEST, LARGEST))


exp.defjvps(lambda t, value, x: t * _finite(value))
k3.defjvps(lambda t, value, log_ratio: t * _finite(-jnp.expm1(-log_ratio)))
product.defjvps(lambda t, value, x, y: t * _finite(y), lambda t, value, x, y: t * _finite(x))
