"""Generation: policy + problems + key -> trajectory, with a KV cache, stopping when every episode has ended.

The noise of a sampled character is a function of (key, episode, position in the answer) alone, so that every correct
algorithm, batching and device layout draws the same characters.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax import alphabet, tasks
from ckl_jax import problems as problems_lib
from ckl_jax.arrays import require_integers, require_temperature
from ckl_jax.config import ModelConfig, require
from ckl_jax.errors import is_integer
from ckl_jax.model import Cache, Output, forward, init_cache
from ckl_jax.problems import Array, Problems

CACHE_BLOCK = 128


class Trajectory(NamedTuple):
    """B episodes of prompts (P columns) and answers (T columns).

    Attributes:
      tokens_BxL: int32, L = P + T: left padding, prompt, answer, ``PAD_ID`` after the end.
      positions_BxL: absolute position of each character in its episode.
      segments_BxL: 0 on the left padding, 1 from the prompt on.
      log_probs_BxT: log pi of each generated character at the sampling temperature, 0 after the end.
      mask_BxT: True on generated characters, the last newline included.
      reward_B: 1 for a right result, else 0.
    """

    tokens_BxL: jax.Array
    positions_BxL: jax.Array
    segments_BxL: jax.Array
    log_probs_BxT: jax.Array
    mask_BxT: jax.Array
    reward_B: jax.Array

    @property
    def answers_BxT(self) -> jax.Array:
        return self.tokens_BxL[:, self.tokens_BxL.shape[1] - self.mask_BxT.shape[1] :]


class _Decoding(NamedTuple):
    step: jax.Array
    active: jax.Array
    logits_BxV: jax.Array
    cache: Cache | None
    answers_BxT: jax.Array
    log_probs_BxT: jax.Array
    done_B: jax.Array
    in_result_B: jax.Array


def _continues(limit: int, state: _Decoding) -> jax.Array:
    return state.active & (state.step < limit)


def gumbel_noise(key: jax.Array, episodes_B: jax.Array, steps_BxT: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise [B, T, V] for the given positions of the answers."""

    def at(episode_key, step):
        return jax.random.gumbel(jax.random.fold_in(episode_key, step), (vocab_size,))

    def row(episode, steps_T):
        return jax.vmap(at, in_axes=(None, 0))(jax.random.fold_in(key, episode), steps_T)

    return jax.vmap(row)(episodes_B, steps_BxT)


def rollout(
    config: ModelConfig,
    params: Any,
    problems: Problems,
    key: jax.Array,
    *,
    max_length: int,
    temperature: float | jax.Array = 1.0,
    greedy: bool = False,
    given_BxT: Array | None = None,
    batch: int | None = None,
    axis_name: str | None = None,
) -> Trajectory:
    """Generates one answer per problem.

    An episode ends at the newline after the result line, at a padding token, or after ``max_length`` characters.

    Args:
      params: of ``GPT2``.
      max_length: T, the length limit of the answers.
      temperature: logits are divided by it, above 0. The log-probs are at this temperature too.
      greedy: take the likeliest character instead of sampling.
      given_BxT: characters that the answers start with instead of sampled ones, -1 from where on the policy goes on; at
        most ``max_length`` columns. They belong to the answer: log-probs, end and reward are those of the whole text.
      batch: problems decoded together, at most, in equal groups one after another; default: all. It changes the speed
        and not the characters: on CPU, a KV cache that stays in the processor's own cache is read faster.
      axis_name: name of the vmapped axis of runs, if any. The loop then stops when the episodes of all runs have
        ended; without it a vmapped loop would copy the whole cache at every step.

    Raises:
      ValueError: ``temperature`` is not above 0, prompt + answer exceed the model's block, or ``given_BxT`` has another
        shape.
    """
    require_possible(config, problems, max_length, temperature, given_BxT)
    require(batch is None or (is_integer(batch) and batch >= 1), "batch", batch, "1 or more, or None")
    decode = functools.partial(
        _decode, config, params, key, max_length=max_length, temperature=temperature, greedy=greedy, axis_name=axis_name
    )
    start = (problems, given_BxT)
    count = problems.prompts_BxP.shape[0]
    group = largest_divisor(count, at_most=batch or count)
    if group == count:
        return decode(start)
    grouped = jax.tree.map(lambda x: jnp.asarray(x).reshape(count // group, group, *x.shape[1:]), start)
    trajectories = jax.lax.map(decode, grouped)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), trajectories)


