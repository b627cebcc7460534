"""A round's collect: rollout, reward, one pass of policy and reference, advantages, and what is reported of it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ckl_jax import advantage_shaping, advantages, losses, overflow, ratio_losses, token_weights
from ckl_jax.certainty import certainty
from ckl_jax.config import FinetuneConfig
from ckl_jax.model import values
from ckl_jax.rl.program import Hyper, Program
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.trajectory import Sampling, Trajectory, score
from ckl_jax.runtime import sharding
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.problems import Problems


class Episodes(NamedTuple):
    """A round's collect with everything that its updates need; the reference's pass is done once.

    ``kl_cov_BxT`` marks the tokens that KL-Cov holds, ``lp_reg_BxT`` those that Lp-Reg looks after;
    ``signed_entropy_BxT`` is h of HAPO.
    """

    trajectory: Trajectory
    ref_logits_BxTxV: jax.Array
    certainty_BxT: jax.Array
    advantages_BxT: jax.Array
    returns_BxT: jax.Array
    kl_weights_BxT: jax.Array
    kl_cov_BxT: jax.Array
    lp_reg_BxT: jax.Array
    signed_entropy_BxT: jax.Array


def collect(
    program: Program,
    params: dict[str, Any],
    ref_params: Any,
    hyper: Hyper,
    problems: Problems,
    keys: tuple[jax.Array, jax.Array],
    axis_name: str | None,
    sampler: Any = None,
    certainty_params: Any = None,
) -> tuple[Episodes, dict[str, jax.Array]]:
    """Rolls out a policy, judges the answers, passes policy and reference over them, weighs KL and advantages.

    Args:
      keys: for sampling, and for weights that are shuffled.
      sampler: the policy that writes the answers with ``staleness``; without it is that of ``params``.
      certainty_params: of the program's ``certainty_model``, if it has one.
    """
    config, model = program.config, program.model
    # Computed otherwise, numbers are rounded otherwise: beyond float32 a policy that is the reference would have a KL.
    as_generated = config.is_exact and config.staleness == 0

    def roll_out(whole, problems):
        policy, key = whole
        return generate(
            model,
            policy,
            problems,
            key,
            Sampling(program.max_length, config.temperature),
            how=config.rollout,
            batch=config.rollout_batch,
            with_scores=as_generated,
            axis_name=axis_name,
        )[:3]

    with jax.named_scope("rollout"):
        trajectory, logits_BxTxV, hidden_BxTxD = sharding.over_rows(
            roll_out, (params["policy"] if sampler is None else sampler, keys[0]), problems
        )
    sampled_log_probs_BxT = trajectory.log_probs_BxT
    with jax.named_scope("reference"):
        if as_generated:
            ref_logits_BxTxV, _ = score(model, ref_params, trajectory)
        else:
            trajectory, logits_BxTxV, hidden_BxTxD, ref_logits_BxTxV = _scored_alike(
                program, params["policy"], ref_params, trajectory
            )
        sure_logits_BxTxV = ref_logits_BxTxV
        if program.certainty_model is not None:
            sure_logits_BxTxV, _ = score(program.certainty_model, certainty_params, trajectory)
    with jax.named_scope("advantages"):
        values_BxT = values(params["value"], hidden_BxTxD)
        critical_BxT = problems_lib.critical_mask(trajectory.answers_BxT, problems)
        all_logits = logits_BxTxV, ref_logits_BxTxV, sure_logits_BxTxV
        episodes = assessed(config, trajectory, critical_BxT, all_logits, values_BxT, hyper, keys[1])
        episodes, importance = _corrected(config, episodes, sampled_log_probs_BxT)
    with jax.named_scope("diagnostics"):
        return episodes, _collect_metrics(program, episodes, logits_BxTxV, values_BxT, problems) | importance


def _scored_alike(
    program: Program, policy: Any, ref_params: Any, trajectory: Trajectory
) -> tuple[Trajectory, jax.Array, jax.Array, jax.Array]:
    """The trajectory with log-probs of one compiled pass for both models, its logits and hidden states, and the
    reference's logits. Two passes compiled apart may be rounded differently."""

    def scored(of_policy):
        chosen = jax.tree.map(lambda x, y: jnp.where(of_policy, x, y), policy, ref_params)
        return score(program.model, chosen, trajectory)

    logits_2xBxTxV, hidden_2xBxTxD = jax.lax.map(scored, jnp.array([True, False]))
    log_probs_BxT = losses.token_log_probs(
        logits_2xBxTxV[0], trajectory.answers_BxT, program.config.temperature, trajectory.mask_BxT
    )
    return trajectory._replace(log_probs_BxT=log_probs_BxT), logits_2xBxTxV[0], hidden_2xBxTxD[0], logits_2xBxTxV[1]


