"""What a policy's entropy, or its log-probabilities, do to advantages, and the tokens that they choose for a recipe.

Means and quantiles are over a whole round: B episodes of T tokens. These functions act on the policy gradient, not on
the KL to the reference (``token_weights`` does). H is the policy's entropy in nats before the round's updates. Results
are float32 or bool, without gradient, and 0 or False where the mask is False. A round that lies on several devices
belongs on all of them first; on a mesh of explicit axes, by ``jax.sharding.reshard(x, jax.P())``.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from ckl_jax.advantages import EPSILON, as_constants, centered, require_groups, standardized
from ckl_jax.checks import number, require_array, require_share
from ckl_jax.errors import require
from ckl_jax.token_weights import lowest_share

AdvantageShaping = Literal["none", "top_entropy", "entropy_bonus", "gtpo"]


def top_entropy(
    advantages_BxT: jax.Array, entropy_BxT: jax.Array, mask_BxT: jax.Array, share: float | jax.Array
) -> jax.Array:
    """A where H is among the ``share`` highest of the round, else 0: the 80/20 rule (arXiv 2506.01939).

    At least one token is kept, and all that tie with the last one kept. The loss still divides by all tokens.

    Raises:
      ConfigError: different shapes, or ``share`` outside (0, 1].
    """
    mask_BxT, entropy_BxT, advantages_BxT = as_constants(mask_BxT, entropy=entropy_BxT, advantages=advantages_BxT)
    return jnp.where(top_share(entropy_BxT, mask_BxT, share), advantages_BxT, 0.0)


def entropy_bonus(
    advantages_BxT: jax.Array,
    entropy_BxT: jax.Array,
    mask_BxT: jax.Array,
    scale: float | jax.Array,
    kappa: float | jax.Array,
) -> jax.Array:
    """A + min(scale * H, |A| / kappa): longer thought where the policy hesitates (arXiv 2506.14758).

    The bonus never turns A's sign while kappa > 1, and is 0 where A is.
    """
    mask_BxT, entropy_BxT, advantages_BxT = as_constants(mask_BxT, entropy=entropy_BxT, advantages=advantages_BxT)
    bonus_BxT = jnp.minimum(number(scale) * entropy_BxT, jnp.abs(advantages_BxT) / number(kappa))
    return jnp.where(mask_BxT, advantages_BxT + bonus_BxT, 0.0)


def gtpo(
    success_B: jax.Array, entropy_BxT: jax.Array, mask_BxT: jax.Array, group_size: int, share: float | jax.Array
) -> jax.Array:
    """Rewards dealt out by entropy among the answers to a problem (arXiv 2508.04349), standardized over its tokens.

    Of the n_t right answers that have a token at t, answer i gets r_it = 1 - share + share * n_t * H_it / sum_k H_kt;
    of the m_t wrong ones r_jt = -(1 - share) - share * m_t * H_jt^-1 / sum_k H_kt^-1, so a wrong answer that was sure
    of itself loses most. H counts as at least 1e-6. Dealing out leaves the total reward of the right and of the wrong
    answers at t as it was. One mean and one deviation are of right and wrong answers together; that work standardizes
    the two apart.

    Args:
      success_B: 1 for a right answer, else 0; the answers to a problem are ``group_size`` neighbours.
      share: part of the reward that is dealt out, in [0, 1].

    Returns:
      float32 [B, T]; 0 in a group that is all right or all wrong, as in GRPO.

    Raises:
      ConfigError: different shapes, ``share`` outside [0, 1], or ``group_size`` below 2 or no divisor of B.
    """
    require_share(share, "share")
    share = number(share)
    for name, array in (("mask", mask_BxT), ("success", success_B)):
        require_array(array, name)
    num_episodes = len(mask_BxT)
    require_groups(num_episodes, group_size)
    require(success_B.shape == (num_episodes,), "success", success_B.shape, f"one per episode, ({num_episodes},)")
    mask_BxT, entropy_BxT = as_constants(mask_BxT, entropy=entropy_BxT)
    right_GxKx1 = success_B.reshape(-1, group_size, 1) > 0
    mask_GxKxT, entropy_GxKxT = (x.reshape(-1, group_size, mask_BxT.shape[1]) for x in (mask_BxT, entropy_BxT))
    entropy_GxKxT = jnp.maximum(entropy_GxKxT, 1e-6)

    def dealt(deserved_GxKxT, receive_GxKxT):
        deserved_GxKxT = jnp.where(receive_GxKxT, deserved_GxKxT, 0.0)
        total_Gx1xT = jnp.maximum(deserved_GxKxT.sum(axis=1, keepdims=True), 1e-12)
        return receive_GxKxT.sum(axis=1, keepdims=True) * deserved_GxKxT / total_Gx1xT

    gain_GxKxT = dealt(entropy_GxKxT, mask_GxKxT & right_GxKx1)
    loss_GxKxT = dealt(1.0 / entropy_GxKxT, mask_GxKxT & ~right_GxKx1)
    fixed_GxKx1 = (1 - share) * jnp.where(right_GxKx1, 1.0, -1.0)
    advantages_GxKxT = jax.vmap(standardized)(fixed_GxKx1 + share * (gain_GxKxT - loss_GxKxT), mask_GxKxT)
    mixed_Gx1x1 = right_GxKx1.any(axis=1, keepdims=True) & ~right_GxKx1.all(axis=1, keepdims=True)
    return jnp.where(mixed_Gx1x1, advantages_GxKxT, 0.0).reshape(mask_BxT.shape)


def signed_entropy(entropy_BxT: jax.Array, mask_BxT: jax.Array, pivot: float | jax.Array) -> jax.Array:
    """h of HAPO (arXiv 2509.16591): log H less its ``pivot``-quantile, over its greatest value, below 0 over its least.

    Returns:
      float32 [B, T] in [-1, 1]: 1 at the least sure token if it lies above that quantile, -1 at the surest one if it
      lies below. H counts as at least 1e-8: where even the quantile is surer than that, nothing lies below it.

    Raises:
      ConfigError: different shapes, or ``pivot`` outside [0, 1].
    """
    require_share(pivot, "pivot")
    mask_BxT, entropy_BxT = as_constants(mask_BxT, entropy=entropy_BxT)
    log_BxT = jnp.log(jnp.maximum(entropy_BxT, EPSILON))
    rank = jnp.round(number(pivot) * jnp.maximum(mask_BxT.sum() - 1, 0)).astype(jnp.int32)
    middle = jnp.sort(jnp.where(mask_BxT, log_BxT, jnp.inf), axis=None)[rank]
    off_BxT = jnp.where(mask_BxT, log_BxT - middle, 0.0)
    span_BxT = jnp.where(off_BxT > 0, off_BxT.max(), -off_BxT.min())
    return off_BxT / jnp.maximum(span_BxT, EPSILON)


def covariance(advantages_BxT: jax.Array, log_probs_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """(A - mean A) * (log pi - mean log pi), token by token: where it is great, entropy falls (arXiv 2505.22617).

    Exactly 0 where all A, or all log pi, are equal.
    """
    mask_BxT, log_probs_BxT, advantages_BxT = as_constants(mask_BxT, log_probs=log_probs_BxT, advantages=advantages_BxT)
    return centered(advantages_BxT, mask_BxT) * centered(log_probs_BxT, mask_BxT)


def unlikely(
    advantages_BxT: jax.Array, log_probs_BxT: jax.Array, mask_BxT: jax.Array, share: float | jax.Array
) -> jax.Array:
    """True on the ``share`` of least log pi among the tokens with A < 0, at least one, and on what ties with the last.

    Those are the tokens that Lp-Reg looks after (arXiv 2510.03222).

    Raises:
      ConfigError: different shapes, or ``share`` outside (0, 1].
    """
    mask_BxT, log_probs_BxT, advantages_BxT = as_constants(mask_BxT, log_probs=log_probs_BxT, advantages=advantages_BxT)
    return top_share(-log_probs_BxT, mask_BxT & (advantages_BxT < 0), share)


def top_share(values_BxT: jax.Array, mask_BxT: jax.Array, share: float | jax.Array) -> jax.Array:
    """True on the round(share * n) greatest of the mask's n values, at least one, and on what ties with the last."""
    mask_BxT, values_BxT = as_constants(mask_BxT, values=values_BxT)
    return lowest_share(-values_BxT.reshape(1, -1), mask_BxT.reshape(1, -1), share).reshape(mask_BxT.shape)
