"""Attention as XLA compiles it, on any device.

Tensor names carry their shape as in ``ckl_jax.model``.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30


def _product(axes, left, right, precision):
    """In float32, as the kernels of ``tpu`` and ``gpu`` have it."""
    return jnp.einsum(axes, left, right, precision=precision, preferred_element_type=jnp.float32)


def _softmax_values(scores_BxHxTxS, mask_Bx1xTxS, values_BxHxSxK, dropout, precision):
    scores = jnp.where(mask_Bx1xTxS, scores_BxHxTxS, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = dropout(weights).astype(values_BxHxSxK.dtype)
    attended = _product("bhts,bhsk->bhtk", weights, values_BxHxSxK, precision)
    return (attended / total).astype(values_BxHxSxK.dtype)


def causal(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, segments_BxT, dropout, config):
    """Causal attention inside segments, a chunk of queries at a time against the keys up to the chunk's end.

    The queries may be those of the last positions only.
    """
    num_positions = k_BxHxTxK.shape[2]
    first = num_positions - q_BxHxTxK.shape[2]
    outputs = []
    for start in range(first, num_positions, config.attention_chunk):
        end = min(start + config.attention_chunk, num_positions)
        q, k, v = q_BxHxTxK[:, :, start - first : end - first], k_BxHxTxK[:, :, :end], v_BxHxTxK[:, :, :end]
        scores = _product("bhtk,bhsk->bhts", q, k, config.precision)
        causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        same_segment = segments_BxT[:, start:end, None] == segments_BxT[:, None, :end]
        mask = (causal[None] & same_segment)[:, None]
        outputs.append(_softmax_values(scores, mask, v, dropout, config.precision))
    return jnp.concatenate(outputs, axis=2)


def cached(q_BxHxTxK, keys_BxHxSxK, values_BxHxSxK, mask_BxTxS, dropout, config):
    scores = _product("bhtk,bhsk->bhts", q_BxHxTxK, keys_BxHxSxK, config.precision)
    return _softmax_values(scores, mask_BxTxS[:, None], values_BxHxSxK, dropout, config.precision)
