"""Advantages: what a token's log-probability is multiplied by (``advantage_shaping`` has what entropy does to them).

Small pure functions; losses take no gradient of them.

B episodes of T tokens; the answers to one problem are ``group_size`` neighbours of B. Rewards are one number an
episode; ``gae`` takes them token by token. Standard deviations are those of the tokens or answers at hand, divided by
their number and not by one less. Numbers whose spread is below 4 float32 epsilons (4.8e-7) of the greatest magnitude
among them count as equal: a deviation of rounding alone would blow it up. Episodes that lie on several devices belong
on all of them first: the functions of groups and of whole rounds reshape and sort them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ckl_jax.checks import as_mask, number, require_array, require_shape_of, require_some
from ckl_jax.errors import is_integer, require

EPSILON = 1e-8
ROUNDING = 4 * float(jnp.finfo(jnp.float32).eps)
"""Of the greatest magnitude: a spread below it is taken for 0."""


def gae(
    rewards_BxT: jax.Array,
    values_BxT: jax.Array,
    mask_BxT: jax.Array,
    discount: float | jax.Array,
    gae_lambda: float | jax.Array,
) -> jax.Array:
    """Generalized advantage estimates of episodes that end with their mask (Schulman et al. 2016).

    delta_t = r_t + discount * V_{t+1} - V_t and A_t = delta_t + discount * lambda * A_{t+1}, with V = A = 0 after the
    end: the length limit counts as a true end.

    Args:
      rewards_BxT: reward of each token.
      values_BxT: value of the state before each token.
      mask_BxT: True on an episode's tokens, a prefix of each row.

    Returns:
      float32 [B, T], 0 after the end. Returns (value targets) are these plus ``values_BxT``.
    """
    mask_BxT = _rows(mask_BxT, rewards=rewards_BxT, values=values_BxT)
    values_BxT = jnp.where(mask_BxT, values_BxT.astype(jnp.float32), 0.0)
    rewards_BxT = jnp.where(mask_BxT, rewards_BxT.astype(jnp.float32), 0.0)
    discount, gae_lambda = number(discount), number(gae_lambda)
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
      float32 [B]; exactly 0 in a group of equal rewards, until it is ``standardized`` over several.

    Raises:
      ConfigError: ``group_size`` is below 2 or does not divide B.
    """
    rewards_GxK = _groups(rewards_B, group_size)
    rewards_GxK = jax.vmap(_above_least)(rewards_GxK, jnp.ones_like(rewards_GxK, bool))
    others_GxK = (rewards_GxK.sum(axis=1, keepdims=True) - rewards_GxK) / (group_size - 1)
    return (rewards_GxK - others_GxK).reshape(-1)


def standardized_in_group(rewards_B: jax.Array, group_size: int) -> jax.Array:
    """(R - mean) / (standard deviation + epsilon) over a group's answers: GRPO (Shao et al. 2024).

    Returns and raises as ``leave_one_out``.
    """
    rewards_GxK = _groups(rewards_B, group_size)
    return jax.vmap(standardized)(rewards_GxK, jnp.ones_like(rewards_GxK, bool)).reshape(-1)


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
    require_array(values_BxT, "values")
    require_some(values_BxT, "values")
    mask_BxT = as_mask(mask_BxT, values_BxT.shape)
    above_BxT = _above_least(jax.lax.stop_gradient(values_BxT.astype(jnp.float32)), mask_BxT)
    return jnp.where(mask_BxT, above_BxT - above_BxT.sum() / jnp.maximum(mask_BxT.sum(), 1), 0.0)


def kl_to_go(kl_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """The sum of ``kl_BxT`` over a token and all after it, minus its mean over the other episodes that reach there.

    With kl = log pi(a|s) - log ref(a|s) of the sampled tokens, -alpha times this is what a KL in the reward adds to the
    advantage: the gradient then has each token's effect on later states, which a KL in the loss leaves out. The mean is
    a baseline and adds no bias. Where all that reach a token are equal from there on it is exactly 0, if they are
    several.

    Returns:
      float32 [B, T], 0 outside the mask.
    """
    mask_BxT, kl_BxT = as_constants(mask_BxT, kl=kl_BxT)
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
    mask_BxT, kl_BxT, later_BxT = as_constants(mask_BxT, kl=kl_BxT, later=later_BxT)
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
    require_shape_of(penalties_B, "penalties", rewards_B, "rewards")
    rewards_GxK, penalties_GxK = _groups(rewards_B, group_size), _groups(penalties_B, group_size)
    everyone = jnp.ones_like(rewards_GxK, bool)
    advantages_GxK, excess_GxK = (jax.vmap(centered)(x, everyone) for x in (rewards_GxK, penalties_GxK))
    largest_Gx1 = jnp.abs(advantages_GxK).max(axis=1, keepdims=True)
    shares_GxK = advantages_GxK / jnp.where(largest_Gx1 > 0, largest_Gx1, 1.0)
    return jnp.where(largest_Gx1 > 0, shares_GxK - excess_GxK, 0.0).reshape(-1)


def as_constants(mask_BxT: jax.Array, **values: jax.Array) -> tuple[jax.Array, ...]:
    """The mask as bool, and ``values`` [B, T] as float32 without gradient, 0 outside it.

    Raises ConfigError for different shapes, under the names that the values are given by.
    """
    mask_BxT = _rows(mask_BxT, **values)
    cleaned = (jnp.where(mask_BxT, jax.lax.stop_gradient(x.astype(jnp.float32)), 0.0) for x in values.values())
    return mask_BxT, *cleaned


def require_groups(num_episodes: int, group_size: int) -> None:
    """Raises ConfigError unless the episodes are whole groups of 2 or more."""
    whole = is_integer(group_size) and group_size >= 2 and num_episodes % group_size == 0
    require(whole, "group_size", group_size, f"2 or more, a divisor of the {num_episodes} episodes")


def _rows(mask_BxT: jax.Array, **values: jax.Array) -> jax.Array:
    """The mask as bool. Raises ConfigError unless it and the values, under their names, are [B, T]."""
    require_array(mask_BxT, "mask")
    require(mask_BxT.ndim == 2, "mask", mask_BxT.shape, "[B, T]")
    require_some(mask_BxT, "mask")
    for name, value in values.items():
        require_shape_of(value, name, mask_BxT, "mask")
    return as_mask(mask_BxT, mask_BxT.shape)


def _above_least(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Less the least of the mask, 0 outside it; 0 everywhere where all are equal but for rounding."""
    above = jnp.where(mask, values - jnp.where(mask, values, jnp.inf).min(), 0.0)
    largest = jnp.where(mask, jnp.abs(values), 0.0).max()
    return jnp.where(above.max() < ROUNDING * largest, 0.0, above)


def _summed_from(values_BxT: jax.Array) -> jax.Array:
    """The sum over every token and all after it."""
    return jnp.flip(jnp.cumsum(jnp.flip(values_BxT, 1), axis=1), 1)


def _groups(rewards_B: jax.Array, group_size: int) -> jax.Array:
    require_array(rewards_B, "rewards")
    require(rewards_B.ndim == 1, "rewards", rewards_B.shape, "[B], one number an episode")
    require_some(rewards_B, "rewards")
    require_groups(rewards_B.shape[0], group_size)
    return jax.lax.stop_gradient(rewards_B.astype(jnp.float32)).reshape(-1, group_size)
