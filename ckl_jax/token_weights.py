"""The weight of every token's KL: the paper's, its controls, and those of follow-up works.

Each is a function of the frozen reference and the tokens' masks alone. Arrays are [B, T] for B episodes of T tokens: a
whole round of them, as means, quantiles and permutations are taken over the round. Every weight is float32, without
gradient, and 0 where the mask is False, whatever stands there (NaN and infinity included). With n tokens in the mask,
``mean`` is over these, J is the reference's certainty and H its entropy. A round that lies on several devices belongs
on all of them first: quantiles and permutations sort all of it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from ckl_jax.checks import (
    as_mask,
    number,
    require_array,
    require_at_least,
    require_floats,
    require_positive_share,
    require_share,
    require_some,
)
from ckl_jax.errors import is_integer, require, require_word

KLWeights = Literal[
    "prioritized",
    "uniform",
    "matched",
    "shuffled",
    "renormalized",
    "threshold",
    "archer",
    "inverted",
    "floored",
    "critical_free",
    "critical_held",
    "overlong_free",
    "overlong_held",
]
ROUNDING = 1e-5


def prioritized(certainty_BxT: jax.Array, beta: float | jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """w = J^beta: the paper's (section 4). ``beta`` 0 is ``uniform``.

    Args:
      certainty_BxT: J in [0, 1]; what rounding has put beyond it (up to 1e-5) is cut off, as a large beta blows it up.
      beta: 0 or more; the paper's main run has 150. J^0 is 1, that of J = 0 too. Above 10^6 the rounding of J decides:
        in float32 one within 3e-8 of 1 is 1, and so is its weight (a quarter of the tokens that our N5 writes).
      mask_BxT: True on generated tokens.

    Returns:
      float32 [B, T], as all functions here.

    Raises:
      ConfigError: negative beta or different shapes.
    """
    require_at_least(beta, "beta", 0, "0 or more, and finite")
    mask_BxT = _checked(certainty_BxT, "certainty", mask_BxT)
    certainty_BxT, beta = jax.lax.stop_gradient((certainty_BxT.astype(jnp.float32), jnp.float32(beta)))
    nearest_BxT = certainty_BxT.clip(0, 1)
    certainty_BxT = jnp.where(jnp.abs(certainty_BxT - nearest_BxT) < ROUNDING, nearest_BxT, certainty_BxT)
    return jnp.where(mask_BxT, jnp.power(jnp.where(mask_BxT, certainty_BxT, 1.0), beta), 0.0)


def uniform(mask_BxT: jax.Array) -> jax.Array:
    """w = 1: the standard KL penalty."""
    require_array(mask_BxT, "mask")
    return jnp.asarray(as_mask(mask_BxT, mask_BxT.shape), jnp.float32)


def matched(certainty_BxT: jax.Array, beta: float | jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """w = mean(J^beta): as much pressure as ``prioritized`` has, spread evenly. A control of this project."""
    weights_BxT = prioritized(certainty_BxT, beta, mask_BxT)
    return _mean(weights_BxT, mask_BxT) * uniform(mask_BxT)


def shuffled(certainty_BxT: jax.Array, beta: float | jax.Array, mask_BxT: jax.Array, key: jax.Array) -> jax.Array:
    """w = J^beta of another token: the weights of ``prioritized`` permuted over the mask's tokens of all episodes.

    The permutation is uniform and a function of ``key``. A control of this project: the same weights, hence the same
    pressure, on tokens that do not deserve them.
    """
    weights_N, mask_N = prioritized(certainty_BxT, beta, mask_BxT).reshape(-1), mask_BxT.astype(bool).reshape(-1)
    from_N = jnp.argsort(jnp.where(mask_N, jax.random.uniform(key, mask_N.shape), 2.0))
    to_N = jnp.argsort(~mask_N, stable=True)
    return jnp.zeros_like(weights_N).at[to_N].set(weights_N[from_N]).reshape(mask_BxT.shape)


def renormalized(certainty_BxT: jax.Array, beta: float | jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """w = J^beta / mean(J^beta): the ratios of ``prioritized``, with the standard KL's mean weight of 1.

    0 everywhere if every J^beta is 0 in float32. A control of this project.
    """
    return _of_mean_1(prioritized(certainty_BxT, beta, mask_BxT), mask_BxT)


def threshold(entropy_BxT: jax.Array, mask_BxT: jax.Array, share: float | jax.Array) -> jax.Array:
    """w = 1 if H <= q, else 0: the KL on low-entropy tokens only, a J^beta with a hard edge (arXiv 2512.04359).

    q is the ``share``-quantile over the round: the round(share * n)-th smallest H, at least the smallest. That work
    has more besides: a second, stronger level by covariance and a curriculum.

    Raises:
      ConfigError: different shapes, or ``share`` outside (0, 1].
    """
    mask_BxT = _checked(entropy_BxT, "entropy", mask_BxT)
    require(mask_BxT.ndim == 2, "mask", mask_BxT.shape, "[B, T]")
    require_some(mask_BxT, "mask")
    low_1xN = lowest_share(entropy_BxT.reshape(1, -1), mask_BxT.reshape(1, -1), share)
    return low_1xN.reshape(mask_BxT.shape).astype(jnp.float32)


def archer(entropy_BxT: jax.Array, mask_BxT: jax.Array, share: float | jax.Array, weak: float | jax.Array) -> jax.Array:
    """w = 1 if H <= q_b, else ``weak``, where q_b is the ``share``-quantile of H in episode b (arXiv 2507.15778).

    Archer's published settings have share 0.8, no KL on the others (weak 0), the training policy's entropy instead of
    the reference's, and a clip of two levels besides.

    Raises:
      ConfigError: different shapes, ``share`` outside (0, 1], or ``weak`` outside [0, 1].
    """
    require_share(weak, "weak")
    low_BxT = lowest_share(entropy_BxT, mask_BxT, share)
    return jnp.where(mask_BxT.astype(bool), jnp.where(low_BxT, 1.0, number(weak)), 0.0).astype(jnp.float32)


def inverted(certainty_BxT: jax.Array, beta: float | jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """w = (1 - J^beta) * mean(J^beta) / mean(1 - J^beta): the opposite order, with as much pressure as ``prioritized``.

    0 everywhere if every J^beta is 1, as with beta 0. The sharpest control: it holds the policy where the reference is
    unsure, and frees it elsewhere.
    """
    weights_BxT = prioritized(certainty_BxT, beta, mask_BxT)
    return _mean(weights_BxT, mask_BxT) * _of_mean_1(uniform(mask_BxT) - weights_BxT, mask_BxT)


def floored(
    certainty_BxT: jax.Array, beta: float | jax.Array, mask_BxT: jax.Array, weak: float | jax.Array
) -> jax.Array:
    """w = max(J^beta, ``weak``): no token is wholly free (after arXiv 2605.13255).

    Raises:
      ConfigError: as ``prioritized``, or ``weak`` outside [0, 1].
    """
    require_share(weak, "weak")
    return jnp.maximum(prioritized(certainty_BxT, beta, mask_BxT), number(weak) * uniform(mask_BxT))


def critical_free(critical_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """w = 0 at the task's critical tokens, 1 elsewhere: an oracle that knows the task, and nothing of J. A control.

    Raises:
      ConfigError: different shapes.
    """
    weights_BxT = uniform(mask_BxT)
    return jnp.where(as_mask(critical_BxT, weights_BxT.shape, "critical"), 0.0, weights_BxT)


def critical_held(
    certainty_BxT: jax.Array, beta: float | jax.Array, critical_BxT: jax.Array, mask_BxT: jax.Array
) -> jax.Array:
    """w = 1 at the task's critical tokens, J^beta elsewhere: what is left of ``prioritized`` without them. A control.

    Raises:
      ConfigError: as ``prioritized``.
    """
    weights_BxT = prioritized(certainty_BxT, beta, mask_BxT)
    return jnp.where(as_mask(critical_BxT, mask_BxT.shape, "critical"), uniform(mask_BxT), weights_BxT)


def overlong_free(overlong_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """w = 0 at overlong and at critical tokens, 1 elsewhere. A control of this project.

    An answer is overlong where a number has as many digits as any in pre-training, or more; most answers of a
    pre-trained model first go wrong there, or at a critical token. ``critical_free`` of more places.

    Args:
      overlong_BxT: as in ``Tokens``, the critical tokens among them.
    """
    return critical_free(overlong_BxT, mask_BxT)


def overlong_held(
    certainty_BxT: jax.Array, beta: float | jax.Array, overlong_BxT: jax.Array, mask_BxT: jax.Array
) -> jax.Array:
    """w = 1 at overlong and at critical tokens, J^beta elsewhere: ``critical_held`` of more places. A control.

    Args:
      overlong_BxT: as in ``Tokens``, the critical tokens among them.
    """
    return critical_held(certainty_BxT, beta, overlong_BxT, mask_BxT)


class Tokens(NamedTuple):
    """What the weights depend on.

    Attributes:
      certainty_BxT, entropy_BxT: J and H of the frozen reference.
      mask_BxT: True on generated tokens.
      critical_BxT: True on those that the task knows as critical.
      overlong_BxT: True on these and where a number has come to N digits or more.
    """

    certainty_BxT: jax.Array
    entropy_BxT: jax.Array
    mask_BxT: jax.Array
    critical_BxT: jax.Array
    overlong_BxT: jax.Array


class Settings(NamedTuple):
    """The arguments of the weight functions beside the tokens; each reads those that it has."""

    beta: float | jax.Array
    share: float | jax.Array
    weak: float | jax.Array
    key: jax.Array


def weigh(index: jax.Array | int, tokens: Tokens, settings: Settings) -> jax.Array:
    """The weights that a word of ``KLWeights`` names.

    Args:
      index: of the word, from ``index_of``; may be traced, so that runs of one program differ in it. A traced one that
        no word has counts as the nearest that one has.
    """
    certainty_BxT, entropy_BxT, mask_BxT, critical_BxT, overlong_BxT = tokens
    beta, share, weak, key = settings
    of_word = {
        "prioritized": lambda: prioritized(certainty_BxT, beta, mask_BxT),
        "uniform": lambda: uniform(mask_BxT),
        "matched": lambda: matched(certainty_BxT, beta, mask_BxT),
        "shuffled": lambda: shuffled(certainty_BxT, beta, mask_BxT, key),
        "renormalized": lambda: renormalized(certainty_BxT, beta, mask_BxT),
        "threshold": lambda: threshold(entropy_BxT, mask_BxT, share),
        "archer": lambda: archer(entropy_BxT, mask_BxT, share, weak),
        "inverted": lambda: inverted(certainty_BxT, beta, mask_BxT),
        "floored": lambda: floored(certainty_BxT, beta, mask_BxT, weak),
        "critical_free": lambda: critical_free(critical_BxT, mask_BxT),
        "critical_held": lambda: critical_held(certainty_BxT, beta, critical_BxT, mask_BxT),
        "overlong_free": lambda: overlong_free(overlong_BxT, mask_BxT),
        "overlong_held": lambda: overlong_held(certainty_BxT, beta, overlong_BxT, mask_BxT),
    }
    if not isinstance(index, jax.core.Tracer):
        whole = is_integer(index) or (isinstance(index, jax.Array) and index.ndim == 0)
        require(whole and 0 <= int(index) < len(of_word), "index", index, f"0..{len(of_word) - 1}")
    return jax.lax.switch(index, [of_word[word] for word in get_args(KLWeights)])


def index_of(word: str) -> int:
    """The index of a word for ``weigh``. Raises ConfigError for an unknown one."""
    words = get_args(KLWeights)
    require_word(word, "kl_weights", words)
    return words.index(word)


def _checked(values_BxT: jax.Array, name: str, mask_BxT: jax.Array) -> jax.Array:
    """The mask as bool, of the shape of the values, which are floats."""
    require_floats(values_BxT, name)
    return as_mask(mask_BxT, values_BxT.shape, of=f"the shape of {name}")


def _mean(weights_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Over the mask; the weights are 0 elsewhere."""
    return weights_BxT.sum() / jnp.maximum(mask_BxT.astype(bool).sum(), 1)


def _of_mean_1(weights_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    return weights_BxT / jnp.maximum(_mean(weights_BxT, mask_BxT), jnp.finfo(jnp.float32).tiny)


def lowest_share(entropy_BxT: jax.Array, mask_BxT: jax.Array, share: float | jax.Array) -> jax.Array:
    """True on the round(share * n) smallest of the n values in every row's mask, at least one, and on what ties.

    Raises ConfigError like ``threshold``.
    """
    require_positive_share(share, "share")
    mask_BxT = _checked(entropy_BxT, "entropy", mask_BxT)
    require(mask_BxT.ndim == 2, "mask", mask_BxT.shape, "[B, T]")
    require_some(mask_BxT, "mask")
    entropy_BxT = jnp.where(mask_BxT, jax.lax.stop_gradient(entropy_BxT.astype(jnp.float32)), jnp.inf)
    rank_Bx1 = jnp.round(number(share) * mask_BxT.sum(axis=1, keepdims=True)).astype(jnp.int32)
    quantile_Bx1 = jnp.take_along_axis(jnp.sort(entropy_BxT, axis=1), jnp.maximum(rank_Bx1 - 1, 0), axis=1)
    return mask_BxT & (entropy_BxT <= quantile_Bx1)
