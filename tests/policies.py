"""Policies that are made, not trained: random ones that heed their context, ones that say a given text, and tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.config import ModelConfig
from ckl_jax.model import GPT2
from ckl_jax.tasks import alphabet

SCRIPT_MODEL = ModelConfig(num_layers=1, num_heads=1, width=alphabet.VOCAB_SIZE, block_size=300)

POLICY_4x3 = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [0.7, 0.1, 0.2]])
"""Next-token distributions of a two-token policy: at the start, then after each first token."""
REFERENCE_4x3 = np.array([[0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1]])


TWO = jnp.array([0.0, 2 * np.log(3.0)])
"""Logits of 1/4 and 3/4 at temperature 2, of 1/10 and 9/10 at 1."""


@functools.cache
def initializer(config):
    return jax.jit(GPT2(config).init)


def untrained(config, seed=0, contrast=1):
    """What pre-training starts from; with more ``contrast`` its logits, and so its certainty, vary more."""
    params = initializer(config)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
    params["params"]["wte"]["embedding"] *= contrast
    return params


def policy(config, seed=0, pad_logit=0.0):
    """A random policy that heeds its context. ``pad_logit`` is what padding's logit has above the others."""
    params = untrained(config, seed)
    params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)["params"]
    wte = params["wte"]["embedding"].at[:, 0].set(0).at[alphabet.PAD_ID, 0].set(pad_logit)
    ln_f = {"scale": params["ln_f"]["scale"].at[0].set(0), "bias": params["ln_f"]["bias"].at[0].set(1)}
    return {"params": {**params, "wte": {"embedding": wte}, "ln_f": ln_f}}


def scripted_policy(text, first, config=SCRIPT_MODEL):
    """A policy whose character at position ``first + t`` of the document is ``text[t]``, whatever the context."""
    params = jax.tree.map(jnp.zeros_like, untrained(config))["params"]
    one_hot = jnp.eye(alphabet.VOCAB_SIZE)
    tokens = alphabet.encode(text)
    wpe = params["wpe"]["embedding"].at[first - 1 : first - 1 + len(text)].set(50 * one_hot[tokens])
    scale = jnp.full(alphabet.VOCAB_SIZE, 10.0)
    embeddings = {"wte": {"embedding": one_hot}, "wpe": {"embedding": wpe}}
    return {"params": {**params, **embeddings, "ln_f": {**params["ln_f"], "scale": scale}}}


def reverse_kl_gradient(policy, reference):
    log_ratio = np.log(policy / reference)
    return policy * (log_ratio - (policy * log_ratio).sum(-1, keepdims=True))
