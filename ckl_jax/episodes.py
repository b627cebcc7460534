"""A round's collect: rollout, reward, one pass of policy and reference, advantages, and what is reported of it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ckl_jax import addition, losses, sharding, token_weights
from ckl_jax import problems as problems_lib
from ckl_jax.certainty import certainty
from ckl_jax.config import FinetuneConfig, ModelConfig
from ckl_jax.model import values
from ckl_jax.problems import Problems
from ckl_jax.rollout import Trajectory, score
from ckl_jax.speculative import generate


class Task(NamedTuple):
    """The static part of a program: hashable, so that it is compiled once."""

    model: ModelConfig
    config: FinetuneConfig
    max_pretrain_digits: int

    @property
    def digits(self) -> int:
        return self.max_pretrain_digits + self.config.extra_digits

    @property
    def max_length(self) -> int:
        return addition.max_answer_length(self.digits, self.config.extra_length)


class Episodes(NamedTuple):
    """A round's collect with everything that its updates need; the reference's pass is done once.

    ``kl_weights_BxT`` are the standard KL's, 1, until ``weighed``.
    """

    trajectory: Trajectory
    ref_logits_BxTxV: jax.Array
    certainty_BxT: jax.Array
    advantages_BxT: jax.Array
    returns_BxT: jax.Array
    kl_weights_BxT: jax.Array


def collect(
    task: Task, params: dict[str, Any], ref_params: Any, problems: Problems, key: jax.Array, axis_name: str | None
) -> tuple[Episodes, dict[str, jax.Array]]:
    """Rolls out the policy, judges the answers, passes policy and reference over them, and estimates advantages."""
    config = task.config

    def roll_out(whole, problems):
        policy, key = whole
        return generate(
            task.model,
            policy,
            problems,
            key,
            how=config.rollout,
            batch=config.rollout_batch,
            max_length=task.max_length,
            temperature=config.temperature,
            with_scores=True,
            axis_name=axis_name,
        )[:3]

    trajectory, logits_BxTxV, hidden_BxTxD = sharding.over_rows(roll_out, (params["policy"], key), problems)
    assert logits_BxTxV is not None
    assert hidden_BxTxD is not None
    ref_logits_BxTxV, _ = score(task.model, ref_params, trajectory)
    values_BxT = values(params["value"], hidden_BxTxD)
    mask_BxT = trajectory.mask_BxT

    final_B = jnp.where(trajectory.reward_B > 0, config.reward_right, config.reward_wrong)
    is_last_BxT = mask_BxT & ~jnp.pad(mask_BxT[:, 1:], ((0, 0), (0, 1)))
    rewards_BxT = jnp.where(is_last_BxT, final_B[:, None], 0.0)
    raw_BxT = losses.gae(rewards_BxT, values_BxT, mask_BxT, config.discount, config.gae_lambda)
    advantages_BxT = _normalize(raw_BxT, mask_BxT, final_B) if config.normalize_advantages else raw_BxT
    sure_BxT = certainty(ref_logits_BxTxV, config.certainty, config.certainty_temperature)
    returns_BxT = raw_BxT + values_BxT
    ones_BxT = token_weights.uniform(mask_BxT)
    episodes = Episodes(trajectory, ref_logits_BxTxV, sure_BxT, advantages_BxT, returns_BxT, ones_BxT)
    metrics = _collect_metrics(task, episodes, logits_BxTxV, values_BxT, final_B, problems)
    return episodes, metrics


def weighed(
    config: FinetuneConfig, episodes: Episodes, kl_weights: jax.Array | int, beta: float | jax.Array, key: jax.Array
) -> Episodes:
    """A whole round's episodes with the weight of every token's KL.

    Args:
      kl_weights: index of the word, from ``token_weights.index_of``; it and ``beta`` replace the config's.
      key: for weights that are shuffled.
    """
    entropy_BxT = losses.entropy(episodes.ref_logits_BxTxV, config.certainty_temperature)
    mask_BxT, share, weak = episodes.trajectory.mask_BxT, config.kl_quantile, config.kl_weak
    weights_BxT = token_weights.weigh(kl_weights, episodes.certainty_BxT, entropy_BxT, beta, mask_BxT, key, share, weak)
    return episodes._replace(kl_weights_BxT=weights_BxT)


def _normalize(advantages_BxT: jax.Array, mask_BxT: jax.Array, final_B: jax.Array) -> jax.Array:
    mean = losses.masked_mean(advantages_BxT, mask_BxT)
    variance = losses.masked_mean(jnp.square(advantages_BxT - mean), mask_BxT)
    # Equal rewards say nothing about the tokens: what is left of the advantage is the critic's error.
    informative = final_B.max() > final_B.min()
    return jnp.where(mask_BxT & informative, (advantages_BxT - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def _collect_metrics(task, episodes, logits_BxTxV, values_BxT, final_B, problems) -> dict[str, jax.Array]:
    config, mask_BxT = task.config, episodes.trajectory.mask_BxT
    mean = functools.partial(losses.masked_mean, mask=mask_BxT)
    kl_BxT = losses.exact_kl(logits_BxTxV, episodes.ref_logits_BxTxV, config.temperature)
    residual = mean(jnp.square(episodes.returns_BxT - values_BxT))
    spread = mean(jnp.square(episodes.returns_BxT - mean(episodes.returns_BxT)))
    indices, recorded = problems_lib.critical_indices(episodes.trajectory.answers_BxT, problems)
    batch = indices.shape[0]

    def at_critical(values_BxT):
        return jnp.take_along_axis(values_BxT, indices.reshape(batch, -1), axis=1).reshape(indices.shape)

    log_p_BxTxV = jax.nn.log_softmax(logits_BxTxV / config.temperature)
    flat = jnp.take_along_axis(log_p_BxTxV, indices.reshape(batch, -1, 1), axis=1)
    right = problems_lib.critical_characters(problems).reshape(batch, -1, 1)
    probability = jnp.exp(jnp.take_along_axis(flat, right, axis=2)).reshape(indices.shape)
    counts = recorded.sum(axis=0)
    return {
        "success": episodes.trajectory.reward_B.mean(),
        "reward": final_B.mean(),
        "length": mask_BxT.sum(axis=1).mean(),
        "entropy": mean(losses.entropy(logits_BxTxV, config.temperature)),
        "kl": mean(kl_BxT),
        "certainty_mean": mean(episodes.certainty_BxT),
        "certainty_min": jnp.where(mask_BxT, episodes.certainty_BxT, 1.0).min(),
        "explained_variance": 1.0 - residual / jnp.maximum(spread, 1e-8),
        "critical_advantage": losses.masked_mean(at_critical(episodes.advantages_BxT), recorded),
        "critical_certainty": losses.masked_mean(at_critical(episodes.certainty_BxT), recorded),
        "critical_probability_3x2xC": (probability * recorded).sum(axis=0) / jnp.maximum(counts, 1),
        "critical_count_3x2xC": counts,
    }
