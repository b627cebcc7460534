"""Speculative rollout: the task writes a draft, the policy verifies a window of it in one pass.

Every pass takes each row's draft of the next characters, computes the policy's distribution at all of them, samples
there with the positions' own noise, and accepts up to and including the first character that differs from the draft.
Since the noise of a character is a function of (key, episode, position) alone, the characters are those of
``ckl_jax.rollout.rollout``, except where rounding decides between two of them; how many were drafted right changes the
number of passes and nothing else. (Leviathan et al. 2023 accept by rejection sampling; with common noise the drafts of
a deterministic drafter need none.)

The rows are slots: as soon as an episode has ended its slot takes the next one, and the last few episodes, which tend
to be those that follow no draft, are moved to fewer slots.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ckl_jax.attention.cache import Cache
from ckl_jax.config import ModelConfig
from ckl_jax.errors import require
from ckl_jax.model import forward, init_cache, with_stacked_layers
from ckl_jax.rollout.drafts import draft
from ckl_jax.rollout.trajectory import Sampling, Trajectory, answer_mask, gumbel_noise, judged, require_possible
from ckl_jax.runtime import targets
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.problems import Problems

Drafter = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
WINDOW = 32
CPU_SLOTS = 16
LAST_SHARE = 4
TRIAL_PASSES = 16


class Verified(NamedTuple):
    """A rollout with what its passes computed anyway.

    Attributes:
      trajectory: as ``rollout`` gives it.
      logits_BxTxV, hidden_BxTxD: as ``score`` gives them where the mask is True, elsewhere finite and meaningless;
        None unless asked for.
      passes: int32 [], how many times the policy was applied to a window of every slot.
      windows: int32 [], how many windows of single rows that makes, idle slots left out.
      complete: bool [], False if it gave up: the trajectory is unfinished then.
    """

    trajectory: Trajectory
    logits_BxTxV: jax.Array | None
    hidden_BxTxD: jax.Array | None
    passes: jax.Array
    windows: jax.Array
    complete: jax.Array


class _Written(NamedTuple):
    """What has been generated, by episode; tokens have one row more for idle slots and room for a whole window."""

    tokens: jax.Array
    log_probs_BxT: jax.Array
    logits_BxTxV: jax.Array | None
    hidden_BxTxD: jax.Array | None


class _Slots(NamedTuple):
    """G slots: which episode (B: none), how many of its columns are known, and the cache.

    ``queued`` is the next episode without a slot, ``active`` how many slots have one (the most of all runs), and
    ``complete`` whether it has not given up; ``windows`` and ``accepted`` count windows and the characters they
    accepted.
    """

    queued: jax.Array
    episodes_G: jax.Array
    known_G: jax.Array
    cache: Cache
    written: _Written
    active: jax.Array
    complete: jax.Array
    passes: jax.Array
    windows: jax.Array
    accepted: jax.Array


def speculative_rollout(
    config: ModelConfig,
    params: Any,
    problems: Problems,
    key: jax.Array,
    sampling: Sampling,
    *,
    slots: int | None = None,
    window: int = WINDOW,
    with_scores: bool = False,
    drafter: Drafter | None = None,
    least_accepted: float = 0.0,
    axis_name: str | None = None,
) -> Verified:
    """Generates one answer per problem, with the arguments and errors of ``rollout`` and, beside them:

    Args:
      slots: episodes generated side by side, at most; default: all, on CPU 16 (whose caches its own cache can hold).
      window: characters verified per pass and row.
      with_scores: give the logits and hidden states too.
      drafter: writes the drafts; takes and gives what ``drafts.draft`` does after the task, and is that by default. A
        bad one costs passes, no exactness.
      least_accepted: gives up if the first ``TRIAL_PASSES`` accept fewer characters per window, on average.
    """
    require_possible(config, problems, sampling)
    max_length, temperature, greedy, given_BxT = sampling
    count, num_prompt = problems.prompts_BxP.shape
    total = num_prompt + max_length
    require(window >= 1, "window", window, "1 or more")
    require(slots is None or slots >= 1, "slots", slots, "1 or more")
    num_slots = min(slots or (CPU_SLOTS if targets.platform() == "cpu" else count), count)
    if drafter is None:
        require(problems.task.has_drafts, "drafter", None, f"one: {problems.task.name} has no drafts of its own")
    params = with_stacked_layers(config, params)
    drafts = drafter or functools.partial(draft, problems.task)
    prompts_BxP = jnp.asarray(problems.prompts_BxP).astype(jnp.int32)
    nothing_Bx0 = jnp.zeros((count, 0), jnp.int32)
    given_BxT = nothing_Bx0 if given_BxT is None else jnp.asarray(given_BxT).astype(jnp.int32)
    given_lengths_B = (given_BxT >= 0).sum(axis=1)
    padding_B = num_prompt - jnp.asarray(problems.prompt_lengths_B)
    lists_Bx2xJ = jnp.asarray(problems.lists_Bx3x2xJ)[:, 0]
    identities_B = jnp.asarray(problems.episodes_B)

    def over_runs(number, combine=jax.lax.psum):
        return number if axis_name is None else combine(number, axis_name)

    def verify(state: _Slots) -> _Slots:
        idle_G = state.episodes_G == count
        of_slot = jnp.minimum(state.episodes_G, count - 1)
        padding_G, given_G, known_G = padding_B[of_slot], given_lengths_B[of_slot], state.known_G
        tokens_GxL = state.written.tokens[state.episodes_G]
        written_G = jnp.maximum(known_G - num_prompt, given_G)
        answers_GxT = tokens_GxL[:, num_prompt:total]
        drafts_GxW = drafts(lists_Bx2xJ[of_slot], answers_GxT, written_G, window)

        # Columns of the inputs: the last known character, then the rest of what is given if any, then the draft.
        columns_GxW = known_G[:, None] - 1 + jnp.arange(window)[None]
        drafted_GxW = columns_GxW - num_prompt - written_G[:, None]
        inputs_GxW = jnp.where(
            drafted_GxW < 0,
            jnp.take_along_axis(tokens_GxL, columns_GxW, axis=1),
            jnp.take_along_axis(drafts_GxW, drafted_GxW.clip(0), axis=1),
        )
        positions_GxW = (columns_GxW - padding_G[:, None]).clip(0, config.block_size - 1)
        cache = state.cache._replace(length=known_G - 1)
        output = forward(config, params, inputs_GxW, positions_GxW, jnp.ones_like(inputs_GxW), cache)
        assert output.cache is not None

        steps_GxW = columns_GxW + 1 - num_prompt
        scaled_GxWxV = output.logits_BxTxV / temperature
        noise = 0.0 if greedy else gumbel_noise(key, identities_B[of_slot], steps_GxW.clip(0), config.vocab_size)
        given_GxW = jnp.take_along_axis(tokens_GxL, columns_GxW + 1, axis=1)
        is_given_GxW = steps_GxW < given_G[:, None]
        sampled_GxW = jnp.where(is_given_GxW, given_GxW, jnp.argmax(scaled_GxWxV + noise, axis=2)).astype(jnp.int32)
        matched = jnp.cumprod(sampled_GxW[:, :-1] == inputs_GxW[:, 1:], axis=1).sum(axis=1)
        now_known_G = jnp.minimum(known_G + 1 + matched, total)
        log_probs_GxW = jnp.take_along_axis(jax.nn.log_softmax(scaled_GxWxV), sampled_GxW[..., None], axis=2)[..., 0]

        rows_Gx1 = state.episodes_G[:, None]
        steps = jnp.where((steps_GxW >= 0) & ~idle_G[:, None], steps_GxW, max_length)

        def write(buffer, values):
            return None if buffer is None else buffer.at[rows_Gx1, steps].set(values, mode="drop")

        written = _Written(
            state.written.tokens.at[rows_Gx1, columns_GxW + 1].set(sampled_GxW),
            write(state.written.log_probs_BxT, log_probs_GxW),
            write(state.written.logits_BxTxV, output.logits_BxTxV),
            write(state.written.hidden_BxTxD, output.hidden_BxTxD),
        )
        answers_GxT = written.tokens[state.episodes_G, num_prompt:total]
        is_known_GxT = jnp.arange(max_length)[None] < (now_known_G - num_prompt)[:, None]
        lengths_G = answer_mask(jnp.where(is_known_GxT, answers_GxT, alphabet.PAD_ID)).sum(axis=1)
        ended_G = ~idle_G & (lengths_G <= now_known_G - num_prompt)

        following_G = jnp.minimum(state.queued + jnp.cumsum(ended_G) - 1, count)
        episodes_G = jnp.where(ended_G, following_G, state.episodes_G)
        first_G = padding_B[jnp.minimum(episodes_G, count - 1)] + 1
        segments = jnp.where(ended_G[:, None], 0, output.cache.segments_BxS)
        windows = state.windows + (~idle_G).sum()
        accepted = state.accepted + jnp.where(idle_G, 0, now_known_G - known_G).sum()
        hopeless = (state.passes + 1 == TRIAL_PASSES) & (over_runs(accepted) < least_accepted * over_runs(windows))
        return _Slots(
            jnp.minimum(state.queued + ended_G.sum(), count),
            episodes_G,
            jnp.where(ended_G | idle_G, first_G, now_known_G),
            output.cache._replace(segments_BxS=segments, length=known_G),
            written,
            over_runs((episodes_G < count).sum(), jax.lax.pmax),
            ~hopeless,
            state.passes + 1,
            windows,
            accepted,
        )

    width = total + window
    known_BxL = jnp.concatenate([prompts_BxP, jnp.where(given_BxT >= 0, given_BxT, alphabet.PAD_ID)], axis=1)
    tokens = jnp.pad(known_BxL, ((0, 1), (0, width - known_BxL.shape[1])), constant_values=alphabet.PAD_ID)
    zero = jnp.zeros((), jnp.int32)
    state = _Slots(
        jnp.asarray(num_slots),
        jnp.arange(num_slots),
        padding_B[:num_slots] + 1,
        init_cache(config, num_slots, width)._replace(length=jnp.zeros(num_slots, jnp.int32)),
        _Written(
            tokens,
            jnp.zeros((count, max_length), jnp.float32),
            jnp.zeros((count, max_length, config.vocab_size), jnp.float32) if with_scores else None,
            jnp.zeros((count, max_length, config.width), jnp.float32) if with_scores else None,
        ),
        jnp.asarray(num_slots),
        jnp.ones((), bool),
        zero,
        zero,
        zero,
    )
    few = num_slots // LAST_SHARE
    state = jax.lax.while_loop(functools.partial(_goes_on, few), verify, state)
    if few:
        state = jax.lax.while_loop(functools.partial(_goes_on, 0), verify, _keep_slots(state, few, count))

    written = state.written
    answers_BxT = written.tokens[:count, num_prompt:total]
    mask_BxT = answer_mask(answers_BxT)
    answers_BxT = jnp.where(mask_BxT, answers_BxT, alphabet.PAD_ID)
    trajectory = judged(problems, answers_BxT, jnp.where(mask_BxT, written.log_probs_BxT, 0.0))
    return Verified(trajectory, written.logits_BxTxV, written.hidden_BxTxD, state.passes, state.windows, state.complete)


def _goes_on(fewest: int, state: _Slots) -> jax.Array:
    return state.complete & (state.active > fewest)


def _keep_slots(state: _Slots, number: int, idle: int) -> _Slots:
    """The state with that many slots, those of the remaining episodes."""
    kept = jnp.argsort(state.episodes_G == idle)[:number]
    return state._replace(episodes_G=state.episodes_G[kept], known_G=state.known_G[kept], cache=state.cache.rows(kept))
