"""How sure the frozen reference is at each token, and what is made of it (paper, section 4)."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ckl_jax.checks import number, require_logits, require_temperature
from ckl_jax.errors import require_word

CertaintyKind = Literal["negentropy", "negentropy_max_prob", "max_prob"]


def certainty(logits: jax.Array, kind: CertaintyKind = "negentropy", temperature: float | jax.Array = 1.0) -> jax.Array:
    """J(s) in [0, 1] of every next-token distribution, in float32 and without gradient.

    With p = softmax(logits / temperature) over a vocabulary of V tokens:

    - ``negentropy``: J = (log V - H(p)) / log V, the paper's normalized negentropy.
    - ``negentropy_max_prob``: J = 1 + log(max_a p) / log V, with the min-entropy (authors' code).
    - ``max_prob``: J = max_a p (authors' code).

    Args:
      logits: [..., V] of the reference model, any float type.
      kind: which of the three.
      temperature: above 0; the paper uses 1, the authors' code 4.

    Returns:
      float32 [...].

    Raises:
      ConfigError: unknown kind, temperature not above 0, or V < 2.
    """
    require_word(kind, "kind", get_args(CertaintyKind))
    require_temperature(temperature)
    require_logits(logits)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits.astype(jnp.float32) / number(temperature)))
    log_v = jnp.log(logits.shape[-1])
    if kind == "max_prob":
        return jnp.exp(log_p.max(axis=-1))
    surprise = entropy_of(log_p) if kind == "negentropy" else -log_p.max(axis=-1)
    return jnp.clip(1.0 - surprise / log_v, 0.0, 1.0)


def entropy_of(log_p: jax.Array) -> jax.Array:
    """H = -sum_a p log p in nats, from log-probabilities [..., V]; impossible tokens (-inf) count 0."""
    safe = jnp.where(jnp.isneginf(log_p), 0.0, log_p)
    return -(jnp.exp(log_p) * safe).sum(axis=-1)