def require_possible(
    config: ModelConfig,
    problems: Problems,
    max_length: int,
    temperature: float | jax.Array,
    given_BxT: Array | None = None,
) -> None:
    """Raises ConfigError as ``rollout`` says."""
    require_temperature(temperature, note=" (greedy=True for argmax)")
    require(is_integer(max_length) and max_length >= 1, "max_length", max_length, "1 or more")
    total = problems.prompts_BxP.shape[1] + max_length
    require(total <= config.block_size, "block_size", config.block_size, f"at least prompt + answer = {total}")
    if given_BxT is not None:
        require_integers(given_BxT, "given_BxT")
        count = problems.prompts_BxP.shape[0]
        fits = given_BxT.ndim == 2 and given_BxT.shape[0] == count and given_BxT.shape[1] <= max_length
        require(fits, "given_BxT", given_BxT.shape, f"[{count}, up to {max_length}]")
        if isinstance(given_BxT, np.ndarray) and given_BxT.size:
            low, high = int(given_BxT.min()), int(given_BxT.max())
            inside = low >= -1 and high < config.vocab_size
            require(inside, "given_BxT", f"{low}..{high}", f"-1 or a token below {config.vocab_size}")


def layout(problems: Problems, max_length: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments [B, P + T] of left-padded prompts and answers, as ``Trajectory`` has them."""
    count, num_prompt = problems.prompts_BxP.shape
    total = num_prompt + max_length
    padding_B = num_prompt - jnp.asarray(problems.prompt_lengths_B)
    columns_BxL = jnp.broadcast_to(jnp.arange(total)[None], (count, total))
    positions_BxL = jnp.maximum(columns_BxL - padding_B[:, None], 0)
    return positions_BxL, (columns_BxL >= padding_B[:, None]).astype(jnp.int32)


def judged(problems: Problems, answers_BxT: jax.Array, log_probs_BxT: jax.Array) -> Trajectory:
    """The trajectory of answers with nothing but ``PAD_ID`` after their end."""
    prompts_BxP = jnp.asarray(problems.prompts_BxP).astype(jnp.int32)
    return Trajectory(
        jnp.concatenate([prompts_BxP, answers_BxT], axis=1),
        *layout(problems, answers_BxT.shape[1]),
        log_probs_BxT,
        answer_mask(answers_BxT),
        problems_lib.reward(answers_BxT, jnp.asarray(problems.results_BxR).astype(jnp.int32)),
    )


def largest_divisor(count: int, at_most: int) -> int:
    """The largest divisor of ``count`` that is not above ``at_most`` (1 or more)."""
    return next(divisor for divisor in range(min(at_most, count), 0, -1) if count % divisor == 0)


def _decode(
    config: ModelConfig,
    params: Any,
    key: jax.Array,
    start: tuple[Problems, Array | None],
    *,
    max_length: int,
    temperature: float | jax.Array,
    greedy: bool,
    axis_name: str | None,
) -> Trajectory:
    problems, given_BxT = start
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

    def decode_step(state: _Decoding) -> _Decoding:
        step = state.step
        scaled_BxV = state.logits_BxV / temperature
        steps_Bx1 = jnp.broadcast_to(step, (batch, 1))
        noise_BxV = 0.0 if greedy else gumbel_noise(key, episodes_B, steps_Bx1, config.vocab_size)[:, 0]
        sampled_B = jnp.argmax(scaled_BxV + noise_BxV, axis=1)
        if given_BxT is not None:
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
            step + 1,
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
    while True:
        state = jax.lax.while_loop(functools.partial(_continues, slots - num_prompt), decode_step, state)
        if slots == total:
            break
        slots = min(total, slots + CACHE_BLOCK)
        state = state._replace(cache=_grow(state.cache, slots))

    return judged(problems, state.answers_BxT[:, len(mark) :], state.log_probs_BxT)


def answer_mask(answers_BxT: jax.Array) -> jax.Array:
    """True up to and including the newline after the result line or the first padding token: bool [B, T]."""
    starts_B, found_B = problems_lib.result_start(answers_BxT)
    columns = jnp.arange(answers_BxT.shape[1])[None]
    in_result = found_B[:, None] & (columns >= starts_B[:, None])
    ends = (answers_BxT == alphabet.PAD_ID) | (in_result & (answers_BxT == alphabet.NEWLINE_ID))
    return jnp.cumsum(ends, axis=1) - ends == 0


def score(config: ModelConfig, params: Any, trajectory: Trajectory) -> tuple[jax.Array, jax.Array]:
    """The teacher-forced pass: logits [B, T, V] and hidden states [B, T, D] that predict each answer character."""
    inputs = (trajectory.tokens_BxL, trajectory.positions_BxL, trajectory.segments_BxL)
    output = forward(config, params, *(x[:, :-1] for x in inputs), num_outputs=trajectory.mask_BxT.shape[1])
    return output.logits_BxTxV, output.hidden_BxTxD


def _round_up(length: int) -> int:
    return -(-length // CACHE_BLOCK) * CACHE_BLOCK


def _grow(cache: Cache | None, slots: int) -> Cache:
    assert cache is not None
    extra = slots - cache.segments_BxS.shape[1]

    def grow(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))

    return Cache(
        tuple(grow(x) for x in cache.keys_BxHxSxK),
        tuple(grow(x) for x in cache.values_BxHxSxK),
        jnp.pad(cache.segments_BxS, ((0, 0), (0, extra))),
        cache.length,
    )
