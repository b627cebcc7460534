"""The keys and values of the positions seen so far, a plain pytree.

Tensor names carry their shape as in ``ckl_jax.model``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of the positions seen so far.

    Attributes:
      keys_BxHxSxK, values_BxHxSxK: one array per layer; where layers are scanned, one array [L, B, H, S, K] of all.
      segments_BxS: int32 segment of each cached position.
      length: int32, how many of the S slots are filled: [], or [B] where each row has its own.
    """

    keys_BxHxSxK: tuple[jax.Array, ...]
    values_BxHxSxK: tuple[jax.Array, ...]
    segments_BxS: jax.Array
    length: jax.Array

    def of_layers(self, change: Callable[[jax.Array], jax.Array]) -> "Cache":
        """The cache with its keys and values changed."""
        keys, values = (tuple(map(change, of_layers)) for of_layers in (self.keys_BxHxSxK, self.values_BxHxSxK))
        return self._replace(keys_BxHxSxK=keys, values_BxHxSxK=values)

    def grown(self, slots: int) -> "Cache":
        """With room for as many positions, none fewer than before."""
        extra = slots - self.segments_BxS.shape[1]
        grown = self.of_layers(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)]))
        return grown._replace(segments_BxS=jnp.pad(self.segments_BxS, ((0, 0), (0, extra))))

    def rows(self, index: jax.Array) -> "Cache":
        """Those rows of the batch; ``length`` is [B]."""
        kept = self.of_layers(lambda x: jnp.take(x, index, axis=x.ndim - 4))
        return kept._replace(segments_BxS=self.segments_BxS[index], length=self.length[index])


class LayerCache(NamedTuple):
    """What a layer appends to: its own keys and values, or those of all layers and which of them it is."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    layer: jax.Array | None


def append(buffer_BxHxSxK: jax.Array, new_BxHxTxK: jax.Array, length: jax.Array) -> jax.Array:
    """The buffer with the new positions behind the first ``length`` (of all rows, or of each)."""
    if length.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(buffer_BxHxSxK, new_BxHxTxK, length, axis=2)
    return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(buffer_BxHxSxK, new_BxHxTxK, length)


def append_to_layer(buffer: jax.Array, new_BxHxTxK: jax.Array, cache: LayerCache) -> tuple[jax.Array, jax.Array]:
    """The buffer with the new positions, and that layer's part [B, H, S, K] of it."""
    layer, length = cache.layer, cache.length
    if layer is None:
        appended = append(buffer, new_BxHxTxK, length)
        return appended, appended
    if length.ndim == 0:  # In place: what the loop over layers carries is not copied.
        buffer = jax.lax.dynamic_update_slice(buffer, new_BxHxTxK[None], (layer, 0, 0, length, 0))
    else:
        appended = append(jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False), new_BxHxTxK, length)
        buffer = jax.lax.dynamic_update_index_in_dim(buffer, appended, layer, axis=0)
    return buffer, jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False)
