"""Step-by-step generation: policy + problems + key -> trajectory, with a KV cache that grows with the answers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ckl_jax import tasks
from ckl_jax.attention.cache import Cache
from ckl_jax.config import ModelConfig
from ckl_jax.errors import is_integer, require
from ckl_jax.model import Output, forward, init_cache, with_stacked_layers
from ckl_jax.rollout.trajectory import Sampling, Trajectory, gumbel_noise, judged, layout, require_possible
from ckl_jax.runtime.sharding import largest_divisor
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.problems import Array, Problems

CACHE_BLOCK = 128


class _Decoding(NamedTuple):
    turn: jax.Array
    active: jax.Array
    logits_BxV: jax.Array
    cache: Cache | None
    answers_BxT: jax.Array
    log_probs_BxT: jax.Array
    done_B: jax.Array
    in_result_B: jax.Array


def _continues(turns: int, state: _Decoding) -> jax.Array:
    return state.active & (state.turn < turns)


def rollout(
    config: ModelConfig,
    params: Any,
    problems: Problems,
    key: jax.Array,
    sampling: Sampling,
    *,
    batch: int | None = None,
    axis_name: str | None = None,
) -> Trajectory:
    """Generates one answer per problem.

    An episode ends at the newline after the result line, at a padding token, or at the length limit. It is made for
    ``jax.jit`` (with ``config``, the length and ``greedy`` of ``sampling`` static): called without, every step is
    dispatched alone.

    Args:
      params: of ``GPT2``.
      batch: problems decoded together, at most, in equal groups one after another; default: all. It changes the speed
        and not the characters: on CPU, a KV cache that stays in the processor's own cache is read faster.
      axis_name: name of the vmapped axis of runs, if any. The loop then stops when the episodes of all runs have
        ended; without it a vmapped loop would copy the whole cache at every step.

    Raises:
      ConfigError: ``temperature`` is not above 0, prompt + answer exceed the model's block, or ``given_BxT`` has
        another shape, or tokens after a -1.
    """
    require_possible(config, problems, sampling)
    require(batch is None or (is_integer(batch) and batch >= 1), "batch", batch, "1 or more, or None")
    params = with_stacked_layers(config, params)

    def decode(rows: tuple[Problems, Array | None]) -> Trajectory:
        return _decode(config, params, rows[0], key, sampling._replace(given_BxT=rows[1]), axis_name)

    start = (problems, sampling.given_BxT)
    count = problems.prompts_BxP.shape[0]
    group = largest_divisor(count, at_most=batch or count)
    if group == count:
        return decode(start)
    grouped = jax.tree.map(lambda x: jnp.asarray(x).reshape(count // group, group, *x.shape[1:]), start)
    trajectories = jax.lax.map(decode, grouped)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), trajectories)


def _decode(
    config: ModelConfig, params: Any, problems: Problems, key: jax.Array, sampling: Sampling, axis_name: str | None
) -> Trajectory:
    max_length, temperature, greedy, given_BxT = sampling
    num_prompt = problems.prompts_BxP.shape[1]
    total = num_prompt + max_length
    prompts_BxP = jnp.asarray(problems.prompts_BxP).astype(jnp.int32)
    batch = prompts_BxP.shape[0]
    episodes_B = jnp.asarray(problems.episodes_B)
    positions_BxL, segments_BxL = layout(problems, max_length)
    mark = jnp.asarray(alphabet.encode(tasks.RESULT_MARK)).astype(jnp.int32)

    def extend(tokens, first, count, cache) -> Output:
        window = [jax.lax.dynamic_slice_in_dim(x, first, count, axis=1) for x in (positions_BxL, segments_BxL)]
        return forward(config, params, tokens, *window, cache)

    def any_active(done_B):
        active = ~done_B.all()
        return active if axis_name is None else jax.lax.pmax(active.astype(jnp.int32), axis_name) > 0

    def decode_step(begun: int, state: _Decoding) -> _Decoding:
        step = begun + state.turn
        scaled_BxV = state.logits_BxV / temperature
        steps_Bx1 = jnp.broadcast_to(step, (batch, 1))
        noise_BxV = 0.0 if greedy else gumbel_noise(key, episodes_B, steps_Bx1, config.vocab_size)[:, 0]
        sampled_B = jnp.argmax(scaled_BxV + noise_BxV, axis=1)
        if given_BxT is not None and given_BxT.shape[1] > 0:
            given_B = jnp.asarray(given_BxT).at[:, step].get(mode="fill", fill_value=-1)
            sampled_B = jnp.where(given_B >= 0, given_B, sampled_B)
        log_probs_B = jnp.take_along_axis(jax.nn.log_softmax(scaled_BxV), sampled_B[:, None], axis=1)[:, 0]
        tokens_B = jnp.where(state.done_B, alphabet.PAD_ID, sampled_B).astype(jnp.int32)
        answers_BxT = jax.lax.dynamic_update_slice_in_dim(state.answers_BxT, tokens_B[:, None], step + len(mark), 1)
        log_probs_BxT = jax.lax.dynamic_update_slice_in_dim(
            state.log_probs_BxT, jnp.where(state.done_B, 0.0, log_probs_B)[:, None], step, axis=1
        )
        recent = jax.lax.dynamic_slice_in_dim(answers_BxT, step + 1, len(mark), axis=1)
        ended_B = (tokens_B == alphabet.PAD_ID) | (state.in_result_B & (tokens_B == alphabet.NEWLINE_ID))
        done_B = state.done_B | ended_B
        output = extend(tokens_B[:, None], num_prompt + step, 1, state.cache)
        return _Decoding(
            state.turn + 1,
            any_active(done_B),
            output.logits_BxTxV[:, 0],
            output.cache,
            answers_BxT,
            log_probs_BxT,
            done_B,
            state.in_result_B | (recent == mark[None]).all(axis=1),
        )

    # The buffer of answers starts with room for the mark, so that the last characters are a fixed-size slice.
    slots = min(total, _round_up(num_prompt + 1))
    prefill = extend(prompts_BxP, 0, num_prompt, init_cache(config, batch, slots))
    done_B = jnp.zeros(batch, bool)
    state = _Decoding(
        jnp.zeros((), jnp.int32),
        jnp.ones((), bool),
        prefill.logits_BxTxV[:, -1],
        prefill.cache,
        jnp.full((batch, len(mark) + max_length), alphabet.PAD_ID, jnp.int32),
        jnp.zeros((batch, max_length), jnp.float32),
        done_B,
        done_B,
    )
    begun = 0
    while True:  # Every loop counts from 0, so that its most turns can be read from it.
        turns = functools.partial(_continues, slots - num_prompt - begun)
        state = jax.lax.while_loop(turns, functools.partial(decode_step, begun), state)
        if slots == total:
            break
        begun, slots = slots - num_prompt, min(total, slots + CACHE_BLOCK)
        assert state.cache is not None
        state = state._replace(turn=jnp.zeros((), jnp.int32), cache=state.cache.grown(slots))

    return judged(problems, state.answers_BxT[:, len(mark) :], state.log_probs_BxT)


def _round_up(length: int) -> int:
    return -(-length // CACHE_BLOCK) * CACHE_BLOCK
