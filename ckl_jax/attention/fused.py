"""Causal attention as one kernel of a TPU or a GPU, whose scores never reach main memory, forward and backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ckl_jax.attention import tpu
from ckl_jax.attention.kernel import Settings
from ckl_jax.runtime import targets

KERNELS: dict[str, Any] = {"tpu": tpu}
"""By platform. ``forward`` gives what is attended and what ``backward`` is to be given beside it."""
try:
    from ckl_jax.attention import gpu
except ImportError:  # JAX 0.12 announces that Pallas for Triton will go one day; attention on a GPU is plain then.
    pass
else:
    KERNELS["gpu"] = gpu
MULTIPLE = 128  # Of positions.
AMPERE = 8.0  # The compute capability from which on XLA compiles for Triton.


def is_there() -> bool:
    """Whether the devices have a kernel: of GPUs NVIDIA's from Ampere on (A100, RTX 30), no T4 or V100."""
    if targets.platform() != "gpu":
        return targets.platform() in KERNELS
    return "gpu" in KERNELS and all(_capability(device) >= AMPERE for device in targets.devices())


def _capability(device: Any) -> float:
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # AMD's is a name.
        return 0.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(qkv_BxTx3D: jax.Array, segments_BxT: jax.Array, seeds_BxH: jax.Array, settings: Settings) -> jax.Array:
    """Softmax of q k / sqrt(K) over the keys at or before a query in its segment, dropout, times the values.

    Args:
      qkv_BxTx3D: queries, keys and values of all heads, in the model's dtype.
      segments_BxT: int32.
      seeds_BxH: int32, of the dropout; read only with a rate above 0.

    Returns:
      [B, T, D] in the dtype of ``qkv``; sums are float32.
    """
    return _forward(qkv_BxTx3D, segments_BxT, seeds_BxH, settings)[0]


def _forward(qkv_BxTx3D, segments_BxT, seeds_BxH, settings):
    qkv, segments = _padded(qkv_BxTx3D), _padded(segments_BxT)
    out, kept = KERNELS[settings.device].forward(qkv, segments, seeds_BxH, settings)
    return out[:, : qkv_BxTx3D.shape[1]], (qkv_BxTx3D, segments_BxT, seeds_BxH, kept)


def _backward(settings, saved, d_out_BxTxD):
    qkv_BxTx3D, segments_BxT, seeds_BxH, kept = saved
    qkv, segments, d_out = (_padded(x) for x in (qkv_BxTx3D, segments_BxT, d_out_BxTxD))
    d_qkv = KERNELS[settings.device].backward(qkv, segments, seeds_BxH, kept, d_out, settings)
    return d_qkv[:, : qkv_BxTx3D.shape[1]], None, None


def _padded(x: jax.Array) -> jax.Array:
    """With more positions behind: no query before them reads their keys."""
    padding = -x.shape[1] % MULTIPLE
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x


attention.defvjp(_forward, _backward)
