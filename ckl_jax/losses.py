"""The terms of the fine-tuning loss: small pure functions of log-probs, certainty, advantages and a mask.

Shapes are [...] for per-token values and [..., V] for logits; any batch layout works. Every mean is over the tokens
whose mask is True, and what stands at the others (infinities included) has no influence on value or gradient.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ckl_jax.certainty import entropy_of
from ckl_jax.config import require

KLKind = Literal["k1", "k2", "k3"]


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of ``values`` [...] over ``mask`` [...] in float32; 0 where no token is selected."""
    require(values.shape == mask.shape, "mask", mask.shape, f"the shape of the values, {values.shape}")
    mask = mask.astype(bool)
    selected = jnp.where(mask, values.astype(jnp.float32), 0.0)
    return selected.sum() / jnp.maximum(mask.sum(), 1)


def token_log_probs(logits: jax.Array, tokens: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """log softmax(logits / temperature)[token]: logits [..., V], tokens [...] -> float32 [...]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def entropy(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Entropy of softmax(logits / temperature) in nats: [..., V] -> float32 [...]."""
    return entropy_of(jax.nn.log_softmax(logits.astype(jnp.float32) / temperature))


def kl_estimate(log_probs: jax.Array, ref_log_probs: jax.Array, kind: KLKind = "k2") -> jax.Array:
    """Schulman's per-token estimates of KL(pi || ref) from tokens sampled from pi.

    With d = log pi(a|s) - log ref(a|s): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

    Differentiated as a loss on tokens of pi itself: k1 has zero expected gradient, k2 the gradient of KL(pi || ref),
    k3 that of the forward KL(ref || pi). The paper uses k2; the authors' code has all three.

    Args:
      log_probs, ref_log_probs: [...], any float type; ``ref_log_probs`` takes no gradient.

    Returns:
      float32 [...].

    Raises:
      ValueError: unknown kind or different shapes.
    """
    require(kind in get_args(KLKind), "kind", kind, " | ".join(get_args(KLKind)))
    same = log_probs.shape == ref_log_probs.shape
    require(same, "ref_log_probs", ref_log_probs.shape, f"the shape of log_probs, {log_probs.shape}")
    log_ratio = log_probs.astype(jnp.float32) - jax.lax.stop_gradient(ref_log_probs.astype(jnp.float32))
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    return jnp.expm1(-log_ratio) + log_ratio


def exact_kl(logits: jax.Array, ref_logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """KL(pi || ref) = sum_a pi(a) (log pi(a) - log ref(a)) over the whole vocabulary, in nats.

    Args:
      logits, ref_logits: [..., V]; both are divided by ``temperature``; ``ref_logits`` take no gradient.

    Returns:
      float32 [...]. A token that pi excludes (-inf) counts 0.
    """
    require(logits.shape == ref_logits.shape, "ref_logits", ref_logits.shape, f"the shape of logits, {logits.shape}")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    log_q = jax.lax.stop_gradient(jax.nn.log_softmax(ref_logits.astype(jnp.float32) / temperature))
    impossible = jnp.isneginf(log_p)
    difference = jnp.where(impossible, 0.0, log_p) - jnp.where(impossible, 0.0, log_q)
    return (jnp.exp(log_p) * difference).sum(axis=-1)


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
      ValueError: negative beta or different shapes.
    """
    if not isinstance(beta, jax.core.Tracer):
        require(float(beta) >= 0, "beta", float(beta), "0 or more")
    require(kl.shape == certainty.shape, "certainty", certainty.shape, f"the shape of kl, {kl.shape}")
    weights = jnp.power(jax.lax.stop_gradient(certainty.astype(jnp.float32)), beta)
    mask = mask.astype(bool)
    return masked_mean(weights * jnp.where(mask, kl, 0.0), mask)


def policy_gradient_loss(log_probs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """A2C: -mean over the masked tokens of advantage * log pi(a|s); advantages take no gradient."""
    safe = jnp.where(mask, log_probs, 0.0)
    return -masked_mean(jax.lax.stop_gradient(advantages) * safe, mask)


def value_loss(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error of the critic over the masked tokens (authors' code: no factor 1/2)."""
    error = jnp.where(mask, values - jax.lax.stop_gradient(returns), 0.0)
    return masked_mean(jnp.square(error), mask)


def gae(
    rewards_BxT: jax.Array, values_BxT: jax.Array, mask_BxT: jax.Array, discount: float, gae_lambda: float
) -> jax.Array:
    """Generalized advantage estimates of episodes that end with their mask (Schulman et al. 2016).

    delta_t = r_t + discount * V_{t+1} - V_t and A_t = delta_t + discount * lambda * A_{t+1}, with V = A = 0 after the
    end: the length limit counts as a true end.

    Args:
      rewards_BxT: reward of each token. values_BxT: value of the state before each token.
      mask_BxT: True on an episode's tokens, a prefix of each row.

    Returns:
      float32 [B, T], 0 after the end. Returns (value targets) are these plus ``values_BxT``.
    """
    mask_BxT = mask_BxT.astype(bool)
    values_BxT = jnp.where(mask_BxT, values_BxT.astype(jnp.float32), 0.0)
    rewards_BxT = jnp.where(mask_BxT, rewards_BxT.astype(jnp.float32), 0.0)
    next_values_BxT = jnp.pad(values_BxT[:, 1:], ((0, 0), (0, 1)))
    deltas_BxT = rewards_BxT + discount * next_values_BxT - values_BxT

    def backward(advantage_B, delta_B):
        advantage_B = delta_B + discount * gae_lambda * advantage_B
        return advantage_B, advantage_B

    _, advantages_TxB = jax.lax.scan(backward, jnp.zeros_like(deltas_BxT[:, 0]), deltas_BxT.T, reverse=True)
    return jnp.where(mask_BxT, advantages_TxB.T, 0.0)
