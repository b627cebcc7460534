"""The terms of the fine-tuning loss: small pure functions of log-probs, certainty, advantages and a mask.

Shapes are [...] for per-token values and [..., V] for logits; any batch layout works. Every mean is over the tokens
whose mask is True, and what stands at the others (NaN and infinity included) has no influence on value or gradient. A
mask has booleans, or zeros and ones. A token whose weight or advantage is 0 counts 0 in value and gradient, whatever
its KL or ratio is; one whose loss overflows makes the mean infinite (see ``overflow``).

Per-token values are not finite where logits are not, and then the gradient of their masked mean is NaN even where the
mask is False: a zero cotangent times an infinite derivative. So the functions that make them take the mask too; where
padding may hold such logits, pass it. Their values there are 0.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ckl_jax import overflow, token_weights
from ckl_jax.certainty import entropy_of
from ckl_jax.checks import as_mask, require_array, require_integers, require_logits, require_temperature
from ckl_jax.errors import require

KLKind = Literal["k1", "k2", "k3"]
Clip = float | tuple[jax.Array, jax.Array]
"""How far a ratio counts from 1: the same both ways, or below and above, token by token [...]."""
EPSILON = float(jnp.finfo(jnp.float32).eps)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of ``values`` [...] over ``mask`` [...] in float32; 0 where no token is selected."""
    require_array(values, "values")
    mask = as_mask(mask, values.shape)
    selected = jnp.where(mask, values.astype(jnp.float32), 0.0)
    return selected.sum() / jnp.maximum(mask.sum(), 1)


def token_log_probs(
    logits: jax.Array,
    tokens: jax.Array,
    temperature: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
    clamp: bool = False,
) -> jax.Array:
    """log softmax(logits / temperature)[token]: logits [..., V], tokens [...] -> float32 [...].

    With a ``mask`` [...], tokens outside it may be any number (padding of -100, say). Elsewhere a token that the
    vocabulary does not have, negative ones included, gives NaN. ``clamp``: as ``clamped``.
    """
    require_logits(logits)
    require_integers(tokens, "tokens")
    require(tokens.shape == logits.shape[:-1], "tokens", tokens.shape, f"one per distribution, {logits.shape[:-1]}")
    log_p = _log_softmax(logits, temperature, mask)
    tokens = _only(mask, tokens)
    tokens = jnp.where(tokens < 0, logits.shape[-1], tokens)
    log_probs = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return _only(mask, clamped(log_probs) if clamp else log_probs)


def clamped(log_probs: jax.Array) -> jax.Array:
    """Log-probs [...] of probabilities clamped to [e, 1 - e], e = 1.19e-7 that of float32: at least -15.942385.

    There is no gradient beyond. So a torch Categorical made of probabilities has them, hence the authors' losses.
    """
    return jnp.clip(log_probs, math.log(EPSILON), math.log1p(-EPSILON))


def entropy(logits: jax.Array, temperature: float | jax.Array = 1.0, mask: jax.Array | None = None) -> jax.Array:
    """Entropy of softmax(logits / temperature) in nats: [..., V], mask [...] -> float32 [...]."""
    return _only(mask, entropy_of(_log_softmax(logits, temperature, mask)))


def top_tokens(logits: jax.Array, count: int) -> jax.Array:
    """True on the ``count`` likeliest tokens of [..., V], and on what ties with the last: bool [..., V].

    Raises ConfigError for a ``count`` outside 1..V.
    """
    require_logits(logits)
    require(1 <= count <= logits.shape[-1], "count", count, f"1 to {logits.shape[-1]}")
    return logits >= jax.lax.top_k(logits, count)[0][..., -1:]


def nucleus(logits: jax.Array, share: float, temperature: float | jax.Array = 1.0) -> jax.Array:
    """True on the fewest likeliest tokens that have ``share`` of the probability together, and on what ties: [..., V].

    Raises ConfigError for a ``share`` outside (0, 1].
    """
    require(0 < share <= 1, "share", share, "above 0, at most 1")
    p = jnp.exp(_log_softmax(logits, temperature, None))
    falling = -jnp.sort(-p, axis=-1)
    needed = jnp.cumsum(falling, axis=-1) - falling < share
    return p >= jnp.where(needed, falling, jnp.inf).min(axis=-1, keepdims=True)


