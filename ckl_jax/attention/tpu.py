"""The kernel of a TPU, in Pallas.

A block of queries is taken against all keys up to its end, so that a row's softmax is computed at once. The backward
pass keeps nothing of the forward one: it computes the scores again. Keys, queries and values are read where the dense
layer wrote them. Two heads of width 64 lie in one block of 128 lanes; each is computed with the other's lanes zeroed,
which costs a matrix unit of 128 x 128 nothing.

"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ckl_jax.attention.kernel import Settings, dropped, product
from ckl_jax.attention.plain import MASKED

LANES = 128


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
        scores = product(q, k, (1, 1), self.settings) * self.head_width**-0.5
        scores = jnp.where(allowed, scores, MASKED)
        weights = jnp.exp(scores - scores.max(1, keepdims=True))
        return weights, weights.sum(1, keepdims=True)

    def dropped(self, weights: jax.Array, seed: jax.Array) -> jax.Array:
        return dropped(weights, seed, *self.positions(), self.settings.rate)

    def product(self, a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
        return product(a, b, contracted, self.settings)


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


def forward(
    qkv_BxTx3D: jax.Array, segments_BxT: jax.Array, seeds_BxH: jax.Array, settings: Settings
) -> tuple[jax.Array, None]:
    """What is attended [B, T, D], T a multiple of 128; the backward pass needs no more than the same arguments."""
    batch, num_positions, width = qkv_BxTx3D.shape[0], qkv_BxTx3D.shape[1], qkv_BxTx3D.shape[2] // 3
    plan = _planned(batch, num_positions, width, settings)
    names = ("seeds", "segments", "queries", "keys", "values")
    out = pl.pallas_call(
        functools.partial(_forward_kernel, plan.blocks),
        grid=plan.grid,
        in_specs=[plan.specs[name] for name in names],
        out_specs=plan.specs["queries"],
        out_shape=jax.ShapeDtypeStruct((batch, num_positions, width), qkv_BxTx3D.dtype),
        **_options(plan, products=2, moved=4 * qkv_BxTx3D.size // 3 * qkv_BxTx3D.dtype.itemsize, settings=settings),
    )(seeds_BxH, segments_BxT[:, None], qkv_BxTx3D, qkv_BxTx3D, qkv_BxTx3D)
    return out, None


def backward(
    qkv_BxTx3D: jax.Array,
    segments_BxT: jax.Array,
    seeds_BxH: jax.Array,
    kept: None,
    d_out_BxTxD: jax.Array,
    settings: Settings,
) -> jax.Array:
    """The gradient of ``qkv``."""
    batch, num_positions, width = d_out_BxTxD.shape
    plan = _planned(batch, num_positions, width, settings)
    names = ("seeds", "segments", "queries", "keys", "values", "queries")
    (rows, groups, steps), lanes = plan.grid, plan.specs["d_qkv"].block_shape[2]
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan.blocks),
        grid=(rows, groups, steps + 2),
        in_specs=[plan.specs[name] for name in names],
        out_specs=plan.specs["d_qkv"],
        out_shape=jax.ShapeDtypeStruct(qkv_BxTx3D.shape, qkv_BxTx3D.dtype),
        scratch_shapes=[pltpu.VMEM((num_positions, lanes), jnp.float32)] * 2,
        **_options(plan, products=5, moved=7 * d_out_BxTxD.size * d_out_BxTxD.dtype.itemsize, settings=settings),
    )(seeds_BxH, segments_BxT[:, None], qkv_BxTx3D, qkv_BxTx3D, qkv_BxTx3D, d_out_BxTxD)


def _options(plan: _Plan, products: int, moved: int, settings: Settings) -> dict[str, Any]:
    exponentials = plan.flops // (2 * plan.blocks[0].head_width)
    cost = pl.CostEstimate(flops=products * plan.flops, transcendentals=exponentials, bytes_accessed=moved)
    order = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    return {"cost_estimate": cost, "compiler_params": order, "interpret": settings.interpret}