def assessed(
    config: FinetuneConfig,
    trajectory: Trajectory,
    critical_BxT: jax.Array,
    all_logits: tuple[jax.Array, jax.Array, jax.Array],
    values_BxT: jax.Array,
    hyper: Hyper,
    key: jax.Array,
) -> Episodes:
    """A whole round's answers with the weight of every token's KL and every token's advantage.

    Args:
      critical_BxT: True on the answers' critical tokens.
      all_logits: [B, T, V] of the policy, of the reference, and of the model whose certainty weighs the KL.
      values_BxT: of the policy's critic.
      key: for weights that are shuffled.
    """
    logits_BxTxV, ref_logits_BxTxV, sure_logits_BxTxV = all_logits
    if config.clamp_log_probs:
        trajectory = trajectory._replace(log_probs_BxT=losses.clamped(trajectory.log_probs_BxT))
    sure_BxT = certainty(sure_logits_BxTxV, config.certainty, config.certainty_temperature)
    entropy_BxT = losses.entropy(sure_logits_BxTxV, config.certainty_temperature)
    tokens = token_weights.Tokens(sure_BxT, entropy_BxT, trajectory.mask_BxT, critical_BxT)
    weights_BxT = kl_weights(config, hyper, tokens, key)
    outcome_BxT, returns_BxT = _outcome_advantages(config, trajectory, values_BxT)
    advantages_BxT = _shaped(config, outcome_BxT, trajectory, logits_BxTxV)
    if config.kl_in == "episode":
        advantages_BxT = _zero_centered(config, trajectory, logits_BxTxV, ref_logits_BxTxV, weights_BxT, hyper)
    elif config.kl_in != "loss":  # After the normalization, which would rescale alpha.
        to_go_BxT = _kl_to_go(config, trajectory, ref_logits_BxTxV, weights_BxT)
        advantages_BxT = advantages_BxT - overflow.product(hyper.kl_coefficient, to_go_BxT)
    held_BxT = _held_by_kl_cov(config, trajectory, advantages_BxT)
    unlikely_BxT = _unlikely(config, trajectory, advantages_BxT)
    h_BxT = _signed_entropy(config, trajectory.mask_BxT, logits_BxTxV)
    return Episodes(
        trajectory, ref_logits_BxTxV, sure_BxT, advantages_BxT, returns_BxT, weights_BxT, held_BxT, unlikely_BxT, h_BxT
    )


def kl_weights(config: FinetuneConfig, hyper: Hyper, tokens: token_weights.Tokens, key: jax.Array) -> jax.Array:
    """The weight of every token's KL over a whole round: float32 [B, T]. ``hyper`` says which, and beta."""
    settings = token_weights.Settings(hyper.beta, config.kl_quantile, config.kl_weak, key)
    return token_weights.weigh(hyper.kl_weights, tokens, settings)


def _final_rewards(config: FinetuneConfig, trajectory: Trajectory) -> jax.Array:
    return jnp.where(trajectory.reward_B > 0, config.reward_right, config.reward_wrong)


