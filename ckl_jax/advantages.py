"""Advantages: what a token's log-probability is multiplied by, and what a policy's entropy does to them.

Small pure functions; losses take no gradient of them.

B episodes of T tokens; the answers to one problem are ``group_size`` neighbours of B. Rewards are one number an
episode; ``gae`` takes them token by token. From ``top_entropy`` on the functions take means and quantiles over a whole
round and act on the policy gradient, not on the KL: H is the policy's entropy in nats when it wrote the token, and
results are float32, without gradient, and 0 where the mask is False.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from ckl_jax.checks import as_mask
from ckl_jax.errors import require
from ckl_jax.token_weights import lowest_share

AdvantageShaping = Literal["none", "top_entropy", "entropy_bonus", "gtpo"]

EPSILON = 1e-8


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
    mask_BxT = as_mask(as_mask(mask_BxT, values_BxT.shape), rewards_BxT.shape)
    values_BxT = jnp.where(mask_BxT, values_BxT.astype(jnp.float32), 0.0)
    rewards_BxT = jnp.where(mask_BxT, rewards_BxT.astype(jnp.float32), 0.0)
    next_values_BxT = jnp.pad(values_BxT[:, 1:], ((0, 0), (0, 1)))
    deltas_BxT = rewards_BxT + discount * next_values_BxT - values_BxT

    def backward(advantage_B, delta_B):
        advantage_B = delta_B + discount * gae_lambda * advantage_B
        return advantage_B, advantage_B

    _, advantages_TxB = jax.lax.scan(backward, jnp.zeros_like(deltas_BxT[:, 0]), deltas_BxT.T, reverse=True)
    return jnp.where(mask_BxT, advantages_TxB.T, 0.0)


def leave_one_out(rewards_B: jax.Array, group_size: int) -> jax.Array:
    """Reward minus the mean reward of the group's other episodes: RLOO (Ahmadian et al. 2024).

    With one group of all episodes it is REINFORCE with the mean as baseline. The baseline does not depend on the
    episode, so the gradient has no bias.

    Returns:
      float32 [B]; exactly 0 in a group of equal rewards.

    Raises:
      ConfigError: ``group_size`` is below 2 or does not divide B.
    """
    rewards_GxK = _groups(rewards_B, group_size)
    rewards_GxK = rewards_GxK - rewards_GxK.min(axis=1, keepdims=True)
    others_GxK = (rewards_GxK.sum(axis=1, keepdims=True) - rewards_GxK) / (group_size - 1)
    return (rewards_GxK - others_GxK).reshape(-1)


def standardized_in_group(rewards_B: jax.Array, group_size: int) -> jax.Array:
    """(R - mean) / (standard deviation + epsilon) over a group's answers: GRPO (Shao et al. 2024).

    Returns and raises as ``leave_one_out``.
    """
    rewards_GxK = _groups(rewards_B, group_size)
    return jax.vmap(standardized)(rewards_GxK, jnp.ones(rewards_GxK.shape, bool)).reshape(-1)


def standardized(advantages_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """(A - mean) / (standard deviation + epsilon) over the mask, 0 outside it; exactly 0 where all A are equal."""
    centered_BxT = centered(advantages_BxT, mask_BxT)
    largest = jnp.abs(centered_BxT).max()
    shares_BxT = centered_BxT / jnp.where(largest > 0, largest, 1.0)
    deviation = largest * jnp.sqrt(jnp.square(shares_BxT).sum() / jnp.maximum(mask_BxT.astype(bool).sum(), 1))
    return centered_BxT / (deviation + EPSILON)


def centered(values_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """A - mean over the mask, 0 outside it; exactly 0 where all A are equal: their mean may be rounded off them.

    Returns:
      float32 [B, T], as ``standardized`` does.
    """
    mask_BxT = as_mask(mask_BxT, values_BxT.shape)
    values_BxT = jax.lax.stop_gradient(values_BxT.astype(jnp.float32))
    least = jnp.where(mask_BxT, values_BxT, jnp.inf).min()
    above_BxT = jnp.where(mask_BxT, values_BxT - least, 0.0)
    return jnp.where(mask_BxT, above_BxT - above_BxT.sum() / jnp.maximum(mask_BxT.sum(), 1), 0.0)


def kl_to_go(kl_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """The sum of ``kl_BxT`` over a token and all after it, minus its mean over the other episodes that reach there.

    With kl = log pi(a|s) - log ref(a|s) of the sampled tokens, -alpha times this is what a KL in the reward adds to the
    advantage: the gradient then has each token's effect on later states, which a KL in the loss leaves out. The mean is
    a baseline and adds no bias. Episodes that are equal from there on have exactly 0, if there are several.

    Returns:
      float32 [B, T], 0 outside the mask.
    """
    mask_BxT = as_mask(mask_BxT, kl_BxT.shape)
    kl_BxT = jax.lax.stop_gradient(jnp.where(mask_BxT, kl_BxT.astype(jnp.float32), 0.0))
    to_go_BxT = jnp.where(mask_BxT, _summed_from(kl_BxT), 0.0)
    # Above the least of their column: equal ones are then no advantage, whatever their sum is rounded to.
    least_T = jnp.where(mask_BxT, to_go_BxT, jnp.inf).min(axis=0)
    above_BxT = jnp.where(mask_BxT, to_go_BxT - least_T[None], 0.0)
    counts_T = mask_BxT.sum(axis=0)
    others_BxT = (above_BxT.sum(axis=0)[None] - above_BxT) / jnp.maximum(counts_T - 1, 1)[None]
    return jnp.where(mask_BxT, jnp.where(counts_T[None] > 1, above_BxT - others_BxT, to_go_BxT), 0.0)


def future_kl(kl_BxT: jax.Array, later_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """``kl_BxT`` of a token plus the sum of ``later_BxT`` over all after it: FRPO (arXiv 2601.10201).

    -alpha times this joins the advantage after its normalization. As ``kl_to_go``, but without baseline. ``kl_BxT`` has
    to be k1; ``later_BxT`` may be that or k3, which has the same mean on the policy's tokens, and is never negative.

    Returns:
      float32 [B, T], 0 outside the mask.
    """
    mask_BxT, kl_BxT, later_BxT = _finite(mask_BxT, kl_BxT, later_BxT)
    after_BxT = jnp.pad(_summed_from(later_BxT)[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(mask_BxT, kl_BxT + after_BxT, 0.0)


def zero_centered(rewards_B: jax.Array, penalties_B: jax.Array, group_size: int) -> jax.Array:
    """A / max |A| - (D - mean of D) over a group's answers: ZCPO (Ding 2026).

    A is the reward minus the group's mean, D = ``penalties_B`` alpha times an answer's KL to the reference in nats a
    token. Both parts have mean 0, so the KL only decides among the answers to one problem.

    Returns:
      float32 [B]; exactly 0 in a group of equal rewards, whatever its KLs are.

    Raises:
      ConfigError: ``group_size`` is below 2 or does not divide B.
    """
    rewards_GxK, penalties_GxK = _groups(rewards_B, group_size), _groups(penalties_B, group_size)
    everyone = jnp.ones(rewards_GxK.shape, bool)
    advantages_GxK, excess_GxK = (jax.vmap(centered)(x, everyone) for x in (rewards_GxK, penalties_GxK))
    largest_Gx1 = jnp.abs(advantages_GxK).max(axis=1, keepdims=True)
    shares_GxK = advantages_GxK / jnp.where(largest_Gx1 > 0, largest_Gx1, 1.0)
    return jnp.where(largest_Gx1 > 0, shares_GxK - excess_GxK, 0.0).reshape(-1)


def top_entropy(advantages_BxT: jax.Array, entropy_BxT: jax.Array, mask_BxT: jax.Array, share: float) -> jax.Array:
    """A where H is among the ``share`` highest of the round, else 0: the 80/20 rule (arXiv 2506.01939).

    At least one token is kept, and all that tie with the last one kept. The loss still divides by all tokens.

    Raises:
      ConfigError: different shapes, or ``share`` outside (0, 1].
    """
    chosen_BxT = top_share(entropy_BxT, mask_BxT, share)
    return jnp.where(chosen_BxT, jax.lax.stop_gradient(advantages_BxT.astype(jnp.float32)), 0.0)


def entropy_bonus(
    advantages_BxT: jax.Array, entropy_BxT: jax.Array, mask_BxT: jax.Array, scale: float, kappa: float
) -> jax.Array:
    """A + min(scale * H, |A| / kappa): longer thought where the policy hesitates (arXiv 2506.14758).

    The bonus never turns A's sign while kappa > 1, and is 0 where A is.
    """
    mask_BxT, entropy_BxT, advantages_BxT = _finite(mask_BxT, entropy_BxT, advantages_BxT)
    bonus_BxT = jnp.minimum(scale * entropy_BxT, jnp.abs(advantages_BxT) / kappa)
    return jnp.where(mask_BxT, advantages_BxT + bonus_BxT, 0.0)


def gtpo(success_B: jax.Array, entropy_BxT: jax.Array, mask_BxT: jax.Array, group_size: int, share: float) -> jax.Array:
    """Rewards dealt out by entropy among the answers to a problem (arXiv 2508.04349), standardized over its tokens.

    Of the n_t right answers that have a token at t, answer i gets r_it = 1 - share + share * n_t * H_it / sum_k H_kt;
    of the m_t wrong ones r_jt = -(1 - share) - share * m_t * H_jt^-1 / sum_k H_kt^-1, so a wrong answer that was sure
    of itself loses most. Dealing out leaves the total reward of the right and of the wrong answers at t as it was.

    Args:
      success_B: 1 for a right answer, else 0; the answers to a problem are ``group_size`` neighbours.
      share: part of the reward that is dealt out, in [0, 1].

    Returns:
      float32 [B, T]; 0 in a group that is all right or all wrong, as in GRPO.

    Raises:
      ConfigError: different shapes, ``share`` outside [0, 1], or ``group_size`` that does not divide B.
    """
    require(0 <= share <= 1, "share", share, "0 to 1")
    num_episodes, num_steps = mask_BxT.shape
    require(num_episodes % group_size == 0, "group_size", group_size, f"a divisor of the {num_episodes} episodes")
    mask_BxT, entropy_BxT, _ = _finite(mask_BxT, entropy_BxT, entropy_BxT)
    right_GxKx1 = success_B.reshape(-1, group_size, 1) > 0
    mask_GxKxT, entropy_GxKxT = (x.reshape(-1, group_size, num_steps) for x in (mask_BxT, entropy_BxT))
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


def signed_entropy(entropy_BxT: jax.Array, mask_BxT: jax.Array, pivot: float) -> jax.Array:
    """h of HAPO (arXiv 2509.16591): log H less its ``pivot``-quantile, over its greatest value, below 0 over its least.

    Returns:
      float32 [B, T] in [-1, 1], 1 at the least sure token and -1 at the surest one.

    Raises:
      ConfigError: different shapes, or ``pivot`` outside [0, 1].
    """
    require(0 <= pivot <= 1, "pivot", pivot, "0 to 1")
    mask_BxT, entropy_BxT = _finite(mask_BxT, entropy_BxT)
    log_BxT = jnp.log(jnp.maximum(entropy_BxT, EPSILON))
    rank = jnp.round(pivot * jnp.maximum(mask_BxT.sum() - 1, 0)).astype(jnp.int32)
    middle = jnp.sort(jnp.where(mask_BxT, log_BxT, jnp.inf), axis=None)[rank]
    off_BxT = jnp.where(mask_BxT, log_BxT - middle, 0.0)
    span_BxT = jnp.where(off_BxT > 0, off_BxT.max(), -off_BxT.min())
    return off_BxT / jnp.maximum(span_BxT, EPSILON)


def covariance(advantages_BxT: jax.Array, log_probs_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """(A - mean A) * (log pi - mean log pi), token by token: where it is great, entropy falls (arXiv 2505.22617).

    Exactly 0 where all A, or all log pi, are equal.
    """
    mask_BxT, log_probs_BxT, advantages_BxT = _finite(mask_BxT, log_probs_BxT, advantages_BxT)
    return centered(advantages_BxT, mask_BxT) * centered(log_probs_BxT, mask_BxT)


def unlikely(advantages_BxT: jax.Array, log_probs_BxT: jax.Array, mask_BxT: jax.Array, share: float) -> jax.Array:
    """True on the ``share`` of least log pi among the tokens with A < 0, at least one, and on what ties with the last.

    Those are the tokens that Lp-Reg looks after (arXiv 2510.03222).

    Raises:
      ConfigError: different shapes, or ``share`` outside (0, 1].
    """
    mask_BxT, log_probs_BxT, advantages_BxT = _finite(mask_BxT, log_probs_BxT, advantages_BxT)
    losing_BxT = mask_BxT & (advantages_BxT < 0)
    return lowest_share(log_probs_BxT.reshape(1, -1), losing_BxT.reshape(1, -1), share).reshape(mask_BxT.shape)


def top_share(values_BxT: jax.Array, mask_BxT: jax.Array, share: float) -> jax.Array:
    """True on the round(share * n) greatest of the mask's n values, at least one, and on what ties with the last."""
    mask_BxT, values_BxT = _finite(mask_BxT, values_BxT)
    return lowest_share(-values_BxT.reshape(1, -1), mask_BxT.reshape(1, -1), share).reshape(mask_BxT.shape)


def _finite(mask_BxT: jax.Array, *values: jax.Array) -> tuple[jax.Array, ...]:
    """The mask as bool, and the values as float32 without gradient, 0 outside it."""
    for value in values:
        mask_BxT = as_mask(mask_BxT, value.shape)
    cleaned = (jnp.where(mask_BxT, jax.lax.stop_gradient(x.astype(jnp.float32)), 0.0) for x in values)
    return mask_BxT, *cleaned


def _summed_from(values_BxT: jax.Array) -> jax.Array:
    """The sum over every token and all after it."""
    return jnp.flip(jnp.cumsum(jnp.flip(values_BxT, 1), axis=1), 1)


def _groups(rewards_B: jax.Array, group_size: int) -> jax.Array:
    whole = group_size >= 2 and rewards_B.shape[0] % group_size == 0
    require(whole, "group_size", group_size, f"2 or more, a divisor of the {rewards_B.shape[0]} episodes")
    return jax.lax.stop_gradient(rewards_B.astype(jnp.float32)).reshape(-1, group_size)
