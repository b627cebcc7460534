"""The loss, its update, and collect -> update as one pure round, scanned over rounds and vmapped over runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ckl_jax import losses, sharding, transitions
from ckl_jax.config import FinetuneConfig
from ckl_jax.episodes import Episodes, Task, collect, weighed
from ckl_jax.model import ValueHead, values
from ckl_jax.problems import Problems
from ckl_jax.rollout import largest_divisor, score

RUNS = "runs"
TERMS = ("policy", "value", "entropy", "kl")
Gradient = tuple[dict[str, Any], dict[str, jax.Array]]
"""The loss's gradient in the parameters, and the loss's terms."""


class Hyper(NamedTuple):
    """What may differ between runs of one program; scalars, or arrays [runs]."""

    seed: jax.Array
    learning_rate: jax.Array
    kl_coefficient: jax.Array
    beta: jax.Array
    kl_weights: jax.Array


class RunState(NamedTuple):
    """What a run carries from round to round: ``params`` has ``policy`` and ``value``; Adam's state lives on."""

    round: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState


def _optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(eps=config.adam_epsilon)


def init_run(task: Task, policy_params: Any, hyper: Hyper) -> RunState:
    """A run's state before its first round: the pre-trained policy, a fresh critic, Adam at zero."""
    key = jax.random.fold_in(jax.random.key(hyper.seed), 0)
    value_params = ValueHead().init(key, jnp.zeros((1, task.model.width)))
    params = {"policy": policy_params, "value": value_params}
    return RunState(jnp.zeros((), jnp.int32), params, _optimizer(task.config).init(params))


def loss_terms(task: Task, hyper: Hyper, params: dict[str, Any], episodes: Episodes) -> dict[str, jax.Array]:
    """The loss as its weighted terms; their sum is what is minimized (paper, section 5)."""
    config = task.config
    trajectory = episodes.trajectory
    actions_BxT, mask_BxT = trajectory.answers_BxT, trajectory.mask_BxT
    logits_BxTxV, hidden_BxTxD = score(task.model, params["policy"], trajectory)
    log_probs_BxT = losses.token_log_probs(logits_BxTxV, actions_BxT, config.temperature)
    if config.kl == "exact":
        kl_BxT = losses.exact_kl(logits_BxTxV, episodes.ref_logits_BxTxV, config.temperature)
    else:
        ref_log_probs_BxT = losses.token_log_probs(episodes.ref_logits_BxTxV, actions_BxT, config.temperature)
        kl_BxT = losses.kl_estimate(log_probs_BxT, ref_log_probs_BxT, config.kl)
    if config.detach_critic:
        hidden_BxTxD = jax.lax.stop_gradient(hidden_BxTxD)
    values_BxT = values(params["value"], hidden_BxTxD)
    entropy_BxT = losses.entropy(logits_BxTxV, config.temperature)
    return {
        "policy": losses.policy_gradient_loss(log_probs_BxT, episodes.advantages_BxT, mask_BxT),
        "value": config.value_coefficient * losses.value_loss(values_BxT, episodes.returns_BxT, mask_BxT),
        "entropy": -config.entropy_coefficient * losses.masked_mean(entropy_BxT, mask_BxT),
        "kl": hyper.kl_coefficient * losses.weighted_kl(kl_BxT, episodes.kl_weights_BxT, mask_BxT),
    }


