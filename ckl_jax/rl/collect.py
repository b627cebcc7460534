"""A round's collect: rollout, reward, one pass of policy and reference, and what is reported of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ckl_jax import losses
from ckl_jax.rl.assessment import Episodes, assessed, corrected, final_rewards
from ckl_jax.rl.critic import values
from ckl_jax.rl.program import Hyper, Program
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.trajectory import Sampling, Trajectory, score
from ckl_jax.runtime import sharding
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.problems import Problems


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
      sampler: parameters of the policy that writes the answers, with ``staleness``; default: those of ``params``.
      certainty_params: of the program's ``certainty_model``, if it has one.
    """
    config, model = program.config, program.model
    # Below float32, passes that are compiled apart round differently, and a policy equal to the reference would have
    # a KL. Then one pass scores both.
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
        overlong_BxT = problems_lib.overlong_mask(trajectory.answers_BxT, program.max_pretrain_digits)
        episodes = assessed(
            config,
            trajectory,
            hyper,
            keys[1],
            logits_BxTxV=logits_BxTxV,
            ref_logits_BxTxV=ref_logits_BxTxV,
            sure_logits_BxTxV=sure_logits_BxTxV,
            values_BxT=values_BxT,
            critical_BxT=critical_BxT,
            overlong_BxT=critical_BxT | overlong_BxT,
        )
        episodes, importance = corrected(config, episodes, sampled_log_probs_BxT)
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
        "reward": final_rewards(config, episodes.trajectory).mean(),
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
