"""One answer per problem, by the faster of two ways: speculation, or decoding step by step."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from ckl_jax.config import ModelConfig
from ckl_jax.errors import require_word
from ckl_jax.rollout.decoding import rollout
from ckl_jax.rollout.speculative import Verified, speculative_rollout
from ckl_jax.rollout.trajectory import Sampling, score
from ckl_jax.runtime import targets
from ckl_jax.tasks.problems import Problems

How = Literal["auto", "speculative", "plain"]
# Where a pass costs as much as decoding that many characters: measured on CPU, assumed on accelerators, where a pass
# over a window takes about as long as one over a character.
CPU_LEAST_ACCEPTED, LEAST_ACCEPTED = 8.0, 2.0


def generate(
    config: ModelConfig,
    params: Any,
    problems: Problems,
    key: jax.Array,
    sampling: Sampling,
    *,
    how: How = "auto",
    batch: int | None = None,
    with_scores: bool = False,
    axis_name: str | None = None,
) -> Verified:
    """One answer per problem, by the fastest way unless one is named: the same characters, up to rounding.

    Args:
      how: ``speculative``, ``plain`` (step by step, then a pass for the scores), or ``auto``: speculative, and plain
        where the task has no drafts or the policy turns out to follow too few of them.
      batch: episodes generated together, at most: ``slots`` of the one, ``batch`` of the other.
    """
    require_word(how, "how", get_args(How))

    def plain() -> Verified:
        trajectory = rollout(config, params, problems, key, sampling, batch=batch, axis_name=axis_name)
        logits_BxTxV, hidden_BxTxD = score(config, params, trajectory) if with_scores else (None, None)
        none = jnp.zeros((), jnp.int32)
        return Verified(trajectory, logits_BxTxV, hidden_BxTxD, none, none, jnp.ones((), bool))

    if how == "plain" or (how == "auto" and not problems.task.has_drafts):
        return plain()
    break_even = CPU_LEAST_ACCEPTED if targets.platform() == "cpu" else LEAST_ACCEPTED
    verified = speculative_rollout(
        config,
        params,
        problems,
        key,
        sampling,
        slots=batch,
        with_scores=with_scores,
        least_accepted=break_even if how == "auto" else 0.0,
        axis_name=axis_name,
    )
    return verified if how == "speculative" else jax.lax.cond(verified.complete, lambda: verified, plain)
