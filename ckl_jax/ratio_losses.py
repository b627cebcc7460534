"""Terms that compare the policy with the older one that sampled the tokens: ratios, their clips and distances.

``log_probs`` and ``old_log_probs`` [...] are those of the sampled tokens, now and at the rollout; the ratio of a token
is r = exp(log_probs - old_log_probs). Shapes and masks are those of ``losses``; nothing old takes a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax import overflow
from ckl_jax.checks import as_mask, number, require_above_0, require_array, require_shape_of
from ckl_jax.errors import require, require_word
from ckl_jax.losses import KLKind, masked, masked_mean

Clip = float | jax.Array | Sequence[float | jax.Array]
"""How far a ratio counts from 1: the same both ways, or a tuple or list of two, below and above 1; each is one number
or token by token [...]."""

ROUNDING = 1e-4
"""Two passes of one policy in float32 give log-probabilities that are far nearer to each other."""


def clipped_policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip: Clip,
    free: jax.Array | None = None,
) -> jax.Array:
    """PPO: -mean over the masked tokens of min(r * A, clip(r, 1 - clip, 1 + clip) * A) (Schulman et al. 2017).

    r = exp(log_probs - old_log_probs), token by token; ``old_log_probs`` are those at which the tokens were sampled.
    Old log-probabilities and advantages take no gradient. Tokens that are ``free``, bool, are not clipped.

    Raises:
      ConfigError: different shapes, or ``clip`` not above 0.
    """
    require_shape_of(advantages, "advantages", log_probs, "log_probs")
    below, above = _clip(clip, log_probs, mask)
    ratio = _ratio(log_probs, old_log_probs, mask)
    advantages = jax.lax.stop_gradient(masked(advantages.astype(jnp.float32), mask))
    bounded = jnp.clip(ratio, 1 - below, 1 + above)
    if free is not None:
        bounded = jnp.where(as_mask(free, ratio.shape, "free"), ratio, bounded)
    both = overflow.product(ratio, advantages), overflow.product(bounded, advantages)
    return -masked_mean(jnp.minimum(*both), mask)


def open_gate(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip: Clip,
    free: jax.Array | None = None,
) -> jax.Array:
    """True on the masked tokens whose policy gradient ``clipped_policy_loss`` does not stop: [...], as all arguments.

    It stops where A > 0 and r > 1 + clip, and where A < 0 and r < 1 - clip, but not at ``free`` tokens. As a factor of
    the KL this is the gate F1-B of ZCPO (Ding 2026): a token that the policy loss no longer moves, the KL does not move
    back. Takes no gradient.

    Raises:
      ConfigError: different shapes, or ``clip`` not above 0.
    """
    require_shape_of(advantages, "advantages", log_probs, "log_probs")
    below, above = _clip(clip, log_probs, mask)
    ratio = jax.lax.stop_gradient(_ratio(log_probs, old_log_probs, mask))
    stopped = ((advantages > 0) & (ratio > 1 + above)) | ((advantages < 0) & (ratio < 1 - below))
    if free is not None:
        stopped &= ~as_mask(free, ratio.shape, "free")
    return as_mask(mask, log_probs.shape) & ~stopped


def entropy_clip(h: jax.Array, clip: float | jax.Array, alpha: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Below and above 1: ``clip``, times 1 + alpha * |h| below where h < 0 and above where h > 0: HAPO (2509.16591).

    Args:
      h: [...] from ``advantage_shaping.signed_entropy``.
    """
    clip, alpha = number(clip), number(alpha)
    return clip * (1 + alpha * jnp.maximum(-h, 0)), clip * (1 + alpha * jnp.maximum(h, 0))


def redistributed(
    advantages: jax.Array,
    h: jax.Array,
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    mask: jax.Array,
    clip: Clip,
    beta: float | jax.Array,
) -> jax.Array:
    """A (1 + beta * h) on the tokens whose signal is clear to HAPO, else A: [...] without gradient (arXiv 2509.16591).

    With h > 0 these have a ratio beyond half the clip, with h < 0 one within it. The work's clip of the loss itself at
    ten times A is left out.

    Raises:
      ConfigError: different shapes, or ``clip`` not above 0.
    """
    require_shape_of(advantages, "advantages", log_probs, "log_probs")
    require_shape_of(h, "h", log_probs, "log_probs")
    below, above = _clip(clip, log_probs, mask)
    ratio = _ratio(log_probs, old_log_probs, mask)
    within = (ratio > 1 - below / 2) & (ratio < 1 + above / 2)
    advantages, h = (masked(x.astype(jnp.float32), mask) for x in (advantages, h))
    return jax.lax.stop_gradient(advantages * jnp.where((h > 0) != within, 1 + number(beta) * h, 1.0))


