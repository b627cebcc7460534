"""What an update averages over: whole episodes, or single transitions shuffled over a round's episodes.

Transitions are the minibatches of the authors' code (paper, section 5). One is an episode whose prompt is everything
before one character and whose answer is that character. So it has the type of episodes, and their loss is its loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ckl_jax.rl.assessment import Episodes
from ckl_jax.rl.objective import Gradient, loss_gradient, term_names
from ckl_jax.rl.program import Program
from ckl_jax.rollout.trajectory import Trajectory
from ckl_jax.runtime import sharding
from ckl_jax.runtime.sharding import largest_divisor

BUCKETS = 8
ALIGNMENT = 64


class Indices(NamedTuple):
    """Where M transitions stand: rows of the episodes, steps of their answers.

    ``lengths_M`` are the characters before each transition, the prompt's included; 0 marks a filler.
    """

    rows_M: jax.Array
    steps_M: jax.Array
    lengths_M: jax.Array


def shuffled(key: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All transitions in a random order, those of the mask first.

    Returns:
      int32 [B * T], a permutation of the flat indices into ``mask_BxT``, and int32 [], how many of the mask lead it.
    """
    order = jax.random.permutation(key, mask_BxT.size)
    return order[jnp.argsort(~mask_BxT.reshape(-1)[order], stable=True)], mask_BxT.sum()


def minibatch(trajectory: Trajectory, order_BT: jax.Array, count: jax.Array, index: jax.Array, size: int) -> Indices:
    """The ``index``-th ``size`` transitions of an order and its count from ``shuffled``, from short to long prefixes.

    What lies beyond the count are fillers.
    """
    num_steps = trajectory.mask_BxT.shape[1]
    slots_M = index * size + jnp.arange(size)
    flat_M = order_BT.at[slots_M].get(mode="clip")
    rows_M, steps_M = flat_M // num_steps, flat_M % num_steps
    prompt_lengths_M = trajectory.segments_BxL[rows_M, :-num_steps].sum(axis=1)
    lengths_M = jnp.where(slots_M < count, prompt_lengths_M + steps_M, 0)
    by_length_M = jnp.argsort(lengths_M)
    return Indices(*(x[by_length_M] for x in (rows_M, steps_M, lengths_M)))


def buckets(trajectory: Trajectory, number: int = BUCKETS) -> list[int]:
    """At most ``number`` evenly spaced lengths that prefixes are padded to; the last holds the longest possible one."""
    longest = trajectory.tokens_BxL.shape[1] - 1
    spacing = -(-longest // (number * ALIGNMENT)) * ALIGNMENT
    return [*range(spacing, longest, spacing), longest]


def cut(episodes: Episodes, indices: Indices, length: int) -> Episodes:
    """M transitions as episodes with prompts of ``length`` columns, left-padded, and answers of one character.

    A prefix that is longer than ``length`` loses its start.
    """
    trajectory, rows_M, steps_M = episodes.trajectory, indices.rows_M, indices.steps_M
    num_prompt = trajectory.tokens_BxL.shape[1] - trajectory.mask_BxT.shape[1]
    columns_MxL = (num_prompt + steps_M)[:, None] - length + jnp.arange(length + 1)[None]
    safe_MxL = jnp.maximum(columns_MxL, 0)

    def characters(values_BxL):
        return jnp.where(columns_MxL >= 0, values_BxL[rows_M[:, None], safe_MxL], 0)

    def at_step(values_BxT):
        return values_BxT[rows_M, steps_M][:, None]

    transitions = Trajectory(
        tokens_BxL=characters(trajectory.tokens_BxL),
        positions_BxL=characters(trajectory.positions_BxL),
        segments_BxL=characters(trajectory.segments_BxL),
        log_probs_BxT=at_step(trajectory.log_probs_BxT),
        mask_BxT=(indices.lengths_M > 0)[:, None],
        reward_B=trajectory.reward_B[rows_M],
    )
    rest = episodes._asdict()
    del rest["trajectory"]
    return Episodes(transitions, **jax.tree.map(at_step, rest))


def of_episodes(program, hyper, episodes, key, axis_name) -> tuple[int, Callable[..., Gradient]]:
    """An epoch's number of minibatches, and the gradient of one: (params, index) -> gradient."""
    config = program.config
    order = jax.random.permutation(key, config.episodes)
    size, shares = config.minibatch_episodes, sharding.num_shares()
    even = math.gcd(size, shares)  # The shares, but for a mesh of other rows than the minibatch's.
    group = even * largest_divisor(size // even, at_most=shares // even * (config.episode_batch or size))

    def gradient(params, index):
        chosen = jax.lax.dynamic_slice_in_dim(order, index * size, size)
        if group == size:
            return of(params, chosen)
        valid = jnp.maximum(episodes.trajectory.mask_BxT[chosen].sum(), 1)

        def add(total, chosen):
            share = episodes.trajectory.mask_BxT[chosen].sum() / valid
            return _added(total, share, of(params, chosen)), None

        return jax.lax.scan(add, _zeros(program, params), chosen.reshape(-1, group))[0]

    def of(params, chosen):
        minibatch = sharding.share_rows(jax.tree.map(lambda x: x[chosen], episodes))
        return loss_gradient(program, hyper, params, minibatch)

    return config.episodes // size, gradient


def _zeros(program: Program, params: dict[str, Any]) -> Gradient:
    return jax.tree.map(jnp.zeros_like, params), dict.fromkeys(term_names(program.config), jnp.zeros(()))


def _added(total: Gradient, share: jax.Array, part: Gradient) -> Gradient:
    return jax.tree.map(lambda x, y: x + share * y, total, part)


def of_transitions(program, hyper, episodes, key, axis_name) -> tuple[jax.Array, Callable[..., Gradient]]:
    """As ``of_episodes``; a minibatch is the weighted sum of groups, each padded to its own bucket."""
    size, shares = program.config.minibatch_transitions, sharding.num_shares()
    group = largest_divisor(size // shares, at_most=program.config.transition_batch)
    lengths = buckets(episodes.trajectory)
    order, count = shuffled(key, episodes.trajectory.mask_BxT)

    def weighted_sum(whole, chosen):
        params, hyper, episodes, valid = whole

        def add(total, indices):
            longest = indices.lengths_M.max()
            # One bucket for all vmapped runs: a switch on an index of each run's own would compute every branch.
            longest = longest if axis_name is None else jax.lax.pmax(longest, axis_name)
            branches = [
                lambda indices, length=length: loss_gradient(program, hyper, params, cut(episodes, indices, length))
                for length in lengths
            ]
            part = jax.lax.switch(jnp.searchsorted(jnp.array(lengths), longest), branches, indices)
            return _added(total, (indices.lengths_M > 0).sum() / valid, part), None

        groups = jax.tree.map(lambda x: x.reshape(-1, group), chosen)
        return jax.lax.scan(add, _zeros(program, params), groups)[0]

    def gradient(params, index):
        chosen = minibatch(episodes.trajectory, order, count, index, size)
        valid = jnp.maximum((chosen.lengths_M > 0).sum(), 1)
        dealt = jax.tree.map(lambda x: x.reshape(size // shares, shares).T.reshape(size), chosen)
        return sharding.over_rows(weighted_sum, (params, hyper, episodes, valid), dealt, total=True)

    return -(-count // size), gradient