def _outcome_advantages(
    config: FinetuneConfig, trajectory: Trajectory, values_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The algorithm's advantages of the right or wrong result, and the critic's targets."""
    final_B, mask_BxT = _final_rewards(config, trajectory), trajectory.mask_BxT
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


def _kl_to_go(
    config: FinetuneConfig, trajectory: Trajectory, ref_logits_BxTxV: jax.Array, weights_BxT: jax.Array
) -> jax.Array:
    """The weighted KL of every token and of all after it."""
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
    of_answers_B = advantages.zero_centered(_final_rewards(config, trajectory), penalties_B, config.group_size)
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


def _corrected(
    config: FinetuneConfig, episodes: Episodes, sampled_log_probs_BxT: jax.Array
) -> tuple[Episodes, dict[str, jax.Array]]:
    """The episodes with advantages for what another policy has written, and the mean factor as a metric."""
    if config.importance_sampling == "none":
        return episodes, {}
    mask_BxT = episodes.trajectory.mask_BxT
    importance_BxT = ratio_losses.truncated_importance(
        episodes.trajectory.log_probs_BxT, sampled_log_probs_BxT, mask_BxT, config.importance_limit
    )
    episodes = episodes._replace(advantages_BxT=overflow.product(importance_BxT, episodes.advantages_BxT))
    return episodes, {"importance": losses.masked_mean(importance_BxT, mask_BxT)}


def _collect_metrics(program, episodes, logits_BxTxV, values_BxT, problems) -> dict[str, jax.Array]:
    config, mask_BxT = program.config, episodes.trajectory.mask_BxT
    mean = functools.partial(losses.masked_mean, mask=mask_BxT)
    kl_BxT = losses.exact_kl(logits_BxTxV, episodes.ref_logits_BxTxV, config.temperature, mask_BxT)
    indices, recorded = problems_lib.critical_indices(episodes.trajectory.answers_BxT, problems)
    batch = indices.shape[0]

    def at_critical(values_BxT):
        return jnp.take_along_axis(values_BxT, indices.reshape(batch, -1), axis=1).reshape(indices.shape)

    log_p_BxTxV = jax.nn.log_softmax(logits_BxTxV / config.temperature)
    flat = jnp.take_along_axis(log_p_BxTxV, indices.reshape(batch, -1, 1), axis=1)
    right = problems_lib.critical_characters(problems).reshape(batch, -1, 1)
    probability = jnp.exp(jnp.take_along_axis(flat, right, axis=2)).reshape(indices.shape)
    counts = recorded.sum(axis=0)
    metrics = {
        "success": episodes.trajectory.reward_B.mean(),
        "reward": _final_rewards(config, episodes.trajectory).mean(),
        "length": mask_BxT.sum(axis=1).mean(),
        "entropy": mean(losses.entropy(logits_BxTxV, config.temperature, mask_BxT)),
        "kl": mean(kl_BxT),
        "kl_weight": mean(episodes.kl_weights_BxT),
        "certainty_mean": mean(episodes.certainty_BxT),
        "certainty_min": jnp.where(mask_BxT, episodes.certainty_BxT, 1.0).min(),
        "critical_advantage": losses.masked_mean(at_critical(episodes.advantages_BxT), recorded),
        "critical_certainty": losses.masked_mean(at_critical(episodes.certainty_BxT), recorded),
        "critical_probability_3x2xC": jnp.where(recorded, probability, 0.0).sum(axis=0) / jnp.maximum(counts, 1),
        "critical_count_3x2xC": counts,
    }
    if config.has_critic:
        residual = mean(jnp.square(episodes.returns_BxT - values_BxT))
        spread = mean(jnp.square(episodes.returns_BxT - mean(episodes.returns_BxT)))
        metrics["explained_variance"] = 1.0 - residual / jnp.maximum(spread, 1e-8)
    return metrics
