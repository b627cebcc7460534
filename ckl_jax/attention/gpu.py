"""The kernel of an NVIDIA GPU, in Pallas for Triton, after FlashAttention-2 (Dao 2023, arXiv 2307.08691).

Forward, a program has a block of queries and meets the blocks of keys up to its end one by one; what it has summed is
scaled down whenever a larger score turns up. Backward, a program has the same block twice: as keys and values, for
which it meets the blocks of queries from there on, and as queries, for which it meets the keys before. So all programs
do the same work, and none waits for another. Kept between both passes is the logarithm of each softmax's denominator.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ckl_jax.attention.kernel import Settings, dropped, product
from ckl_jax.attention.plain import MASKED


class _Blocks(NamedTuple):
    """How many queries a program of the forward pass has, the keys that it meets at once, and both backward."""

    queries: int
    keys: int
    backward: int


_BLOCKS = {2: _Blocks(128, 64, 64), 4: _Blocks(64, 32, 32)}
"""By the bytes of a number, of heads of up to 64: what a multiprocessor with 99 KB of fast memory holds."""


class _Part(NamedTuple):
    """A block of queries against one of keys: where both start, and all that the scores depend on."""

    first_query: Any
    first_key: Any
    queries: int
    keys: int
    seed: Any
    settings: Settings

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Of queries [Q, 1] and keys [1, S]."""
        rows = self.first_query + jax.lax.broadcasted_iota(jnp.int32, (self.queries, 1), 0)
        return rows, self.first_key + jax.lax.broadcasted_iota(jnp.int32, (1, self.keys), 1)

    def scores(self, q: jax.Array, k: jax.Array, segments_ref: Any) -> jax.Array:
        """[Q, S]: of keys at or before the query in its segment, of others ``MASKED``."""
        rows, columns = self.positions()
        of_queries = segments_ref[pl.ds(self.first_query, self.queries)]
        of_keys = segments_ref[pl.ds(self.first_key, self.keys)]
        allowed = (rows >= columns) & (of_queries[:, None] == of_keys[None])
        return jnp.where(allowed, product(q, k, (1, 1), self.settings) * q.shape[1] ** -0.5, MASKED)

    def dropped(self, weights: jax.Array) -> jax.Array:
        return dropped(weights, self.seed, *self.positions(), self.settings.rate)