def entropy_within(
    logits: jax.Array, inside: jax.Array, temperature: float | jax.Array = 1.0, mask: jax.Array | None = None
) -> jax.Array:
    """Entropy of softmax(logits / temperature) renormalized over the n tokens ``inside``, times log V / log n.

    So its maximum is that of ``entropy``, log V. As a bonus it moves no token outside: TRE (arXiv 2602.03635).

    Args:
      logits: [..., V]. inside: bool [..., V], from ``top_tokens`` or ``nucleus``. mask: bool [...].

    Returns:
      float32 [...]; 0 where one token is inside.
    """
    size = as_mask(inside, logits.shape, "inside").sum(axis=-1)
    scale = jnp.log(logits.shape[-1]) / jnp.log(jnp.maximum(size, 2))
    return _only(mask, scale * entropy(jnp.where(inside, logits, -jnp.inf), temperature, mask))


def kl_estimate(
    log_probs: jax.Array, ref_log_probs: jax.Array, kind: KLKind = "k2", mask: jax.Array | None = None
) -> jax.Array:
    """Schulman's per-token estimates of KL(pi || ref) from tokens sampled from pi.

    With d = log pi(a|s) - log ref(a|s): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

    Differentiated as a loss on tokens of pi itself: k1 has zero expected gradient, k2 the gradient of KL(pi || ref),
    k3 that of the forward KL(ref || pi). The paper uses k2; the authors' code has all three.

    Args:
      log_probs, ref_log_probs: [...], any float type; ``ref_log_probs`` takes no gradient.
      mask: bool [...]; 0 and without gradient outside it.

    Returns:
      float32 [...].

    Raises:
      ValueError: unknown kind or different shapes.
    """
    require(kind in get_args(KLKind), "kind", kind, " | ".join(get_args(KLKind)))
    same = log_probs.shape == ref_log_probs.shape
    require(same, "ref_log_probs", ref_log_probs.shape, f"the shape of log_probs, {log_probs.shape}")
    ref_log_probs = jax.lax.stop_gradient(_only(mask, ref_log_probs.astype(jnp.float32)))
    log_ratio = _only(mask, log_probs.astype(jnp.float32)) - ref_log_probs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * overflow.product(log_ratio, log_ratio)
    return overflow.k3(log_ratio)


