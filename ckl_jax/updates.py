"""The loss, its update, and collect -> update as one pure round, scanned over rounds and vmapped over runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ckl_jax import losses
from ckl_jax.config import FinetuneConfig
from ckl_jax.episodes import Episodes, Task, collect
from ckl_jax.model import ValueHead, values
from ckl_jax.problems import Problems
from ckl_jax.rollout import largest_divisor, score

RUNS = "runs"


class Hyper(NamedTuple):
    """What may differ between runs of one program; scalars, or arrays [runs]."""

    seed: jax.Array
    learning_rate: jax.Array
    kl_coefficient: jax.Array
    beta: jax.Array


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
        "kl": hyper.kl_coefficient * losses.prioritized_kl(kl_BxT, episodes.certainty_BxT, hyper.beta, mask_BxT),
    }


def update(task: Task, hyper: Hyper, state: RunState, episodes: Episodes, key: jax.Array) -> tuple[RunState, dict]:
    """One pass per epoch over the episodes in shuffled minibatches, an Adam step each."""
    config = task.config
    optimizer = _optimizer(config)
    policy_learns = state.round >= config.value_warmup_rounds
    decay = 1.0 - state.round / config.rounds if config.learning_rate_decay else 1.0
    rates = {
        "policy": jnp.where(policy_learns, decay * hyper.learning_rate, 0.0),
        "value": jnp.asarray(config.value_learning_rate),
    }

    def total_loss(params, batch):
        terms = loss_terms(task, hyper, params, batch)
        return sum(terms.values()), terms

    def step(carry, indices):
        params, opt_state = carry
        batch = jax.tree.map(lambda x: x[indices], episodes)
        grads, terms = jax.grad(total_loss, has_aux=True)(params, batch)
        directions, opt_state = optimizer.update(grads, opt_state, params)
        params = {
            name: jax.tree.map(lambda p, d, rate=rates[name]: p - rate * d, params[name], directions[name])
            for name in params
        }
        return (params, opt_state), {f"loss/{name}": value for name, value in terms.items()}

    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, config.episodes))(keys)
    minibatches = order.reshape(-1, config.minibatch_episodes)
    (params, opt_state), terms = jax.lax.scan(step, (state.params, state.opt_state), minibatches)
    return RunState(state.round + 1, params, opt_state), jax.tree.map(jnp.mean, terms)


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
    rollout_key, shuffle_key = jax.random.split(key)
    episodes, metrics = collect(task, state.params, ref_params, problems, rollout_key, axis_name)
    weights_BxT = jnp.power(episodes.certainty_BxT, hyper.beta)
    metrics["kl_weight"] = losses.masked_mean(weights_BxT, episodes.trajectory.mask_BxT)
    metrics |= gradient_norms(task, hyper, state.params, episodes)
    state, terms = update(task, hyper, state, episodes, shuffle_key)
    return state, metrics | terms


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def train_rounds(
    task: Task, ref_params: Any, states: RunState, hypers: Hyper, problems: Problems
) -> tuple[RunState, dict[str, jax.Array]]:
    """Several rounds of all runs as one program.

    Args:
      states, hypers: with a leading axis of runs R.
      problems: with leading axes [R, rounds].

    Returns:
      the states after the rounds, and metrics with leading axes [R, rounds].
    """

    def run(axis_name, state, hyper, problems_of_run):
        def one(state, problems_of_round):
            return train_round(task, ref_params, state, hyper, problems_of_round, axis_name)

        return jax.lax.scan(one, state, problems_of_run)

    return map_runs(task.config.runs_at_once, run, states, hypers, problems)


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
