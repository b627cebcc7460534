"""What a round's answers are worth: the weight of every token's KL, and every token's advantage."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ckl_jax import advantage_shaping, advantages, losses, overflow, ratio_losses, token_weights
from ckl_jax.certainty import certainty
from ckl_jax.config import FinetuneConfig
from ckl_jax.rl.program import Hyper
from ckl_jax.rollout.trajectory import Trajectory


class Episodes(NamedTuple):
    """A round's collect with everything that its updates need; the reference's pass is done once.

    ``in_kl_cov_BxT`` marks the tokens that KL-Cov holds, ``in_lp_reg_BxT`` those that Lp-Reg looks after;
    ``signed_entropy_BxT`` is h of HAPO.
    """

    trajectory: Trajectory
    ref_logits_BxTxV: jax.Array
    certainty_BxT: jax.Array
    advantages_BxT: jax.Array
    returns_BxT: jax.Array
    kl_weights_BxT: jax.Array
    in_kl_cov_BxT: jax.Array
    in_lp_reg_BxT: jax.Array
    signed_entropy_BxT: jax.Array


def assessed(
    config: FinetuneConfig,
    trajectory: Trajectory,
    hyper: Hyper,
    key: jax.Array,
    *,
    logits_BxTxV: jax.Array,
    ref_logits_BxTxV: jax.Array,
    sure_logits_BxTxV: jax.Array,
    values_BxT: jax.Array,
    critical_BxT: jax.Array,
    overlong_BxT: jax.Array,
) -> Episodes:
    """A whole round's answers with the weight of every token's KL and every token's advantage.

    Args:
      key: for weights that are shuffled.
      logits_BxTxV, ref_logits_BxTxV: of the policy and of the reference.
      sure_logits_BxTxV: of the model whose certainty weighs the KL.
      values_BxT: of the policy's critic.
      critical_BxT, overlong_BxT: as in ``token_weights.Tokens``.
    """
    if config.clamp_log_probs:
        trajectory = trajectory._replace(log_probs_BxT=losses.clamped(trajectory.log_probs_BxT))
    sure_BxT = certainty(sure_logits_BxTxV, config.certainty, config.certainty_temperature)
    entropy_BxT = losses.entropy(sure_logits_BxTxV, config.certainty_temperature)
    tokens = token_weights.Tokens(sure_BxT, entropy_BxT, trajectory.mask_BxT, critical_BxT, overlong_BxT)
    weights_BxT = kl_weights(config, hyper, tokens, key)
    outcome_BxT, returns_BxT = _outcome_advantages(config, trajectory, values_BxT)
    advantages_BxT = _shaped(config, outcome_BxT, trajectory, logits_BxTxV)
    if config.kl_in == "episode":
        advantages_BxT = _zero_centered(config, trajectory, logits_BxTxV, ref_logits_BxTxV, weights_BxT, hyper)
    elif config.kl_in != "loss":  # After the normalization, which would rescale alpha.
        kl_BxT = _kl_in_advantage(config, trajectory, ref_logits_BxTxV, weights_BxT)
        advantages_BxT = advantages_BxT - overflow.product(hyper.kl_coefficient, kl_BxT)
    return Episodes(
        trajectory=trajectory,
        ref_logits_BxTxV=ref_logits_BxTxV,
        certainty_BxT=sure_BxT,
        advantages_BxT=advantages_BxT,
        returns_BxT=returns_BxT,
        kl_weights_BxT=weights_BxT,
        in_kl_cov_BxT=_held_by_kl_cov(config, trajectory, advantages_BxT),
        in_lp_reg_BxT=_unlikely(config, trajectory, advantages_BxT),
        signed_entropy_BxT=_signed_entropy(config, trajectory.mask_BxT, logits_BxTxV),
    )


def kl_weights(config: FinetuneConfig, hyper: Hyper, tokens: token_weights.Tokens, key: jax.Array) -> jax.Array:
    """The weight of every token's KL over a whole round: float32 [B, T]. ``hyper`` says which, and beta."""
    settings = token_weights.Settings(hyper.beta, config.kl_quantile, config.kl_weak, key)
    return token_weights.weigh(hyper.kl_weights, tokens, settings)


def final_rewards(config: FinetuneConfig, trajectory: Trajectory) -> jax.Array:
    return jnp.where(trajectory.reward_B > 0, config.reward_right, config.reward_wrong)