def _forward_kernel(blocks, settings, seed_ref, segments_ref, q_ref, k_ref, v_ref, out_ref, log_totals_ref):
    first, seed, q = pl.program_id(0) * blocks.queries, seed_ref[...], q_ref[...]

    def meet(index, state):
        out, highest, total = state
        at = pl.ds(index * blocks.keys, blocks.keys)
        part = _Part(first, index * blocks.keys, blocks.queries, blocks.keys, seed, settings)
        scores, v = part.scores(q, k_ref[at], segments_ref), v_ref[at]
        now_highest = jnp.maximum(highest, scores.max(1))
        weights, scale = jnp.exp(scores - now_highest[:, None]), jnp.exp(highest - now_highest)
        attended = product(part.dropped(weights).astype(v.dtype), v, (1, 0), settings)
        return out * scale[:, None] + attended, now_highest, total * scale + weights.sum(1)

    nothing = jnp.zeros((blocks.queries,), jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), nothing + MASKED, nothing
    end = (first + blocks.queries) // blocks.keys
    out, highest, total = jax.lax.fori_loop(0, end, meet, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_totals_ref[...] = highest + jnp.log(total)


def _backward_kernel(
    size,
    settings,
    seed_ref,
    segments_ref,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    log_totals_ref,
    means_ref,
    d_qkv_ref,
):
    own, seed = pl.program_id(0), seed_ref[...]

    def gradients(query_block, key_block, q, k, v, d_out):
        """Dropped weights and the gradient of the scores, both [Q, S] in the type of the values."""
        part = _Part(query_block * size, key_block * size, size, size, seed, settings)
        of_queries = pl.ds(query_block * size, size)
        weights = jnp.exp(part.scores(q, k, segments_ref) - log_totals_ref[of_queries][:, None])
        d_weights = part.dropped(product(d_out, v, (1, 1), settings))
        d_scores = weights * (d_weights - means_ref[of_queries][:, None]) * q.shape[1] ** -0.5
        return part.dropped(weights).astype(v.dtype), d_scores.astype(v.dtype)

    here = pl.ds(own * size, size)
    q, k, v, d_out = q_ref[here], k_ref[here], v_ref[here], d_out_ref[here]
    nothing = jnp.zeros(q.shape, jnp.float32)

    def meet_queries(index, sums):
        there = pl.ds(index * size, size)
        their_q, their_d_out = q_ref[there], d_out_ref[there]
        weights, d_scores = gradients(index, own, their_q, k, v, their_d_out)
        dk = sums[0] + product(d_scores, their_q, (0, 0), settings)
        return dk, sums[1] + product(weights, their_d_out, (0, 0), settings)

    def meet_keys(index, dq):
        there = pl.ds(index * size, size)
        their_k = k_ref[there]
        _, d_scores = gradients(own, index, q, their_k, v_ref[there], d_out)
        return dq + product(d_scores, their_k, (1, 0), settings)

    dk, dv = jax.lax.fori_loop(own, q_ref.shape[0] // size, meet_queries, (nothing, nothing))
    dq = jax.lax.fori_loop(0, own + 1, meet_keys, nothing)
    for part, gradient in enumerate((dq, dk, dv)):
        d_qkv_ref[:, part] = gradient.astype(d_qkv_ref.dtype)


class _Grid(NamedTuple):
    """Sizes of what a call is given, and so of its grid: blocks of positions, heads, rows of the batch."""

    batch: int
    num_positions: int
    num_heads: int
    head_width: int

    @classmethod
    def of(cls, qkv_BxTx3D: jax.Array, settings: Settings) -> "_Grid":
        batch, num_positions, width = qkv_BxTx3D.shape
        return cls(batch, num_positions, settings.num_heads, width // 3 // settings.num_heads)

    def blocks(self, dtype: jnp.dtype) -> _Blocks:
        sizes = _BLOCKS[dtype.itemsize]
        return sizes if self.head_width <= 64 else _Blocks(*(size // 2 for size in sizes))

    def block(self, size: int, part: int = 0) -> pl.BlockSpec:
        """A program's own positions of its head, of queries (part 0), keys (1) or values (2) where all three lie."""
        return pl.BlockSpec((None, size, self.head_width), lambda i, h, b: (b, i, part * self.num_heads + h))

    def whole(self, part: int = 0) -> pl.BlockSpec:
        """All positions of the head."""
        shape = (None, self.num_positions, self.head_width)
        return pl.BlockSpec(shape, lambda i, h, b: (b, 0, part * self.num_heads + h))

    def of_rows(self) -> list[pl.BlockSpec]:
        """The seed of a row and a head, and the row's segments."""
        seed = pl.BlockSpec((None, None), lambda i, h, b: (b, h))
        return [seed, pl.BlockSpec((None, self.num_positions), lambda i, h, b: (b, 0))]

    def options(self, size: int, products: int, settings: Settings) -> dict[str, Any]:
        """Of ``pallas_call``, with the operations of a program on average."""
        flops = products * size * (self.num_positions + size) * self.head_width
        return {
            "grid": (self.num_positions // size, self.num_heads, self.batch),
            "interpret": settings.interpret,
            "metadata": {"flops_of_a_program": str(flops)},
            "compiler_params": triton.CompilerParams(num_warps=4 if self.head_width <= 64 else 8, num_stages=2),
        }


def forward(
    qkv_BxTx3D: jax.Array, segments_BxT: jax.Array, seeds_BxH: jax.Array, settings: Settings
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What is attended [B, T, D], T a multiple of 128; the same and the logarithms of the denominators [B, H, T]."""
    sizes = _Grid.of(qkv_BxTx3D, settings)
    blocks = sizes.blocks(qkv_BxTx3D.dtype)
    shape = (sizes.batch, sizes.num_positions, sizes.num_heads * sizes.head_width)
    numbers = pl.BlockSpec((None, None, blocks.queries), lambda i, h, b: (b, h, i))
    out, log_totals_BxHxT = pl.pallas_call(
        functools.partial(_forward_kernel, blocks, settings),
        in_specs=[*sizes.of_rows(), sizes.block(blocks.queries), sizes.whole(1), sizes.whole(2)],
        out_specs=[sizes.block(blocks.queries), numbers],
        out_shape=[
            jax.ShapeDtypeStruct(shape, qkv_BxTx3D.dtype),
            jax.ShapeDtypeStruct((sizes.batch, sizes.num_heads, sizes.num_positions), jnp.float32),
        ],
        **sizes.options(blocks.queries, 2, settings),
    )(seeds_BxH, segments_BxT, qkv_BxTx3D, qkv_BxTx3D, qkv_BxTx3D)
    return out, (out, log_totals_BxHxT)


def backward(
    qkv_BxTx3D: jax.Array,
    segments_BxT: jax.Array,
    seeds_BxH: jax.Array,
    kept: tuple[jax.Array, jax.Array],
    d_out_BxTxD: jax.Array,
    settings: Settings,
) -> jax.Array:
    """The gradient of ``qkv``."""
    (out_BxTxD, log_totals_BxHxT), sizes = kept, _Grid.of(qkv_BxTx3D, settings)
    size = sizes.blocks(qkv_BxTx3D.dtype).backward
    rows, of_head = (sizes.batch, sizes.num_positions), (sizes.num_heads, sizes.head_width)
    both = out_BxTxD.astype(jnp.float32) * d_out_BxTxD.astype(jnp.float32)
    means_BxHxT = both.reshape(*rows, *of_head).sum(3).swapaxes(1, 2)
    numbers = pl.BlockSpec((None, None, sizes.num_positions), lambda i, h, b: (b, h, 0))
    d_qkv = pl.pallas_call(
        functools.partial(_backward_kernel, size, settings),
        in_specs=[*sizes.of_rows(), *(sizes.whole(part) for part in range(3)), sizes.whole(), numbers, numbers],
        out_specs=pl.BlockSpec((None, size, 3, None, sizes.head_width), lambda i, h, b: (b, i, 0, h, 0)),
        out_shape=jax.ShapeDtypeStruct((*rows, 3, *of_head), qkv_BxTx3D.dtype),
        **sizes.options(size, 7, settings),
    )(seeds_BxH, segments_BxT, qkv_BxTx3D, qkv_BxTx3D, qkv_BxTx3D, d_out_BxTxD, log_totals_BxHxT, means_BxHxT)
    return d_qkv.reshape(qkv_BxTx3D.shape)