def exact_kl(
    logits: jax.Array,
    ref_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """KL(pi || ref) = sum_a pi(a) (log pi(a) - log ref(a)) over the whole vocabulary, in nats.

    Args:
      logits, ref_logits: [..., V]; both are divided by ``temperature``; ``ref_logits`` take no gradient.
      mask: bool [...]; 0 and without gradient outside it.

    Returns:
      float32 [...]. A token whose probability under pi is 0 in float32 counts 0.
    """
    require(logits.shape == ref_logits.shape, "ref_logits", ref_logits.shape, f"the shape of logits, {logits.shape}")
    log_p = _log_softmax(logits, temperature, mask)
    log_q = jax.lax.stop_gradient(_log_softmax(ref_logits, temperature, mask))
    impossible = jnp.isneginf(log_p)
    difference = jnp.where(impossible, 0.0, log_p) - jnp.where(impossible, 0.0, log_q)
    return _only(mask, overflow.product(jnp.exp(log_p), difference).sum(axis=-1))


def weighted_kl(kl: jax.Array, weights: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the masked tokens of weight * kl, divided by the number of tokens.

    Args:
      kl: per-token KL [...], from ``kl_estimate`` or ``exact_kl``.
      weights: [...], from ``token_weights``; they take no gradient.
      mask: bool [...], True on generated tokens.

    Returns:
      float32 [].
    """
    require(kl.shape == weights.shape, "weights", weights.shape, f"the shape of kl, {kl.shape}")
    weights = jax.lax.stop_gradient(_only(mask, weights.astype(jnp.float32)))
    return masked_mean(overflow.product(weights, _only(mask, kl.astype(jnp.float32))), mask)


def prioritized_kl(kl: jax.Array, certainty: jax.Array, beta: float | jax.Array, mask: jax.Array) -> jax.Array:
    """The prioritized KL penalty: mean over the masked tokens of J(s)^beta * kl (paper, section 4).

    Divided by the number of tokens, not by the sum of the weights, so a larger beta also lowers the total pressure.
    ``beta = 0`` is the standard KL penalty.

    Args:
      kl: per-token KL [...], from ``kl_estimate`` or ``exact_kl``.
      certainty: J of the reference [...] in [0, 1]; takes no gradient.
      beta: 0 or more; the paper's main run has 150.
      mask: bool [...], True on generated tokens.

    Returns:
      float32 [].

    Raises:
      ValueError: negative beta or different shapes.
    """
    require(kl.shape == certainty.shape, "certainty", certainty.shape, f"the shape of kl, {kl.shape}")
    return weighted_kl(kl, token_weights.prioritized(certainty, beta, mask), mask)


def policy_gradient_loss(log_probs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """A2C: -mean over the masked tokens of advantage * log pi(a|s); advantages take no gradient."""
    advantages = jax.lax.stop_gradient(_only(mask, advantages.astype(jnp.float32)))
    return -masked_mean(overflow.product(advantages, _only(mask, log_probs.astype(jnp.float32))), mask)


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
    below, above = _clip(clip)
    ratio = _ratio(log_probs, old_log_probs, mask)
    advantages = jax.lax.stop_gradient(_only(mask, advantages.astype(jnp.float32)))
    bounded = jnp.clip(ratio, 1 - below, 1 + above)
    if free is not None:
        bounded = jnp.where(as_mask(free, ratio.shape, "free"), ratio, bounded)
    both = overflow.product(ratio, advantages), overflow.product(bounded, advantages)
    return -masked_mean(jnp.minimum(*both), mask)


def open_gate(
    log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, mask: jax.Array, clip: Clip
) -> jax.Array:
    """True on the masked tokens whose policy gradient ``clipped_policy_loss`` does not stop: [...], as all arguments.

    It stops where A > 0 and r > 1 + clip, and where A < 0 and r < 1 - clip. As a factor of the KL this is the gate F1-B
    of ZCPO (Ding 2026): a token that the policy loss no longer moves, the KL does not move back. Takes no gradient.

    Raises:
      ConfigError: different shapes, or ``clip`` not above 0.
    """
    below, above = _clip(clip)
    ratio = jax.lax.stop_gradient(_ratio(log_probs, old_log_probs, mask))
    stopped = ((advantages > 0) & (ratio > 1 + above)) | ((advantages < 0) & (ratio < 1 - below))
    return as_mask(mask, log_probs.shape) & ~stopped


def entropy_clip(h: jax.Array, clip: float, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Below and above 1: ``clip``, times 1 + alpha * |h| below where h < 0 and above where h > 0: HAPO (2509.16591).

    Args:
      h: [...] from ``advantages.signed_entropy``.
    """
    return clip * (1 + alpha * jnp.maximum(-h, 0)), clip * (1 + alpha * jnp.maximum(h, 0))


def redistributed(
    advantages: jax.Array,
    h: jax.Array,
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    mask: jax.Array,
    clip: Clip,
    beta: float,
) -> jax.Array:
    """A (1 + beta * h) on the tokens whose signal is clear to HAPO, else A: [...] without gradient (arXiv 2509.16591).

    With h > 0 these have a ratio beyond half the clip, with h < 0 one within it. The work's clip of the loss itself at
    ten times A is left out.

    Raises:
      ConfigError: different shapes, or ``clip`` not above 0.
    """
    below, above = _clip(clip)
    ratio = _ratio(log_probs, old_log_probs, mask)
    within = (ratio > 1 - below / 2) & (ratio < 1 + above / 2)
    advantages, h = (_only(mask, x.astype(jnp.float32)) for x in (advantages, h))
    return jax.lax.stop_gradient(advantages * jnp.where((h > 0) != within, 1 + beta * h, 1.0))


def off_policy_kl(
    kl: jax.Array, kind: KLKind, log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """A KL estimate of tokens that an older policy sampled: r * kl, with the ratio r of new to old probability.

    Its expected gradient over the older policy's tokens is that of KL(pi || ref) for every kind: the ratio takes part
    in the gradient of k1 and k3, and is a constant for k2, whose own gradient it is. An exact KL needs no ratio. With
    k3 it is the estimate of DeepSeek-V3.2 (arXiv 2512.02556).

    Args:
      kl: from ``kl_estimate`` of that ``kind``, [...] as all others. ``old_log_probs`` take no gradient.
    """
    ratio = _ratio(log_probs, old_log_probs, mask)
    ratio = jax.lax.stop_gradient(ratio) if kind == "k2" else ratio
    return overflow.product(_only(mask, kl.astype(jnp.float32)), ratio)


def kl_cov(log_probs: jax.Array, old_log_probs: jax.Array, chosen: jax.Array, mask: jax.Array) -> jax.Array:
    """KL-Cov: mean over the masked tokens of |log pi - log pi_old| where ``chosen``, else 0 (arXiv 2505.22617).

    ``old_log_probs`` are those of the rollout, without gradient; ``chosen`` bool [...] marks the greatest covariances
    of advantage and log-probability. In that work they are chosen in each minibatch, here by the caller, over a round.
    """
    chosen = as_mask(chosen, log_probs.shape, "chosen") & as_mask(mask, log_probs.shape)
    return masked_mean(jnp.abs(_log_ratio(log_probs, old_log_probs, chosen)), mask)


def proxy_log_probs(
    logits: jax.Array,
    tokens: jax.Array,
    min_p: float,
    temperature: float | jax.Array = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Log-probs of tokens under the policy without its noise: what is below ``min_p`` times the likeliest is left out.

    Args:
      logits: [..., V]. tokens: [...]. min_p: in (0, 1]. mask: bool [...].

    Returns:
      float32 [...], without gradient: log pi less the log of the probability that is kept, -inf for a token left out; 0
      outside the mask.
    """
    require(0 < min_p <= 1, "min_p", min_p, "above 0, at most 1")
    log_p = jax.lax.stop_gradient(_log_softmax(logits, temperature, mask))
    kept = log_p >= log_p.max(axis=-1, keepdims=True) + math.log(min_p)
    return token_log_probs(jnp.where(kept, log_p, -jnp.inf), tokens, 1.0, mask)


def lp_reg(log_probs: jax.Array, proxy: jax.Array, pulled: jax.Array, mask: jax.Array) -> jax.Array:
    """Lp-Reg: mean over the masked tokens of k3(pi, proxy) where ``pulled``, else 0 (arXiv 2510.03222).

    Args:
      log_probs: [...]. proxy: [...], from ``proxy_log_probs``. mask: bool [...].
      pulled: bool [...], the unlikely tokens of bad answers to which the proxy gives more than the policy does.
    """
    pulled = as_mask(pulled, log_probs.shape, "pulled") & as_mask(mask, log_probs.shape)
    return masked_mean(kl_estimate(log_probs, proxy, "k3", pulled), mask)


def adapted_coefficient(
    coefficient: jax.Array, kl: jax.Array, target: float | jax.Array, gain: float | jax.Array
) -> jax.Array:
    """The KL coefficient after a round whose KL was ``kl``: coefficient * (1 + gain * clip(kl / target - 1, +-0.2)).

    A proportional controller in log space (Ziegler et al. 2019, section 2.2).
    """
    return coefficient * (1.0 + gain * jnp.clip(kl / target - 1.0, -0.2, 0.2))


def value_loss(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error of the critic over the masked tokens (authors' code: no factor 1/2)."""
    returns = jax.lax.stop_gradient(_only(mask, returns.astype(jnp.float32)))
    return masked_mean(jnp.square(_only(mask, values.astype(jnp.float32)) - returns), mask)


def _only(mask: jax.Array | None, values: jax.Array) -> jax.Array:
    """``values`` [...] where the mask is True, else 0; all of them without a mask."""
    if mask is None:
        return values
    return jnp.where(as_mask(mask, values.shape), values, 0)


def _log_ratio(log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array | None) -> jax.Array:
    same = log_probs.shape == old_log_probs.shape
    require(same, "old_log_probs", old_log_probs.shape, f"the shape of log_probs, {log_probs.shape}")
    old_log_probs = jax.lax.stop_gradient(_only(mask, old_log_probs.astype(jnp.float32)))
    return _only(mask, log_probs.astype(jnp.float32)) - old_log_probs


def _clip(clip: Clip) -> tuple[float | jax.Array, float | jax.Array]:
    """Below and above 1."""
    if isinstance(clip, tuple):
        return clip
    require(clip > 0, "clip", clip, "above 0")
    return clip, clip


def _ratio(log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array | None) -> jax.Array:
    return overflow.exp(_log_ratio(log_probs, old_log_probs, mask))


def _log_softmax(logits: jax.Array, temperature: float | jax.Array, mask: jax.Array | None) -> jax.Array:
    """Of logits [..., V] over the temperature in float32; uniform where a mask [...] is False."""
    require_logits(logits)
    require_temperature(temperature)
    if mask is not None:
        logits = jnp.where(as_mask(mask, logits.shape[:-1], of="one entry per token")[..., None], logits, 0)
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