def _outcome_advantages(
    config: FinetuneConfig, trajectory: Trajectory, values_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The algorithm's advantages of the right or wrong result, and the critic's targets."""
    final_B, mask_BxT = final_rewards(config, trajectory), trajectory.mask_BxT
    if config.has_critic:
        is_last_BxT = mask_BxT & ~jnp.pad(mask_BxT[:, 1:], ((0, 0), (0, 1)))
        rewards_BxT = jnp.where(is_last_BxT, final_B[:, None], 0.0)
        raw_BxT = advantages.gae(rewards_BxT, values_BxT, mask_BxT, config.discount, config.gae_lambda)
        returns_BxT = raw_BxT + values_BxT
    else:
        of_episodes = {
            "reinforce": lambda: advantages.leave_one_out(final_B, config.episodes),
            "rloo": lambda: advantages.leave_one_out(final_B, config.group_size),
            "grpo": lambda: advantages.standardized_in_group(final_B, config.group_size),
        }
        raw_BxT = jnp.where(mask_BxT, of_episodes[config.algorithm]()[:, None], 0.0)
        returns_BxT = jnp.where(mask_BxT, final_B[:, None], 0.0)
    if not config.normalize_advantages or config.algorithm == "grpo":
        return raw_BxT, returns_BxT
    # Equal rewards say nothing about the tokens: what is left of the advantage is the critic's error.
    informative = final_B.max() > final_B.min()
    return jnp.where(informative, advantages.standardized(raw_BxT, mask_BxT), 0.0), returns_BxT


def _shaped(
    config: FinetuneConfig, advantages_BxT: jax.Array, trajectory: Trajectory, logits_BxTxV: jax.Array
) -> jax.Array:
    """The advantages with what the policy's entropy does to them."""
    mask_BxT = trajectory.mask_BxT
    entropy_BxT = losses.entropy(logits_BxTxV, config.temperature, mask_BxT)
    shaped = {
        "none": lambda A: A,
        "top_entropy": lambda A: advantage_shaping.top_entropy(A, entropy_BxT, mask_BxT, config.entropy_quantile),
        "entropy_bonus": lambda A: advantage_shaping.entropy_bonus(
            A, entropy_BxT, mask_BxT, config.entropy_scale, config.entropy_kappa
        ),
        "gtpo": lambda A: advantage_shaping.gtpo(
            trajectory.reward_B, entropy_BxT, mask_BxT, config.group_size, config.gtpo_share
        ),
    }
    return shaped[config.advantage_shaping](advantages_BxT)


def _kl_in_advantage(
    config: FinetuneConfig, trajectory: Trajectory, ref_logits_BxTxV: jax.Array, weights_BxT: jax.Array
) -> jax.Array:
    """The weighted KL of every token and of all after it, as the config's ``kl_in`` counts them."""
    mask_BxT = trajectory.mask_BxT
    ref_log_probs_BxT = losses.token_log_probs(
        ref_logits_BxTxV, trajectory.answers_BxT, config.temperature, mask_BxT, clamp=config.clamp_log_probs
    )

    def weighted(kind):
        kl_BxT = losses.kl_estimate(trajectory.log_probs_BxT, ref_log_probs_BxT, kind, mask_BxT)
        return overflow.product(weights_BxT, kl_BxT)

    if config.kl_in == "reward":
        return advantages.kl_to_go(weighted("k1"), mask_BxT)
    return advantages.future_kl(weighted("k1"), weighted(config.kl), mask_BxT)


def _zero_centered(
    config: FinetuneConfig,
    trajectory: Trajectory,
    logits_BxTxV: jax.Array,
    ref_logits_BxTxV: jax.Array,
    weights_BxT: jax.Array,
    hyper: Hyper,
) -> jax.Array:
    """An answer's advantage with its weighted KL in it, at each of its tokens."""
    mask_BxT = trajectory.mask_BxT
    kl_BxT = losses.exact_kl(logits_BxTxV, ref_logits_BxTxV, config.temperature, mask_BxT)
    kl_B = jax.vmap(losses.weighted_kl)(kl_BxT, weights_BxT, mask_BxT)
    penalties_B = overflow.product(hyper.kl_coefficient, kl_B)
    of_answers_B = advantages.zero_centered(final_rewards(config, trajectory), penalties_B, config.group_size)
    return jnp.where(mask_BxT, of_answers_B[:, None], 0.0)


def _held_by_kl_cov(config: FinetuneConfig, trajectory: Trajectory, advantages_BxT: jax.Array) -> jax.Array:
    """True on the tokens of KL-Cov."""
    mask_BxT = trajectory.mask_BxT
    if config.kl_cov == 0:
        return jnp.zeros_like(mask_BxT)
    covariance_BxT = advantage_shaping.covariance(advantages_BxT, trajectory.log_probs_BxT, mask_BxT)
    return advantage_shaping.top_share(covariance_BxT, mask_BxT, config.kl_cov_share) & (covariance_BxT > 0)


def _unlikely(config: FinetuneConfig, trajectory: Trajectory, advantages_BxT: jax.Array) -> jax.Array:
    """True on the tokens of Lp-Reg."""
    mask_BxT = trajectory.mask_BxT
    if config.lp_reg == 0:
        return jnp.zeros_like(mask_BxT)
    return advantage_shaping.unlikely(advantages_BxT, trajectory.log_probs_BxT, mask_BxT, config.lp_reg_share)


def _signed_entropy(config: FinetuneConfig, mask_BxT: jax.Array, logits_BxTxV: jax.Array) -> jax.Array:
    if config.clip_by == "none":
        return jnp.zeros(mask_BxT.shape)
    entropy_BxT = losses.entropy(logits_BxTxV, config.temperature, mask_BxT)
    return advantage_shaping.signed_entropy(entropy_BxT, mask_BxT, config.hapo_pivot)


def corrected(
    config: FinetuneConfig, episodes: Episodes, sampled_log_probs_BxT: jax.Array
) -> tuple[Episodes, dict[str, jax.Array]]:
    """The episodes with advantages for what another policy has written, and the mean factor as a metric."""
    if config.importance_sampling == "none":
        return episodes, {}
    mask_BxT = episodes.trajectory.mask_BxT
    if config.clamp_log_probs:  # As those of the trajectory are.
        sampled_log_probs_BxT = losses.clamped(sampled_log_probs_BxT)
    importance_BxT = ratio_losses.truncated_importance(
        episodes.trajectory.log_probs_BxT, sampled_log_probs_BxT, mask_BxT, config.importance_limit
    )
    episodes = episodes._replace(advantages_BxT=overflow.product(importance_BxT, episodes.advantages_BxT))
    return episodes, {"importance": losses.masked_mean(importance_BxT, mask_BxT)}
