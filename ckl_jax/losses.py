"""The paper's loss and what every other one needs: small pure functions of log-probs, certainty, advantages and a mask.

Terms that compare the policy with the older one that sampled are in ``ratio_losses``, terms of truncated distributions
in ``truncation``.

Shapes are [...] for per-token values and [..., V] for logits; any batch layout works. Every mean is over the tokens
whose mask is True, and what stands at the others (NaN and infinity included) has no influence on value or gradient. A
mask has booleans, or zeros and ones. The mean of microbatches is that of their tokens if each one's mean is weighted by
its number of them. A token whose weight or advantage is 0 counts 0 in value and gradient, whatever its KL or ratio is;
one whose loss overflows makes the mean infinite (see ``overflow``).

Per-token values are not finite where logits are not, and then the gradient of their masked mean is NaN even where the
mask is False: a zero cotangent times an infinite derivative. So the functions that make them take the mask too; where
padding may hold such logits, pass it. Their values there are 0.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ckl_jax import overflow, token_weights
from ckl_jax.certainty import entropy_of
from ckl_jax.checks import (
    as_mask,
    number,
    require_array,
    require_integers,
    require_logits,
    require_shape_of,
    require_temperature,
)
from ckl_jax.errors import require, require_word

KLKind = Literal["k1", "k2", "k3"]
EPSILON = float(jnp.finfo(jnp.float32).eps)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of ``values`` [...] over ``mask`` [...] in float32; 0 where no token is selected."""
    require_array(values, "values")
    mask = as_mask(mask, values.shape)
    selected = jnp.where(mask, values.astype(jnp.float32), 0.0)
    return selected.sum() / jnp.maximum(mask.sum(), 1)


