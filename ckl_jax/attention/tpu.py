"""Causal attention as one TPU kernel: scores and weights stay in the chip's fast memory, forward and backward.

A block of queries is taken against all keys up to its end, so that a row's softmax is computed at once. The backward
pass keeps nothing of the forward one: it computes the scores again. Keys, queries and values are read where the dense
layer wrote them. Two heads of width 64 lie in one block of 128 lanes; each is computed with the other's lanes zeroed,
which costs a matrix unit of 128 x 128 nothing.

Dropout draws from a counter: a hash of the row's seed, the head's, query and key says what is kept, the same in both
passes and in ``keeps``, which computes it outside of the kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ckl_jax.attention.plain import MASKED

LANES = 128


class Settings(NamedTuple):
    """What a kernel is compiled for; ``interpret`` computes it in Python's steps, on any device."""

    num_heads: int
    rate: float
    precision: Any
    interpret: bool


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


def keeps(seed: jax.Array, rows: jax.Array, columns: jax.Array, rate: float) -> jax.Array:
    """Which weights dropout keeps: True with probability 1 - rate, independent for all practical purposes.

    Args:
      seed: int32 of a row of the batch and a head.
      rows, columns: int32 positions of queries and keys, of shapes that broadcast.
    """
    bits = _hash(_hash(rows ^ seed) + columns)
    return jax.lax.shift_right_logical(bits, 1) < jnp.int32((1 - rate) * 2**31 - 1)


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the input moves half of the output's (lowbias32, C. Wellons)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ jax.lax.shift_right_logical(x, shift)) * jnp.int32(factor)
    return x ^ jax.lax.shift_right_logical(x, 16)


