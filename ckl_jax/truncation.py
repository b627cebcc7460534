"""Distributions truncated to their likely tokens (top-k, nucleus, min-p), and the terms of a loss that they make.

Shapes and masks are those of ``losses``. The choice of the tokens takes no gradient. Logits whose vocabulary lies on
several devices belong on all of them first; on a mesh of explicit axes, by ``jax.sharding.reshard(x, jax.P())``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ckl_jax.checks import as_mask, number, require_array, require_logits, require_positive_share
from ckl_jax.errors import require
from ckl_jax.losses import entropy, kl_estimate, log_softmax, masked, masked_mean, token_log_probs


def top_tokens(logits: jax.Array, count: int) -> jax.Array:
    """True on the ``count`` likeliest tokens of [..., V], and on what ties with the last: bool [..., V].

    Impossible tokens (-inf) are never among them, so they are fewer where fewer are possible. Raises ConfigError for a
    ``count`` outside 1..V.
    """
    require_logits(logits)
    require(1 <= count <= logits.shape[-1], "count", count, f"1 to {logits.shape[-1]}")
    logits = jax.lax.stop_gradient(logits)
    return (logits >= jax.lax.top_k(logits, count)[0][..., -1:]) & ~jnp.isneginf(logits)


def nucleus(logits: jax.Array, share: float | jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """True on the fewest likeliest tokens that have ``share`` of the probability together, and on what ties: [..., V].

    Raises ConfigError for a ``share`` outside (0, 1].
    """
    require_positive_share(share, "share")
    p = jnp.exp(log_softmax(*jax.lax.stop_gradient((logits, temperature)), None))
    rising = jnp.sort(p, axis=-1)
    # What a token and all less likely ones have together: summed from the least, so that a large vocabulary's tail is
    # not rounded away.
    needed = jnp.cumsum(rising, axis=-1) > 1 - number(share)
    least = jnp.where(needed, rising, jnp.inf).min(axis=-1, keepdims=True)
    return p >= jnp.minimum(least, rising[..., -1:])  # The likeliest one also where 1 - share is rounded to 1.


def entropy_within(
    logits: jax.Array, inside: jax.Array, temperature: float | jax.Array = 1.0, mask: jax.Array | None = None
) -> jax.Array:
    """Entropy of softmax(logits / temperature) renormalized over the n tokens ``inside``, times log V / log n.

    So its maximum is that of ``entropy``, log V. As a bonus it moves no token outside: TRE (arXiv 2602.03635).

    Args:
      logits: [..., V].
      inside: bool [..., V], from ``top_tokens`` or ``nucleus``.
      mask: bool [...].

    Returns:
      float32 [...]; 0 where one token is inside.
    """
    size = as_mask(inside, logits.shape, "inside").sum(axis=-1)
    scale = jnp.log(logits.shape[-1]) / jnp.log(jnp.maximum(size, 2).astype(jnp.float32))
    return masked(scale * entropy(jnp.where(inside, logits, -jnp.inf), temperature, mask), mask)


def proxy_log_probs(
    logits: jax.Array,
    tokens: jax.Array,
    min_p: float | jax.Array,
    temperature: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Log-probs of tokens under the policy without its noise: what is below ``min_p`` times the likeliest is left out.

    Args:
      logits: [..., V].
      tokens: [...].
      min_p: in (0, 1].
      mask: bool [...].

    Returns:
      float32 [...], without gradient: log pi less the log of the probability that is kept, -inf for a token left out; 0
      outside the mask.
    """
    require_positive_share(min_p, "min_p")
    least = jnp.log(number(min_p)) if isinstance(min_p, jax.Array) else math.log(min_p)
    log_p = jax.lax.stop_gradient(log_softmax(logits, temperature, mask))
    kept = log_p >= log_p.max(axis=-1, keepdims=True) + least
    return token_log_probs(jnp.where(kept, log_p, -jnp.inf), tokens, 1.0, mask)


def lp_reg(log_probs: jax.Array, proxy: jax.Array, pulled: jax.Array, mask: jax.Array) -> jax.Array:
    """Lp-Reg: mean over the masked tokens of k3(pi, proxy) where ``pulled``, else 0 (arXiv 2510.03222).

    Args:
      log_probs: [...].
      proxy: [...], from ``proxy_log_probs``.
      mask: bool [...].
      pulled: bool [...], the unlikely tokens of bad answers that the proxy does not leave out. It gives each of them
        more than the policy does, but maybe so little more that rounding hides it.
    """
    require_array(log_probs, "log_probs")
    pulled = as_mask(pulled, log_probs.shape, "pulled") & as_mask(mask, log_probs.shape)
    return masked_mean(kl_estimate(log_probs, proxy, "k3", pulled), mask)