def masked(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """``values`` [...] where the ``mask`` [...] is True, else 0; all of them without a mask."""
    require_array(values, "values")
    if mask is None:
        return values
    return jnp.where(as_mask(mask, values.shape), values, 0)


def log_softmax(logits: jax.Array, temperature: float | jax.Array, mask: jax.Array | None) -> jax.Array:
    """log softmax(logits / temperature) in float32, uniform where a mask is False: [..., V], mask [...] -> [..., V].

    Raises ConfigError for what has no floats or less than 2 tokens, a ``temperature`` not above 0, or different shapes.
    """
    require_logits(logits)
    require_temperature(temperature)
    if mask is not None:
        logits = jnp.where(as_mask(mask, logits.shape[:-1], of="one entry per token")[..., None], logits, 0)
    return jax.nn.log_softmax(logits.astype(jnp.float32) / number(temperature))


def token_log_probs(
    logits: jax.Array,
    tokens: jax.Array,
    temperature: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
    clamp: bool = False,
) -> jax.Array:
    """log softmax(logits / temperature)[token]: logits [..., V], tokens [...] -> float32 [...].

    With a ``mask`` [...], tokens outside it may be any number (padding of -100, say). Elsewhere a token that the
    vocabulary does not have, negative ones included, gives NaN. ``clamp``: as ``clamped``.
    """
    require_logits(logits)
    require_integers(tokens, "tokens")
    require(tokens.shape == logits.shape[:-1], "tokens", tokens.shape, f"one per distribution, {logits.shape[:-1]}")
    log_p = log_softmax(logits, temperature, mask)
    tokens = tokens.astype(jnp.int32) if tokens.dtype.itemsize < 4 else tokens
    tokens = jnp.where((tokens < 0) | (tokens >= logits.shape[-1]), logits.shape[-1], tokens)
    tokens = masked(tokens, mask)
    log_probs = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return masked(clamped(log_probs) if clamp else log_probs, mask)


def clamped(log_probs: jax.Array) -> jax.Array:
    """Log-probs [...] of probabilities clamped to [e, 1 - e], e = 1.19e-7 that of float32: at least -15.942385.

    There is no gradient beyond. So a torch Categorical made of probabilities has them, hence the authors' losses.
    """
    return jnp.clip(log_probs, math.log(EPSILON), math.log1p(-EPSILON))


def entropy(logits: jax.Array, temperature: float | jax.Array = 1.0, mask: jax.Array | None = None) -> jax.Array:
    """Entropy of softmax(logits / temperature) in nats: [..., V], mask [...] -> float32 [...]."""
    return masked(entropy_of(log_softmax(logits, temperature, mask)), mask)


def kl_estimate(
    log_probs: jax.Array, ref_log_probs: jax.Array, kind: KLKind = "k2", mask: jax.Array | None = None
) -> jax.Array:
    """Schulman's per-token estimates of KL(pi || ref) from tokens sampled from pi.

    With d = log pi(a|s) - log ref(a|s): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

    Differentiated as a loss on tokens of pi itself: k1 has zero expected gradient, k2 the gradient of KL(pi || ref),
    k3 that of the forward KL(ref || pi). The paper uses k2; the authors' code has all three.

    Args:
      log_probs, ref_log_probs: [...], any float type; ``ref_log_probs`` takes no gradient.
      mask: bool [...]; 0 and without gradient outside it.

    Returns:
      float32 [...].

    Raises:
      ConfigError: unknown kind or different shapes.
    """
    require_word(kind, "kind", get_args(KLKind))
    require_shape_of(ref_log_probs, "ref_log_probs", log_probs, "log_probs")
    ref_log_probs = jax.lax.stop_gradient(masked(ref_log_probs.astype(jnp.float32), mask))
    log_ratio = masked(log_probs.astype(jnp.float32), mask) - ref_log_probs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * overflow.product(log_ratio, log_ratio)
    return overflow.k3(log_ratio)


def exact_kl(
    logits: jax.Array,
    ref_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """KL(pi || ref) = sum_a pi(a) (log pi(a) - log ref(a)) over the whole vocabulary, in nats.

    Args:
      logits, ref_logits: [..., V]; both are divided by ``temperature``; ``ref_logits`` take no gradient.
      mask: bool [...]; 0 and without gradient outside it.

    Returns:
      float32 [...]. A token whose probability under pi is 0 in float32 counts 0. Near 0 the sum cancels: its error was
      up to 5e-7 whatever the KL is (V up to 151,936), so one of 5e-5 has two digits, and one below 5e-7 may come out
      negative. The gradient does not cancel so: it was within 1% still at a KL of 5e-9.
    """
    require_shape_of(ref_logits, "ref_logits", logits, "logits")
    log_p = log_softmax(logits, temperature, mask)
    log_q = jax.lax.stop_gradient(log_softmax(ref_logits, temperature, mask))
    p = jnp.exp(log_p)
    difference = jnp.where(p == 0, 0.0, log_p) - jnp.where(p == 0, 0.0, log_q)
    return masked(overflow.product(p, difference).sum(axis=-1), mask)


def weighted_kl(kl: jax.Array, weights: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the masked tokens of weight * kl, divided by the number of tokens.

    Args:
      kl: per-token KL [...], from ``kl_estimate`` or ``exact_kl``.
      weights: [...], from ``token_weights``; they take no gradient.
      mask: bool [...], True on generated tokens.

    Returns:
      float32 [].
    """
    require_shape_of(weights, "weights", kl, "kl")
    weights = jax.lax.stop_gradient(masked(weights.astype(jnp.float32), mask))
    return masked_mean(overflow.product(weights, masked(kl.astype(jnp.float32), mask)), mask)


def prioritized_kl(kl: jax.Array, certainty: jax.Array, beta: float | jax.Array, mask: jax.Array) -> jax.Array:
    """The prioritized KL penalty: mean over the masked tokens of J(s)^beta * kl (paper, section 4).

    Divided by the number of tokens, not by the sum of the weights, so a larger beta also lowers the total pressure.
    ``beta = 0`` is the standard KL penalty.

    Args:
      kl: per-token KL [...], from ``kl_estimate`` or ``exact_kl``.
      certainty: J of the reference [...] in [0, 1]; takes no gradient.
      beta: 0 or more; the paper's main run has 150.
      mask: bool [...], True on generated tokens.

    Returns:
      float32 [].

    Raises:
      ConfigError: negative beta or different shapes.
    """
    require_shape_of(certainty, "certainty", kl, "kl")
    return weighted_kl(kl, token_weights.prioritized(certainty, beta, mask), mask)


def policy_gradient_loss(log_probs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """A2C: -mean over the masked tokens of advantage * log pi(a|s); advantages, [...] as all, take no gradient."""
    require_shape_of(advantages, "advantages", log_probs, "log_probs")
    advantages = jax.lax.stop_gradient(masked(advantages.astype(jnp.float32), mask))
    return -masked_mean(overflow.product(advantages, masked(log_probs.astype(jnp.float32), mask)), mask)


def value_loss(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error of the critic over the masked tokens (authors' code: no factor 1/2)."""
    require_shape_of(returns, "returns", values, "values")
    returns = jax.lax.stop_gradient(masked(returns.astype(jnp.float32), mask))
    return masked_mean(jnp.square(masked(values.astype(jnp.float32), mask) - returns), mask)


def adapted_coefficient(
    coefficient: jax.Array, kl: jax.Array, target: float | jax.Array, gain: float | jax.Array
) -> jax.Array:
    """The KL coefficient after a round whose KL was ``kl``: coefficient * (1 + gain * clip(kl / target - 1, +-0.2)).

    A proportional controller (Ziegler et al. 2019, section 2.2). A gain of 5 or more can make the coefficient 0, where
    it stays, or negative.
    """
    return coefficient * (1.0 + number(gain) * jnp.clip(kl / number(target) - 1.0, -0.2, 0.2))