def update(
    task: Task, hyper: Hyper, state: RunState, episodes: Episodes, key: jax.Array, axis_name: str | None = None
) -> tuple[RunState, dict[str, jax.Array]]:
    """One pass per epoch over the episodes or their single transitions in shuffled minibatches, an Adam step each.

    Args:
      axis_name: name of the vmapped axis of runs, if any.

    Returns:
      the next state, and ``loss/<term>`` as means over the updates and ``updates``, their number.
    """
    config = task.config
    optimizer = _optimizer(config)
    policy_learns = state.round >= config.value_warmup_rounds
    decay = 1.0 - state.round / config.rounds if config.learning_rate_decay else 1.0
    rates = {
        "policy": jnp.where(policy_learns, decay * hyper.learning_rate, 0.0),
        "value": jnp.asarray(config.value_learning_rate),
    }
    plan = {"episodes": _episode_minibatches, "transitions": _transition_minibatches}[config.minibatch]

    def epoch(carry, key):
        updates, gradient = plan(task, hyper, episodes, key, axis_name)

        def step(index, carry):
            params, opt_state, sums = carry
            grads, terms = gradient(params, index)
            directions, opt_state = optimizer.update(grads, opt_state, params)
            params = {
                name: jax.tree.map(lambda p, d, rate=rates[name]: p - rate * d, params[name], directions[name])
                for name in params
            }
            if config.shard_state:
                params, opt_state = sharding.split_state((params, opt_state))
            return params, opt_state, jax.tree.map(jnp.add, sums, terms)

        return jax.lax.fori_loop(0, updates, step, carry), updates

    zeros = dict.fromkeys(TERMS, jnp.zeros(()))
    keys = jax.random.split(key, config.epochs)
    (params, opt_state, sums), updates = jax.lax.scan(epoch, (state.params, state.opt_state, zeros), keys)
    updates = updates.sum()
    metrics = {f"loss/{name}": total / updates for name, total in sums.items()}
    return RunState(state.round + 1, params, opt_state), metrics | {"updates": updates}


def _gradient(task: Task, hyper: Hyper, params: dict[str, Any], episodes: Episodes) -> Gradient:
    def total_loss(params):
        terms = loss_terms(task, hyper, params, episodes)
        return sum(terms.values()), terms

    return jax.grad(total_loss, has_aux=True)(params)


def _episode_minibatches(task, hyper, episodes, key, axis_name) -> tuple[int, Callable[..., Gradient]]:
    """An epoch's number of minibatches, and the gradient of one: (params, index) -> gradient."""
    config = task.config
    order = jax.random.permutation(key, config.episodes)

    def gradient(params, index):
        chosen = jax.lax.dynamic_slice_in_dim(order, index * config.minibatch_episodes, config.minibatch_episodes)
        minibatch = sharding.share_rows(jax.tree.map(lambda x: x[chosen], episodes))
        return _gradient(task, hyper, params, minibatch)

    return config.episodes // config.minibatch_episodes, gradient