class _Block(NamedTuple):
    """A block of queries of the lanes that a step of the grid has: its sizes, known when the kernel is traced."""

    start: int
    end: int
    head_width: int
    settings: Settings

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.start, self.end

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Of queries [Q, 1] and keys [1, S]."""
        rows = self.start + jax.lax.broadcasted_iota(jnp.int32, (self.shape[0], 1), 0)
        return rows, jax.lax.broadcasted_iota(jnp.int32, (1, self.end), 1)

    def allowed(self, segments_ref: Any) -> jax.Array:
        """[Q, S]: keys at or before the query in its segment."""
        rows, columns = self.positions()
        of_keys = segments_ref[0, :, : self.end]
        of_queries = segments_ref[0, :, self.start : self.end].reshape(self.shape[0], 1)
        return (rows >= columns) & (of_queries == of_keys)

    def of_head(self, head: int, x: jax.Array) -> jax.Array:
        """With the lanes of the other heads zeroed."""
        if self.head_width >= x.shape[1]:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        first = head * self.head_width
        return jnp.where((lane >= first) & (lane < first + self.head_width), x, jnp.zeros_like(x))

    def weights(self, q: jax.Array, k: jax.Array, allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The softmax's numerators [Q, S] and denominators [Q, 1] in float32."""
        scores = self.product(q, k, (1, 1)) * self.head_width**-0.5
        scores = jnp.where(allowed, scores, MASKED)
        weights = jnp.exp(scores - scores.max(1, keepdims=True))
        return weights, weights.sum(1, keepdims=True)

    def dropped(self, weights: jax.Array, seed: jax.Array) -> jax.Array:
        rate = self.settings.rate
        if rate == 0:
            return weights
        return jnp.where(keeps(seed, *self.positions(), rate), weights / (1 - rate), 0.0)

    def product(self, a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
        """In float32; bfloat16 has but one precision."""
        axes = ((contracted[:1], contracted[1:]), ((), ()))
        precision = self.settings.precision if a.dtype == jnp.float32 else None
        return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _forward_kernel(blocks, seeds_ref, segments_ref, q_ref, k_ref, v_ref, out_ref):
    seeds = _seeds(seeds_ref, q_ref, blocks[0].head_width)

    def compute(block: _Block):
        k, v, allowed = k_ref[0, : block.end], v_ref[0, : block.end], block.allowed(segments_ref)
        out = jnp.zeros(out_ref.shape[1:], jnp.float32)
        for head, seed in enumerate(seeds):
            weights, total = block.weights(block.of_head(head, q_ref[0]), k, allowed)
            attended = block.product(block.dropped(weights, seed).astype(v.dtype), v, (1, 0))
            out += block.of_head(head, attended / total)
        out_ref[0] = out.astype(out_ref.dtype)

    _of_step(pl.program_id(2), blocks, compute)


def _backward_kernel(
    blocks, seeds_ref, segments_ref, q_ref, k_ref, v_ref, d_out_ref, d_qkv_ref, dk_sum_ref, dv_sum_ref
):
    """A step for every block of queries, whose gradients it writes, then one for those of the keys and the values."""
    step, seeds = pl.program_id(2), _seeds(seeds_ref, q_ref, blocks[0].head_width)

    @pl.when(step == 0)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def compute(block: _Block):
        k, v, allowed = k_ref[0, : block.end], v_ref[0, : block.end], block.allowed(segments_ref)
        dq = jnp.zeros(q_ref.shape[1:], jnp.float32)
        for head, seed in enumerate(seeds):
            q, d_out = block.of_head(head, q_ref[0]), block.of_head(head, d_out_ref[0])
            weights, total = block.weights(q, k, allowed)
            weights = weights / total
            dv_sum_ref[: block.end] += block.product(block.dropped(weights, seed).astype(v.dtype), d_out, (0, 0))
            d_weights = block.dropped(block.product(d_out, v, (1, 1)), seed)
            d_scores = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
            d_scores = (d_scores * block.head_width**-0.5).astype(k.dtype)
            dq += block.of_head(head, block.product(d_scores, k, (1, 0)))
            dk_sum_ref[: block.end] += block.product(d_scores, q, (0, 0))
        d_qkv_ref[0, block.start : block.end] = dq.astype(d_qkv_ref.dtype)

    _of_step(step, blocks, compute)
    for index, sums_ref in enumerate((dk_sum_ref, dv_sum_ref)):

        @pl.when(step == len(blocks) + index)
        def _(sums_ref=sums_ref):
            d_qkv_ref[0] = sums_ref[...].astype(d_qkv_ref.dtype)


def _of_step(step, blocks, compute):
    """A branch for every block of queries, as each has its own number of keys."""
    for index, block in enumerate(blocks):
        pl.when(step == index)(functools.partial(compute, block))


def _seeds(seeds_ref, q_ref, head_width: int):
    """Of the heads in this step's lanes."""
    count = q_ref.shape[2] // head_width
    return [seeds_ref[pl.program_id(0), pl.program_id(1) * count + head] for head in range(count)]


class _Plan(NamedTuple):
    """The grid (rows of the batch, blocks of lanes, blocks of queries) and where each step's arrays lie.

    ``flops`` are those of one product of all queries with their keys.
    """

    blocks: list[_Block]
    grid: tuple[int, int, int]
    specs: dict[str, Any]
    flops: int


def _planned(batch: int, num_positions: int, width: int, settings: Settings) -> _Plan:
    head_width = width // settings.num_heads
    lanes = max(LANES, head_width)
    queries = LANES if num_positions % (2 * LANES) else 2 * LANES
    blocks = [_Block(at, at + queries, head_width, settings) for at in range(0, num_positions, queries)]
    groups = width // lanes
    whole, part = (1, num_positions, lanes), (1, queries, lanes)
    specs = {
        "seeds": pl.BlockSpec(memory_space=pltpu.SMEM),
        "segments": pl.BlockSpec((1, 1, num_positions), lambda b, g, i: (b, 0, 0)),
        "queries": pl.BlockSpec(part, lambda b, g, i: (b, jnp.minimum(i, len(blocks) - 1), g)),
        "keys": pl.BlockSpec(whole, lambda b, g, i: (b, 0, groups + g)),
        "values": pl.BlockSpec(whole, lambda b, g, i: (b, 0, 2 * groups + g)),
        "d_qkv": pl.BlockSpec(whole, lambda b, g, i: (b, 0, jnp.maximum(i - len(blocks) + 1, 0) * groups + g)),
    }
    flops = sum(2 * rows * columns for rows, columns in (block.shape for block in blocks)) * width * batch
    return _Plan(blocks, (batch, groups, len(blocks)), specs, flops)


def _forward(qkv_BxTx3D, segments_BxT, seeds_BxH, settings):
    batch, num_positions, width = qkv_BxTx3D.shape[0], qkv_BxTx3D.shape[1], qkv_BxTx3D.shape[2] // 3
    padding = -num_positions % LANES
    padded, segments = _padded(qkv_BxTx3D, padding), _padded(segments_BxT, padding)
    plan = _planned(batch, num_positions + padding, width, settings)
    names = ("seeds", "segments", "queries", "keys", "values")
    out = pl.pallas_call(
        functools.partial(_forward_kernel, plan.blocks),
        grid=plan.grid,
        in_specs=[plan.specs[name] for name in names],
        out_specs=plan.specs["queries"],
        out_shape=jax.ShapeDtypeStruct((batch, num_positions + padding, width), qkv_BxTx3D.dtype),
        **_options(plan, products=2, moved=4 * qkv_BxTx3D.size // 3 * qkv_BxTx3D.dtype.itemsize, settings=settings),
    )(seeds_BxH, segments[:, None], padded, padded, padded)
    return out[:, :num_positions], (qkv_BxTx3D, segments_BxT, seeds_BxH)


def _backward(settings, kept, d_out_BxTxD):
    qkv_BxTx3D, segments_BxT, seeds_BxH = kept
    batch, num_positions, width = d_out_BxTxD.shape
    padding = -num_positions % LANES
    padded, segments, d_out = (_padded(x, padding) for x in (qkv_BxTx3D, segments_BxT, d_out_BxTxD))
    plan = _planned(batch, num_positions + padding, width, settings)
    names = ("seeds", "segments", "queries", "keys", "values", "queries")
    (rows, groups, steps), lanes = plan.grid, plan.specs["d_qkv"].block_shape[2]
    d_qkv = pl.pallas_call(
        functools.partial(_backward_kernel, plan.blocks),
        grid=(rows, groups, steps + 2),
        in_specs=[plan.specs[name] for name in names],
        out_specs=plan.specs["d_qkv"],
        out_shape=jax.ShapeDtypeStruct(padded.shape, padded.dtype),
        scratch_shapes=[pltpu.VMEM((num_positions + padding, lanes), jnp.float32)] * 2,
        **_options(plan, products=5, moved=7 * d_out.size * d_out.dtype.itemsize, settings=settings),
    )(seeds_BxH, segments[:, None], padded, padded, padded, d_out)
    return d_qkv[:, :num_positions], None, None


def _padded(x: jax.Array, padding: int) -> jax.Array:
    """With more positions behind: no query before them reads their keys."""
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x


def _options(plan: _Plan, products: int, moved: int, settings: Settings) -> dict[str, Any]:
    exponentials = plan.flops // (2 * plan.blocks[0].head_width)
    cost = pl.CostEstimate(flops=products * plan.flops, transcendentals=exponentials, bytes_accessed=moved)
    order = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    return {"cost_estimate": cost, "compiler_params": order, "interpret": settings.interpret}


attention.defvjp(_forward, _backward)