def off_policy_kl(
    kl: jax.Array, kind: KLKind, log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """A KL estimate of tokens that an older policy sampled: r * kl, with the ratio r of new to old probability.

    Its expected gradient over the older policy's tokens is that of KL(pi || ref) for every kind: the ratio takes part
    in the gradient of k1 and k3, and is a constant for k2, whose own gradient it is. An exact KL needs no ratio. With
    k3 it is the estimate of DeepSeek-V3.2 (arXiv 2512.02556).

    Args:
      kl: from ``kl_estimate`` of that ``kind``, [...] as all others. ``old_log_probs`` take no gradient.

    Raises:
      ConfigError: unknown kind or different shapes.
    """
    require_word(kind, "kind", get_args(KLKind))
    require_shape_of(kl, "kl", log_probs, "log_probs")
    ratio = _ratio(log_probs, old_log_probs, mask)
    ratio = jax.lax.stop_gradient(ratio) if kind == "k2" else ratio
    return overflow.product(masked(kl.astype(jnp.float32), mask), ratio)


def truncated_importance(
    log_probs: jax.Array, sampler_log_probs: jax.Array, mask: jax.Array, limit: float | jax.Array
) -> jax.Array:
    """min(pi / pi_sampler, ``limit``), token by token: how much a token of another policy counts (Ionides 2008).

    As a factor of the policy gradient it corrects for answers that are stale or were sampled at another precision. The
    limit bounds its variance, and biases it; google-tunix has 2.

    Args:
      log_probs, sampler_log_probs: [...] of the policy, and of the one that sampled.
      mask: bool [...].

    Returns:
      float32 [...], without gradient; 0 outside the mask.

    Raises:
      ConfigError: different shapes, or ``limit`` not above 0.
    """
    require_above_0(limit, "limit")
    ratio = jax.lax.stop_gradient(_ratio(log_probs, sampler_log_probs, mask))
    return masked(jnp.minimum(ratio, number(limit)), mask)


def kl_cov(log_probs: jax.Array, old_log_probs: jax.Array, chosen: jax.Array, mask: jax.Array) -> jax.Array:
    """KL-Cov: mean over the masked tokens of |log pi - log pi_old| where ``chosen``, else 0 (arXiv 2505.22617).

    ``old_log_probs`` are those of the rollout, without gradient; ``chosen`` bool [...] marks the greatest covariances
    of advantage and log-probability. In that work they are chosen in each minibatch, here by the caller, over a round.
    It is a term beside any policy loss: that work's published code has an unclipped ratio there, our ppo and grpo clip.
    A distance below ``ROUNDING`` counts as none: at the rollout's own policy its gradient is 0.
    """
    require_array(log_probs, "log_probs")
    chosen = as_mask(chosen, log_probs.shape, "chosen") & as_mask(mask, log_probs.shape)
    distance = jnp.abs(_log_ratio(log_probs, old_log_probs, chosen))
    return masked_mean(jnp.where(distance < ROUNDING, 0.0, distance), mask)


def _log_ratio(log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array | None) -> jax.Array:
    require_shape_of(old_log_probs, "old_log_probs", log_probs, "log_probs")
    old_log_probs = jax.lax.stop_gradient(masked(old_log_probs.astype(jnp.float32), mask))
    return masked(log_probs.astype(jnp.float32), mask) - old_log_probs


def _ratio(log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array | None) -> jax.Array:
    return overflow.exp(_log_ratio(log_probs, old_log_probs, mask))


def _clip(clip: Clip, log_probs: jax.Array, mask: jax.Array) -> tuple[float | jax.Array, float | jax.Array]:
    """Below and above 1, checked where they are known and, token by token, where the mask is."""
    parts = tuple(clip) if isinstance(clip, (tuple, list)) else (clip, clip)
    require(len(parts) == 2, "clip", clip, "one number, or two: how far below and above 1")
    for part in parts:
        if isinstance(part, (np.ndarray, jax.Array)) and part.ndim:
            require_shape_of(part, "clip", log_probs, "log_probs")
            if not isinstance(part, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
                wrong = ~(np.asarray(part, np.float32) > 0) & np.asarray(as_mask(mask, log_probs.shape))
                require(not wrong.any(), "clip", "numbers not above 0", "above 0 at every token of the mask")
        else:
            require_above_0(part, "clip")
    below, above = (jnp.asarray(x, jnp.float32) if isinstance(x, (np.ndarray, jax.Array)) else number(x) for x in parts)
    return below, above