def _transition_minibatches(task, hyper, episodes, key, axis_name) -> tuple[jax.Array, Callable[..., Gradient]]:
    """As ``_episode_minibatches``; a minibatch is the weighted sum of groups, each padded to its own bucket."""
    size, shares = task.config.minibatch_transitions, sharding.num_shares()
    group = largest_divisor(size // shares, at_most=task.config.transition_batch)
    lengths = transitions.buckets(episodes.trajectory)
    order, count = transitions.shuffled(key, episodes.trajectory.mask_BxT)

    def weighted_sum(whole, chosen):
        params, hyper, episodes, valid = whole

        def add(total, indices):
            longest = indices.lengths_M.max()
            # One bucket for all vmapped runs: a switch on an index of each run's own would compute every branch.
            longest = longest if axis_name is None else jax.lax.pmax(longest, axis_name)
            branches = [
                lambda indices, length=length: _gradient(
                    task, hyper, params, transitions.cut(episodes, indices, length)
                )
                for length in lengths
            ]
            part = jax.lax.switch(jnp.searchsorted(jnp.array(lengths), longest), branches, indices)
            share = (indices.lengths_M > 0).sum() / valid
            return jax.tree.map(lambda x, y: x + share * y, total, part), None

        zeros = jax.tree.map(jnp.zeros_like, params), dict.fromkeys(TERMS, jnp.zeros(()))
        groups = jax.tree.map(lambda x: x.reshape(-1, group), chosen)
        return jax.lax.scan(add, zeros, groups)[0]

    def gradient(params, index):
        chosen = transitions.minibatch(episodes.trajectory, order, count, index, size)
        valid = jnp.maximum((chosen.lengths_M > 0).sum(), 1)
        dealt = jax.tree.map(lambda x: x.reshape(size // shares, shares).T.reshape(size), chosen)
        return sharding.over_rows(weighted_sum, (params, hyper, episodes, valid), dealt, total=True)

    return -(-count // size), gradient


def gradient_norms(task: Task, hyper: Hyper, params: dict[str, Any], episodes: Episodes) -> dict[str, jax.Array]:
    """Norm of each term's gradient in the policy's parameters, on the first ``diagnostic_episodes`` episodes."""
    few = jax.tree.map(lambda x: x[: task.config.diagnostic_episodes], episodes)

    def terms_of(policy):
        return loss_terms(task, hyper, {**params, "policy": policy}, few)

    terms, pullback = jax.vjp(terms_of, params["policy"])

    def norm(name):
        cotangent = {other: jnp.asarray(float(other == name)) for other in terms}
        return optax.global_norm(pullback(cotangent)[0])

    return {f"grad_norm/{name}": norm(name) for name in terms}


def train_round(
    task: Task, ref_params: Any, state: RunState, hyper: Hyper, problems: Problems, axis_name: str | None = None
) -> tuple[RunState, dict[str, jax.Array]]:
    """One collect-update round of one run. Its randomness is a function of (seed, round) alone."""
    key = jax.random.fold_in(jax.random.key(hyper.seed), state.round + 1)
    rollout_key, shuffle_key, weights_key = jax.random.split(key, 3)
    episodes, metrics = collect(task, state.params, ref_params, problems, rollout_key, axis_name)
    episodes = weighed(task.config, episodes, hyper.kl_weights, hyper.beta, weights_key)
    metrics["kl_weight"] = losses.masked_mean(episodes.kl_weights_BxT, episodes.trajectory.mask_BxT)
    metrics |= gradient_norms(task, hyper, state.params, episodes)
    state, terms = update(task, hyper, state, episodes, shuffle_key, axis_name)
    return state, metrics | terms


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def train_rounds(
    task: Task, mesh: Mesh, ref_params: Any, states: RunState, hypers: Hyper, problems: Problems
) -> tuple[RunState, dict[str, jax.Array]]:
    """Several rounds of all runs as one program, every device its own runs and its share of their episodes.

    Args:
      mesh: from ``finetune.make_mesh``.
      states, hypers: with a leading axis of runs R.
      problems: with leading axes [R, rounds].

    Returns:
      the states after the rounds, and metrics with leading axes [R, rounds].
    """

    def run(ref_params, axis_name, state, hyper, problems_of_run):
        def one(state, problems_of_round):
            return train_round(task, ref_params, state, hyper, problems_of_round, axis_name)

        return jax.lax.scan(one, state, problems_of_run)

    def on_device(ref_params, *of_device):
        return map_runs(task.config.runs_at_once, functools.partial(run, ref_params), *of_device)

    states, metrics = sharding.over_runs(mesh, on_device, ref_params, states, hypers, problems)
    shardings = sharding.state_shardings(mesh, states, task.config.shard_state, sharding.RUN_AXIS)
    return jax.lax.with_sharding_constraint(states, shardings), metrics


def map_runs(runs_at_once: int, run: Callable[..., Any], *arguments: Any) -> Any:
    """Applies ``run(axis_name, *of_one_run)`` to arguments with a leading axis of runs.

    The runs are vmapped in equal groups of at most ``runs_at_once``, group after group. Groups of one are not vmapped
    at all (``axis_name`` is None): on CPU a batch axis of 1 makes decoding four times slower.
    """
    num_runs = jax.tree.leaves(arguments)[0].shape[0]
    group = largest_divisor(num_runs, at_most=runs_at_once)
    if group == 1:
        return jax.lax.map(lambda of_one_run: run(None, *of_one_run), arguments)
    grouped = jax.tree.map(lambda x: x.reshape(num_runs // group, group, *x.shape[1:]), arguments)
    vmapped = jax.vmap(functools.partial(run, RUNS), axis_name=RUNS)
    results = jax.lax.map(lambda of_group: vmapped(*of_group), grouped)
    return jax.tree.map(lambda x: x.reshape(num_runs, *x.shape[2:]), results)
